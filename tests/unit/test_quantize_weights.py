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
from lamella.passes.times import Times
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
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, or none"),
        ({"bits": 4, "block": 48}, "block must be one of 32, 64, 128, 256"),
        ({"bits": 2, "block": 256}, "block of 2 bits must be one of 32, 64, 128, got 256"),
        ({"bits": 4, "scales": "bfloat16"}, "scales must be one of"),
        ({"min_size": -1}, "must not be negative"),
        ({"bits": 8, "min_rows": -1}, "must not be negative"),
        ({"bits": 8, "activations": "int4"}, "activations must be one of none, int8, int8-rows"),
        ({"bits": 4, "activations": "int8"}, "needs weights of 8 bits, got bits=4"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeWeights(**options)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "t5"])
@pytest.mark.parametrize("activations", ["int8-rows", "int8-tensor"])
def test_layers_with_many_rows_multiply_integers(
    family: str,
    activations: str,
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, inputs = captured(family), sample_inputs(family)
    plain = captured(family)
    _run(plain, bits=8, scales="float32", int8_activations=False)
    _run(graph, bits=8, scales="float32", activations=activations)
    layers = graph.find(lam.linear_int8.default)
    assert len(layers) > 5
    assert {graph.operand(layer, "per_row") for layer in layers} == {activations == "int8-rows"}
    got, want = (one(**inputs)[0] for one in (graph, plain))
    # 255 steps for the inputs of each of a few layers, and for rows of weights instead of blocks.
    assert float((got - want).norm() / want.norm()) < 0.05
    assert float(nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)) > 0.999


def test_layers_with_few_rows_and_shared_codes_stay(captured: Callable[[str], Graph]) -> None:
    graph = captured("bert")
    notes = " ".join(_run(graph, bits=8, activations="int8-rows").take_remarks())
    # The pooler sees the first token only.
    assert "without integer products (fewer than 16 rows): " in notes
    assert "pooler" in notes.split("fewer than 16 rows): ")[1]
    few = [str(n.args[1].target) for n in graph.find(lam.linear_nbits.default)]
    assert [name for name in few if "pooler" not in name] == []
    graph = captured("gpt2")
    notes = " ".join(_run(graph, bits=8, activations="int8-rows").take_remarks())
    assert "an embedding reads the weight): transformer.wte.weight" in notes


def test_the_plan_says_which_layers_may_multiply_integers(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    sites = find_sites(graph)
    graph.plan = {s.weight: Format(4 if "mlp" in s.weight else 8) for s in sites}
    notes = " ".join(_run(graph, activations="int8").take_remarks())
    names = {str(n.args[1].target) for n in graph.find(lam.linear_int8.default)}
    assert names == {
        f"{s.weight}_codes" for s in sites if s.role != "embedding" and "mlp" not in s.weight
    }
    assert "without integer products (stored in 4 bits/32)" in notes
    graph = captured("llama")
    message = "no linear layer multiplies integers: give weights 8 bits"
    assert message in " ".join(
        _run(graph, bits=8, activations="int8", min_rows=10**6).take_remarks()
    )


def test_rows_that_are_alike_share_a_scale(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    samples = Samples.of([sample_inputs("bert", seed=seed) for seed in range(3)])
    graph = captured("bert")
    _run(graph, samples, bits=8, activations="int8")
    assert {n.args[4] for n in graph.find(lam.linear_int8.default)} == {False}
    graph = captured("bert")
    table = max(graph.weight_nodes(), key=lambda n: graph.weight(n).shape[0])
    rows = graph.weight(table).clone()
    # One row of the table is far larger than the others, and the norm after it is gone.
    rows[int(next(iter(samples))["input_ids"][0, 1])] *= 1e4
    graph.set_weight(table, rows)
    (norm, *_) = graph.find(aten.layer_norm.default)
    graph.replace(norm, graph.operand(norm, "input"))
    _run(graph, samples, bits=8, activations="int8")
    assert True in {n.args[4] for n in graph.find(lam.linear_int8.default)}


def test_the_integers_stand_for_the_weight(captured: Callable[[str], Graph]) -> None:
    graph, before = captured("bert"), captured("bert")
    _run(graph, bits=8, activations="int8-rows")
    for node in graph.find(lam.linear_int8.default):
        codes, scales = (graph.weight(graph.operand(node, n)) for n in ("weight", "scales"))
        weight = before.weight(str(graph.operand(node, "weight").target).removesuffix("_codes"))
        # Half a step of the largest entry of the row over 128, or what a clipped entry loses.
        error = (codes * scales[:, None] - weight).abs() / weight.abs().amax(1, keepdim=True)
        assert float(error.max()) < 0.02
        assert float(error.mean()) < 0.25 / 128 + 1e-4


def test_a_broken_weight_of_an_integer_layer_is_named(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    node = graph.weight_node("model.layers.1.mlp.up_proj.weight")
    broken = graph.weight(node).clone()
    broken[3, 5] = float("nan")
    graph.set_weight(node, broken)
    with pytest.raises(PassError, match=r"'model.layers.1.mlp.up_proj.weight' can't be quantized"):
        _run(graph, bits=8, activations="int8-rows")


class ByShape(Times):
    """Integers win where a layer is wide, and only if rounding is shared."""

    merges = False
    cache_bytes = 0

    def seconds(self, kernels):
        return {kernel: self._one(kernel) for kernel in set(kernels)}

    def rest(self, graph, workload):
        return 0.0

    def _one(self, kernel):
        if kernel.kind.startswith("rounding"):
            return 3.0
        wide = kernel.outputs > kernel.inputs
        return 10.0 if kernel.kind == "nbits" else (8.0 if not wide else 2.0)


def test_the_faster_kernel_is_taken_for_each_layer(captured):
    graph = captured("bert")
    analyses = Analyses(graph)
    analyses.times = ByShape()
    QuantizeWeights(bits=8, min_size=0, activations="int8-rows", measure=True).run(graph, analyses)
    graph.finish()
    taken = [tuple(graph.operand(n, "weight").meta["val"].shape)
             for n in graph.find(torch.ops.lamella.linear_int8.default)]  # fmt: skip
    square = {shape for shape in taken if shape[0] == shape[1]}
    # Queries, keys and values share a rounding of 3: 8 + 1 < 10; alone 8 + 3 > 10; wide 2 + 3.
    assert len([shape for shape in taken if shape[0] > shape[1]]) == len(graph.blocks)
    assert len([shape for shape in taken if shape in square]) == 3 * len(graph.blocks)
    assert not [shape for shape in taken if shape[0] < shape[1]]


def test_measuring_needs_somebody_who_measures(captured):
    graph = captured("bert")
    a_pass = QuantizeWeights(bits=8, min_size=0, activations="int8-rows", measure=True)
    with pytest.raises(PassError, match="measured times"):
        a_pass.run(graph, Analyses(graph))
