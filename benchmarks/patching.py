"""Activation patching against its estimates from one sweep, on the trained language model.

    python -m benchmarks.patching [--pairs 16] [--record]

Two tasks are made of files that the model has not seen. Induction: a piece of a file, and its
beginning again; the next token is the one that came then. Brackets: a piece of a file up to a
closing bracket, which depends on what was opened. One token is exchanged (the one to repeat, the
opening bracket), and the metric is the difference of the logits of the two answers. Measured
effects are kept on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoTokenizer

import lamella
from benchmarks.record import Result
from benchmarks.zoo.cache import ROOT
from benchmarks.zoo.language_model import language_model, windows
from lamella import faithfulness
from lamella.faithfulness import PatchEffects, PatchSite
from lamella.ir.graph import Graph
from lamella.ir.segments import program

logger = logging.getLogger(__name__)

KINDS = ("block", "attention", "mlp", "heads")
PRESETS = ("relp", "gradient", "attnlrp", "cp")
PIECE, REPEATED = 16, 10
"""Tokens of a piece of a file, and how many of them come again."""

BRACKETS = 20
"""Tokens before a closing bracket."""

STRIDE = 2
"""One in so many blocks is patched: measured effects are what takes the time."""

PERMUTATIONS = 200


@dataclass(frozen=True)
class Task:
    """Pairs of rows that differ in one token.

    Attributes:
        name: For people.
        clean: ``[pairs, tokens]``.
        corrupt: As `clean`.
        answers: The tokens that follow the clean and the corrupted row, ``[pairs, 2]``.
        found: How many pairs there were before those were left out that the model gets wrong.
    """

    name: str
    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    found: int

    def metric(self, logits: Tensor) -> Tensor:
        """The logit of the clean answer minus that of the other, after the last token."""
        last = logits[:, -1]
        return (last.gather(1, self.answers[:, :1]) - last.gather(1, self.answers[:, 1:]))[:, 0]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = windows(tokenizer, "test", 256, 400)
    graph = lamella.capture(folder, _given(rows[:2]))
    tasks = [
        solved(graph, task, options.pairs)
        for task in (induction(rows), brackets(rows, tokenizer.get_vocab()))
    ]
    for task in tasks:
        logger.info("%s: %d pairs of %d", task.name, len(task.clean), task.found)
    table = [row for task in tasks for row in rows_of(graph, task)]
    result = Result(
        "patching",
        "Pearson correlation of measured effects of single activations (activation patching) "
        "with estimates from one sweep, mean over pairs first, [95 % interval over pairs]",
        ("task", "patched", "units", *_METHODS),
        table,
        (
            *(f"{task.name}: {len(task.clean)} pairs of {task.found} tried" for task in tasks),
            f"One in {STRIDE} blocks. Only pairs where the model prefers the right answer in both "
            "rows. Blocks, attention and mlp: each token apart; heads: all tokens at once. Units "
            "without any effect are left out.",
            f"Chance: the 97.5 % point of {PERMUTATIONS} random assignments of the estimates of "
            "relp to units. Size: the norm of the change of the activation.",
        ),
    )
    result.publish() if options.record else result.show()


_METHODS = ("relp", "gradient", "attnlrp", "cp", "size of the change", "chance")


def rows_of(graph: Graph, task: Task) -> Iterator[tuple[object, ...]]:
    """A row for each kind of site."""
    given = _given(task.clean), _given(task.corrupt)
    for kind in KINDS:
        cut = "whole" if kind == "heads" else "position"
        sites = faithfulness.patch_sites(graph, (kind,), cut=cut)[::STRIDE]
        measured = _measured(graph, task, sites)
        estimates = {
            preset: faithfulness.relevance_patching(
                graph, *given, sites, task.metric, preset=preset
            )
            for preset in PRESETS
        }
        estimates["size of the change"] = _sizes(graph, task, sites, measured)
        found = [
            str(faithfulness.patching_agreement(measured, estimates[name], kind))
            for name in _METHODS[:-1]
        ]
        chance = _chance(measured.of(kind).mean(0), estimates["relp"].of(kind).mean(0))
        units = int((measured.of(kind) != 0).any(0).sum())
        logger.info("%s, %s: %s, chance %.3f", task.name, kind, found, chance)
        yield (task.name, kind, units, *found, chance)


def _measured(graph: Graph, task: Task, sites: Sequence[PatchSite]) -> PatchEffects:
    """`activation_patching`, or what it found before; every site is kept as soon as known."""
    values: dict[PatchSite, Tensor] = {}
    for site in sites:
        sha = hashlib.sha256(task.clean.numpy().tobytes() + task.corrupt.numpy().tobytes())
        sha.update(repr([site, task.answers.tolist(), language_model().name]).encode())
        path = ROOT.parent / "patching" / f"{sha.hexdigest()[:16]}.pt"
        if not path.exists():
            pair = _given(task.clean), _given(task.corrupt)
            found = faithfulness.activation_patching(graph, *pair, [site], task.metric)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found.values[site], path.with_suffix(".aside"))
            path.with_suffix(".aside").replace(path)
        values[site] = torch.load(path, weights_only=True)
    ends = (_metric(graph, task, rows).double() for rows in (task.clean, task.corrupt))
    return PatchEffects(values, *ends)


def _sizes(
    graph: Graph, task: Task, sites: Sequence[PatchSite], measured: PatchEffects
) -> PatchEffects:
    """How far each activation moves: what a method that knows nothing else would say."""
    values = [_values(graph, rows, sites) for rows in (task.clean, task.corrupt)]
    sizes: dict[PatchSite, Tensor] = {}
    for site in sites:
        change = (values[0][site.node] - values[1][site.node]).double()
        rest = [axis for axis in range(1, change.ndim) if axis not in site.units]
        sizes[site] = change.square().sum(rest).sqrt()
    return PatchEffects(sizes, measured.clean, measured.corrupt)


def _values(graph: Graph, rows: Tensor, sites: Sequence[PatchSite]) -> Mapping[str, Tensor]:
    names = {site.node for site in sites}
    running = program(graph, [node for node in graph.nodes if node.name in names])
    values = running.start(_given(rows))
    for _ in running.sweep([values]):
        pass
    return {node.name: values[node] for node in running.wanted}


def _chance(measured: Tensor, estimated: Tensor) -> float:
    """What a random assignment of estimates to units reaches in one of 40 cases."""
    shown = (measured != 0) | (estimated != 0)
    one, other = measured[shown], estimated[shown]
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack(
        [torch.randperm(len(other), generator=generator) for _ in range(PERMUTATIONS)]
    )
    found = faithfulness.pearson(one.expand(PERMUTATIONS, -1), other[orders])
    return float(torch.quantile(found, 0.975))


# ---- tasks --------------------------------------------------------------------------------


def induction(rows: Tensor) -> Task:
    """``<s> A x B A``, to be followed by x; the other row has another token at x."""
    pieces = rows[:, : PIECE + 1].clone()
    pieces[:, 0] = 1
    # Of windows of different files; what stands at the same place of another one.
    others = pieces.roll(1, 0)[:, REPEATED + 1]
    answer = pieces[:, REPEATED + 1]
    alone = (pieces == answer[:, None]).sum(1).eq(1) & (pieces == others[:, None]).sum(1).eq(0)
    pieces, others, answer = pieces[alone], others[alone], answer[alone]
    clean = torch.cat([pieces, pieces[:, 1 : REPEATED + 1]], 1)
    corrupt = clean.clone()
    corrupt[:, REPEATED + 1] = others
    return Task("induction", clean, corrupt, torch.stack([answer, others], 1), len(clean))


def brackets(rows: Tensor, vocabulary: Mapping[str, int]) -> Task:
    """What closes ``(`` and ``[``; the other row opens with the other one."""
    opening = [vocabulary["("], vocabulary["["]]
    closing = [vocabulary[")"], vocabulary["]"]]
    clean: list[Tensor] = []
    corrupt: list[Tensor] = []
    answers: list[list[int]] = []
    for row in rows:
        for end, opened in _closed(row.tolist(), opening, closing):
            piece = row[end - BRACKETS : end]
            other = piece.clone()
            kind = opening.index(int(row[opened]))
            other[opened - (end - BRACKETS)] = opening[1 - kind]
            clean.append(piece)
            corrupt.append(other)
            answers.append([closing[kind], closing[1 - kind]])
    return Task(
        "brackets", torch.stack(clean), torch.stack(corrupt), torch.tensor(answers), len(clean)
    )


def _closed(
    row: Sequence[int], opening: Sequence[int], closing: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Places of a closing bracket and of what it closes, at most a piece before; one per row."""
    for end in range(BRACKETS, len(row)):
        if row[end] not in closing:
            continue
        for opened in range(end - 2, end - BRACKETS, -1):
            if row[opened] in closing:
                break
            if row[opened] in opening:
                if opening.index(row[opened]) == closing.index(row[end]):
                    yield end, opened
                    return
                break


def solved(graph: Graph, task: Task, pairs: int) -> Task:
    """The first pairs that the model gets right, both rows of them."""
    right = (_metric(graph, task, task.clean) > 0) & (_metric(graph, task, task.corrupt) < 0)
    kept = right.nonzero()[:pairs, 0]
    tried = int(kept[-1]) + 1 if len(kept) == pairs else task.found
    return Task(task.name, task.clean[kept], task.corrupt[kept], task.answers[kept], tried)


def _metric(graph: Graph, task: Task, rows: Tensor) -> Tensor:
    return task.metric(graph(**_given(rows))[graph.signature.outputs[0]])


def _given(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


if __name__ == "__main__":
    main()
