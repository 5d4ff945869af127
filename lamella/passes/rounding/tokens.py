"""How much each token counts in a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Samples
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.segments import Segment, Values, program
from lamella.passes.rounding.steps import Stage, part_of
from lamella.passes.scores.gradients import differentiable
from lamella.passes.scores.target import LossTarget, drawn_loss

TOKENS = ("uniform", "attention", "gradient")
"""Names of the weightings."""

LEAST = 0.005
"""Weight of the token that is attended to least; the most attended has 1."""

MOST = 10.0
"""Weights by gradients are clipped at this multiple of their mean."""

_ATTENTION = aten.scaled_dot_product_attention.default
Weights = Callable[[int, Node], Mapping[Node, Any]]


class TokenWeights:
    """Weights of the tokens of each sample, ``[batch, sequence]``, for the inputs of a layer."""

    def __init__(
        self,
        kind: str,
        by_reader: Mapping[Node, Sequence[Tensor]] = MappingProxyType({}),
    ) -> None:
        """Weights of one kind.

        Args:
            kind: One of `TOKENS`.
            by_reader: Linear layer -> weights of each sample, for ``"gradient"``.
        """
        self.kind = kind
        self._by_reader = by_reader
        self._attended: list[Tensor | None] = []

    def enter(self, stage: Stage, states: Sequence[Values], weights: Mapping[Node, Tensor]) -> None:
        """Look ahead into a block, with weights as they are so far; nothing is kept but scores."""
        if self.kind != "attention":
            return
        places = [i for i, node in enumerate(stage.segment.nodes) if node.target is _ATTENTION]
        self._attended = [None] * len(states)
        if not places:
            return
        ahead = part_of(stage.segment, 0, places[-1] + 1)
        self._attended = [_attended(ahead, dict(values), weights) for values in states]

    def of(self, sample: int, reader: Node, value: Tensor) -> Tensor | None:
        """Weights of the tokens of `value`, the input of `reader`; None counts all alike."""
        found: Tensor | None = None
        if self.kind == "attention" and self._attended:
            found = self._attended[sample]
        elif self.kind == "gradient" and reader in self._by_reader:
            found = self._by_reader[reader][sample]
        # Some layers read the tokens of all sequences as rows of one matrix.
        if found is None or found.numel() * value.shape[-1] != value.numel():
            return None
        return found.reshape(value.shape[:-1])


def _attended(ahead: Segment, values: Values, weights: Mapping[Node, Tensor]) -> Tensor | None:
    """The attention that each token gets, mapped to ``[LEAST, 1]``; the sum over attentions."""
    scores: list[Tensor] = []

    def watch(node: Node, alive: Values) -> None:
        if node.target is _ATTENTION:
            scores.append(concentration(_arguments(node, alive, weights)))

    ahead.run(values, {node: weights[node] for node in ahead.weights}, watch)
    sizes = {tuple(score.shape) for score in scores}
    if len(sizes) != 1:
        return None
    total = torch.stack(scores).sum(0)
    low, high = total.amin(-1, keepdim=True), total.amax(-1, keepdim=True)
    return LEAST + (1 - LEAST) * (total - low) / (high - low).clamp(min=1e-30)


def concentration(arguments: Mapping[str, Any]) -> Tensor:
    """``sum over heads and queries of softmax(q k^T s + mask)``, the attention a token gets.

    Args:
        arguments: Of `scaled_dot_product_attention`, by name.

    Returns:
        ``[batch, sequence of keys]``.

    References:
        [Sung2025], section 4.2.
    """
    query, key = arguments["query"].float(), arguments["key"].float()
    if query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = arguments.get("scale") or query.shape[-1] ** -0.5
    logits = (query @ key.transpose(-1, -2)) * scale
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        barred = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else None
        logits = logits + mask if barred is None else barred
    return functional.softmax(logits, -1).nan_to_num().sum((1, 2))


def _arguments(node: Node, values: Values, weights: Mapping[Node, Tensor]) -> dict[str, Any]:
    def value_of(one: Any) -> Any:
        if not isinstance(one, Node):
            return one
        return weights[one] if one.op == "get_attr" else values[one]

    return {name: value_of(one) for name, one in ops.bind(node).items()}


def gradient_norms(
    graph: Graph, target: LossTarget, samples: Samples, readers: Sequence[Node]
) -> dict[Node, list[Tensor]]:
    """The squared gradients at the outputs of layers, token by token, for each sample.

    The loss is that of labels drawn from the model itself. Weights are clipped at `MOST` times
    their mean. The activations of one sample are in memory, of all blocks.

    Args:
        graph: The model before it is rounded.
        target: The output that the loss is taken of.
        samples: Run one by one.
        readers: Linear layers.

    References:
        [Martens2020], section 5, for drawn labels.
    """
    kept = [target.node] if target.mask is None else [target.node, target.mask]
    running = program(graph, kept)
    generator = torch.Generator().manual_seed(samples.seed)
    run = {node for segment in running.segments for node in segment.nodes}
    found: dict[Node, list[Tensor]] = {reader: [] for reader in readers if reader in run}
    for sample in samples:
        norms: dict[Node, Tensor] = {}
        values = running.start(sample)
        for segment in running.segments:
            calls = differentiable(segment.nodes)
            weights = segment.read_weights(graph)
            watch = _watch(found, norms)
            segment.run(values, weights, watch, calls=calls, gradients=True)
        loss = drawn_loss(target.rows(values), target, generator)
        if loss.requires_grad:
            loss.backward()
        for reader, several in found.items():
            norm = norms[reader]
            several.append(norm.clamp(max=MOST * float(norm.mean())))
    return found


def _watch(readers: Mapping[Node, Any], norms: dict[Node, Tensor]) -> Callable[..., None]:
    def watch(node: Node, values: Values) -> None:
        if node not in readers:
            return
        value: Tensor = values[node]
        if not value.requires_grad:
            value = values[node] = value.detach().requires_grad_()
        norms[node] = torch.ones(value.shape[:-1])

        def keep(gradient: Tensor) -> None:
            norms[node] = gradient.float().square().sum(-1)

        value.register_hook(keep)

    return watch
