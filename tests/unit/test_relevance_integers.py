"""Relevance and gradients go through products of integers as through the floats they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lamella.ir.capture import capture_module
from lamella.ir.ops import lam
from lamella.passes.base import Analyses
from lamella.passes.scores.gradients import differentiable
from lamella.passes.transforms.quantize_convolutions import QuantizeConvolutions
from lamella.rewrite.canonicalize import canonicalize
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


def test_the_gradient_passes_by_the_rounding() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()).eval()
    x = torch.randn(2, 8, 6, 6)
    graph = capture_module(model, (x,))
    canonicalize(graph)
    QuantizeConvolutions().run(graph, Analyses(graph, samples=[{"input": x}]))
    graph.finish()
    (layer,) = graph.find(lam.conv_int8.default)
    instead = differentiable([layer])[layer]
    operands = [graph.weight(graph.operand(layer, k)) for k in ("weight", "scales", "bias")]
    smooth = instead(x.requires_grad_(), *operands, *layer.args[4:])
    # The roundings of weights, inputs and outputs to 8 bits.
    assert float((smooth - graph(x.detach())).detach().abs().max() / smooth.detach().max()) < 0.02
    (found,) = torch.autograd.grad(smooth.sum(), x, retain_graph=True)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    # Those of weights alone; a value near zero may be cut off by one and not by the other.
    assert float((found - want).norm() / want.norm()) < 0.1
