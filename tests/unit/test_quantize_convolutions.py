"""Convolutions of 8-bit integers: what becomes one, what it computes, what it is written as."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.eager import EagerBackend
from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.reducers import Extremes
from lamella.passes.analyses.cost import Cost
from lamella.passes.base import Analyses
from lamella.passes.rounding.patches import patch_grams
from lamella.passes.transforms.quantize_convolutions import QuantizeConvolutions
from lamella.rewrite.canonicalize import canonicalize


class Net(nn.Module):
    """Two convolutions in a row, a depthwise one, a residual sum, and one that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1, stride=2)
        self.tiny = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.body(x))
        return self.tiny(self.point(self.deep(x)))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 10, generator=torch.Generator().manual_seed(seed))


def captured() -> Graph:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.5, 2.0)
    graph = capture_module(model, (images(2),))
    canonicalize(graph)
    return graph


def quantized(**options: object) -> tuple[Graph, Analyses]:
    graph = captured()
    analyses = Analyses(graph, samples=[{"x": images(8)}, {"x": images(3, seed=1)}])
    QuantizeConvolutions(**options).run(graph, analyses)
    graph.finish()
    return graph, analyses


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_dense_convolutions_become_products_of_integers() -> None:
    graph, analyses = quantized()
    layers = graph.find(lam.conv_int8.default)
    names = [str(graph.operand(layer, "weight").target) for layer in layers]
    assert len(layers) == 3
    assert names[1:] == ["body.weight_codes", "point.weight_codes"]
    # The rectifiers are the lower ends of the ranges; the last convolution has none.
    assert graph.find(aten.relu.default) == []
    assert [graph.operand(layer, "out_zero") == 0 for layer in layers] == [True, True, False]
    assert graph.find(aten.batch_norm.default) == []
    told = " ".join(analyses.take_remarks())
    assert "depthwise, floats are faster): deep.weight" in told
    assert "fewer than 256 entries): tiny.weight" in told


def test_a_convolution_reads_the_codes_that_the_one_before_it_made() -> None:
    graph, _ = quantized()
    stem, body, _ = graph.find(lam.conv_int8.default)
    ends = [graph.operand(stem, key) for key in ("out_step", "out_zero")]
    assert [graph.operand(body, key) for key in ("step", "zero")] == ends


def test_the_result_stays_close_to_the_model() -> None:
    graph, _ = quantized()
    x = images(4, seed=2)
    # Three layers with 256 levels each: a percent of each layer's range.
    assert off(graph(x), captured()(x)) < 0.03


def test_backends_compute_what_the_graph_says(tmp_path: Path) -> None:
    graph, _ = quantized()
    x, want = images(4, seed=2), None
    want = graph(x)
    for backend in (OnnxRuntimeBackend(), EagerBackend()):
        got = backend.lower(graph)(x)
        step = 2e-3
        # Sums are integers; a product of float32 at a tie may be rounded to the next code.
        assert off(got, want) < step


def test_onnxruntime_runs_them_as_integers(tmp_path: Path) -> None:
    graph, _ = quantized()
    save_model(write_onnx(graph), tmp_path)
    optimized = tmp_path / "optimized.onnx"
    Session(tmp_path / MODEL, threads=1, optimized=optimized)
    nodes = onnx.load(optimized).graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["QLinearConv"] == 3
    # The depthwise one and the tiny one.
    assert kinds["Conv"] + kinds["FusedConv"] == 2


@pytest.mark.parametrize("axes", [1, 2])
def test_one_and_two_axes_with_steps(axes: int) -> None:
    torch.manual_seed(1)
    made = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = made(8, 12, 3, stride=2, padding=1, dilation=2).eval()
    x = torch.randn(2, 8, *[11] * axes)
    graph = capture_module(layer, (x,))
    canonicalize(graph)
    dense = graph(x)
    QuantizeConvolutions().run(graph, Analyses(graph, samples=[{"input": x}]))
    graph.finish()
    assert len(graph.find(lam.conv_int8.default)) == 1
    # Two roundings to 256 levels and one of the weights.
    assert off(graph(x), dense) < 0.02
    assert off(OnnxRuntimeBackend().lower(graph)(x), graph(x)) < 1e-6


def test_cost_counts_the_same_products() -> None:
    graph, plain = quantized()[0], captured()
    QuantizeConvolutions(min_size=10**6).run(plain, Analyses(plain, samples=[{"x": images(2)}]))
    before, after = (Analyses(one).get(Cost()) for one in (plain, graph))
    products = [
        sum(one.work.contraction_flops for one in report.operations) for report in (before, after)
    ]
    assert products[0] == products[1]
    assert graph.weight_bytes() < plain.weight_bytes() / 2


def test_extremes_are_those_of_all_batches() -> None:
    reducer, state = Extremes(), None
    for rows in (torch.tensor([[1.0, -2.0]]), torch.empty(0, 2), torch.tensor([[5.0, 0.0]])):
        state = reducer.add(state, rows)
    assert state is not None
    assert reducer.result(state).tolist() == [-2.0, 5.0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="min_size must not be negative, got -1"):
        QuantizeConvolutions(min_size=-1)
    graph = captured()
    with pytest.raises(Exception, match="needs data; pass samples="):
        QuantizeConvolutions().run(graph, Analyses(graph))
    wrong = images(2)
    wrong[0, 0, 0, 0] = float("inf")
    with pytest.raises(PassError, match="values that have no range"):
        QuantizeConvolutions().run(graph, Analyses(graph, samples=[{"x": wrong}]))


def test_nothing_to_do_is_said() -> None:
    graph, analyses = quantized(min_size=10**6)
    assert graph.find(lam.conv_int8.default) == []
    assert any("no convolution was quantized" in remark for remark in analyses.take_remarks())
    assert len(quantized(first=False)[0].find(lam.conv_int8.default)) == 2


def patches_of(x: Tensor, layer: nn.Conv1d | nn.Conv2d) -> Tensor:
    """What the kernel lies over, place by place."""
    padded = nn.functional.pad(x, (layer.padding[0],) * 2 * len(layer.kernel_size))
    reach = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    rows = []
    starts = [
        range(0, size - far, step)
        for size, far, step in zip(padded.shape[2:], reach, layer.stride, strict=True)
    ]
    for image in padded:
        for start in itertools.product(*starts):
            window = image
            for axis, (at, far, step) in enumerate(zip(start, reach, layer.dilation, strict=True)):
                window = window.index_select(axis + 1, torch.arange(at, at + far + 1, step))
            rows.append(window.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("method", ["gptq", "quantease"])
def test_weights_are_rounded_for_the_patches_that_are_seen(axes: int, method: str) -> None:
    torch.manual_seed(2)
    made = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = made(6, 8, 3, stride=2, padding=1, dilation=2, bias=False).eval()
    mix = torch.randn(6, 6) / 6**0.5
    batches = [torch.einsum("ij,bj...->bi...", mix, torch.randn(3, 6, *[17] * axes)) for _ in "12"]
    graph = capture_module(layer, (batches[0],))
    canonicalize(graph)
    (node,) = graph.find(aten.conv1d.default, aten.conv2d.default)
    data = Samples.of([{"input": x} for x in batches])
    ((_, inputs),) = patch_grams(graph, data, [node])
    rows = torch.cat([patches_of(x, layer) for x in batches])
    assert inputs.tokens == len(rows)
    # The same products, summed in another order.
    torch.testing.assert_close(inputs.matrix, rows.t() @ rows / len(rows), rtol=1e-4, atol=1e-5)
    # The rows times the flat weight are the convolution.
    flat = layer.weight.detach().flatten(1)
    want = torch.cat([layer(x).flatten(2).transpose(1, 2).flatten(0, 1) for x in batches])
    torch.testing.assert_close(rows @ flat.t(), want.detach(), rtol=1e-4, atol=1e-4)

    def output_error(method: str) -> float:
        edited = graph.copy()
        a_pass = QuantizeConvolutions(method=method, min_size=0)
        a_pass.run(edited, Analyses(edited, samples=data))
        edited.finish()
        codes, scales = (
            edited.weight(next(n for n in edited.weight_nodes() if str(n.target).endswith(part)))
            for part in ("_codes", "_scales")
        )
        value = codes.flatten(1) * scales[:, None]
        return float((rows @ (value - flat).t()).square().sum())

    assert output_error(method) < 0.7 * output_error("rtn")


def test_methods_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"method must be one of rtn, gptq, quantease.*'gptq'"):
        QuantizeConvolutions(method="gtpq")
    graph = captured()
    few = Analyses(graph, samples=[{"x": images(1)[..., :4, :4]}])
    QuantizeConvolutions(method="gptq").run(graph, few)
    # 4 x 4 places; the second convolution reads 16 channels under a kernel of 3 x 3.
    told = " ".join(few.take_remarks())
    assert "the samples hold 4, 144 are needed" in told
    assert "body.weight" in told
    graph = captured()
    strict = Analyses(graph, samples=[{"x": images(1)[..., :4, :4]}], strict=True)
    with pytest.raises(PassError, match="too few tokens"):
        QuantizeConvolutions(method="gptq").run(graph, strict)


def test_patches_whose_squares_overflow_are_told() -> None:
    graph = captured()
    (node, *_) = graph.find(aten.conv2d.default)
    with pytest.raises(SamplesError, match=r"stem.weight multiplies, entries that are NaN"):
        list(patch_grams(graph, Samples.of([{"x": images(2) * 1e30}]), [node]))
