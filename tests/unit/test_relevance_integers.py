"""Relevance goes through products of integers as through the floats they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lamella.rules.relevance.contraction import conv_int8, linear_int8_static


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_linear_layer_by_its_dense_weight() -> None:
    codes, scales = torch.arange(-60, 60).reshape(6, 20).to(torch.int8), drawn(6, seed=1).abs()
    x, coefficient = drawn(3, 20, seed=2), drawn(3, 6, seed=3)
    found = linear_int8_static(coefficient, coefficient, x, codes, scales, None, 0.1, 3)
    assert len(found) == 6
    # Products and sums of float64.
    want = coefficient @ (codes.double() * scales[:, None])
    torch.testing.assert_close(found[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("out_zero", [0, 7])
def test_a_convolution_by_its_dense_weight(axes: int, out_zero: int) -> None:
    shape = (6, 4, *[3] * axes)
    codes = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales, bias = drawn(6, seed=1).abs(), drawn(6, seed=2)
    x = drawn(2, 4, *[9] * axes, seed=3).requires_grad_()
    dense = codes.double() * scales.reshape(-1, *[1] * (axes + 1))
    steps = ([2] * axes, [1] * axes, [1] * axes)
    convolve = functional.conv1d if axes == 1 else functional.conv2d
    output = convolve(x, dense, None, *steps)
    output = output.clamp(min=0) if out_zero == 0 else output
    coefficient = drawn(*output.shape, seed=4)
    want = torch.autograd.grad(output, x, coefficient)[0]
    given = (*steps, 1, 0.1, 3, 0.2, out_zero)
    with torch.no_grad():
        found = conv_int8(coefficient, output, x, codes, scales, bias, *given)
    assert len(found) == 12
    # Products and sums of float64.
    torch.testing.assert_close(found[0], want, rtol=1e-12, atol=1e-12)
    assert found[3] is not None
