"""The rules for weights against tables of all contributions ``c_ij = x_i w_ij``.

The tables follow the published definitions as literally as possible. A convolution is made dense
by applying it to unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.ir.capture import capture_module
from lamella.ir.ops import aten
from lamella.passes.relevance.emit import emit
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance import amplified, presets, terminal
from lamella.rules.relevance.contraction import convolution, epsilon, linear
from lamella.rules.relevance.rule import Rule
from lamella.rules.relevance.signs import feeds_only_relu, is_nonnegative

Table = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From contributions ``[i, j]``, biases, sums and relevance ``[j]`` to relevance ``[i]``."""

# Quotients of sums in float64, where a sum may cancel to a millionth of its terms.
TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
STABILIZER = 1e-6


def by_epsilon(stabilizer: float) -> Table:
    def table(c: Tensor, bias: Tensor, z: Tensor, relevance: Tensor) -> Tensor:
        sign = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
        return (c * (relevance / (z + stabilizer * sign))).sum(1)

    return table


def by_gamma(factor: float) -> Table:
    """The four branches: sums above zero favor positive contributions, others negative ones."""

    def table(c: Tensor, bias: Tensor, z: Tensor, relevance: Tensor) -> Tensor:
        up, down = c.clamp(min=0), c.clamp(max=0)
        above = z + factor * (up.sum(0) + bias.clamp(min=0))
        below = z + factor * (down.sum(0) + bias.clamp(max=0))
        shares = torch.where(z > 0, (c + factor * up) / above, (c + factor * down) / below)
        return (shares * relevance).sum(1)

    return table


def by_alpha_beta(alpha: float, beta: float) -> Table:
    def table(c: Tensor, bias: Tensor, z: Tensor, relevance: Tensor) -> Tensor:
        up, down = c.clamp(min=0), c.clamp(max=0)
        above = up.sum(0) + bias.clamp(min=0) + STABILIZER
        below = down.sum(0) + bias.clamp(max=0) - STABILIZER
        return ((alpha * up / above - beta * down / below) * relevance).sum(1)

    return table


CASES: dict[str, tuple[Callable[[Any], Rule], Table]] = {
    "lrp-0": (epsilon, by_epsilon(0.0)),
    "epsilon": (lambda layer: epsilon(layer, 0.1), by_epsilon(0.1)),
    "gamma": (lambda layer: amplified.gamma(layer, 0.25), by_gamma(0.25)),
    "gamma of 100": (lambda layer: amplified.gamma(layer, 100.0), by_gamma(100.0)),
    "z-plus": (lambda layer: amplified.alpha_beta(layer, 1.0, 0.0), by_alpha_beta(1.0, 0.0)),
    "alpha-beta": (lambda layer: amplified.alpha_beta(layer, 2.0, 1.0), by_alpha_beta(2.0, 1.0)),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_linear_layer_is_its_table(case: str, with_bias: bool):
    make, table = CASES[case]
    x, weight, coefficient = draw(5, 7, seed=0), draw(6, 7, seed=1), draw(5, 6, seed=2)
    bias = draw(6, seed=3) if with_bias else None
    y = torch.nn.functional.linear(x, weight, bias)
    got, none, _ = make(linear)(coefficient, y, x, weight, bias)
    assert none is None
    held = torch.zeros(6, dtype=torch.float64) if bias is None else bias
    for row in range(5):
        want = table(x[row][:, None] * weight.T, held, y[row], y[row] * coefficient[row])
        torch.testing.assert_close(got[row] * x[row], want, **TOLERANCE)


SHAPES = {
    "plain": ((2, 3, 5, 6), (4, 3, 3, 2), (1, 1), (0, 0), (1, 1), 1),
    "padded": ((2, 3, 5, 6), (4, 3, 3, 3), (1, 1), (1, 2), (1, 1), 1),
    "strided": ((1, 3, 6, 7), (4, 3, 3, 2), (2, 3), (1, 0), (1, 1), 1),
    "dilated": ((1, 2, 7, 7), (4, 2, 2, 3), (1, 2), (1, 2), (2, 2), 1),
    "groups": ((1, 4, 5, 5), (6, 2, 3, 3), (1, 1), (1, 1), (1, 1), 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_a_convolution_is_its_table(case: str, shape: str):
    make, table = CASES[case]
    of_input, of_weight, *options = SHAPES[shape]
    x, weight, bias = draw(*of_input, seed=0), draw(*of_weight, seed=1), draw(of_weight[0], seed=2)
    y = torch.nn.functional.conv2d(x, weight, bias, *options)
    coefficient = draw(*y.shape, seed=3)
    got, *_ = make(convolution(2))(coefficient, y, x, weight, bias, *options)
    units = torch.eye(x[0].numel(), dtype=torch.float64).reshape(-1, *x.shape[1:])
    matrix = torch.nn.functional.conv2d(units, weight, None, *options).flatten(1)
    biases = bias[:, None, None].expand(y.shape[1:]).flatten()
    for row in range(len(x)):
        flat, sums = x[row].flatten(), y[row].flatten()
        want = table(flat[:, None] * matrix, biases, sums, sums * coefficient[row].flatten())
        torch.testing.assert_close((got[row] * x[row]).flatten(), want, **TOLERANCE)


ABOVE = {
    "gamma": (lambda layer: amplified.gamma_above_zero(layer, 0.25), by_gamma(0.25)),
    "z-plus": (amplified.z_plus_of_positive, by_alpha_beta(1.0, 0.0)),
}


@pytest.mark.parametrize("case", ABOVE)
def test_where_no_input_is_negative_fewer_products_give_the_same(case: str):
    make, table = ABOVE[case]
    x, weight, bias = draw(5, 7, seed=0).abs(), draw(6, 7, seed=1), draw(6, seed=3)
    y = torch.nn.functional.linear(x, weight, bias)
    # What a relu reads has relevance only where it is positive.
    coefficient = draw(5, 6, seed=2) * (y > 0)
    got, none, of_bias = make(linear)(coefficient, y, x, weight, bias)
    assert none is None
    for row in range(5):
        want = table(x[row][:, None] * weight.T, bias, y[row], y[row] * coefficient[row])
        torch.testing.assert_close(got[row] * x[row], want, **TOLERANCE)
    # With the bias nothing is lost; the stabilizer of z-plus is 1e-6 beside sums of about 1.
    total = (got * x).sum() + (of_bias * bias).sum()
    torch.testing.assert_close(total, (y * coefficient).sum(), rtol=1e-5, atol=1e-5)


def test_presets_take_the_fewest_products():
    """A network with relus: the first layer may see negative pixels, the others don't."""
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)),
    )
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    graph = capture_module(model.eval(), {"input": pixels}, dynamic=False)
    canonicalize(graph)
    convolutions = graph.find(aten.conv2d.default)
    assert [is_nonnegative(graph.operand(node, "input")) for node in convolutions] == [0, 1, 1]
    assert [feeds_only_relu(node) for node in convolutions] == [1, 1, 0]
    made = emit(graph, presets.PRESETS["gamma"])
    # Forwards, and one more forward of every layer; the second needs one adjoint, others two.
    assert len(made.graph.find(aten.conv2d.default)) == 6
    assert len(made.graph.find(aten.conv_transpose2d.input)) == 5
    plus = emit(graph, presets.PRESETS["eps-plus"])
    assert len(plus.graph.find(aten.conv_transpose2d.input)) == 4


def test_one_axis_is_as_two():
    x, weight = draw(2, 4, 9, seed=0), draw(6, 2, 3, seed=1)
    options = ([2], [1], [1], 2)
    y = torch.nn.functional.conv1d(x, weight, None, *options)
    coefficient = draw(*y.shape, seed=2)
    got, *_ = amplified.gamma(convolution(1), 0.5)(coefficient, y, x, weight, None, *options)
    wide = ([1, 2], [0, 1], [1, 1], 2)
    flat = [value.unsqueeze(2) for value in (coefficient, y, x, weight)]
    want, *_ = amplified.gamma(convolution(2), 0.5)(*flat, None, *wide)
    # The same sums over one more axis of size one.
    torch.testing.assert_close(got, want.squeeze(2), rtol=1e-12, atol=1e-12)


def test_the_box_is_its_table():
    low, high = -0.5, 2.0
    x, weight, coefficient = draw(4, 7, seed=0), draw(6, 7, seed=1), draw(4, 6, seed=2)
    x = x.clamp(low, high)
    y = x @ weight.T
    got, *_ = terminal.box(linear, low, high)(coefficient, y, x, weight, None)
    up, down = weight.T.clamp(min=0), weight.T.clamp(max=0)
    for row in range(4):
        parts = x[row][:, None] * weight.T - low * up - high * down
        total = parts.sum(0)
        # All parts are positive, and so is the stabilizer.
        want = (parts / (total + STABILIZER) * (y[row] * coefficient[row])).sum(1)
        torch.testing.assert_close(got.relevance[row], want, **TOLERANCE)


def test_flat_and_squared_weights_are_their_tables():
    x, weight, coefficient = draw(4, 7, seed=0), draw(6, 7, seed=1), draw(4, 6, seed=2)
    y = x @ weight.T
    for rule, measure in (
        (terminal.squared_weights, weight**2),
        (terminal.flat, torch.ones_like(weight)),
    ):
        got, *_ = rule(linear)(coefficient, y, x, weight, None)
        shares = measure.T / (measure.sum(1) + STABILIZER)
        want = (y * coefficient) @ shares.T
        torch.testing.assert_close(got.relevance, want, **TOLERANCE)


@pytest.mark.parametrize("case", [name for name in CASES if name != "epsilon"])
def test_relevance_is_conserved_without_bias(case: str):
    make, _ = CASES[case]
    x, weight, coefficient = draw(5, 40, seed=0), draw(30, 40, seed=1), draw(5, 30, seed=2)
    y = x @ weight.T
    got, *_ = make(linear)(coefficient, y, x, weight, None)
    # Up to the stabilizer of alpha-beta, 1e-6 beside sums of about 10.
    torch.testing.assert_close((got * x).sum(1), (y * coefficient).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [{"alpha": 2.0, "beta": 2.0}, {"alpha": 0.0, "beta": 1.0}])
def test_alpha_and_beta_differ_by_one(bad: dict[str, float]):
    with pytest.raises(ValueError, match="alpha - beta must be 1"):
        amplified.alpha_beta(linear, **bad)


def test_gamma_is_not_negative_and_boxes_hold_zero():
    with pytest.raises(ValueError, match="gamma must be at least 0, got -1"):
        amplified.gamma(linear, -1)
    with pytest.raises(ValueError, match="the box must hold 0, got low=1 and high=2"):
        terminal.box(linear, 1, 2)


def test_nothing_is_divided_by_zero():
    x, weight = torch.zeros(2, 3, dtype=torch.float64), draw(4, 3, seed=0)
    y, coefficient = x @ weight.T, draw(2, 4, seed=1)
    for make, _ in CASES.values():
        got, *_ = make(linear)(coefficient, y, x, weight, None)
        assert bool(torch.isfinite(got).all())
