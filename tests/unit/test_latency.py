"""Predicted times: kernels of graphs, hand-made tables, budgets in milliseconds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from lamella.errors import BudgetError, PassError
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.allocation.budget import Budget
from lamella.passes.analyses.latency import Latency
from lamella.passes.base import Analyses
from lamella.passes.products import kernels_of, products_of
from lamella.passes.scores import bit_score
from lamella.passes.sites import find_sites, tie_groups
from lamella.passes.times import Kernel, Table, Times, Workload, stored
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from tests.unit.planted import network

_TINY: dict[str, Any] = {"min_size": 0, "by": "weight-error", "embedding_min": 2, "head_min": 2}
NO_CACHE = 0


def _as_language_model(graph: Graph) -> Graph:
    """A graph captured from a module, taken for one that transformers would generate with."""
    origin = graph.origin
    graph.origin = type(origin)(
        kind="transformers", config={"max_position_embeddings": 512}, generation={}
    )
    return graph


class Formula(Times):
    """A time for every kernel, from a formula that a test can repeat."""

    def __init__(self, merges: bool = True, rest_seconds: float = 1e-3) -> None:
        self.merges, self.cache_bytes, self.rest_seconds = merges, NO_CACHE, rest_seconds
        self.asked: list[Kernel] = []

    def seconds(self, kernels: Any) -> dict[Kernel, float]:
        wanted = list(kernels)
        self.asked += wanted
        return {kernel: self.of(kernel) for kernel in wanted}

    def rest(self, graph: Graph, workload: Workload) -> float:
        return self.rest_seconds

    @staticmethod
    def of(kernel: Kernel) -> float:
        bits = kernel.bits or 32
        # A price that neither bytes nor bits explain: two bits are slow with many rows.
        per_row = 3.0 if bits == 2 else 1.0
        return (
            1e-6 + 1e-9 * kernel.outputs * kernel.inputs * bits / 32 + 1e-6 * per_row * kernel.rows
        )


# ---- kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel("linear", 768, 1280, 1),
        Kernel("linear", 768, 1280, 16, "float16", cold=False),
        Kernel("nbits", 768, 1280, 1, "float32", 4, 32),
        Kernel("nbits", 768, 1280, 128, "float32", 2, 128, symmetric=False),
        Kernel("int8-rows", 768, 1280, 128),
        Kernel("rounding-tensor", 768, 0, 128, cold=False),
    ],
)
def test_a_kernel_as_text_and_back(kernel: Kernel) -> None:
    assert Kernel.parse(str(kernel)) == kernel


@pytest.mark.parametrize("text", ["", "gemm 1x1 float32 rows=1 cold", "linear 1x1 float32 rows=1"])
def test_other_text_is_no_kernel(text: str) -> None:
    with pytest.raises(ValueError, match="no kernel is written"):
        Kernel.parse(text)


def test_bytes_of_kernels() -> None:
    assert Kernel("linear", 64, 10, 1).weight_bytes == 64 * 10 * 4
    assert Kernel("linear", 64, 10, 1, "float16").weight_bytes == 64 * 10 * 2
    # 70 columns are 3 blocks of 32, 16 bytes of codes and a scale of 4 bytes each.
    assert Kernel("nbits", 70, 10, 1, "float32", 4, 32).weight_bytes == 10 * 3 * 20
    assert Kernel("int8-rows", 64, 10, 1).weight_bytes == 640


def test_kernels_of_a_decoder_are_merged(captured: Callable[[str], Graph]) -> None:
    graph = _as_language_model(captured("llama"))
    times = Formula()
    workload = Workload.of(graph)
    assert workload == Workload(batch=1, tokens=1, past=128)
    products = products_of(graph, workload, times)
    shapes = {p.weight: (p.kernel.inputs, p.kernel.outputs) for p in products}
    assert {p.kernel.rows for p in products} == {1}
    merged = kernels_of(products, merged=True)
    apart = kernels_of(products, merged=False)
    # Queries, keys and values are one product, gate and up another: 4 of 7, and the head.
    blocks = len(graph.blocks)
    assert (merged.total(), apart.total()) == (4 * blocks + 1, 7 * blocks + 1)
    name = "model.layers.0.self_attn.{}_proj.weight"
    (width, _), *_ = [shapes[name.format(p)] for p in "qkv"]
    wide = sum(shapes[name.format(p)][1] for p in "qkv")
    assert merged[Kernel("linear", width, wide, 1)] == blocks
    # Layers in different formats are not merged.
    plan = {name.format("q"): Format(8)}
    split = kernels_of(products, merged=True, plan=plan)
    assert split.total() == merged.total() + 1
    assert split[stored(Kernel("linear", *shapes[name.format("q")], 1), Format(8))] == 1


def test_rows_follow_the_call(captured: Callable[[str], Graph]) -> None:
    graph, times = _as_language_model(captured("llama")), Formula()
    decode = products_of(graph, Workload.of(graph, rows=5), times)
    assert {p.kernel.rows for p in decode} == {5}
    prompt = products_of(graph, Workload.of(graph, rows=20, past=0), times)
    *others, head = [p.kernel.rows for p in prompt]
    assert (set(others), head) == ({20}, 1)
    encoder = captured("bert")
    whole = products_of(encoder, Workload.of(encoder, rows=7), times)
    assert {p.kernel.rows for p in whole} <= {7, 1}
    assert Counter(p.kernel.rows for p in whole)[7] >= 6 * len(encoder.blocks)


def test_a_stored_graph_has_the_kernels_of_its_plan(captured: Callable[[str], Graph]) -> None:
    graph, times = _as_language_model(captured("llama")), Formula()
    workload = Workload.of(graph)
    plan = {site.weight: Format(4) for site in find_sites(graph)}
    expected = kernels_of(products_of(graph, workload, times), True, plan)
    QuantizeWeights(bits=4, min_size=0).run(graph, Analyses(graph))
    graph.finish()
    assert kernels_of(products_of(graph, workload, times), True) == expected


def test_integers_are_rounded_once_for_all_their_readers(captured: Callable[[str], Graph]) -> None:
    graph, times = captured("bert"), Formula()
    a_pass = QuantizeWeights(bits=8, min_size=0, activations="int8-rows", min_rows=0)
    a_pass.run(graph, Analyses(graph))
    graph.finish()
    counts = kernels_of(products_of(graph, Workload.of(graph, rows=16), times), False)
    by_kind = Counter[str]()
    for kernel, count in counts.items():
        by_kind[kernel.kind] += count
    blocks = len(graph.blocks)
    # Queries, keys and values share the rounded input: 6 products and 4 roundings of a block.
    assert by_kind["int8-rows"] - by_kind["rounding-rows"] == 2 * blocks


def test_weights_that_a_cache_holds_are_warm(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    for size, cold in ((0, True), (10**9, False)):
        products = products_of(graph, Workload(), Table({}, cache_bytes=size))
        assert {p.kernel.cold for p in products} == {cold}


# ---- predictions ------------------------------------------------------------------------


def test_the_prediction_is_the_sum_of_the_table(captured: Callable[[str], Graph]) -> None:
    graph = _as_language_model(captured("llama"))
    sizes = {site.weight: site.shape for site in find_sites(graph)}
    kernels: dict[Kernel, float] = {}
    expected = 5e-4
    seconds = (1e-6 * n for n in itertools.count(1))
    for layer in range(len(graph.blocks)):
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ):
            shapes = [sizes[f"model.layers.{layer}.{name}.weight"] for name in names]
            kernel = Kernel("linear", shapes[0][1], sum(out for out, _ in shapes), 1)
            if kernel not in kernels:
                kernels[kernel] = next(seconds)
            expected += kernels[kernel]
    out, inputs = sizes["lm_head.weight"]
    head = Kernel("linear", inputs, out, 1)
    kernels.setdefault(head, next(seconds))
    expected += kernels[head]
    analyses = Analyses(graph)
    analyses.times = Table(kernels, rest_seconds=5e-4)
    report = analyses.get(Latency())
    # The same numbers in another order.
    assert report.seconds == pytest.approx(expected, rel=1e-12)
    assert report.rest_seconds == 5e-4
    assert report.kernel_seconds == pytest.approx(expected - 5e-4, rel=1e-9)
    longest = [share.count * share.seconds for share in report.kernels]
    assert longest == sorted(longest, reverse=True)


def test_without_times_there_is_no_prediction(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    with pytest.raises(PassError, match="needs measured times"):
        Analyses(graph).get(Latency())
    with pytest.raises(PassError, match="a budget in milliseconds needs measured times"):
        AllocateBits(budget="3ms", **_TINY).run(graph, Analyses(graph))
    analyses = Analyses(graph)
    analyses.times = Table({})
    with pytest.raises(PassError, match="the table has no time for linear"):
        analyses.get(Latency())


def test_sizes_that_there_are_not(captured: Callable[[str], Graph]) -> None:
    with pytest.raises(ValueError, match="rows must be at least 1"):
        Latency(rows=0)
    with pytest.raises(ValueError, match="past must not be negative"):
        AllocateBits(budget="3ms", past=-1)
    with pytest.raises(ValueError, match="this one has no cache"):
        Workload.of(captured("bert"), past=5)


# ---- budgets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "seconds"),
    [("3.2ms", "", 3.2e-3), (3.2, "ms", 3.2e-3), ("250 us", "", 2.5e-4), (2, "s", 2.0)],
)
def test_budgets_in_time(text: Any, unit: str, seconds: float) -> None:
    budget = Budget.parse(text, unit)
    assert budget.unit == "seconds"
    # Products of two decimal fractions.
    assert budget.seconds == pytest.approx(seconds, rel=1e-12)


def test_units_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"unit 'mss'; did you mean 'ms'.* known are bits, %, "):
        AllocateBits(budget="3.2mss")
    with pytest.raises(ValueError, match="'parsec'; known are"):
        AllocateBits(budget=3.2, unit="parsec")
    with pytest.raises(ValueError, match="one unit, got '3ms' and unit=ms"):
        AllocateBits(budget="3ms", unit="ms")
    with pytest.raises(ValueError, match="rows and past say what a budget in milliseconds"):
        AllocateBits(budget=4.5, rows=16)
    assert Budget.parse(12, "MB").unit == "bytes"


def _losses(graph: Graph) -> dict[str, dict[Format, float]]:
    formats = [Format(bits) for bits in (2, 4, 8)]
    found = Analyses(graph).get(bit_score("weight-error", formats)).losses
    return {name: dict(of) for name, of in found.items()}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_the_plan_is_the_best_of_all_within_the_time(share: float, rows: int) -> None:
    graph, times = network(), Formula()
    sites = find_sites(graph)
    groups = tie_groups(sites)
    assert len(groups) == 4
    formats = [Format(bits) for bits in (2, 4, 8)]
    losses = _losses(graph)
    products = products_of(graph, Workload(1, rows), times)

    def seconds(plan: dict[str, Format]) -> float:
        counts = kernels_of(products, merged=False, plan=plan)
        return times.rest_seconds + sum(n * Formula.of(k) for k, n in counts.items())

    def loss(plan: dict[str, Format]) -> float:
        return sum(losses[name][f] for name, f in plan.items())

    every = [
        {s.weight: f for g, f in zip(groups, choice, strict=True) for s in g}
        for choice in itertools.product(formats, repeat=len(groups))
    ]
    fastest, slowest = min(map(seconds, every)), max(map(seconds, every))
    budget = fastest + share * (slowest - fastest) + 1e-6
    best = min(loss(plan) for plan in every if seconds(plan) <= budget)
    analyses = Analyses(graph)
    analyses.times = times
    options = {"budget": f"{budget * 1e3:.9f}ms", "rows": rows, "block": 32, **_TINY}
    AllocateBits(**options).run(graph, analyses)
    # Prices are rounded to a tenth of a microsecond each.
    assert seconds(dict(graph.plan)) <= budget + 1e-7 * len(groups)
    # Sums of the same numbers; a plan within the rounding of prices may be better than `best`.
    assert loss(dict(graph.plan)) <= best * (1 + 1e-9)


def test_an_impossible_time_names_the_smallest(captured: Callable[[str], Graph]) -> None:
    graph = _as_language_model(captured("llama"))
    analyses = Analyses(graph)
    analyses.times = Formula()
    with pytest.raises(BudgetError, match=r"a budget of 0.1 ms; the smallest .* ms$") as caught:
        AllocateBits(budget=0.1, unit="ms", **_TINY).run(graph, analyses)
    smallest = str(caught.value).split(" is ")[-1]
    AllocateBits(budget=smallest, **_TINY).run(graph, analyses)
    assert analyses.times.asked
    found = Analyses(graph)
    found.times = analyses.times
    assert len(graph.plan) == len(find_sites(graph))


def test_the_report_says_what_was_predicted_and_measured(captured: Callable[[str], Graph]) -> None:
    class Told(Formula):
        def take_notes(self) -> tuple[str, ...]:
            return ("measured 7 kernels in 1.5 s",)

        def take_problems(self) -> tuple[str, ...]:
            return ("a file is corrupt",)

    graph = _as_language_model(captured("llama"))
    analyses = Analyses(graph)
    analyses.times = Told()
    AllocateBits(budget="100ms", past=16, **_TINY).run(graph, analyses)
    remarks = analyses.take_remarks()
    assert "measured 7 kernels in 1.5 s" in remarks
    assert "a file is corrupt" in remarks
    (told,) = [text for text in remarks if "predicted loss" in text]
    assert "predicted for batch=1 tokens=1 past=16" in told
    analyses = Analyses(graph, strict=True)
    analyses.times = Told()
    with pytest.raises(PassError, match="strict=True"):
        AllocateBits(budget="100ms", **_TINY).run(graph, analyses)


def test_slow_formats_are_not_taken_for_many_rows(captured: Callable[[str], Graph]) -> None:
    """Two bits are dearer than four from many rows on: with any budget four are taken."""
    graph = captured("bert")
    analyses = Analyses(graph)
    analyses.times = Formula()
    AllocateBits(budget="1s", rows=10**4, choices=(2, 4), **_TINY).run(graph, analyses)
    linear = [s.weight for s in find_sites(graph) if s.role != "embedding"]
    assert {graph.plan[name].bits for name in linear} == {4}
