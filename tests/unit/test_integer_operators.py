"""Products of integers with static ranges, beside loops over integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamella.ir.integer_operators import INTEGER_REFERENCE, static_codes, static_range

lam = torch.ops.lamella


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


CASES = {
    "linear_int8_static": (
        drawn(2, 3, 20),
        codes(6, 20),
        drawn(6, seed=1).abs() + 0.01,
        drawn(6, seed=2),
        0.02,
        120,
    ),
    "conv_int8": (
        drawn(2, 4, 7, 6),
        codes(6, 2, 3, 3),
        drawn(6, seed=1).abs() * 0.01 + 0.001,
        drawn(6, seed=2),
        [2, 1],
        [1, 0],
        [1, 2],
        2,
        0.02,
        120,
        0.05,
        130,
    ),
}


def test_every_operator_has_a_case() -> None:
    assert {str(op).split(".")[1] for op in INTEGER_REFERENCE} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_schema_fake_kernel_and_kernel_agree(name: str) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(lam, name).default, CASES[name], test_utils=checks)


def by_hand(value: float, step: float, zero: int) -> int:
    """A code around zero; Python rounds half to even too."""
    quotient = torch.tensor(value) / torch.tensor(step)
    return min(max(round(float(quotient)) + zero, 0), 255) - zero


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_multiplies_integers(with_bias: bool) -> None:
    x, weight, scales, bias, step, zero = CASES["linear_int8_static"]
    got = lam.linear_int8_static(x, weight, scales, bias if with_bias else None, step, zero)
    for place in ((0, 0), (1, 2)):
        row = [by_hand(float(v), step, zero) for v in x[place]]
        for out in range(6):
            total = sum(a * int(b) for a, b in zip(row, weight[out], strict=True))
            want = total * step * float(scales[out]) + (float(bias[out]) if with_bias else 0.0)
            # Two products and a sum of float32.
            assert float(got[place][out]) == pytest.approx(want, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_multiplies_integers_and_rounds_once(with_bias: bool) -> None:
    x, weight, scales, bias, *rest = CASES["conv_int8"]
    stride, padding, dilation, groups, step, zero, out_step, out_zero = rest
    got = lam.conv_int8(x, weight, scales, bias if with_bias else None, *rest)
    padded = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    assert got.shape == (2, 6, 4, 2)
    for batch, out, row, column in ((0, 0, 0, 0), (1, 5, 3, 1), (0, 2, 1, 0)):
        total = 0
        for channel in range(2):
            for i in range(3):
                for j in range(3):
                    y, z = row * stride[0] + i * dilation[0], column * stride[1] + j * dilation[1]
                    source = out // (6 // groups) * 2 + channel
                    code = by_hand(float(padded[batch, source, y, z]), step, zero)
                    total += code * int(weight[out, channel, i, j])
        unit = step * float(scales[out])
        total += round(float(bias[out]) / unit) if with_bias else 0
        code = min(max(round(total * unit / out_step) + out_zero, 0), 255)
        # The code is an integer; one product of float32 follows.
        want = (code - out_zero) * out_step
        assert float(got[batch, out, row, column]) == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_a_range_that_starts_at_zero_is_a_rectifier() -> None:
    x, weight, scales, bias, *rest = CASES["conv_int8"]
    rest[-2:] = [0.05, 0]
    got = lam.conv_int8(x, weight, scales, bias, *rest)
    assert float(got.min()) == 0.0
    assert float(got.max()) > 0.0


def test_one_axis_is_two_axes_with_one_row() -> None:
    x, weight, scales = drawn(2, 4, 9), codes(6, 4, 3), drawn(6, seed=1).abs()
    rest = (0.02, 120, 0.5, 128)
    one = lam.conv_int8(x, weight, scales, None, [2], [1], [1], 1, *rest)
    wide = (x.unsqueeze(2), weight.unsqueeze(2), scales, None, [1, 2], [0, 1], [1, 1], 1)
    assert torch.equal(one, lam.conv_int8(*wide, *rest).squeeze(2))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 1e-3)])
def test_a_range_covers_its_ends_and_zero(low: float, high: float) -> None:
    step, zero = static_range(low, high)
    ends = torch.tensor([low, high, 0.0])
    back = static_codes(ends, step, zero) * step
    # Half a step of rounding; zero has a code of its own, which moves the range by half a step.
    assert bool(((back - ends).abs() <= step * 1.001).all())
    assert float(back[2]) == 0.0
    assert step <= (max(high, 0) - min(low, 0)) / 255 * 1.0001


def test_ranges_that_can_not_be() -> None:
    assert static_range(0.0, 0.0) == (1.0, 0)
    with pytest.raises(ValueError, match="can't be cut into steps"):
        static_range(0.0, float("inf"))
