"""The canonical operators and the facts about them.

After `canonicalize` a graph holds these operators and integer arithmetic on shapes, nothing
else. A rule table (cost, relevance, ONNX emission, …) covers this set; what is outside of it is
one error that lists every gap.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch._ops import OpOverload
from torch.fx import Node

import lamella.ir.adjoint_attention  # pyright: ignore[reportUnusedImport]  (registers)
import lamella.ir.adjoint_operators  # pyright: ignore[reportUnusedImport]  (registers)
import lamella.ir.cached_operators  # pyright: ignore[reportUnusedImport]  (registers)
import lamella.ir.integer_operators  # pyright: ignore[reportUnusedImport]  (registers)
import lamella.ir.rounding_operators  # noqa: F401  # pyright: ignore[reportUnusedImport]

aten = torch.ops.aten
lam = torch.ops.lamella
hf = getattr(torch.ops, "transformers")  # noqa: B009  (a namespace, filled when HF is imported)

Category = Literal[
    "elementwise",
    "view",
    "contraction",
    "attention",
    "normalization",
    "reduction",
    "softmax",
    "indexing",
    "ordering",
    "creation",
    "cast",
    "pooling",
    "scan",
    "shape",
]
Target = Callable[..., Any]


@dataclass(frozen=True)
class OpFacts:
    """What the passes may know about a canonical operator.

    Attributes:
        category: The class of the operator.
        weights: Operands that usually are weights, by schema name.
        linear_in: Operands in which the operator is linear when the others are held fixed.
    """

    category: Category
    weights: tuple[str, ...] = ()
    linear_in: tuple[str, ...] = ()


class _Table:
    """The facts while they are written down."""

    def __init__(self) -> None:
        self.facts: dict[Target, OpFacts] = {}

    def add(self, category: Category, *targets: Target, **more: tuple[str, ...]) -> None:
        self.facts.update((target, OpFacts(category, **more)) for target in targets)


def _facts() -> dict[Target, OpFacts]:
    table = _Table()
    for describe in (_elementwise, _views, _others):
        describe(table.add)
    return table.facts


def _elementwise(add: Callable[..., None]) -> None:
    add("elementwise", aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    add("elementwise", aten.rsub.Scalar, aten.div.Tensor_mode, aten.floor_divide.default)
    add("elementwise", aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor)
    add("elementwise", aten.remainder.Scalar, aten.remainder.Tensor)
    add("elementwise", aten.maximum.default, aten.minimum.default, aten.clamp.default)
    add("elementwise", aten.neg.default, aten.abs.default, aten.sign.default, aten.exp.default)
    add("elementwise", aten.log.default, aten.sqrt.default, aten.rsqrt.default)
    add("elementwise", aten.reciprocal.default, aten.square.default, aten.floor.default)
    add("elementwise", aten.ceil.default, aten.round.default, aten.erf.default)
    add("elementwise", aten.sin.default, aten.cos.default, aten.tanh.default, aten.atan.default)
    add("elementwise", aten.sigmoid.default, aten.relu.default, aten.silu.default)
    add("elementwise", aten.gelu.default, aten.softplus.default, aten.elu.default)
    add("elementwise", aten.leaky_relu.default, aten.hardtanh.default, aten.mish.default)
    add("elementwise", aten.hardswish.default, aten.hardsigmoid.default, aten.log1p.default)
    add("elementwise", aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
    add("elementwise", aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    add("elementwise", aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor)
    add("elementwise", aten.gt.Tensor, aten.ge.Tensor, aten.eq.Scalar, aten.ne.Scalar)
    add("elementwise", aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar)
    add("elementwise", aten.logical_and.default, aten.logical_or.default)
    add("elementwise", aten.logical_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor)
    add("elementwise", aten.bitwise_not.default, aten.isnan.default, aten.prelu.default)
    add("elementwise", aten.threshold_backward.default, linear_in=("grad_output",))
    add("elementwise", lam.rotary_embedding.default, linear_in=("input",))
    add("elementwise", lam.round_uniform.default, lam.round_log.default)


def _views(add: Callable[..., None]) -> None:
    add("view", aten.reshape.default, aten.transpose.int, aten.permute.default)
    add("view", aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
    add("view", aten.expand.default, aten.slice.Tensor, aten.select.int, aten.cat.default)
    add("view", aten.stack.default, aten.split_with_sizes.default, aten.pad.default)
    add("view", aten.repeat.default, aten.repeat_interleave.self_int, aten.roll.default)
    add("view", aten.flip.default, aten.clone.default, aten.constant_pad_nd.default)
    add("view", aten.tril.default, aten.triu.default, aten.pixel_shuffle.default)
    add("view", operator.getitem)


def _others(add: Callable[..., None]) -> None:
    add(
        "contraction",
        aten.linear.default,
        lam.linear_nbits.default,
        lam.linear_int8.default,
        lam.linear_int8_static.default,
        lam.conv_int8.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv_transpose2d.input,
        weights=("weight", "bias", "packed", "scales", "zero_points"),
        linear_in=("input", "weight"),
    )
    add("contraction", aten.matmul.default, aten.einsum.default, linear_in=("self", "other"))
    add("contraction", lam.grouped_linear.default, weights=("weight",), linear_in=("input",))
    add("attention", aten.scaled_dot_product_attention.default, linear_in=("value",))
    add("attention", lam.cached_attention.default, linear_in=("value", "past_value"))
    add("attention", lam.attention_adjoint.default, linear_in=("coefficient",))
    add("attention", lam.attention_value_adjoint.default, linear_in=("coefficient",))
    add("normalization", aten.layer_norm.default, aten.rms_norm.default, weights=("weight", "bias"))
    add("normalization", aten.group_norm.default, weights=("weight", "bias"))
    add(
        "normalization",
        aten.batch_norm.default,
        weights=("weight", "bias", "running_mean", "running_var"),
    )
    add("reduction", aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
    add("reduction", aten.mean.default, aten.sum.default, aten.any.dim, aten.all.dim)
    add("reduction", aten.cumsum.default, aten.argmax.default, aten.prod.dim_int)
    add("reduction", aten.var.correction, aten.linalg_vector_norm.default, aten.histc.default)
    add("softmax", aten.softmax.int, aten.log_softmax.int, linear_in=())
    add("indexing", aten.embedding.default, lam.embedding_nbits.default, weights=("weight",))
    add("indexing", aten.index.Tensor, aten.gather.default, aten.index_select.default)
    add("indexing", aten.index_put.default, aten.scatter.src, aten.scatter.value)
    add("indexing", aten.scatter_add.default, lam.dequantize_nbits.default)
    add("ordering", aten.topk.default, aten.sort.default)
    add("creation", aten.arange.start_step, aten.full.default, aten.scalar_tensor.default)
    add("cast", aten.to.dtype)
    add("pooling", aten.max_pool2d.default, aten.avg_pool2d.default, aten.avg_pool1d.default)
    add("pooling", aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default)
    add("pooling", aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec)
    add("pooling", aten.upsample_bicubic2d.vec)
    add("pooling", aten.max_pool2d_with_indices.default)
    add("scan", lam.selective_scan.default, lam.cached_selective_scan.default)
    add("scan", lam.linear_scan.default)
    add("scan", lam.head_scan.default, lam.cached_head_scan.default)
    add("shape", aten.sym_size.int, operator.add, operator.sub, operator.mul)
    add("shape", operator.floordiv, operator.mod, operator.neg, torch.sym_max, torch.sym_min)


CANONICAL: Mapping[Target, OpFacts] = MappingProxyType(_facts())
"""The canonical operators and their facts."""


def facts(target: Any) -> OpFacts | None:
    """The facts of a canonical operator, or None for what is not canonical."""
    return CANONICAL.get(target)


def is_shape_arithmetic(target: Any) -> bool:
    """Whether `target` computes an integer from shapes."""
    found = CANONICAL.get(target)
    return found is not None and found.category == "shape"


def op_name(target: Any) -> str:
    """The name that people read: ``aten.linear.default``, ``lamella.linear_nbits.default``."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", repr(target))
    return f"{module.lstrip('_')}.{name}" if module else name


@functools.cache
def argument_names(target: Any) -> tuple[str, ...]:
    """The names of the arguments of an operator, from its schema; empty without one."""
    schema = getattr(target, "_schema", None)
    return () if schema is None else tuple(argument.name for argument in schema.arguments)


def argument_defaults(target: Any) -> dict[str, Any]:
    """The default of every argument that has one, from the schema."""
    return dict(_defaults(target))


@functools.cache
def _defaults(target: Any) -> tuple[tuple[str, Any], ...]:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    return tuple((a.name, a.default_value) for a in schema.arguments if a.has_default_value())


def is_inplace(target: Any) -> bool:
    """Whether the operator writes into one of its arguments."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def written_arguments(target: Any) -> tuple[str, ...]:
    """The names of the arguments that the operator writes into, from its schema."""
    arguments = target._schema.arguments if is_inplace(target) else ()
    return tuple(a.name for a in arguments if a.alias_info and a.alias_info.is_write)


def may_return_alias(target: Any) -> bool:
    """Whether the result of the operator may lie in the memory of its first argument."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
        return False
    return any(result.alias_info is not None for result in schema.returns)


_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
        aten.sym_constrain_range.default,
    }
)


def is_assert(target: Any) -> bool:
    """Whether the operator only checks something."""
    return target in _ASSERTS


def is_pure(node: Node) -> bool:
    """Whether `node` may go when nothing reads it.

    fx counts `scaled_dot_product_attention`, dropout and metadata asserts as impure, so that a
    dropped layer would still run. Here an operator is impure only if it writes into an
    argument or really draws random numbers.
    """
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if is_inplace(node.target):
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        bound = bind(node)
        return float(bound.get("dropout_p", 0.0)) == 0.0
    if node.target is aten.dropout.default:
        bound = bind(node)
        return not bound["train"] or bound["p"] == 0
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def bind(node: Node) -> dict[str, Any]:
    """The arguments of `node` by schema name; defaults are filled in."""
    names = argument_names(node.target)
    bound = argument_defaults(node.target)
    bound.update(zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound
