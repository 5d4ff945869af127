"""Every family is captured: the graph computes what the model does, at every size."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ir.torch_private import tree_leaves
from lamella.ir.verify import verify
from tests.conftest import family_of


def relative_error(got: object, expected: object) -> float:
    """The largest absolute error of any output tensor, in units of that tensor's largest value."""
    pairs = zip(_tensors(got), _tensors(expected), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def test_the_captured_graph_is_sound(family, raw) -> None:
    verify(raw(family), canonical=False, shapes=False)


def test_the_canonical_graph_is_sound(family, captured) -> None:
    verify(captured(family))


def test_the_canonical_graph_equals_the_model_at_every_size(family, captured, model) -> None:
    known, graph, eager = family_of(family), captured(family), model(family)
    for batch, sequence in known.sizes():
        inputs = known.inputs(batch, sequence, seed=batch)
        with torch.no_grad():
            expected = eager(**inputs)
        got = graph(**inputs)
        assert type(got) is type(expected)
        # Raised operators add up in another order than the idioms: rounding of float32.
        assert relative_error(got, expected) <= 1e-5, (batch, sequence)
