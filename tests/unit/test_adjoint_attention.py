"""The adjoints of attention: some heads at a time, and as their references in one piece."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.ir import adjoint_attention
from lamella.ir.adjoint_attention import attention_adjoint, attention_value_adjoint
from lamella.ir.ops import lam


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEY, VALUE = draw(5, 3, 6, 4, seed=0), draw(5, 3, 7, 4, seed=1), draw(5, 3, 7, 2, seed=2)
SEEN = draw(5, 1, 6, 7, seed=3) > 0
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "of rows": SEEN,
    "of all": SEEN[:1, :, :1] | True,
    "of heads": draw(3, 6, 7, seed=4),
    "of pairs": draw(6, 7, seed=5) > -1,
    "a row that sees nothing": torch.where(torch.arange(6)[:, None] == 2, False, SEEN),
}


def given(mask: Tensor | None, is_causal: bool = False) -> tuple[Any, ...]:
    output = torch.nn.functional.scaled_dot_product_attention(
        QUERY, KEY, VALUE, attn_mask=mask, is_causal=is_causal, scale=0.3
    )
    coefficient = draw(*output.shape, seed=9)
    return coefficient, output, QUERY, KEY, VALUE, mask, is_causal, 0.3


@pytest.fixture(params=[1, 2 * 6 * 7 * 8, 1 << 20], ids=["heads", "pairs of heads", "whole"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Scores that are held at once: of one head, of two, of everything."""
    monkeypatch.setattr(adjoint_attention, "_HELD_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("mask", MASKS)
def test_parts_are_the_whole(mask: str, held: int):
    args = given(MASKS[mask])
    want = attention_adjoint(*args)
    for got, one in zip(lam.attention_adjoint.default(*args), want, strict=True):
        # The same sums of a few products in float64.
        torch.testing.assert_close(got, one, rtol=1e-12, atol=1e-12)
        assert bool(got.isfinite().all())
    value = lam.attention_value_adjoint.default(args[0], QUERY, KEY, *args[5:])
    torch.testing.assert_close(value, want[2], rtol=1e-12, atol=1e-12)
    again = attention_value_adjoint(args[0], QUERY, KEY, *args[5:])
    torch.testing.assert_close(value, again, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "is_causal"), [("none", False), ("none", True), ("of rows", False)]
)
def test_it_is_the_backward_of_autograd(mask: str, is_causal: bool, held: int):
    args = given(MASKS[mask], is_causal)
    leaves = [one.clone().requires_grad_() for one in (QUERY, KEY, VALUE)]
    scores = leaves[0] @ leaves[1].mT * 0.3
    if is_causal:
        scores = scores.masked_fill(torch.ones(6, 7).tril() == 0, -math.inf)
    if MASKS[mask] is not None:
        scores = scores.masked_fill(~MASKS[mask], -math.inf)
    # A row that sees nothing is NaN here and zero in attention.
    output = scores.softmax(-1).nan_to_num() @ leaves[2]
    torch.testing.assert_close(output.detach(), args[1], rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(output, leaves, args[0])
    for got, one in zip(lam.attention_adjoint.default(*args), want, strict=True):
        torch.testing.assert_close(got, one.nan_to_num(), rtol=1e-11, atol=1e-12)


def test_operands_are_left_as_they_are(held: int):
    args = given(None)
    before = [one.clone() for one in args[:5]]
    lam.attention_adjoint.default(*args)
    assert all(torch.equal(now, old) for now, old in zip(args[:5], before, strict=True))


def test_layouts_are_those_that_are_promised():
    """Heads that were split off without a copy get coefficients in the same layout."""
    query, key = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (QUERY, KEY))
    args = given(None)
    found = lam.attention_adjoint.default(*args[:2], query, key, *args[4:])
    assert found[0].stride() == query.stride()
    assert found[1].stride() == key.stride()
