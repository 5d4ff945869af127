"""Tools that round every weight to one width: the best of their settings within the bytes."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quantization.judge import Judge
from lamella.ir.segments import program
from lamella.passes.sites import find_sites

logger = logging.getLogger(__name__)

METHODS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("rtn", "rtn-symmetric", "hqq", "k_quant", "gptq"),
    "torchao": ("rtn", "rtn-symmetric"),
}
"""Tool -> its ways of rounding."""

WIDTHS = {"onnxruntime": (2, 4), "torchao": (2, 3, 4, 5)}
"""More bits for all weights fit into none of the budgets."""

BLOCK = 32
_ONLY_FOUR = ("gptq", "k_quant")


@dataclass(frozen=True)
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

    def rounded(self) -> dict[str, tuple[int, Tensor]]:
        """Setting -> bytes, and losses on unseen sequences; what fails is left out by name."""
        found: dict[str, tuple[int, Tensor]] = {}
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
            found[label] = self._read(out)
        return found

    def _settings(self) -> Iterator[tuple[str, int, int]]:
        for method in METHODS[self.tool]:
            for bits in WIDTHS[self.tool]:
                if method in _ONLY_FOUR and bits != 4:
                    continue
                yield method, bits, BLOCK

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
        data = np.load(out)
        weights = {name: torch.from_numpy(data[name]) for name in data.files if name != "bytes"}
        return int(data["bytes"]), self.judge.of_weights(weights)
