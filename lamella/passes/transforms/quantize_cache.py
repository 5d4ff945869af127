"""Keep the keys and values of a decoder as codes of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import IncrementalError, PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.reducers import Reducer, State
from lamella.ir.runner import Request
from lamella.ir.symbols import shape_of
from lamella.passes.analyses.caches import Kept, kept_of
from lamella.passes.base import Analyses, Effect, Transform
from lamella.rewrite.incremental.kept import BITS, ZERO
from lamella.rewrite.incremental.roles import tokens_of

_LARGEST = 127
_SMALLEST_STEP = 1e-8
"""For channels that are zero in all samples; in float16 the smallest that is normal."""


@dataclass(frozen=True)
class LargestOfHeads(Reducer):
    """Largest magnitude of each channel of each head, ``[heads, width]``.

    It reads ``[batch, heads, sequence, width]`` with the heads as channels.

    Attributes:
        width: Channels of a head.
    """

    width: int

    def add(self, state: State | None, *values: Tensor) -> State:
        """The larger of both."""
        (value,) = values
        largest = value.reshape(-1, self.width, value.shape[-1]).abs().amax(0).t().float()
        return (largest if state is None else torch.maximum(state[0], largest),)

    def result(self, state: State) -> Tensor:
        """``[heads, width]``."""
        return state[0]


@dataclass(frozen=True)
class QuantizeCache(Transform):
    """Keep the keys and values of causal self-attention as codes of 8 bits.

    Each channel of each head has one scale, the largest magnitude over the samples by 127; what
    is larger later is cut off. Keys are rounded after the rotary embedding, as the cache holds
    them. In the graph of whole sequences the values are rounded and stay floating point
    (`lamella::round_uniform`), so that analyses and other passes see what the codes lose; where
    the graph continues from a cache, the cache holds the codes: a quarter of the memory of
    float32, and in ONNX Runtime a kernel that reads them as they are. Padding of the samples
    counts as their tokens do.

    Scales of channels, since some channels of keys are larger than others by far. What that
    loses is small in most models, and large in some with outliers in keys: compare
    ``lamella bench`` or the loss on texts of your own.

    Raises:
        PassError: The model does not generate, no attention of it is one operator, or its caches
            hold codes already.
        SamplesError: The samples give keys or values that are NaN or infinite.

    References:
        [LiuZ2024], for scales of channels.
    """

    name: ClassVar[str] = "quantize-cache"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Measure all keys and values in one run of the samples, then round them."""
        analyses.need_samples()
        found = _sites(graph, analyses)
        nodes = dict.fromkeys(node for kept in found for node in (kept.key, kept.value))
        requests = {node: _largest(node) for node in nodes}
        known = analyses.statistics(requests.values())
        for node, request in requests.items():
            if not bool(known[request].isfinite().all()):
                raise SamplesError(
                    f"the samples give {node.name} entries that are NaN or infinite; look for "
                    f"inputs or weights that overflow"
                )
        dtype = next(iter(nodes)).meta["val"].dtype
        zero = graph.add_weight("cache.zero", torch.tensor(float(ZERO), dtype=dtype))
        rounded = {
            node: _rounded(graph, node, known[request], zero, number)
            for number, (node, request) in enumerate(requests.items())
        }
        for kept in found:
            for node in (kept.key, kept.value):
                graph.reread(kept.node, node, rounded[node])
        analyses.note(
            f"the caches of {len(found)} attentions hold codes of {BITS} bits: "
            f"{8 * dtype.itemsize // BITS} times less memory"
        )


def _sites(graph: Graph, analyses: Analyses) -> list[Kept]:
    """The attentions whose keys and values are rounded."""
    try:
        tokens_of(graph)
    except IncrementalError as error:
        raise PassError(f"nothing to quantize, the model keeps no cache: {error}") from error
    every = list(kept_of(graph))
    fused = aten.scaled_dot_product_attention.default
    found = [kept for kept in every if kept.node.target is fused]
    done = [k for k in found if k.key.target is lam.round_uniform.default]
    found = [k for k in found if k not in done]
    if not found:
        reason = "is rounded already" if done else "is causal self-attention as one operator"
        raise PassError(
            f"nothing to quantize: {'every cache' if done else 'no attention'} {reason}; "
            f"quantize-cache is for decoders, once"
        )
    written_out = [k.node.name for k in every if k not in found and k not in done]
    if written_out:
        analyses.remark(
            f"the caches of {len(written_out)} attentions that are written out stay as they are: "
            f"{', '.join(written_out)}"
        )
    return found


def _largest(node: Node) -> Request:
    width = int(shape_of(node)[3])
    return Request((node.name,), LargestOfHeads(width), channel_axis=1, masked=False)


def _rounded(graph: Graph, node: Node, largest: Tensor, zero: Node, number: int) -> Node:
    """`node` rounded to the codes of its scales."""
    dtype = node.meta["val"].dtype
    least = max(_SMALLEST_STEP, torch.finfo(dtype).smallest_normal)
    steps = (largest / _LARGEST).clamp(min=least).unsqueeze(1)
    scale = graph.add_weight(f"cache.scale_{number}", steps.to(dtype))
    target = lam.round_uniform.default
    return graph.call(target, node, scale, zero, BITS, after=node, like=node)
