"""Tools that round every weight to one width: the best of their settings within the bytes."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quantization.allocators import Spending
from benchmarks.quantization.judge import Judge
from benchmarks.scores.cases import outputs
from lamella.ir.segments import program
from lamella.passes.sites import find_sites

logger = logging.getLogger(__name__)

METHODS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("rtn", "rtn-symmetric", "hqq", "k_quant", "gptq"),
    "torchao": ("rtn", "rtn-symmetric"),
}
"""Tool -> its ways of rounding."""

WIDTHS = {"onnxruntime": (2, 4, 8), "torchao": (2, 3, 4, 5, 6, 8)}
BLOCKS = (32, 128)
_ONLY_FOUR = ("gptq", "k_quant")
_NARROW = ("hqq",)


@dataclass
class WeightPeer:
    """A tool in an environment of its own.

    Attributes:
        tool: One of `METHODS`.
        python: Interpreter that has it.
        judge: Knows the model and the sequences.
        folder: For files between the processes.
    """

    tool: str
    python: str
    judge: Judge
    folder: Path
    runs: dict[str, tuple[int, Tensor]] = field(default_factory=dict)

    def run(self) -> None:
        """Round the model in every setting, and judge it; what fails is left out by name."""
        weights, inputs = self.folder / "weights.npz", self.folder / "inputs.npz"
        graph = self.judge.case.graph
        np.savez(weights, **{s.weight: graph.weight(s.node).numpy() for s in find_sites(graph)})
        if self.tool == "onnxruntime":
            np.savez(inputs, **self._inputs())
        for method, bits, block in self._settings():
            out = self.folder / "out.npz"
            worker = Path(__file__).parents[1] / "weights_worker.py"
            command = [self.python, worker, weights, out, self.tool, method, bits, block]
            more = [inputs] if method == "gptq" else []
            words = list(map(str, [*command, *more]))
            done = subprocess.run(words, capture_output=True, check=False)
            label = f"{method} {bits}/{block}"
            if done.returncode:
                reason = done.stderr.decode().splitlines()[-1]
                logger.info("%s %s failed: %s", self.tool, label, reason)
                continue
            self.runs[label] = self._read(out)

    def best(self, spending: Spending) -> tuple[str, int, Tensor] | None:
        """The setting that loses least within the bytes, judged on unseen sequences.

        The choice is made with the figures that are told, to the advantage of the peer.
        """
        fitting = [(k, *run) for k, run in self.runs.items() if run[0] <= spending.room]
        return min(fitting, key=lambda one: self.judge.mean(one[2])) if fitting else None

    def _settings(self) -> Iterator[tuple[str, int, int]]:
        for method in METHODS[self.tool]:
            for bits in WIDTHS[self.tool]:
                if (method in _ONLY_FOUR and bits != 4) or (method in _NARROW and bits > 4):
                    continue
                yield from ((method, bits, block) for block in BLOCKS)

    def _inputs(self) -> dict[str, np.ndarray]:
        """What linear layers read of the seen sequences, ``[tokens, in]``."""
        graph, batches = self.judge.case.graph, self.judge.case.seen[0].batches
        readers = {site.weight: site.linears[0] for site in find_sites(graph) if site.linears}
        running = program(graph, [layer.args[0] for layer in readers.values()])
        states = [running.start(batch) for batch in batches]
        for _ in running.sweep(states):
            pass
        return {
            name: np.concatenate(
                [values[layer.args[0]].flatten(0, -2).numpy() for values in states]
            )
            for name, layer in readers.items()
        }

    def _read(self, out: Path) -> tuple[int, Tensor]:
        data, edited = np.load(out), self.judge.case.graph.copy()
        for site in find_sites(edited):
            edited.set_weight(site.node, torch.from_numpy(data[site.weight]))
        return int(data["bytes"]), self.judge.of_outputs(outputs(edited, self.judge.case.unseen))
