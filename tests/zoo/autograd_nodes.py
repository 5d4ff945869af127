"""The nodes that autograd records for a model, and which of them relevance passes.

The model itself runs (not our graph of it), inputs and what embeddings give for integers require
gradients, weights do not, and every node is counted that can be reached from the first output, but
the leaves (`count_as_published` counts those, too). A node is covered if

* it belongs to an operator that has a rule in the preset, and
* relevance really passed it: a sweep reached it with a coefficient that is finite and not zero.
  Under the preset ``gradient`` coefficients are gradients, so the backward of autograd tells.

References:
    [Lee2025], section 7.1, which asks for the rule only.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from lamella.ir.ops import aten, lam
from lamella.ir.torch_private import tree_leaves
from tests.instead import Instead
from tests.zoo.families import Inputs

_RULES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0"), (aten.reshape.default,)),
    **dict.fromkeys(("ReshapeAliasBackward0", "AliasBackward0"), (aten.reshape.default,)),
    **dict.fromkeys(("TransposeBackward0", "TBackward0"), (aten.transpose.int,)),
    **dict.fromkeys(
        ("SplitBackward0", "SplitWithSizesBackward0"), (aten.split_with_sizes.default,)
    ),
    # A linear layer is a product of matrices; one of two activations has the rule of a product.
    **dict.fromkeys(("MmBackward0", "AddmmBackward0"), (aten.linear.default, aten.matmul.default)),
    "BmmBackward0": (aten.matmul.default,),
    "MulBackward0": (aten.mul.Tensor,),
    "AddBackward0": (aten.add.Tensor,),
    "SubBackward0": (aten.sub.Tensor,),
    "DivBackward0": (aten.div.Tensor,),
    "NegBackward0": (aten.neg.default,),
    "PowBackward0": (aten.pow.Tensor_Scalar,),
    "RsqrtBackward0": (aten.rsqrt.default,),
    "ExpBackward0": (aten.exp.default,),
    "TanhBackward0": (aten.tanh.default,),
    "SigmoidBackward0": (aten.sigmoid.default,),
    "SoftplusBackward0": (aten.softplus.default,),
    "ReluBackward0": (aten.relu.default,),
    "SiluBackward0": (aten.silu.default,),
    "GeluBackward0": (aten.gelu.default,),
    "ClampBackward1": (aten.clamp.default,),
    "MaskedFillBackward0": (aten.masked_fill.Scalar,),
    "CloneBackward0": (aten.clone.default,),
    "UnsqueezeBackward0": (aten.unsqueeze.default,),
    "SqueezeBackward1": (aten.squeeze.dim,),
    "SliceBackward0": (aten.slice.Tensor,),
    "SelectBackward0": (aten.select.int,),
    "UnbindBackward0": (aten.select.int,),
    "PermuteBackward0": (aten.permute.default,),
    "ExpandBackward0": (aten.expand.default,),
    "CatBackward0": (aten.cat.default,),
    "StackBackward0": (aten.stack.default,),
    "RollBackward0": (aten.roll.default,),
    "ConstantPadNdBackward0": (aten.pad.default,),
    # Inside of pooling over one axis, which is written as pooling over two.
    "AsStridedBackward1": (aten.adaptive_avg_pool1d.default,),
    "AdaptiveAvgPool2DBackward0": (aten.adaptive_avg_pool2d.default,),
    "MeanBackward1": (aten.mean.dim,),
    "SumBackward1": (aten.sum.dim_IntList,),
    "CumsumBackward0": (aten.cumsum.default,),
    "SoftmaxBackward0": (aten.softmax.int,),
    "IndexBackward0": (aten.index.Tensor,),
    "GatherBackward0": (aten.gather.default,),
    "TopkBackward0": (aten.topk.default,),
    "NativeLayerNormBackward0": (aten.layer_norm.default,),
    "NativeGroupNormBackward0": (aten.group_norm.default,),
    "NativeBatchNormBackward0": (aten.batch_norm.default,),
    "ConvolutionBackward0": (aten.conv1d.default, aten.conv2d.default),
    "MaxPool2DWithIndicesBackward0": (aten.max_pool2d_with_indices.default,),
    "ScaledDotProductFlashAttentionForCpuBackward0": (aten.scaled_dot_product_attention.default,),
    "GroupedMmBackward0": (lam.grouped_linear.default,),
    # Only where weights require gradients, too.
    "EmbeddingBackward0": (aten.embedding.default,),
    "RepeatBackward0": (aten.repeat.default,),
    "WhereBackward0": (aten.where.self,),
    "MulBackward1": (aten.mul.Tensor,),
    "SafeSoftmaxBackward0": (aten.softmax.int,),
    # The canonical form of a weight norm is a product.
    "WeightNormInterfaceBackward0": (
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.linalg_vector_norm.default,
    ),
}

RULES: Mapping[str, tuple[Any, ...]] = MappingProxyType(_RULES)
"""Kind of node -> the canonical operators that compute it, each of which must have a rule."""


@dataclass(frozen=True)
class Count:
    """Nodes of one model.

    Attributes:
        nodes: How many there are.
        without_rule: Those of operators that have no rule, by kind.
        not_passed: Those that no relevance passed, by kind.
    """

    nodes: int
    without_rule: Counter[str]
    not_passed: Counter[str]


def count_nodes(model: nn.Module, inputs: Inputs, has_rule: Callable[[Any], bool]) -> Count:
    """Run a model forward and back, and look at every node."""
    output = _first_output(model.requires_grad_(False), inputs)
    nodes = [node for node in _walk(output.grad_fn) if node.name() != _LEAF]
    passed: set[Any] = set()

    def seen(node: Any) -> Callable[..., None]:
        def hook(_: Any, gradients: tuple[Tensor | None, ...]) -> None:
            given = [one for one in gradients if one is not None]
            if any(bool(one.any()) and bool(one.isfinite().all()) for one in given):
                passed.add(node)

        return hook

    handles = [node.register_hook(seen(node)) for node in nodes]
    generator = torch.Generator().manual_seed(3)
    output.backward(torch.randn(output.shape, generator=generator))
    for handle in handles:
        handle.remove()
    return Count(
        len(nodes),
        Counter(node.name() for node in nodes if not _is_covered(node.name(), has_rule)),
        Counter(node.name() for node in nodes if node not in passed),
    )


def count_as_published(
    model: nn.Module, inputs: Inputs, has_rule: Callable[[Any], bool]
) -> tuple[int, Counter[str]]:
    """All nodes, and those of operators that have no rule, as [Lee2025] counts.

    Weights require gradients too, leaves and what leads to weights are nodes, and a linear layer
    or a convolution with a bias is two. The paper does not say so; its figures for VGG16 (90) and
    ResNet-50 (339) come out that way.
    """
    found: Counter[str] = Counter()
    for node in _walk(_first_output(model.requires_grad_(), inputs).grad_fn):
        kind = node.name()
        with_bias = kind == "ConvolutionBackward0" and node.next_functions[2][0] is not None
        found[kind] += 2 if with_bias or kind == "AddmmBackward0" else 1
    without = {
        kind: count
        for kind, count in found.items()
        if kind != _LEAF and not _is_covered(kind, has_rule)
    }
    return found.total(), Counter(without)


@contextlib.contextmanager
def states_not_zero() -> Iterator[None]:
    """Scans of transformers start from a state of ones, as if there had been tokens before.

    Each of the two files makes zeros in one place only, which is that state.
    """
    ones = {"zeros": torch.ones, "zeros_like": torch.ones_like}
    for module in (modeling_mamba, modeling_mamba2):
        module.torch = Instead(torch, **ones)
    try:
        yield
    finally:
        for module in (modeling_mamba, modeling_mamba2):
            module.torch = torch


_LEAF = "torch::autograd::AccumulateGrad"


def _is_covered(kind: str, has_rule: Callable[[Any], bool]) -> bool:
    operators = RULES.get(kind, ())
    return bool(operators) and all(map(has_rule, operators))


def _first_output(model: nn.Module, inputs: Inputs) -> Tensor:
    given = {
        name: value.clone().requires_grad_()
        if value.is_floating_point() and not name.endswith("mask")
        else value
        for name, value in inputs.items()
    }
    whole = [value for value in inputs.values() if not value.is_floating_point()]

    def start(module: nn.Module, arguments: tuple[Any, ...], value: Tensor) -> Tensor | None:
        if isinstance(module, nn.Embedding) and any(_same(arguments[0], one) for one in whole):
            return value.requires_grad_()
        return None

    hook = register_module_forward_hook(start)
    with torch.enable_grad():
        found = model(**given)
    hook.remove()
    return tree_leaves(dict(found))[0]


def _same(left: Tensor, right: Tensor) -> bool:
    return left.numel() == right.numel() and torch.equal(left.flatten(), right.flatten())


def _walk(start: Any) -> Iterator[Any]:
    seen: set[Any] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions)
