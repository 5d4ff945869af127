"""Loss: against literal definitions, on masked positions, at the edges of floating point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.errors import NumericError
from lamella.passes.loss import (
    Comparison,
    LossMeter,
    comparisons,
    cosine_distance,
    deviation,
    kl_divergence,
)
from tests.unit.planted import network

values = st.floats(-8, 8, width=32)
rows = st.lists(st.tuples(values, values), min_size=1, max_size=12)


@settings(max_examples=60)
@given(rows)
def test_kl_divergence_is_its_definition(pairs: list[tuple[float, float]]):
    was, now = torch.tensor(pairs).T.unsqueeze(1)
    p = [math.exp(x) for x, _ in pairs]
    q = [math.exp(y) for _, y in pairs]
    expected = sum(
        a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)
    )
    # Differences of logs of float32, each rounded to about 1e-6.
    assert float(kl_divergence(was, now)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert float(kl_divergence(was, was)) == 0.0


@settings(max_examples=60)
@given(rows)
def test_cosine_distance_is_its_definition(pairs: list[tuple[float, float]]):
    was, now = torch.tensor(pairs, dtype=torch.float64).T.unsqueeze(1)
    dot = sum(x * y for x, y in pairs)
    norms = math.sqrt(sum(x * x for x, _ in pairs)) * math.sqrt(sum(y * y for _, y in pairs))
    expected = 1 - dot / norms if norms > 1e-12 else None
    if expected is not None:
        # Rounding of float64 in sums of a dozen terms.
        assert float(cosine_distance(was, now)) == pytest.approx(expected, abs=1e-9)
    assert float(cosine_distance(was, was)) == 0.0


def test_edges_of_the_measures():
    ruled_out = torch.tensor([[0.0, -math.inf, 1.0]])
    assert float(kl_divergence(ruled_out, ruled_out)) == 0.0
    assert float(kl_divergence(torch.zeros(1, 3), ruled_out)) == math.inf
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert float(cosine_distance(zero, zero)) == 0.0
    assert float(cosine_distance(zero, one)) == 1.0
    # Rounding of float64.
    assert float(cosine_distance(one, -one)) == pytest.approx(2.0, abs=1e-12)


def test_padding_counts_nowhere():
    generator = torch.Generator().manual_seed(0)
    was = torch.randn(2, 4, 5, generator=generator)
    now = was + torch.randn(2, 4, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    meter = LossMeter([Comparison("logits", "kl", 1)])
    meter.add([None, mask], {"logits": was}, {"logits": now})
    kept = [(b, s) for b in range(2) for s in range(4) if mask[b, s]]
    each = [float(kl_divergence(was[b, s][None], now[b, s][None])) for b, s in kept]
    (output,) = meter.result("samples").outputs
    # Sums of six float32 numbers in another order.
    assert output.value == pytest.approx(sum(each) / 6, rel=1e-5)
    assert output.maximum == pytest.approx(max(each), rel=1e-5)
    same = [was[b, s].argmax() == now[b, s].argmax() for b, s in kept]
    assert output.agreement == pytest.approx(sum(map(bool, same)) / 6)


def test_outputs_are_told_apart_by_name_and_shape():
    found = {one.name: one.measure for one in comparisons(network())}
    assert found == {"logits": "kl", "last_hidden_state": "cosine"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"logits": "kl"}),
        ("bert", {"last_hidden_state": "cosine", "pooler_output": "cosine"}),
        ("vit", {"logits": "kl"}),
        ("t5", {"logits": "kl", "encoder_last_hidden_state": "cosine"}),
    ],
)
def test_outputs_of_families(captured, family: str, expected: dict[str, str]):
    found = {one.name: one.measure for one in comparisons(captured(family))}
    assert expected.items() <= found.items()


def test_images_are_one_vector_each_and_scalars_are_relative():
    meter = LossMeter([Comparison("image", "cosine", None), Comparison("loss", "relative", None)])
    image = torch.ones(2, 3, 4, 4)
    other = image.clone()
    other[0] *= -1
    before, after = torch.tensor([2.0, 4.0]), torch.tensor([2.0, 1.0])
    meter.add([], {"image": image, "loss": before}, {"image": other, "loss": after})
    first, second = meter.result("probes").outputs
    # Opposite and equal: distances 2 and 0.
    assert (first.value, first.maximum) == (pytest.approx(1.0), pytest.approx(2.0))
    # Errors 0 and 3 over the mean 3.
    assert (second.value, second.maximum) == (pytest.approx(0.5), pytest.approx(1.0))


def test_a_changed_shape_is_an_error():
    meter = LossMeter([Comparison("logits", "kl", None)])
    with pytest.raises(NumericError, match=r"from \[1, 2\] to \[1, 3\]"):
        meter.add([], {"logits": torch.zeros(1, 2)}, {"logits": torch.zeros(1, 3)})


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.nan, 2.0], [math.nan, 1.0], 0.5),
        ([1.0], [math.nan], math.inf),
        ([math.inf], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_deviation(was: list[float], now: list[float], expected: float):
    assert deviation(torch.tensor(was), torch.tensor(now)) == expected


def test_deviation_of_integers_is_the_share_that_differs():
    assert deviation(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert deviation(torch.zeros(2), torch.zeros(3)) == math.inf
    assert deviation(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == math.inf
