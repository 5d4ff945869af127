"""Peers import torchvision, whose own operators may be built for another PyTorch than is here.

Only the Python of its models is used. It loads once the operators that it registers something for
are declared.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_DECLARED: list[torch.library.Library] = []


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        importlib.import_module("torchvision")


if importlib.util.find_spec("torchvision") is not None:
    _import_torchvision()
