"""What our writer writes, our reader reads: ``read(write(graph))`` computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.ir.graph import Graph
from lamella.ir.onnx import read_onnx
from lamella.ir.packing import pack
from lamella.ir.quantize import integers
from lamella.ir.torch_private import tree_leaves
from lamella.ir.verify import verify
from lamella.rewrite.canonicalize import canonicalize, noncanonical
from tests.zoo.families import FAMILIES

aten = torch.ops.aten
lam = torch.ops.lamella

TOLERANCE = 1e-5
"""Of the largest entry of an output: the same operators, but for spellings of a few."""


def assert_same(one: Graph, other: Graph, family: str) -> None:
    """Two graphs of one family give the same at all sizes it allows."""
    for batch, sequence in FAMILIES[family].sizes():
        inputs = FAMILIES[family].inputs(batch, sequence)
        expected = [leaf for leaf in tree_leaves(one(**inputs)) if isinstance(leaf, Tensor)]
        for got, want in zip(other(**inputs).values(), expected, strict=True):
            assert got.dtype == want.dtype
            atol = TOLERANCE * float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=0, atol=atol)


def kinds(graph: Graph) -> list[list[str]]:
    return [[sublayer.kind for sublayer in block.sublayers] for block in graph.blocks]


@pytest.mark.parametrize(
    "name",
    # The chunks of Mamba 2 have sizes that take sympy half a minute.
    [pytest.param(n, marks=pytest.mark.slow) if n == "mamba2" else n for n in FAMILIES],
)
def test_a_family_is_read_back(name: str, captured: Callable[[str], Graph]):
    graph = captured(name)
    again = read_onnx(write_onnx(graph))
    assert_same(graph, again, name)
    canonicalize(again)
    assert noncanonical(again) == {}
    verify(again)
    assert kinds(again) == kinds(graph)
    assert_same(graph, again, name)


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba", "bert", "vit", "swin"])
def test_a_family_is_read_back_from_older_operators(name: str, captured: Callable[[str], Graph]):
    graph = captured(name)
    again = read_onnx(write_onnx(graph, opset=21, contrib=False))
    canonicalize(again)
    assert noncanonical(again) == {}
    assert kinds(again) == kinds(graph)
    assert_same(graph, again, name)


@pytest.mark.parametrize("name", ["llama", "t5", "resnet"])
def test_weights_keep_names_sizes_and_ties(name: str, captured: Callable[[str], Graph]):
    graph = captured(name)
    again = read_onnx(write_onnx(graph))
    large = {n.target: tuple(graph.weight(n).shape) for n in graph.weight_nodes()
             if graph.weight(n).numel() > 64}  # fmt: skip
    read = {n.target: tuple(again.weight(n).shape) for n in again.weight_nodes()}
    assert {key: read.get(key) for key in large} == large


def test_a_saved_model_is_read_back(tmp_path: Path, captured: Callable[[str], Graph]):
    graph = captured("llama")
    save_model(write_onnx(graph), tmp_path)
    assert_same(graph, read_onnx(tmp_path / MODEL), "llama")


def test_external_weights_are_views_of_the_mapped_file(
    tmp_path: Path, captured: Callable[[str], Graph]
):
    graph, data = captured("llama"), tmp_path / "weights"
    ir.save(write_onnx(graph), tmp_path / MODEL, external_data=data.name, size_threshold_bytes=512)
    again = read_onnx(tmp_path / MODEL)
    assert_same(graph, again, "llama")
    places = [
        again.weight(node).data_ptr()
        for node in again.weight_nodes()
        if again.weight(node).nbytes > 512
    ]
    assert len(places) > 20
    assert max(places) - min(places) < data.stat().st_size


def test_twice_there_and_back_is_once(captured: Callable[[str], Graph]):
    once = read_onnx(write_onnx(captured("bert")))
    canonicalize(once)
    twice = read_onnx(write_onnx(once))
    canonicalize(twice)
    assert str(twice) == str(once)


def quantized(graph: Graph, bits: int, zeros: bool) -> None:
    """Every linear layer, and the table of token embeddings, with random codes of few bits."""
    generator = torch.Generator().manual_seed(bits)

    def drawn(reader: torch.fx.Node) -> dict[str, torch.fx.Node | None]:
        rows, width = graph.weight(reader).shape
        codes = torch.randint(0, 1 << bits, (rows, width // 16, 16), generator=generator)
        zero = torch.randint(0, 1 << bits, (rows, width // 16), generator=generator)
        scales = torch.rand(rows, width // 16, generator=generator) / (1 << bits) / 4
        values = {"packed": pack(codes, bits), "scales": scales}
        values["zero_points"] = pack(zero, bits) if zeros else None
        return {
            key: None if value is None else graph.add_weight(f"{reader.target}_{key}", value)
            for key, value in values.items()
        }

    for node in graph.find(aten.linear.default, aten.embedding.default):
        reader = graph.operand(node, "weight")
        parts = drawn(reader).values()
        if node.target is aten.linear.default:
            rest = (graph.operand(node, "bias"), bits, 16, False)
            call = (lam.linear_nbits.default, graph.operand(node, "input"), *parts, *rest)
        else:
            rest = (graph.operand(node, "indices"), bits, 16, graph.weight(reader).shape[1])
            call = (lam.embedding_nbits.default, *parts, *rest)
        graph.replace(node, graph.call(*call, before=node))
    graph.finish()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_few_bits_stay_packed(bits: int, zeros: bool, captured: Callable[[str], Graph]):
    graph = captured("qwen2")
    quantized(graph, bits, zeros)
    again = read_onnx(write_onnx(graph))
    canonicalize(again)
    for target in (lam.linear_nbits.default, lam.embedding_nbits.default):
        assert len(again.find(target)) == len(graph.find(target))
    assert again.find(aten.linear.default) == []
    assert_same(graph, again, "qwen2")


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_products_of_integers_stay(name: str, per_row: bool, captured: Callable[[str], Graph]):
    graph = captured(name)
    for node in graph.find(aten.linear.default):
        stored = integers(graph.weight(graph.operand(node, "weight")))
        label = graph.operand(node, "weight").target
        codes = graph.add_weight(f"{label}_codes", stored.codes)
        scales = graph.add_weight(f"{label}_scales", stored.scales)
        args = (graph.operand(node, "input"), codes, scales, graph.operand(node, "bias"), per_row)
        graph.replace(node, graph.call(lam.linear_int8.default, *args, before=node))
    graph.finish()
    again = read_onnx(write_onnx(graph))
    canonicalize(again)
    layers = [g.find(lam.linear_int8.default) for g in (graph, again)]
    assert len(layers[1]) == len(layers[0])
    assert all(node.args[4] is per_row for node in layers[1])
    assert again.find(aten.amax.default, aten.round.default) == []
    names = [{str(n.target) for n in g.weight_nodes() if "_codes" in str(n.target)}
             for g in (graph, again)]  # fmt: skip
    assert names[1] == names[0]
    assert_same(graph, again, name)
    # Without the operators of ONNX Runtime the integers are read as what they are made of.
    plain = read_onnx(write_onnx(graph, contrib=False))
    assert_same(graph, plain, name)


def test_model_is_not_changed_by_reading(captured: Callable[[str], Graph]):
    written = write_onnx(captured("gpt2"))
    before = ir.to_proto(written).SerializeToString()
    read_onnx(written)
    assert ir.to_proto(written).SerializeToString() == before
