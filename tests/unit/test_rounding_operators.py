"""Activations rounded to the values of few codes: schema, definition, relevance, gradient, ONNX."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.rounding_operators import ROUNDING_REFERENCE
from lamella.ir.verify import verify
from lamella.passes.scores.gradients import differentiable
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance.presets import ATTNLRP


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SCALES, ZEROS = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 3.0, 7.0, 20.0])
CASES = {
    "uniform": (lam.round_uniform.default, (_drawn(3, 5, 4), SCALES[1], ZEROS[2], 4)),
    "by channel": (lam.round_uniform.default, (_drawn(3, 5, 4), SCALES, ZEROS, 3)),
    "log": (lam.round_log.default, (_drawn(2, 3, 6).softmax(-1), torch.tensor(0.9), 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_schema_fake_kernel_kernel_and_reference_agree(case: str) -> None:
    op, args = CASES[case]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(op(*args), ROUNDING_REFERENCE[op](*args))


def test_uniform_rounding_is_the_nearest_value_of_a_code() -> None:
    x = _drawn(50).double() * 3
    scale, zero = torch.tensor(0.37).double(), torch.tensor(5.0).double()
    values = [0.37 * (code - 5) for code in range(8)]
    want = [min(values, key=lambda v, one=one: abs(v - one)) for one in x.tolist()]
    got = lam.round_uniform(x, scale, zero, 3)
    # The float32 scale is widened before use: products of float64.
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-6, atol=1e-9)


def test_log_rounding_is_a_power_of_the_root_of_two_or_zero() -> None:
    x = torch.tensor([0.0, 1e-9, 0.004, 0.02, 0.25, 0.3, 0.5, 0.9, 1.0]).double()
    scale = torch.tensor(0.5).double()
    want: list[float] = []
    for value in x.tolist():
        code = math.inf if value == 0 else max(round(-2 * math.log2(value / 0.5)), 0)
        want.append(0.0 if code >= 15 else 0.5 * math.sqrt(0.5) ** code)
    # Logarithms of float64; PyTorch computes many powers of two at once to 2e-8.
    torch.testing.assert_close(
        lam.round_log(x, scale, 4), torch.tensor(want).double(), rtol=1e-7, atol=0.0
    )


@pytest.mark.parametrize("case", CASES)
def test_relevance_and_gradients_pass_by(case: str) -> None:
    op, args = CASES[case]
    coefficient = _drawn(*args[0].shape, seed=1)
    first, *rest = ATTNLRP.table[op](coefficient, op(*args), *args)
    assert first is coefficient
    assert rest == [None] * (len(args) - 1)


class _Rounded(nn.Module):
    """Stands for a model: the operators are put in by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1.0


def _graph(x: Tensor) -> Graph:
    graph = capture_module(_Rounded(), (x,))
    canonicalize(graph)
    scale, zero = graph.add_weight("scale", SCALES), graph.add_weight("zero", ZEROS)
    one = graph.add_weight("one", torch.tensor(1.5))
    (relu,) = graph.find(torch.ops.aten.relu.default)
    uniform = graph.call(lam.round_uniform.default, relu, scale, zero, 4, after=relu)
    graph.replace(relu, uniform)
    log = graph.call(lam.round_log.default, uniform, one, 4, after=uniform)
    graph.replace(uniform, log)
    graph.finish()
    verify(graph)
    return graph


def test_onnx_runtime_rounds_alike() -> None:
    x = _drawn(3, 5, 4)
    graph = _graph(x)
    found = differentiable(graph.nodes)
    assert len(found) == 2
    assert all(one(x, None) is x for one in found.values())
    got = OnnxRuntimeBackend().lower(graph)(x)
    # The same codes; logarithm and exponential of float32.
    torch.testing.assert_close(torch.as_tensor(got), graph(x), rtol=1e-5, atol=1e-6)
