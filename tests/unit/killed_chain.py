"""A chain that is killed and goes on; a program of its own, because the killed process dies.

``python -m tests.unit.killed_chain [--kills 30] [--folder FOLDER] [--width 64] [--blocks 12]``
prints the digest of an uninterrupted run; for each of so many processes that were really killed,
each at a random time, how many blocks were on disk and the digest of the run that went on; and
at the end how often each place was met. It fails if a digest differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lamella
from lamella.ir.graph import Graph


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def graph_of(width: int, blocks: int) -> tuple[Graph, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(blocks))).eval()
    samples = [{"input": torch.randn(4, 2 * width, width)} for _ in range(2)]
    return lamella.capture(model, samples[0]), samples


def run(graph: Graph, samples: list[dict[str, Tensor]], folder: Path) -> str:
    """Quantize a copy, and give the digest of all weights."""
    graph = graph.copy()
    options = f"bits=3 min_size=0 method=quantease resume={folder}"
    lamella.transform(graph, [f"quantize-weights {options}"], samples=samples)
    sha = hashlib.sha256()
    for node in graph.weight_nodes():
        sha.update(str(node.target).encode())
        sha.update(graph.weight(node).contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


@dataclass(frozen=True)
class Kill:
    """A process that SIGKILL ended.

    Attributes:
        finished: Blocks on disk at that moment.
        half: Whether a file was only half written.
        digest: Of the run that went on.
    """

    finished: int
    half: bool
    digest: str


def kills(
    graph: Graph, samples: list[dict[str, Tensor]], folder: Path, lasted: float
) -> Iterator[Kill]:
    """Kill one process after the other, each at a random time of its run, and go on."""
    generator = random.Random(0)
    for number in range(1 << 20):
        place = folder / str(number)
        child = os.fork()
        if child == 0:
            run(graph, samples, place)
            os._exit(0)
        time.sleep(generator.random() * lasted)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            finished = len(list(place.glob("block-*.safetensors")))
            half = any(place.glob("*.part"))
            yield Kill(finished, half, run(graph, samples, place))
        else:
            # It ended before, since later runs are faster than the one that was timed.
            lasted *= 0.9
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="for the files; removed at the end by default")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        return _kill(options.folder or Path(made), options.kills, options.width, options.blocks)


def _kill(folder: Path, count: int, width: int, blocks: int) -> int:
    graph, samples = graph_of(width, blocks)
    started = time.monotonic()
    whole = run(graph, samples, folder / "whole")
    print(f"uninterrupted: {whole}", flush=True)
    places: Counter[int] = Counter()
    differ, half = 0, 0
    found = kills(graph, samples, folder, time.monotonic() - started)
    for number, kill in zip(range(1, count + 1), found, strict=False):
        places[kill.finished] += 1
        half += kill.half
        differ += kill.digest != whole
        print(f"kill {number}: {kill.finished} of {blocks} blocks, {kill.digest}", flush=True)
    met = ", ".join(f"{place}: {times}" for place, times in sorted(places.items()))
    print(f"kills by finished blocks: {met}; {half} in the middle of a file")
    print(f"{places.total()} processes killed, {places.total() - differ} with the same sha256")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
