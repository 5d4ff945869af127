"""Scores by gradients of sequences that run together, beside sequences that run one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScoreReport
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.target import single_sequences

Captured = Callable[[str], Graph]
Inputs = Callable[..., dict[str, Tensor]]

APART = {
    "mixtral": "sort",
    "qwen3_moe": "sort",
    "clip": "no common axis",
    "deberta-v2": "reshape",
    "t5": "permute",
    "pix2struct": "permute",
}
"""Families whose sequences run one by one -> a word of the reason."""

SCORE = Fisher((Format(3, 32),), draws=2)


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with another length of each sequence, where it has a mask of tokens."""
    mask = batch.get("attention_mask")
    if mask is None or "flattened_patches" in batch:
        return batch
    shorter = mask.clone()
    for row in range(len(mask)):
        shorter[row, mask.shape[1] - row - 1 :] = 0
    return {**batch, "attention_mask": shorter}


def together_and_apart(graph: Graph, samples: Samples) -> tuple[BitScoreReport, BitScoreReport]:
    """The score of batches, and of their sequences as batches of their own."""
    singles = Samples.of(list(single_sequences(samples)))
    one, other = (Analyses(graph, some).get(SCORE) for some in (samples, singles))
    return one, other


def projections(report: BitScoreReport) -> Tensor:
    """``[weights, draws]``."""
    assert report.interactions is not None
    held = report.interactions.projections
    return torch.stack([one for by_format in held.values() for one in by_format.values()])


def test_a_batch_gives_each_sequence_its_own_gradient(
    family: str, captured: Captured, sample_inputs: Inputs
):
    graph = captured(family)
    batches = [padded(sample_inputs(family, size, seed=seed)) for seed, size in enumerate((4, 3))]
    together, apart = together_and_apart(graph, Samples.of(batches))
    assert bool(together.remarks) == (family in APART)
    for text in together.remarks:
        assert APART[family] in text
    one, other = projections(together), projections(apart)
    assert float(one.abs().max()) > 0
    scale = other.norm(dim=1, keepdim=True)
    # Sums of products of float32 in another order, relative to all draws of a weight.
    assert float(((one - other).abs() / scale.clamp(min=1e-12)).max()) < 2e-4
    for name, losses in together.losses.items():
        for f, loss in losses.items():
            assert apart.losses[name][f] == pytest.approx(loss, rel=1e-3, abs=1e-14)
