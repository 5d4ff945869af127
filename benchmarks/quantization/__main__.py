"""``python -m benchmarks.quantization``: the loss of bit plans at equal bytes, on unseen data.

``--case vit minilm lm`` picks models, ``--allocators`` what is measured again, ``--peer PYTHON``
is an interpreter with ``openvino`` and ``nncf``; ``--onnxruntime`` and ``--torchao`` likewise.
Every plan is rounded to nearest with searched scales and runs with the numerics of the kernels;
peers round their own way, with activations in float32.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quantization.allocators import ALLOCATORS, OVERHEAD, Spending, cost
from benchmarks.quantization.judge import Judge
from benchmarks.quantization.nncf_peer import Nncf
from benchmarks.quantization.weight_peers import METHODS, WeightPeer
from benchmarks.record import Result
from benchmarks.scores.cases import CASES, Case
from lamella.passes.base import Analyses

BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)
OURS, NNCF = "fisher", "NNCF"
KEPT = Path(".cache/quantization")

logger = logging.getLogger(__name__)


def main() -> None:
    """Allocate, quantize, measure, publish; a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with openvino and nncf")
    for tool in METHODS:
        parser.add_argument(f"--{tool}", metavar="PYTHON", help=f"interpreter with {tool}")
    parser.add_argument("--allocators", nargs="*", default=list(ALLOCATORS))
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("lamella").setLevel(logging.WARNING)
    for name in options.case:
        judge, kept = Judge(CASES[name]()), KEPT / f"{name}.pt"
        found = torch.load(kept) if kept.is_file() else {}
        for allocator in options.allocators:
            found[allocator] = measured(judge, allocator, options.budgets)
            save(found, kept)
        if options.peer:
            with tempfile.TemporaryDirectory() as folder:
                found[NNCF] = beside(judge, options.peer, Path(folder), options.budgets)
            save(found, kept)
        for tool in METHODS:
            python = getattr(options, tool)
            if python:
                with tempfile.TemporaryDirectory() as folder:
                    found[tool] = rounded_by(
                        WeightPeer(tool, python, judge, Path(folder)), options.budgets
                    )
                save(found, kept)
        publish(judge, found, options.budgets)


def save(found: dict[str, list[Tensor | None]], path: Path) -> None:
    """Keep what was measured, so that allocators can be measured one by one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)


def measured(judge: Judge, allocator: str, budgets: Sequence[float]) -> list[Tensor | None]:
    """The losses of each sequence at every budget."""
    found: list[Tensor | None] = []
    analyses = analyses_of(judge.case)
    for bits in budgets:
        spending = Spending(analyses, bits)
        plan = ALLOCATORS[allocator](spending)
        size = cost(spending.groups, plan)
        losses = judge.losses(plan) if size <= spending.room else None
        found.append(losses)
        told = judge.mean(losses) if losses is not None else float("nan")
        logger.info("%s %s %.1f: %d bytes, %.5f", judge.case.name, allocator, bits, size, told)
    return found


def analyses_of(case: Case) -> Analyses:
    """Of the model on its first set of samples."""
    return Analyses(case.graph.copy(), case.seen[0])


def beside(
    judge: Judge, python: str, folder: Path, budgets: Sequence[float]
) -> list[Tensor | None]:
    """The best of NNCF at every budget, or None where nothing of it is small enough."""
    peer = Nncf(python, judge, folder)
    peer.prepare()
    found: list[Tensor | None] = []
    analyses = analyses_of(judge.case)
    for bits in budgets:
        best = peer.best(Spending(analyses, bits))
        found.append(None if best is None else best[2])
        told = "none" if best is None else f"{best[0]}: {best[1]} bytes, {judge.mean(best[2]):.5f}"
        logger.info("%s NNCF %.1f: %s", judge.case.name, bits, told)
    return found


def rounded_by(peer: WeightPeer, budgets: Sequence[float]) -> list[Tensor | None]:
    """The best setting of a tool at every budget, or None where none is small enough."""
    peer.run()
    found = [peer.best(Spending(analyses_of(peer.judge.case), bits)) for bits in budgets]
    for bits, best in zip(budgets, found, strict=True):
        told = (
            "none"
            if best is None
            else f"{best[0]}: {best[1]} bytes, {peer.judge.mean(best[2]):.5f}"
        )
        logger.info("%s %s %.1f: %s", peer.judge.case.name, peer.tool, bits, told)
    return [None if best is None else best[2] for best in found]


def publish(judge: Judge, found: dict[str, list[Tensor | None]], budgets: Sequence[float]) -> None:
    """A row for each allocator; behind a loss, its ratio to ours with an interval."""
    ours = found.get(OURS, [None] * len(budgets))
    rows = [
        (name, *(_cell(judge, one, two) for one, two in zip(losses, ours, strict=True)))
        for name in (*ALLOCATORS, NNCF, *METHODS)
        if (losses := found.get(name)) is not None
    ]
    Result(
        name=f"quantization_{judge.case.name}",
        title=(
            f"Loss of {judge.case.name} at equal bytes on {len(judge.tokens)} unseen sequences, "
            f"in brackets its ratio to that of {OURS} (95 % bootstrap interval)"
        ),
        columns=("allocator", *(f"{bits:g} bits" for bits in budgets)),
        rows=rows,
        notes=(
            f"Bits per weight without scales, which add {OVERHEAD} in blocks of 32; a plan of "
            "another block spends the same bytes in all. Every weight takes part, embedding and "
            "head too.",
            "Uniform is the widest format of a kernel that fits. NNCF: the best of two modes and "
            "two criteria, chosen on the figures shown, at the most bytes that fit. onnxruntime "
            "(MatMulNBits quantizer: rtn, hqq, k_quant, gptq) and torchao (groupwise rtn) give "
            "one width and block to all weights: the best setting that fits, chosen on the figures "
            "shown. Peers keep activations in float32.",
        ),
    ).publish()


def _cell(judge: Judge, losses: Tensor | None, ours: Tensor | None) -> str:
    if losses is None:
        return "too large"
    mean = f"{judge.mean(losses):.4g}"
    if ours is None or losses is ours:
        return mean
    low, high = judge.difference(losses, ours)
    return f"{mean} ({low:.2f}-{high:.2f}x)"


if __name__ == "__main__":
    main()
