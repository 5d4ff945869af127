"""A chain that is killed and goes on; a program of its own, because the killed process dies.

``python -m tests.unit.killed_chain FOLDER COUNT WIDTH BLOCKS`` prints the digest of an
uninterrupted run, and for each of COUNT kills the digest of the run that went on after it.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
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


def main() -> None:
    folder, count, width, blocks = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    graph, samples = graph_of(width, blocks)
    started = time.monotonic()
    print("whole", run(graph, samples, folder / "whole"), flush=True)
    lasted = time.monotonic() - started
    generator = random.Random(0)
    killed = 0
    while killed < count:
        place = folder / str(killed)
        child = os.fork()
        if child == 0:
            run(graph, samples, place)
            os._exit(0)
        time.sleep(generator.random() * lasted)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            # It ended before, since later runs are faster than the one that was timed.
            lasted *= 0.8
            shutil.rmtree(place)
            continue
        killed += 1
        found = len(list(place.glob("block-*.safetensors")))
        print(found, os.WIFSIGNALED(status), run(graph, samples, place), flush=True)


if __name__ == "__main__":
    main()
