"""Chains of layers of 8-bit integers with static ranges: what runs between them is part of them.

Layers that read the same codes become one product. An activation behind a product is applied by
it, a residual is added by it, and where only one other layer reads the result, the product gives
its codes. Attention multiplies in bfloat16, and products give that where nothing else reads them.
Kernels that are compiled on this machine take a layer norm behind a residual too, and attention
up to its codes. All of it is for who asks for approximations (see `Kernels.bfloat16`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.torch import chain_kernels as chain
from lamella.backends.torch import kernels, native
from lamella.backends.torch.chain_attention import draw_codes_in, ends_in_attention, only_user
from lamella.backends.torch.held import INTEGERS, NATIVE, Lowered, held, read
from lamella.ir import ops
from lamella.ir.ops import aten, lam


@dataclass(frozen=True)
class _Norm:
    """A layer norm that a product applies to its sum.

    Attributes:
        gain: Node of the factors.
        shift: Node of what is added.
        epsilon: Is added to variances.
        grid: Of the codes of the result.
        keeps_sum: Whether the sum is read elsewhere, and the result as codes alone.
    """

    gain: Node
    shift: Node
    epsilon: float
    grid: chain.Grid
    keeps_sum: bool


@dataclass
class _Product:
    """Layers that read the same codes, and what is drawn into their product.

    Attributes:
        node: Stands for the product until everything is drawn; its arguments are the codes, and
            what is added.
        layers: Arguments of the layers, by name.
        weights: Codes of the layers.
        native: Whether a kernel that is compiled on this machine multiplies.
        output: What it gives.
        activation: What it applies.
        norm: What it applies to the sum.
    """

    node: Node
    layers: list[dict[str, Any]]
    weights: list[Tensor]
    native: bool
    output: chain.Output = chain.FLOAT
    activation: str = chain.NONE
    norm: _Norm | None = None

    @property
    def grid(self) -> chain.Grid:
        """Of the codes that are multiplied."""
        return float(self.layers[0]["step"]), int(self.layers[0]["zero"])

    @property
    def sizes(self) -> list[int]:
        """Outputs of each layer."""
        return [one.shape[0] for one in self.weights]

    @property
    def adds(self) -> bool:
        """Whether something is added."""
        return len(self.node.args) > 1


def lower_chains(state: Lowered) -> None:
    """Replace the layers with static ranges by products, and draw into these what they can do."""
    groups = list(_readers(state))
    if not groups:
        return
    if state.kernels.native:
        state.obstacle = native.obstacle()
    compiled = state.kernels.native and not state.obstacle
    products = [_merged(state, layers, compiled) for layers in groups]
    for product in products:
        _draw_activation(product)
        (_draw_norm if product.native else _draw_sum)(product)
    for product in products:
        _narrow(product)
    for product in products:
        _emit(state, product)
    if compiled:
        draw_codes_in(state)


def _readers(state: Lowered) -> Iterator[list[Node]]:
    """The layers that read the same codes, in the order of the graph."""
    found: dict[tuple[Any, float, int], list[Node]] = {}
    for node in state.module.graph.nodes:
        if node.target is lam.linear_int8_static.default:
            bound = ops.bind(node)
            key = (bound["input"], float(bound["step"]), int(bound["zero"]))
            found.setdefault(key, []).append(node)
    yield from found.values()


def _merged(state: Lowered, layers: list[Node], compiled: bool) -> _Product:
    """One product for some layers that read the same codes, whose results are parts of its."""
    graph, bound = state.module.graph, [ops.bind(layer) for layer in layers]
    weights = [read(state.module, one["weight"]) for one in bound]
    grid = (float(bound[0]["step"]), int(bound[0]["zero"]))
    with graph.inserting_before(layers[0]):
        codes = graph.call_function(chain.codes_of, (bound[0]["input"], *grid))
        node = graph.call_function(chain.product, (codes,))
    fits = weights[0].shape[1] % native.FOUR == 0
    product = _Product(node, bound, weights, compiled and fits)
    for layer, part in zip(layers, _parts(node, layers[0], product.sizes), strict=True):
        layer.replace_all_uses_with(part)
    for layer in layers:
        graph.erase_node(layer)
    return product


def _parts(result: Node, place: Node, sizes: list[int]) -> list[Node]:
    """The parts of a product, one after the other along its last axis; made before `place`."""
    if len(sizes) == 1:
        return [result]
    ends = list(itertools.accumulate(sizes))
    with place.graph.inserting_before(place):
        return [
            place.graph.call_function(aten.slice.Tensor, (result, -1, end - size, end))
            for end, size in zip(ends, sizes, strict=True)
        ]


# ---- what is drawn into a product -------------------------------------------------------------


def _draw_activation(product: _Product) -> None:
    """Let a product apply the activation that alone reads it."""
    reader = only_user(product.node)
    if reader is None:
        return
    if reader.target is aten.gelu.default:
        tanh = ops.bind(reader)["approximate"] == "tanh"
        product.activation = chain.GELU_TANH if tanh else chain.GELU
    elif reader.target is aten.relu.default:
        product.activation = chain.RELU
    else:
        return
    _replace(reader, product.node)


def _draw_sum(product: _Product) -> None:
    """Let a product add what is alone added to it; it is read where the sum was."""
    found = _sum_of(product)
    if found is not None:
        reader, other = found
        # What is added may be computed after the product.
        reader.prepend(product.node)
        product.node.args = (*product.node.args, other)
        _replace(reader, product.node)


def _sum_of(product: _Product) -> tuple[Node, Node] | None:
    """The sum that alone reads a product, and its other part."""
    reader = only_user(product.node)
    if reader is None or reader.target is not aten.add.Tensor or product.activation != chain.NONE:
        return None
    bound = ops.bind(reader)
    others = [one for one in (bound["self"], bound["other"]) if one is not product.node]
    if len(others) != 1 or not isinstance(others[0], Node) or bound["alpha"] != 1:
        return None
    return reader, others[0]


def _draw_norm(product: _Product) -> None:
    """Let a product add what is added to it, and apply the layer norm that reads the sum."""
    found = _sum_of(product)
    norms = [] if found is None else [u for u in found[0].users if _is_norm(u, product)]
    if found is None or len(norms) != 1:
        return
    (total, other), (norm,) = found, norms
    roundings = [user for user in norm.users if user.target is chain.codes_of]
    grids: set[Any] = {one.args[1:] for one in roundings} or {(1.0, 0)}
    keeps_sum = len(total.users) > 1
    if len(grids) != 1 or (keeps_sum and len(roundings) != len(norm.users)):
        return
    bound, (step, zero) = ops.bind(norm), grids.pop()
    affine = (bound["weight"], bound["bias"], float(bound["eps"]))
    product.norm = _Norm(*affine, (step, zero), keeps_sum)
    # What is added may be computed after the product.
    total.prepend(product.node)
    product.node.args = (*product.node.args, other)
    with total.graph.inserting_before(total):
        result, codes = (
            total.graph.call_function(operator.getitem, (product.node, place)) for place in (0, 1)
        )
    for one in roundings:
        _replace(one, codes)
    if keeps_sum:
        total.replace_all_uses_with(result)
        total.graph.erase_node(norm)
    else:
        _replace(norm, result)
    total.graph.erase_node(total)


def _is_norm(node: Node, product: _Product) -> bool:
    """Whether a node is a layer norm of what a product gives, with factors and shifts."""
    if node.target is not aten.layer_norm.default:
        return False
    bound = ops.bind(node)
    affine = isinstance(bound["weight"], Node) and isinstance(bound["bias"], Node)
    return affine and list(bound["normalized_shape"]) == [sum(product.sizes)]


def _narrow(product: _Product) -> None:
    """Let a product give codes or bfloat16 where nothing else is read of it."""
    reader = only_user(product.node)
    if product.adds:
        return
    if reader is not None and reader.target is chain.codes_of:
        arguments: Any = reader.args
        _, step, zero = arguments
        product.output = ("codes", step, zero)
        _replace(reader, product.node)
    elif all(ends_in_attention(user, product.node) for user in product.node.users):
        product.output = ("bfloat16", 1.0, 0)


# ---- the calls --------------------------------------------------------------------------------


def _emit(state: Lowered, product: _Product) -> None:
    """Let the node of a product call its kernel."""
    key = tuple(one["weight"] for one in product.layers)
    scales, biases = (
        [None if one[name] is None else read(state.module, one[name]) for one in product.layers]
        for name in ("scales", "bias")
    )
    scale, bias = _joined(scales, product.sizes), _joined(biases, product.sizes)
    if product.native:
        state.counts[NATIVE] += len(product.layers)
        _emit_native(state, product, key, (scale, bias))
        return
    state.counts[INTEGERS] += len(product.layers)
    name = f"{key[0].target}_chain"
    packed = lambda: kernels.packed_integers(torch.cat(product.weights))  # noqa: E731
    codes, *other = product.node.args
    product.node.args = (
        codes,
        held(state, (*key, INTEGERS), f"{name}_packed", packed),
        held(state, (*key, "scales"), f"{name}_scales", lambda: scale),
        held(state, (*key, "bias"), f"{name}_bias", lambda: bias),
        product.grid,
        product.output,
        product.activation,
        other[0] if other else None,
    )


def _emit_native(
    state: Lowered, product: _Product, key: tuple[Node, ...], vectors: tuple[Tensor, Tensor]
) -> None:
    made = native.packed(torch.cat(product.weights), *vectors, product.grid)
    # Layers may share a weight and read codes of other grids.
    name = f"{key[0].target}_native{len(state.held)}"
    names = {"panels": (), "start": product.grid, "slopes": product.grid, "bias": ()}
    operands = tuple(
        held(state, (*key, grid, NATIVE, part), f"{name}_{part}", lambda one=one: one)
        for (part, grid), one in zip(names.items(), made, strict=True)
    )
    node, norm = product.node, product.norm
    if norm is None:
        node.target = native.product
        node.args = (node.args[0], operands, sum(product.sizes), product.output, product.activation)
        return
    codes, other = node.args
    node.target = native.product_norm
    affine = (norm.gain, norm.shift, norm.epsilon)
    node.args = (codes, operands, other, *affine, norm.grid, norm.keeps_sum)


def _joined(parts: list[Tensor | None], sizes: list[int]) -> Tensor:
    """Vectors one after the other, zeros for those that are None."""
    pairs = zip(parts, sizes, strict=True)
    return torch.cat([torch.zeros(size) if one is None else one.float() for one, size in pairs])


def _replace(node: Node, by: Node) -> None:
    """Let `by` be read instead of `node`, which goes."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
