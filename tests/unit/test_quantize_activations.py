"""Emulated activations of few bits: the formulas of the papers, and what comes out of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format
from lamella.ir.verify import verify
from lamella.passes.base import Analyses
from lamella.passes.sites import find_sites
from lamella.passes.transforms.activation_ranges import (
    Range,
    RowSample,
    channel_ranges,
    log_scale,
    range_of,
    reparameterized,
    rounded,
)
from lamella.passes.transforms.quantize_activations import QuantizeActivations
from lamella.rewrite.canonicalize import canonicalize


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantize(graph: Graph, change: QuantizeActivations, samples: Samples) -> Sequence[str]:
    analyses = Analyses(graph, samples)
    change.run(graph, analyses)
    graph.finish()
    verify(graph)
    return analyses.take_remarks()


# ---- ranges -------------------------------------------------------------------------------------


def test_a_row_sample_does_not_depend_on_batches() -> None:
    rows = _drawn(1000, 3)
    reducer = RowSample(64)
    state = None
    for part in rows.split([7, 500, 1, 492]):
        state = reducer.add(state, part)
    assert state is not None
    # 1000 rows halve to at most 64 with every 16th.
    assert torch.equal(reducer.result(state), rows[::16])
    flat = RowSample(10000, flat=True)
    assert flat.result(flat.add(flat.add(None, _drawn(4, 5)), _drawn(2, 7))).shape == (34, 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_range_of_a_channel_is_the_best_of_the_shrunk_ones(bits: int) -> None:
    rows = _drawn(200, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 3.0, -9.0])
    found = channel_ranges(rows, bits)
    top = 2**bits - 1
    for channel in range(3):
        values = rows[:, channel].double()
        errors: list[float] = []
        for step in range(29):
            middle, half = (values.min() + values.max()) / 2, (values.max() - values.min()) / 2
            half = half * (1 - 0.025 * step)
            scale = 2 * half / top
            zero = (-(middle - half) / scale).round()
            codes = ((values / scale).round() + zero).clamp(0, top)
            errors.append(float((scale * (codes - zero) - values).square().sum()))
        one = Range(found.scale[channel], found.zero[channel])
        got = (rounded(rows[:, channel], one, bits).double() - values).square().sum()
        # Sums of float32 against float64.
        assert math.isclose(float(got), min(errors), rel_tol=1e-4)


def test_a_constant_channel_and_one_range_for_all() -> None:
    rows = torch.full((9, 2), 3.0)
    rows[:, 1] = 0.0
    # The steps are so small that the code of zero is far away; float32 has 7 digits of it.
    torch.testing.assert_close(
        rounded(rows, channel_ranges(rows, 4, whole=False), 4), rows, rtol=1e-5, atol=1e-6
    )
    one = range_of(_drawn(50, 4), 8)
    assert one.scale.shape == one.zero.shape == ()


def test_the_scale_of_probabilities_does_not_exceed_the_largest() -> None:
    entries = _drawn(40, 10).mul(3).softmax(-1)
    found = log_scale(entries, 4)
    assert 0 < float(found) <= float(entries.max())
    error = (lam.round_log(entries, found, 4) - entries).square().sum()
    assert error <= (lam.round_log(entries, entries.max(), 4) - entries).square().sum()


@pytest.mark.parametrize("clip", [0.0, 10.0])
def test_reparameterized_channels_have_the_codes_of_their_own_ranges(clip: float) -> None:
    rows = _drawn(300, 40).double() * torch.logspace(-1, 1, 40) + _drawn(40, seed=1)
    ranges = channel_ranges(rows, 4, whole=False)
    change = reparameterized(ranges, clip)
    turned = rows / change.ratio - change.shift
    one = ((turned / change.range.scale + change.range.zero).round()).clamp(0, 15)
    scale, zero = ranges.scale.double(), ranges.zero.double()
    if clip:
        for values in (scale, zero):
            low, high = torch.quantile(values, 0.1), torch.quantile(values, 0.9)
            values.clamp_(low, high)
    own = (rows / scale + zero).round().clamp(0, 15)
    # The one scale is stored as float32: a tie in a thousand may fall on the other side.
    assert float((one != own).double().mean()) < 1e-3


# ---- the pass -----------------------------------------------------------------------------------


class _Block(nn.Module):
    """A block of a vision transformer and a head."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return self.head(self.last(x)[:, 0])


def _block() -> tuple[_Block, Tensor]:
    torch.manual_seed(0)
    model = _Block().eval()
    with torch.no_grad():
        for norm in (model.first, model.second, model.last):
            norm.weight.copy_(torch.logspace(-1, 1, 32))
            norm.bias.copy_(_drawn(32, seed=3))
    return model, _drawn(8, 9, 32, seed=4)


def _graph(model: nn.Module, x: Tensor) -> Graph:
    graph = capture_module(model, (x,))
    canonicalize(graph)
    return graph


def _relative(got: Tensor, want: Tensor) -> float:
    return float(((got - want).square().sum() / want.square().sum()).detach())


def test_many_bits_change_nothing() -> None:
    model, x = _block()
    graph = _graph(model, x)
    change = QuantizeActivations(16, 16, softmax="uniform")
    told = " ".join(_quantize(graph, change, Samples.of([{"x": x}])))
    assert "no kernel runs this" in told
    assert "3 norms reparameterized" in told
    # Seven weights; inputs of q/k/v, o, up, down and head, queries, keys, values, probabilities.
    assert "9 values and 7 weights" in told
    # Errors of 2**-16 of the range of each value.
    assert _relative(graph(x), model(x)) < 1e-7


@pytest.mark.parametrize("softmax", ["log-sqrt2", "uniform", "none"])
def test_fewer_bits_lose_more(softmax: str) -> None:
    model, x = _block()
    samples = Samples.of([{"x": x}])
    losses: list[float] = []
    for bits in (8, 6, 4):
        graph = _graph(model, x)
        _quantize(graph, QuantizeActivations(bits, bits, softmax), samples)
        losses.append(_relative(graph(x), model(x)))
        assert len(graph.find(lam.round_log.default)) == (softmax == "log-sqrt2")
    assert losses == sorted(losses)
    assert losses[0] < 0.01 < losses[2]


def test_reparameterizing_helps_where_channels_differ() -> None:
    model, x = _block()
    samples = Samples.of([{"x": x}])

    def loss(*, reparameterize: bool) -> float:
        graph = _graph(model, x)
        change = QuantizeActivations(6, 32, reparameterize=reparameterize, weights=False)
        _quantize(graph, change, samples)
        return _relative(graph(x), model(x))

    # Scales of channels a hundred times apart in one range: most channels have few levels.
    assert loss(reparameterize=True) < 0.5 * loss(reparameterize=False)


def test_weights_are_on_a_grid_for_each_output() -> None:
    model, x = _block()
    graph = _graph(model, x)
    change = QuantizeActivations(3, 32, reparameterize=False)
    _quantize(graph, change, Samples.of([{"x": x}]))
    for site in find_sites(graph):
        for row in graph.weight(site.node):
            assert len(row.unique()) <= 8


def test_the_plan_gives_each_layer_its_width() -> None:
    model, x = _block()
    graph = _graph(model, x)
    graph.plan = {site.weight: Format(4) for site in find_sites(graph)}
    graph.plan = {**graph.plan, "down.weight": Format(8), "head.weight": Format(32)}
    _quantize(graph, QuantizeActivations(attention_bits=32), Samples.of([{"x": x}]))
    widths = {node.args[0].name: node.args[3] for node in graph.find(lam.round_uniform.default)}
    assert sorted(widths.values()) == [4, 4, 4, 8]
    (gelu,) = graph.find(aten.gelu.default)
    assert widths[gelu.name] == 8
    assert torch.equal(graph.weight("head.weight"), model.head.weight)
    assert not graph.plan or set(graph.plan) == {"head.weight"}


def test_onnx_runtime_runs_it() -> None:
    model, x = _block()
    graph = _graph(model, x)
    _quantize(graph, QuantizeActivations(6, 6), Samples.of([{"x": x}]))
    got = torch.as_tensor(OnnxRuntimeBackend().lower(graph)(x))
    # A value on the edge between two codes may fall on either side: a step of 6 bits is 1/64.
    assert _relative(got, graph(x)) < 1e-3


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)


def test_attention_that_cannot_be_written_out_is_told() -> None:
    torch.manual_seed(0)
    x = _drawn(2, 5, 8)
    graph = _graph(_Causal(), x)
    told = " ".join(_quantize(graph, QuantizeActivations(8), Samples.of([{"x": x}])))
    assert "left 1 attentions as they are" in told
    assert "hides later tokens" in told


def _without_plan(graph: Graph) -> None:
    QuantizeActivations().run(graph, Analyses(graph, Samples.of([{"x": _drawn(2, 5, 8)}])))


def _without_samples(graph: Graph) -> None:
    QuantizeActivations(4).run(graph, Analyses(graph))


@pytest.mark.parametrize(
    ("run", "error", "text"),
    [(_without_plan, PassError, "no plan"), (_without_samples, SamplesError, "samples")],
    ids=["plan", "samples"],
)
def test_what_is_missing_is_named(
    run: Callable[[Graph], None], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        run(_graph(_Causal(), _drawn(2, 5, 8)))


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"attention_bits": 20}, {"softmax": "log"}, {"clip": 50.0}, {"rows": 1}],
    ids=lambda options: next(iter(options)),
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        QuantizeActivations(**options)  # type: ignore[arg-type]
