"""A model in a process of its own, which obeys lines on its standard input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Worker:
    """A process that loads inputs, runs and saves outputs (see `openvino_worker`).

    Attributes:
        process: The worker.
        folder: Where arrays are handed over; no other worker's.
        loaded: The inputs that the worker has.
    """

    process: subprocess.Popen[str]
    folder: Path
    loaded: int = field(default=0)

    @classmethod
    def start(
        cls, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> Worker:
        """Start it, and wait until its model is ready."""
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=None if environment is None else {**os.environ, **environment},
        )
        found = cls(process, folder)
        found._answer()
        return found

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last hidden state."""
        self.again(inputs, 1)
        self.tell(f"save {self.folder / 'output.npy'}")
        return torch.from_numpy(np.load(self.folder / "output.npy"))

    def again(self, inputs: Mapping[str, Tensor], times: int) -> None:
        """Run several times; inputs are handed over only when they are new."""
        if self.loaded != id(inputs):
            hand_over(self.folder / "inputs.npz", inputs)
            self.tell(f"load {self.folder / 'inputs.npz'}")
            self.loaded = id(inputs)
        self.tell(f"run {times}")

    def tell(self, order: str) -> None:
        """Give an order and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "done":
            sys.exit(f"the worker {self.process.args} ended; run it by hand to see why")


def hand_over(path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Write tensors for another process."""
    held: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
    np.savez(path, **held)
