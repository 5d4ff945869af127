"""Quantized graphs: the model with rounded weights, in the bytes that were promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.data import Samples
from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format, dequantized, weight_bytes
from lamella.passes.base import Analyses
from lamella.passes.sites import find_sites
from lamella.passes.transforms.quantize_weights import QuantizeWeights

# The same rounded weights, sums of float32 in another order, through three layers.
_CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def _run(graph: Graph, samples: Samples | None = None, **options: Any) -> Analyses:
    analyses = Analyses(graph, samples)
    QuantizeWeights(**({"min_size": 0} | options)).run(graph, analyses)
    graph.finish()
    return analyses


def _rounded(model: nn.Module, names: dict[str, Format], turned: frozenset[str]) -> nn.Module:
    """`model` with the named parameters rounded."""
    for name, parameter in model.named_parameters():
        if name in names:
            value = parameter.data.mT if name in turned else parameter.data
            value = dequantized(value.contiguous(), names[name])
            parameter.data = value.mT if name in turned else value
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_model_with_rounded_weights(
    family: str,
    bits: int,
    symmetric: bool,
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, inputs = captured(family), sample_inputs(family)
    format = Format(bits, 32, symmetric, torch.float32)
    names = {site.weight: format for site in find_sites(graph)}
    want = _rounded(model(family), names, graph.origin.transposed)
    options = {"symmetric": symmetric, "scales": "float32", "int8_activations": False}
    _run(graph, bits=bits, **options)
    with torch.no_grad():
        torch.testing.assert_close(graph(**inputs)[0], want(**inputs)[0], **_CLOSE)


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize(
    ("bits", "block", "symmetric"), [(2, 32, False), (4, 64, True), (8, 32, True)]
)
def test_bytes_are_those_of_the_formula(
    scales: str, bits: int, block: int, symmetric: bool, captured: Callable[[str], Graph]
) -> None:
    graph = captured("llama")
    before, sites = graph.weight_bytes(), find_sites(graph)
    options = {"bits": bits, "block": block, "symmetric": symmetric, "scales": scales}
    _run(graph, **options)
    format = Format(bits, block, symmetric, getattr(torch, scales))
    stored = sum(weight_bytes(site.shape, format) for site in sites)
    assert graph.weight_bytes() == before - sum(4 * site.size for site in sites) + stored


def test_a_tied_head_reads_the_codes_of_the_embedding(captured: Callable[[str], Graph]) -> None:
    graph = captured("gpt2")
    _run(graph, bits=4)
    (head,) = [n for n in graph.find(lam.linear_nbits.default) if n.meta["val"].shape[-1] == 99]
    tables = graph.find(lam.embedding_nbits.default)
    shared = [table for table in tables if table.args[0] is head.args[1]]
    assert len(shared) == 1
    assert shared[0].args[:3] == head.args[1:4]
    assert not graph.find(aten.linear.default, aten.embedding.default)


def test_embeddings_go_on_in_the_dtype_of_the_model(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    _run(graph, bits=4)
    (table,) = graph.find(lam.embedding_nbits.default)
    assert table.meta["val"].dtype == torch.float16
    (cast,) = table.users
    assert (cast.target, cast.meta["val"].dtype) == (aten.to.dtype, torch.float32)
    graph = captured("llama")
    _run(graph, bits=4, scales="float32")
    assert graph.find(lam.embedding_nbits.default)[0].meta["val"].dtype == torch.float32


def test_activations_are_rounded_when_asked(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    inputs = sample_inputs("llama")
    outputs = {}
    for rounded in (True, False):
        graph = captured("llama")
        _run(graph, bits=8, int8_activations=rounded)
        assert {n.args[-1] for n in graph.find(lam.linear_nbits.default)} == {rounded}
        outputs[rounded] = graph(**inputs)[0]
    assert not torch.equal(outputs[True], outputs[False])


def test_the_plan_is_followed_and_used_up(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    sites = find_sites(graph)
    widths = [2, 4, 8, 32]
    graph.plan = {s.weight: Format(widths[i % 4], 64) for i, s in enumerate(sites)}
    plan = dict(graph.plan)
    _run(graph)
    found = {
        str(n.args[1].target).removesuffix("_packed"): n.args[5]
        for n in graph.find(lam.linear_nbits.default)
    }
    want = {s.weight: plan[s.weight].bits for s in sites if s.role != "embedding"}
    assert found == {name: bits for name, bits in want.items() if bits != 32}
    assert len(graph.find(aten.linear.default)) == list(want.values()).count(32)
    assert graph.plan == {}


def test_a_plan_must_be_there_and_fit(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    with pytest.raises(PassError, match="no plan to follow"):
        _run(graph)
    graph.plan = {"model.layers.9.mlp.up_proj.weight": Format(4)}
    with pytest.raises(PassError, match=r"no longer there: model.layers.9"):
        _run(graph)


def test_a_router_gets_eight_bits(captured: Callable[[str], Graph]) -> None:
    graph = captured("qwen3_moe")
    remarks = " ".join(_run(graph, bits=4).take_remarks())
    bits = {str(n.args[1].target): n.args[5] for n in graph.find(lam.linear_nbits.default)}
    assert {b for name, b in bits.items() if name.endswith("mlp.gate.weight_packed")} == {8}
    assert {b for name, b in bits.items() if not name.endswith("mlp.gate.weight_packed")} == {4}
    assert "experts.gate_up_proj (3 axes in lamella.grouped_linear" in remarks


def test_small_and_odd_weights_stay_and_are_reported(captured: Callable[[str], Graph]) -> None:
    graph = captured("vit")
    remarks = " ".join(_run(graph, bits=4, min_size=2000).take_remarks())
    assert "left as they are" in remarks
    assert "classifier.weight" in remarks
    assert "4 axes in aten.conv2d.default" in remarks
    with pytest.raises(PassError, match="strict"):
        QuantizeWeights(bits=4, min_size=0).run(graph, Analyses(graph, strict=True))
    graph = captured("vit")
    before = graph.edits
    assert "no weight was quantized" in " ".join(_run(graph, bits=4, min_size=10**9).take_remarks())
    assert graph.edits == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(bad: float, captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    node = graph.weight_node("model.layers.1.mlp.up_proj.weight")
    broken = graph.weight(node).clone()
    broken[3, 5] = bad
    graph.set_weight(node, broken)
    with pytest.raises(PassError, match=r"'model.layers.1.mlp.up_proj.weight' .* 1 entries are"):
        _run(graph, bits=4)


def test_inputs_weigh_the_columns(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    samples = Samples.of([sample_inputs("llama", seed=seed) for seed in range(3)])
    inputs = sample_inputs("llama", seed=0)
    errors = {}
    want = captured("llama")(**inputs)[0]
    for weighted in (False, True):
        graph = captured("llama")
        _run(graph, samples, bits=2, by_inputs=weighted, int8_activations=False)
        errors[weighted] = (graph(**inputs)[0] - want).norm()
    assert errors[True] != errors[False]


def test_the_users_weights_stay(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph, inputs = captured("llama"), sample_inputs("llama")
    copy, want = graph.copy(), graph(**inputs)[0]
    _run(graph, bits=2)
    assert torch.equal(copy(**inputs)[0], want)


def test_quantized_operators_keep_their_place(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    kinds = [block.kinds for block in graph.blocks]
    _run(graph, bits=4)
    assert [block.kinds for block in graph.blocks] == kinds
    assert all("nn_module_stack" in n.meta for n in graph.find(lam.linear_nbits.default))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8"),
        ({"bits": 4, "block": 48}, "block must be one of 32, 64, 128"),
        ({"bits": 4, "scales": "bfloat16"}, "scales must be one of"),
        ({"min_size": -1}, "must not be negative"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeWeights(**options)
