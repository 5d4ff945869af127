"""An encoder in PyTorch, as a process that another one drives.

``python -m benchmarks.torch_worker FOLDER`` runs what Lamella saved there.
``python -m benchmarks.torch_worker MODEL DTYPE PACKAGE`` runs what AOTInductor makes of a model of
transformers; it is compiled if the file PACKAGE is not there, which takes a minute, with its
weights frozen if ``TORCHINDUCTOR_FREEZING=1`` is set. Orders are those of `openvino_worker`.

The threads of PyTorch keep to their cores only if ``OMP_PROC_BIND=true`` is set before it starts.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

import lamella
from lamella.backends.torch.inductor import compile_package, load_package

Run = Callable[..., Tensor]


def main() -> None:
    """Load or compile, then obey."""
    with contextlib.redirect_stdout(sys.stderr):
        run = saved(*sys.argv[1:]) if len(sys.argv) == 2 else compiled(*sys.argv[1:])
    inputs: dict[str, Tensor] = {}
    output = torch.zeros(0)
    print("done", flush=True)
    for line in sys.stdin:
        order, _, name = line.strip().partition(" ")
        if order == "load":
            inputs = {key: torch.from_numpy(value) for key, value in np.load(name).items()}
        elif order == "run":
            with torch.inference_mode():
                for _ in range(int(name)):
                    output = run(**inputs)
        elif order == "save":
            np.save(name, output.float().numpy())
        print("done", flush=True)


def saved(folder: str) -> Run:
    """What Lamella saved."""
    model = lamella.load(folder)
    return lambda **inputs: model(**inputs).last_hidden_state


class LastHidden(nn.Module):
    """A model that gives one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden state."""
        return self.model(input_ids, attention_mask).last_hidden_state


def compiled(path: str, dtype: str, package: str) -> Run:
    """What AOTInductor makes of a model."""
    if not Path(package).exists():
        model = AutoModel.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        ids = torch.ones(2, 16, dtype=torch.int64)
        axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        with torch.no_grad():
            program = torch.export.export(
                LastHidden(model), (ids, ids.clone()), dynamic_shapes=(axes, axes), strict=False
            )
            compile_package(program, Path(package), with_weights=True)
    runner = load_package(Path(package))
    return lambda **inputs: runner(inputs["input_ids"], inputs["attention_mask"])


if __name__ == "__main__":
    main()
