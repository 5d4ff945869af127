"""Rounding methods against the definitions, one weight at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.ir.quantize import Format, quantize
from lamella.passes.rounding.base import rounded_of
from lamella.passes.rounding.feedback import descended
from lamella.passes.rounding.gptq import Gptq
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.grid import Grid
from lamella.passes.rounding.nearest import Nearest
from lamella.passes.rounding.pb_llm import PbLlm
from lamella.passes.rounding.quantease import QuantEase
from lamella.passes.rounding.refit import refitted

F32 = torch.float32


def weight_and_gram(seed: int, out: int = 24, width: int = 96) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.rand(width, generator=generator, dtype=torch.float64) * 2 + 0.1
    inputs = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.eye(width, dtype=torch.float64) + 0.3 * mix) * scales
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return weight, inputs.t() @ inputs / len(inputs)


def error(gram: Tensor, weight: Tensor, value: Tensor) -> float:
    difference = value.double() - weight
    return float(torch.trace(difference @ gram @ difference.t()))


class Replica:
    """The grid of a weight in NumPy, from the scales that are stored."""

    def __init__(self, weight: Tensor, format: Format, importance: Tensor) -> None:
        stored = quantize(weight, format, importance)
        self.scales = stored.scales.double().numpy()
        assert format.symmetric
        self.half = 2 ** (format.bits - 1)
        self.block = format.block

    def nearest(self, values: np.ndarray, column: int) -> np.ndarray:
        scale = self.scales[:, column // self.block]
        return scale * np.clip(np.round(values / scale), -self.half, self.half - 1)


def damped(gram: Tensor, share: float) -> np.ndarray:
    return gram.numpy() + share * np.mean(np.diag(gram.numpy())) * np.eye(len(gram))


def literal_gptq(
    weight: Tensor, gram: Tensor, grid: Replica, order: list[int], share: float = 0.01
) -> np.ndarray:
    """Optimal brain quantization with a fixed order: the inverse is made anew for every column."""
    w, h = weight.numpy().copy(), damped(gram, share)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        stored = grid.nearest(w[:, column], column)
        step = (w[:, column] - stored) / inverse[0, 0]
        w[:, left] -= np.outer(step, inverse[0])
        w[:, column] = stored
    return w


def literal_descent(weight: Tensor, g: np.ndarray, grid: Replica, start: np.ndarray) -> np.ndarray:
    """Every column in turn: the value of the grid closest to the least of the parabola."""
    w, q = weight.numpy(), start.copy()
    for k in range(w.shape[1]):
        others = [j for j in range(w.shape[1]) if j != k]
        target = w[:, k] + (w[:, others] - q[:, others]) @ g[others, k] / g[k, k]
        q[:, k] = grid.nearest(target, k)
    return q


def literal_refit(weight: Tensor, g: np.ndarray, grid: Replica, values: np.ndarray) -> np.ndarray:
    """Row by row and block by block: least squares for one scale; the scales of `grid` change."""
    w, q = weight.numpy(), values.copy()
    root = np.linalg.cholesky(g).T  # the error of a row is the squared length of root (w - q)
    for row in range(len(w)):
        for block, scale in enumerate(grid.scales[row]):
            at = slice(block * grid.block, (block + 1) * grid.block)
            codes = np.zeros(w.shape[1])
            codes[at] = q[row, at] / scale
            rest = q[row] - scale * codes
            side, want = root @ codes, root @ (w[row] - rest)
            best = np.linalg.lstsq(side[:, None], want, rcond=None)[0][0] if side.any() else scale
            grid.scales[row, block] = np.float32(best)
            q[row] = rest + grid.scales[row, block] * codes
    return q


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_gives_the_codes_of_the_definition(bits, act_order):
    weight, gram = weight_and_gram(bits)
    format = Format(bits, 32, scale_dtype=F32)
    diagonal = gram.diagonal()
    order = torch.arange(96)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    grid = Replica(weight, format, diagonal)
    want = literal_gptq(weight, gram, grid, order.tolist())
    method = Gptq(0.01, act_order=act_order, refits=0)
    got = method.round(weight, format, InputGram(gram, 384)).value()
    # Both lie on the grid in float64; the codes are the same, the product is rounded to float32.
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-6, atol=0)


def test_refits_and_sweeps_give_the_codes_of_the_definition():
    weight, gram = weight_and_gram(7)
    format = Format(3, 32, scale_dtype=F32)
    grid = Replica(weight, format, gram.diagonal())
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    want = literal_gptq(weight, gram, grid, order, 0.1)
    for _ in range(2):
        literal_refit(weight, damped(gram, 0.1), grid, want)
        want = literal_gptq(weight, gram, grid, order, 0.1)
    start = Gptq(refits=2)
    got = start.round(weight, format, InputGram(gram, 384)).value()
    # The scales are float32 on both sides, from sums of float64 in another order.
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-6, atol=0)
    want = literal_descent(weight, damped(gram, 0.1), grid, want)
    for _ in range(2):
        want = literal_refit(weight, damped(gram, 0.1), grid, want)
        want = literal_descent(weight, damped(gram, 0.1), grid, want)
    got = QuantEase(start, sweeps=3).round(weight, format, InputGram(gram, 384)).value()
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("free", [None, [5, 40, 41]], ids=str)
def test_fitted_scales_never_make_the_error_larger(free):
    weight, gram = weight_and_gram(11, width=80)
    marked = None
    if free is not None:
        marked = torch.zeros(80, dtype=torch.bool)
        marked[free] = True
    grid = Grid.searched(weight, Format(2, 32, symmetric=False))
    turned = weight.t().contiguous()
    value = torch.stack([grid.nearest_but(marked)(k, turned[k]) for k in range(80)])
    new, fitted = refitted(turned, value, grid, gram, marked)
    before, after = error(gram, weight, value.t()), error(gram, weight, new.t())
    assert after < before
    if free is not None:
        assert torch.equal(new[free], value[free])
    again = torch.stack([fitted.nearest_but(marked)(k, new[k]) for k in range(80)])
    # Codes stay: the new values lie on the new grid, up to rounding of float64.
    torch.testing.assert_close(again, new, rtol=1e-12, atol=1e-12)
    # Scales are those that are stored.
    assert torch.equal(fitted.scales, fitted.scales.half().double())


def test_gptq_with_independent_inputs_rounds_to_nearest():
    weight, _ = weight_and_gram(0)
    for format in (Format(4, 32), Format(2, 64, symmetric=False), Format(3, 32)):
        inputs = InputGram(torch.eye(96, dtype=torch.float64), 384)
        want = quantize(weight, format)
        for method in (Gptq(refits=0), Gptq(act_order=False, refits=0), QuantEase(Gptq(refits=0))):
            got = method.round(weight, format, inputs).codes
            assert torch.equal(got.packed, want.packed)
            assert torch.equal(got.scales, want.scales)
            assert (got.zero_points is None) == (want.zero_points is None)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantease_is_better_than_gptq_and_gptq_than_nearest(bits):
    methods = {"rtn": Nearest(), "gptq": Gptq(), "quantease": QuantEase()}
    format = Format(bits, 32, symmetric=bits > 2)
    sums = dict.fromkeys(methods, 0.0)
    for seed in range(8):
        weight, gram = weight_and_gram(seed)
        for name, method in methods.items():
            value = method.round(weight, format, InputGram(gram, 384)).value()
            sums[name] += error(gram, weight, value)
    # On average over seeds: being greedy gives no guarantee for one weight.
    assert sums["quantease"] < sums["gptq"] < 0.6 * sums["rtn"]


def test_descent_never_makes_the_error_larger():
    weight, gram = weight_and_gram(3)
    grid = Grid.searched(weight, Format(3, 32))
    turned = weight.t().contiguous()
    value = Grid.searched(weight, Format(3, 32)).store(turned).dequantized().double().t()
    last = error(gram, weight, value.t())
    for _ in range(6):
        value = descended(turned, value.contiguous(), gram, grid.nearest, 1)
        now = error(gram, weight, value.t())
        assert now <= last * (1 + 1e-12)  # rounding of float64
        last = now
    again = descended(turned, value, gram, grid.nearest, 50)
    assert torch.equal(descended(turned, again, gram, grid.nearest, 1), again)


def test_the_order_of_columns_leaves_no_trace():
    weight, gram = weight_and_gram(1)
    got = Gptq(refits=0).round(weight, Format(4, 32), InputGram(gram, 384)).codes
    own = quantize(weight, Format(4, 32), gram.diagonal())
    # Blocks of neighbors share a scale as without an order: there is nothing to permute.
    assert torch.equal(got.scales, own.scales)
    assert got.packed.shape == own.packed.shape


def test_columns_without_inputs_are_rounded_to_nearest():
    weight, gram = weight_and_gram(2)
    dead = [3, 40, 95]
    gram[dead] = gram[:, dead] = 0
    format = Format(4, 32, scale_dtype=F32)
    result = QuantEase(Gptq(refits=0)).round(weight, format, InputGram(gram, 384))
    grid = Replica(weight, format, gram.diagonal())
    for column in dead:
        want = torch.from_numpy(grid.nearest(weight[:, column].numpy(), column)).float()
        torch.testing.assert_close(result.value()[:, column], want, rtol=1e-6, atol=0)


def test_a_singular_matrix_is_damped_more_or_given_up():
    weight, gram = weight_and_gram(4)
    # Not positive: what the rounding of sums can leave of a matrix without full rank.
    broken = gram - 1.3 * torch.linalg.eigvalsh(gram).min() * torch.eye(96, dtype=torch.float64)
    broken -= 0.05 * gram.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    found = Gptq(0.01).round(weight, Format(4), InputGram(broken, 384))
    assert found.damping == pytest.approx(0.1)
    hopeless = gram - 10 * gram.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    hopeless.diagonal().copy_(gram.diagonal())
    hopeless[0, 1] = hopeless[1, 0] = 1e6
    for method in (Gptq(), QuantEase(), QuantEase(outliers=0.05), PbLlm()):
        result = method.round(weight, Format(4), InputGram(hopeless, 384))
        assert result.damping == math.inf
        assert torch.equal(result.value(), quantize(weight, Format(4)).dequantized())
    zero = InputGram(torch.zeros(96, 96, dtype=torch.float64), 384)
    assert Gptq().round(weight, Format(4), zero).damping == math.inf


def test_exact_columns_lower_the_error_and_have_codes_of_zero():
    weight, gram = weight_and_gram(5)
    inputs = InputGram(gram, 384)
    plain, kept = (QuantEase(outliers=s).round(weight, Format(3), inputs) for s in (0.0, 0.05))
    assert kept.columns.shape == (5,)
    assert kept.exact.shape == (24, 5)
    assert not kept.codes.dequantized()[:, kept.columns].any()
    assert error(gram, weight, kept.value()) < error(gram, weight, plain.value())


def test_pb_llm_is_its_formula():
    weight, gram = weight_and_gram(6, out=8, width=64)
    format = Format(8, 32, scale_dtype=F32)
    result = PbLlm(salient=0.25).round(weight, format, InputGram(gram, 384))
    h = gram.numpy() + 0.01 * np.mean(np.diag(gram.numpy())) * np.eye(64)
    saliency = (weight.numpy() / np.diag(np.linalg.inv(h))) ** 2
    kept = saliency >= np.sort(saliency.flatten())[-128]
    value = result.dense.numpy()
    for row in range(8):
        for block in (slice(0, 32), slice(32, 64)):
            binary = ~kept[row, block]
            entries = weight.numpy()[row, block][binary]
            mean = entries.mean()
            size = np.abs(entries - mean).mean()
            found = np.unique(value[row, block][binary])
            want = [mean - size, mean + size]
            # Both levels are stored in float16, and one of them may be needed nowhere.
            assert all(np.min(np.abs(one - np.array(want))) < 3e-3 * np.ptp(want) for one in found)
            # The others are rounded to 8 bits after they took over the errors of those before.
            assert len(np.unique(value[row, block][~binary])) > 2 or (~binary).sum() <= 2
    blocks = 8 * 2
    assert result.stored_bytes == (8 * 64 + 128 * 8 + 384) // 8 + blocks * (4 + 4)
    mean_bits = (8 * 64 + 128 * 8 + 384) / 512
    assert mean_bits == 8 * 0.25 + (1 - 0.25) + 1


def test_pb_llm_carries_errors_on():
    weight, gram = weight_and_gram(8)
    inputs = InputGram(gram, 384)
    value = PbLlm(salient=0.1).round(weight, Format(8, 32), inputs).value()
    alone = PbLlm(salient=0.1, damping=1.0)
    independent = InputGram(torch.diag(gram.diagonal()), 384)
    without = alone.round(weight, Format(8, 32), independent).value()
    assert error(gram, weight, value) < error(gram, weight, without)


@pytest.mark.parametrize(
    "method", [Gptq(), QuantEase(outliers=0.05), PbLlm()], ids=["gptq", "quantease", "pb-llm"]
)
def test_results_are_the_same_after_a_file(method):
    weight, gram = weight_and_gram(9, width=80)
    format = Format(3, 32, symmetric=False)
    result = method.round(weight, format, InputGram(gram, 384))
    again = rounded_of(result.tensors(), format, (24, 80))
    assert torch.equal(again.value(), result.value())
    assert (again.damping, again.stored_bytes) == (result.damping, result.stored_bytes)
    assert torch.equal(result.rows(5, 20).value(), result.value()[5:20])


def test_weights_that_read_one_value_share_a_factor(monkeypatch):
    calls = []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: calls.append(1) or real(m))
    weight, gram = weight_and_gram(0)
    inputs = InputGram(gram, 384)
    for part in weight.split(8):
        QuantEase().round(part, Format(4), inputs)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "method",
    [Gptq(), QuantEase(), QuantEase(outliers=0.05)],
    ids=["gptq", "quantease", "outliers"],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_rounded_apart_are_those_of_the_whole_weight(monkeypatch, method, symmetric):
    weight, gram = weight_and_gram(8)
    format = Format(4, 32, symmetric)
    whole = method.round(weight, format, InputGram(gram, 400)).tensors()
    monkeypatch.setattr("lamella.passes.rounding.base.AT_ONCE", 1)
    monkeypatch.setattr("lamella.passes.rounding.base.ROWS", 10)
    # 24 rows as 10, 10 and 4. In float64 no entry lies so near to the middle of two codes that
    # the order of a sum decides.
    apart = method.round(weight, format, InputGram(gram, 400))
    assert apart.codes is not None
    assert apart.codes.shape == (24, 96)
    for name, value in apart.tensors().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)
    assert set(apart.tensors()) == set(whole)
