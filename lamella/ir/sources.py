"""From whatever a user calls a model to a graph that is not canonical yet.

A module, an exported program, a Hugging Face folder or hub id, a ``.pt2`` or an ``.onnx`` file:
each has a reader of its own; here the right one is found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn
from torch.export import ExportedProgram

from lamella.errors import CaptureError, ModelFileError
from lamella.ir.capture import capture_module, capture_program
from lamella.ir.graph import Graph
from lamella.ir.huggingface import capture_pretrained, is_pretrained, load_pretrained
from lamella.ir.onnx import read_onnx
from lamella.ir.pt2_file import read_program

Model = nn.Module | ExportedProgram | Graph | str | os.PathLike[str]
"""What can be captured."""

Inputs = Mapping[str, Any] | Sequence[Any]
"""Sample inputs: keywords, or arguments by position."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A model that was read.

    Attributes:
        graph: Its graph, not canonical yet.
        tokenizer: Turns texts into inputs; None for a model that has none.
    """

    graph: Graph
    tokenizer: Callable[..., Any] | None = None


def read_model(model: Model, inputs: Inputs | None = None, *, dynamic: bool = True) -> Source:
    """Find the reader for `model` and read it.

    Args:
        model: A module, a Hugging Face model, folder or hub id, an exported program or its
            ``.pt2`` file, an ``.onnx`` file, or a graph.
        inputs: Sample inputs; only a module that is not from Hugging Face needs them.
        dynamic: Let batch and sequence vary.

    Raises:
        CaptureError: The model can't be traced, or inputs are missing.
        ModelFileError: There is no such file, or it is corrupt.
    """
    if isinstance(model, Graph):
        return Source(model)
    if isinstance(model, ExportedProgram):
        return Source(capture_program(model))
    if isinstance(model, nn.Module):
        return Source(_from_module(model, inputs, dynamic))
    if isinstance(cast(object, model), str | os.PathLike):
        return _from_path(_located(model), inputs, dynamic)
    raise CaptureError(
        f"a {type(model).__name__} is no model: give an nn.Module, a folder or hub id of Hugging "
        f"Face, an ExportedProgram, or a .pt2 or .onnx file"
    )


def _from_module(model: nn.Module, inputs: Inputs | None, dynamic: bool) -> Graph:
    if is_pretrained(model):
        return capture_pretrained(model, inputs, dynamic=dynamic)
    if inputs is None:
        raise CaptureError(
            f"{type(model).__name__} needs sample inputs: give a dict of keyword arguments, or a "
            f"tuple, with batch and sequence larger than 1"
        )
    return capture_module(model, inputs, dynamic=dynamic)


def _from_path(path: Path, inputs: Inputs | None, dynamic: bool) -> Source:
    if path.is_dir():
        _check_folder(path)
        model, tokenizer = load_pretrained(path)
        return Source(capture_pretrained(model, inputs, dynamic=dynamic), tokenizer)
    if path.suffix == ".onnx":
        return Source(read_onnx(path, inputs, dynamic=dynamic))
    if path.suffix == ".pt2":
        return Source(capture_program(read_program(path)))
    if path.suffix in _PICKLES:
        raise ModelFileError(
            f"{str(path)!r} is a pickle, which can run code when it is read; save the model with "
            f"save_pretrained (safetensors) or torch.export.save (.pt2)"
        )
    raise ModelFileError(
        f"{str(path)!r} is no model: give a folder with config.json and safetensors, or a .pt2 "
        f"or .onnx file"
    )


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "manifest.json").is_file():
        raise ModelFileError(
            f"{str(folder)!r} was compiled already; lamella.load reads it, and the model it was "
            f"compiled from can be captured again"
        )
    raise ModelFileError(f"{str(folder)!r} is no model folder: it has no config.json")


def _located(model: str | os.PathLike[str]) -> Path:
    """A path on this machine; a hub id is downloaded, because the user named it."""
    path = Path(model)
    if path.exists() or not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        if not path.exists():
            raise ModelFileError(f"there is no file or folder {str(path)!r}")
        return path
    try:
        return Path(snapshot_download(model, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelFileError(
            f"there is no folder {model!r}, and it can't be downloaded from the Hugging Face hub "
            f"({type(error).__name__}); check the spelling and the network"
        ) from error
