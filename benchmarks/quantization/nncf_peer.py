"""NNCF's mixed widths, at the most bytes that a budget allows."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quantization.allocators import Spending
from benchmarks.quantization.judge import Judge
from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.data import Batch
from lamella.passes.scores.target import loss_target

METRICS = ("MAX_ACTIVATION_VARIANCE", "HESSIAN_INPUT_ACTIVATION")
MODES = {"INT4_SYM": 4, "INT2_SYM": 2}
STEPS = 5
"""Of the bisection for the ratio of narrow weights."""


@dataclass
class Nncf:
    """A peer in an environment of its own.

    Attributes:
        python: Interpreter that has ``openvino`` and ``nncf``.
        judge: Knows the model and the sequences.
        folder: For files between the processes.
    """

    python: str
    judge: Judge
    folder: Path
    runs: dict[tuple[str, str, float], tuple[int, Tensor]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write the model and the sequences."""
        case = self.judge.case
        save_model(write_onnx(case.graph, contrib=False), self.folder)
        seen = [
            {name: value[row : row + 1] for name, value in batch.items()}
            for batch in case.seen[0]
            for row in range(len(next(iter(batch.values()))))
        ]
        for name, rows in (("seen", seen), ("unseen", case.unseen)):
            np.savez(self.folder / f"{name}.npz", **_arrays(rows))

    def best(self, spending: Spending) -> tuple[str, int, Tensor] | None:
        """The mode and metric that lose least within the bytes, judged on unseen sequences.

        The choice is made with the figures that are told, to the advantage of the peer.
        """
        found = [
            (f"{mode}, {metric}", *fitting)
            for mode in MODES
            for metric in METRICS
            if (fitting := self._fitting(spending, mode, metric)) is not None
        ]
        return min(found, key=lambda one: self.judge.mean(one[2])) if found else None

    def _fitting(self, spending: Spending, mode: str, metric: str) -> tuple[int, Tensor] | None:
        """The largest model within the bytes: as many weights at 8 bits as possible."""
        room = spending.room + self._rest(spending)
        low, high, best = 0.0, 1.0, None
        if self._run(mode, metric, 1.0)[0] > room:
            return None
        for _ in range(STEPS):
            middle = (low + high) / 2
            size, losses = self._run(mode, metric, middle)
            if size <= room:
                high, best = middle, (size, losses)
            else:
                low = middle
        return best or self._run(mode, metric, 1.0)

    def _rest(self, spending: Spending) -> int:
        """Bytes of constants that are no weights of layers."""
        graph = spending.graph
        return graph.weight_bytes() - sum(
            site.size * site.dtype.itemsize for group in spending.groups for site in group
        )

    def _run(self, mode: str, metric: str, ratio: float) -> tuple[int, Tensor]:
        key = (mode, metric, ratio)
        if key not in self.runs:
            out = self.folder / "out.npz"
            files = [self.folder / MODEL, self.folder / "seen.npz", self.folder / "unseen.npz", out]
            worker = Path(__file__).parents[1] / "nncf_worker.py"
            command = [self.python, worker, *files, mode, ratio, metric]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            self.runs[key] = self._read(out)
        return self.runs[key]

    def _read(self, out: Path) -> tuple[int, Tensor]:
        data, case = np.load(out), self.judge.case
        target = loss_target(case.graph)
        masks = [batch.get("attention_mask") for batch in case.unseen]
        rows = [
            _rows(torch.from_numpy(data[f"out/{i}"]), mask if target.mask is not None else None)
            for i, mask in enumerate(masks)
        ]
        return int(data["bytes"]), self.judge.of_outputs(rows)


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])
    return rows if mask is None else rows[mask.bool().flatten()]


def _arrays(rows: Sequence[Batch]) -> dict[str, np.ndarray]:
    return {
        f"{name}/{index}": value.numpy()
        for index, batch in enumerate(rows)
        for name, value in batch.items()
    }
