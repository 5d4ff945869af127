"""Every pass on every family: verified afterwards, and compared with an independent run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.data import Samples
from lamella.errors import PassError
from lamella.ir.cache import Slot
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.quantize import Format, dequantized, weight_bytes
from lamella.ir.stream import Sublayer
from lamella.ir.torch_private import tree_leaves
from lamella.ir.verify import verify
from lamella.passes.base import Analyses, Transform
from lamella.passes.sites import find_sites, tie_groups
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.transforms.blend_weights import BlendWeights
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.drop_sublayers import DropSublayers
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.passes.transforms.quantize_cache import QuantizeCache
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.passes.transforms.restore_blocks import RestoreBlocks
from lamella.rewrite.incremental import incremental
from tests.conftest import family_of

Inputs = Mapping[str, Tensor]


def _run(graph: Graph, a_pass: Transform, samples: Samples | None = None) -> None:
    analyses = Analyses(graph, samples)
    a_pass.run(graph, analyses)
    graph.finish()
    verify(graph)


def _assert_same(got: Any, want: Any) -> None:
    """Equal up to the rounding of float32, relative to the size of each output."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    assert any(isinstance(one, Tensor) for one, _ in pairs)
    for one, two in pairs:
        if isinstance(two, Tensor) and two.is_floating_point():
            scale = float(two.abs().max()) or 1.0
            # A dozen layers of sums of up to 64 products in another order.
            torch.testing.assert_close(one, two, rtol=0, atol=2e-5 * scale)


class _Skipping(fx.Interpreter):
    """Runs a graph in which some nodes have the value of another."""

    def __init__(self, graph: Graph, instead: Mapping[Node, Node]) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self._instead = instead

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return self.env[self._instead[n]] if n in self._instead else value


def _without(graph: Graph, parts: list[Sublayer], inputs: Inputs) -> Any:
    """The outputs of `graph` when the stream behind each part is its shortcut."""
    instead: dict[Node, Node] = {}
    for part in parts:
        # An arm of a parallel block ends at the sum of the arms, not at the stream.
        instead[part.add if len(part.adds) > 1 else part.exit] = part.shortcut
    values = graph.signature.flatten((), inputs)
    with torch.no_grad():
        return graph.signature.unflatten(_Skipping(graph, instead).run(*values))


def _operators(graph: Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def test_fold_norms(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, before = captured(family), captured(family)
    _run(graph, FoldNorms())
    for batch, sequence in family_of(family).sizes()[:2]:
        inputs = sample_inputs(family, batch, sequence)
        _assert_same(graph(**inputs), before(**inputs))


def _parts_to_drop(graph: Graph) -> list[Sublayer]:
    """The first and the last droppable branch of each kind."""
    parts = [part for part in graph.stream.sublayers if part.droppable]
    kinds = dict.fromkeys(part.kind for part in parts)
    same = [[part for part in parts if part.kind == kind] for kind in kinds]
    return list(dict.fromkeys(part for found in same for part in (found[0], found[-1])))


def test_drop_sublayers(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    before = captured(family)
    for index in [part.index for part in _parts_to_drop(before)]:
        graph = captured(family)
        _run(graph, DropSublayers(sublayers=(index,)))
        part = before.stream.sublayers[index]
        assert len(graph.stream.sublayers) == len(before.stream.sublayers) - 1
        assert graph.weight_bytes() < before.weight_bytes()
        for batch, sequence in family_of(family).sizes()[:2]:
            inputs = sample_inputs(family, batch, sequence)
            _assert_same(graph(**inputs), _without(before, [part], inputs))


def test_drop_blocks(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    before = captured(family)
    blocks = [block for block in before.blocks if block.droppable]
    for block in (blocks[0], blocks[-1]):
        graph = captured(family)
        _run(graph, DropBlocks(blocks=(block.index,)))
        assert len(graph.blocks) == len(before.blocks) - 1
        inside = Counter(str(n.target) for n in block.nodes if n.op == "call_function")
        gone = _operators(before) - _operators(graph)
        # What the block computes from sizes may be shared, and masks of other blocks stay.
        heavy = {t for t in inside if "linear" in t or "attention" in t or "conv" in t}
        assert all(gone[target] >= inside[target] for target in heavy)
        assert graph.weight_bytes() < before.weight_bytes()
        inputs = sample_inputs(family)
        _assert_same(graph(**inputs), _without(before, list(block.sublayers), inputs))


def test_drop_by_score(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph = captured(family)
    samples = Samples.of([sample_inputs(family, seed=seed) for seed in range(2)])
    count = len(graph.stream.sublayers)
    options: dict[str, Any] = {"count": 2, "keep_first": 0, "keep_last": 0}
    _run(graph, DropSublayers(iterative=True, **options), samples)
    assert len(graph.stream.sublayers) == count - 2
    _run(graph, DropBlocks(count=1, by="size", keep_first=0, keep_last=0), samples)
    assert all(torch.isfinite(leaf).all() for leaf in _floats(graph(**sample_inputs(family))))


def _floats(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    return [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]


def _with_rounded_weights(graph: Graph, plan: Mapping[str, Format]) -> Graph:
    for site in find_sites(graph):
        if site.weight in plan:
            value = graph.weight(site.node)
            graph.set_weight(site.node, dequantized(value, plan[site.weight]))
    return graph


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_weights(
    bits: int,
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, before = captured(family), captured(family)
    sites = find_sites(before)
    options: dict[str, Any] = {"bits": bits, "min_size": 0, "scales": "float32"}
    _run(graph, QuantizeWeights(symmetric=bits == 8, int8_activations=False, **options))
    widths = {s.weight: max(bits, 8) if s.role == "router" else bits for s in sites}
    plan = {name: Format(b, 32, bits == 8, torch.float32) for name, b in widths.items()}
    inputs = sample_inputs(family)
    _assert_same(graph(**inputs), _with_rounded_weights(before, plan)(**inputs))
    quantized = graph.find(lam.linear_nbits.default, lam.embedding_nbits.default)
    assert len(quantized) == sum(len(site.readers) for site in sites)


def test_a_plan_from_budget_to_bytes(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph = captured(family)
    sites, before = find_sites(graph), graph.weight_bytes()
    least: dict[str, Any] = {"embedding_min": 2, "head_min": 2, "min_size": 0}
    _run(graph, AllocateBits(budget=6, by="weight-error", **least))
    plan = dict(graph.plan)
    assert all(len({plan[site.weight] for site in group}) == 1 for group in tie_groups(sites))
    stored = sum(weight_bytes(site.shape, plan[site.weight]) for site in sites)
    assert 8 * stored <= 6 * sum(site.size for site in sites)
    _run(graph, QuantizeWeights())
    rest = before - sum(site.size * site.dtype.itemsize for site in sites)
    assert graph.weight_bytes() == stored + rest
    assert all(torch.isfinite(leaf).all() for leaf in _floats(graph(**sample_inputs(family))))


def test_blend_and_restore(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, other, want = captured(family), captured(family), captured(family)
    for node in other.weight_nodes():
        if _is_stored(other, node):
            other.set_weight(node, other.weight(node) * 0.5)
            want.set_weight(want.weight_node(str(node.target)), other.weight(node) * 1.5)
    inputs = sample_inputs(family)
    _run(graph, BlendWeights(other, ratio=0.5))
    _assert_same(graph(**inputs), want(**inputs))
    blocks = [block.index for block in graph.blocks]
    _run(graph, RestoreBlocks(other, blocks=tuple(blocks)))
    inside = {str(n.target) for b in graph.blocks for n in b.nodes if n.op == "get_attr"}
    for node in graph.weight_nodes():
        name = str(node.target)
        if name in inside and _is_stored(graph, node):
            assert torch.equal(graph.weight(node), other.weight(name))


def _is_stored(graph: Graph, node: Node) -> bool:
    name = str(node.target)
    follows = name in graph.origin.constants or name.startswith("constant_folded")
    return node.meta["val"].is_floating_point() and not follows


def test_passes_one_after_the_other(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph = captured(family)
    droppable = [block.index for block in graph.blocks if block.droppable]
    pipeline: list[Transform] = [
        FoldNorms(),
        DropBlocks(blocks=(droppable[-1],)),
        AllocateBits(budget=6, by="size", embedding_min=2, head_min=2, min_size=0),
        QuantizeWeights(),
    ]
    for a_pass in pipeline:
        _run(graph, a_pass)
    for batch, sequence in family_of(family).sizes():
        outputs = _floats(graph(**sample_inputs(family, batch, sequence)))
        assert all(torch.isfinite(leaf).all() for leaf in outputs)
    with pytest.raises(PassError, match=r"has to come first|another architecture"):
        BlendWeights(captured(family)).run(graph, Analyses(graph))


class _Rounding(fx.Interpreter):
    """Runs a graph; rounds what some attentions read as keys and values, or finds scales."""

    def __init__(self, graph: Graph, attentions: set[str], scales: dict[str, list[Tensor]]) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self._attentions, self.scales = attentions, scales
        self._known = bool(scales)

    def run_node(self, n: Node) -> Any:
        if n.name not in self._attentions:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        query, *rows = args[:3]
        if not self._known:
            self.scales[n.name] = [one.abs().amax((0, 2), keepdim=True) / 127 for one in rows]
        else:
            steps = zip(rows, self.scales[n.name], strict=True)
            rows = [(one / step).round().clamp(-128, 127) * step for one, step in steps]
        return self.call_function(n.target, (query, *rows, *args[3:]), kwargs)  # pyright: ignore[reportArgumentType]


_KEEPING = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "opt")
_KEEPING += ("t5", "bart", "whisper", "pix2struct")
"""Decoders whose self-attention is one operator; that of Gemma 2 is written out."""


def test_quantize_cache(
    family: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    """Keys and values of decoders are rounded where attention reads them; nothing else is."""
    graph, before, inputs = captured(family), captured(family), sample_inputs(family)
    if family not in _KEEPING:
        with pytest.raises(PassError, match=r"nothing to quantize"):
            QuantizeCache().run(graph, Analyses(graph, [inputs]))
        return
    _run(graph, QuantizeCache(), [inputs])
    rounded = {
        node.name
        for node in graph.find(torch.ops.aten.scaled_dot_product_attention.default)
        if graph.operand(node, "key").target is lam.round_uniform.default
    }
    values = before.signature.flatten((), inputs)
    with torch.no_grad():
        first = _Rounding(before, rounded, {})
        first.run(*values)
        want = _Rounding(before, rounded, first.scales).run(*values)
    _assert_same(graph(**inputs), before.signature.unflatten(want))
    assert {slot.dtype for slot in _slots(graph)} == {"int8"}


def _slots(graph: Graph) -> list[Slot]:
    layout = incremental(graph).step.cache
    assert layout is not None
    return [slot for slot in layout.slots if slot.grows]
