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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quantization import builder_peer
from benchmarks.quantization.allocators import ALLOCATORS, OVERHEAD, Spending, cost
from benchmarks.quantization.judge import Judge
from benchmarks.quantization.nncf_peer import Nncf
from benchmarks.quantization.weight_peers import METHODS, WeightPeer
from benchmarks.record import Result
from benchmarks.scores.cases import CASES, Case
from benchmarks.zoo.language_model import language_model
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
    parser.add_argument("--builder", action="store_true", help="of onnxruntime-genai, for lm")
    parser.add_argument("--allocators", nargs="*", default=list(ALLOCATORS))
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("lamella").setLevel(logging.WARNING)
    for name in options.case:
        judge, kept = Judge(CASES[name]()), KEPT / f"{name}.pt"
        for allocator in options.allocators:
            keep(allocator, measured(judge, allocator, options.budgets), kept)
        for tool, losses in peers(judge, options):
            keep(tool, losses, kept)
        publish(judge, torch.load(kept), options.budgets)


def peers(judge: Judge, options: argparse.Namespace) -> Iterator[tuple[str, list[Tensor | None]]]:
    """The losses of every peer that there is an interpreter for."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.peer:
            yield NNCF, nncf(judge, options.peer, folder, options.budgets)
        for tool in METHODS:
            if python := getattr(options, tool):
                runs = WeightPeer(tool, python, judge, folder).rounded()
                yield tool, best_of(judge, tool, runs, options.budgets)
        if options.builder and judge.case.name == "lm":
            runs = builder_peer.rounded(language_model(), judge, folder)
            yield builder_peer.NAME, best_of(judge, builder_peer.NAME, runs, options.budgets)


def keep(name: str, losses: list[Tensor | None], path: Path) -> None:
    """Put a row among those that are kept, so that they can be measured one by one."""
    found = torch.load(path) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**found, name: losses}, path)


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


def nncf(judge: Judge, python: str, folder: Path, budgets: Sequence[float]) -> list[Tensor | None]:
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


def best_of(
    judge: Judge, tool: str, runs: Mapping[str, tuple[int, Tensor]], budgets: Sequence[float]
) -> list[Tensor | None]:
    """The setting of a tool that loses least at every budget; None where none is small enough.

    The choice is made with the figures that are told, to the advantage of the peer.
    """
    analyses, found = analyses_of(judge.case), list[Tensor | None]()
    for bits in budgets:
        room = Spending(analyses, bits).room
        fitting = [(label, *run) for label, run in runs.items() if run[0] <= room]
        best = min(fitting, key=lambda one: judge.mean(one[2])) if fitting else None
        found.append(None if best is None else best[2])
        told = "none" if best is None else f"{best[0]}: {best[1]} bytes, {judge.mean(best[2]):.5f}"
        logger.info("%s %s %.1f: %s", judge.case.name, tool, bits, told)
    return found


def publish(judge: Judge, found: dict[str, list[Tensor | None]], budgets: Sequence[float]) -> None:
    """A row for each allocator; behind a loss, its ratio to ours with an interval."""
    ours = found.get(OURS, [None] * len(budgets))
    rows = [
        (name, *(_cell(judge, one, two) for one, two in zip(losses, ours, strict=True)))
        for name in (*ALLOCATORS, NNCF, *METHODS, builder_peer.NAME)
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
            "one width and block to all weights, the builder of onnxruntime-genai (rtn, k_quant, "
            "k_quant_last, k_quant_mixed) 8 bits to some by rule: the best setting that fits, "
            "chosen on the figures shown. Peers keep activations in float32.",
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
