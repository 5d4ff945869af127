"""How far outputs are from those of the original model.

Logits are compared as distributions, mean KL divergence per position in nats and top-1 agreement;
vectors (embeddings, hidden states) by their angle; what is neither by its relative error. Padded
positions, those where the attention mask of the model is zero, count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.errors import NumericError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.runner import token_mask
from lamella.ir.symbols import shape_of
from lamella.report import Loss, OutputLoss

Measure = Literal["kl", "cosine", "relative"]
Outputs = tuple[Any, ...]

_ROWS = 1024


@dataclass(frozen=True)
class Comparison:
    """How one output is compared.

    Attributes:
        name: Name of the output.
        measure: By which measure.
        mask: Place of the attention mask among the inputs, or None.
    """

    name: str
    measure: Measure
    mask: int | None


def comparisons(graph: Graph) -> tuple[Comparison, ...]:
    """How the outputs of `graph` are compared, decided by their names and shapes.

    An output called ``logits`` or ``…_logits`` is a distribution, and so is one whose last axis
    is as long as the vocabulary or the labels of the config, unless its name says that it holds
    hidden states or embeddings. Other outputs with at least two axes are
    vectors; images are one vector each.
    """
    widths = _distribution_widths(graph)
    places = {node: place for place, node in enumerate(graph.inputs)}
    found: list[Comparison] = []
    for name, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        if isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor):
            mask = token_mask(graph, node)
            measure: Measure = _measure(name, node, widths)
            found.append(Comparison(name, measure, None if mask is None else places[mask]))
    return tuple(found)


def _measure(name: str, node: Node, widths: set[int]) -> Measure:
    sizes = shape_of(node)
    if not node.meta["val"].is_floating_point() or len(sizes) < 2 or sizes[-1] == 1:
        return "relative"
    leaf = name.rsplit(".", 1)[-1]
    if leaf.endswith("logits") or leaf.startswith("logits"):
        return "kl"
    is_vector = any(word in name for word in ("hidden", "embed", "pool"))
    return "kl" if sizes[-1] in widths and not is_vector else "cosine"


def _distribution_widths(graph: Graph) -> set[int]:
    """Sizes of the largest table of the graph and of the labels of its config."""
    config = graph.origin.config or {}
    labels = config.get("id2label")
    widths = [config.get("vocab_size"), config.get("num_labels")]
    widths.append(len(cast(dict[Any, Any], labels)) if isinstance(labels, dict) else None)
    tables: dict[Any, str] = {
        aten.embedding.default: "weight",
        lam.embedding_nbits.default: "packed",
    }
    found = graph.find(*tables)
    rows = [int(ops.bind(n)[tables[n.target]].meta["val"].shape[0]) for n in found]
    # Tables of positions and token types are as long as some hidden sizes; the vocabulary is
    # longer than they are.
    widths.append(max(rows, default=None))
    return {width for width in widths if isinstance(width, int) and width > 2}


@dataclass
class LossMeter:
    """Adds up the loss over batches."""

    comparisons: Sequence[Comparison]
    _sums: dict[str, _Sum] = field(default_factory=dict)
    _batches: int = 0

    def add(self, inputs: Sequence[Any], before: dict[str, Any], after: dict[str, Any]) -> None:
        """Compare the outputs of one batch, by name; outputs that are gone are left out.

        Raises:
            NumericError: An output changed its shape.
        """
        self._batches += 1
        for one in self.comparisons:
            if one.name not in after:
                continue
            was, now = before[one.name], after[one.name]
            if was.shape != now.shape:
                raise NumericError(
                    f"output {one.name!r} changed its shape from {list(was.shape)} to "
                    f"{list(now.shape)}"
                )
            mask = None if one.mask is None else inputs[one.mask]
            self._sums.setdefault(one.name, _Sum()).add(one.measure, was, now, mask)

    def result(self, source: Literal["samples", "probes"]) -> Loss:
        """The loss over all batches so far."""
        measures: dict[str, Measure] = {one.name: one.measure for one in self.comparisons}
        outputs = tuple(
            OutputLoss(name, measures[name], total.mean, total.maximum, total.share)
            for name, total in self._sums.items()
        )
        return Loss(outputs, self._batches, source)


@dataclass
class _Sum:
    """Sum and maximum over positions."""

    total: float = 0.0
    maximum: float = 0.0
    agreeing: float = 0.0
    count: int = 0
    has_agreement: bool = False

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def share(self) -> float | None:
        return self.agreeing / max(self.count, 1) if self.has_agreement else None

    def add(self, measure: Measure, was: Tensor, now: Tensor, mask: Tensor | None) -> None:
        if measure == "relative":
            scale = float(was.double().abs().mean()) or 1.0
            losses = (was.double() - now.double()).abs().flatten() / scale
            self._add(losses)
            return
        rows = [_rows(value, mask) for value in (was, now)]
        for a, b in zip(rows[0].split(_ROWS), rows[1].split(_ROWS), strict=True):
            self._add(kl_divergence(a, b) if measure == "kl" else cosine_distance(a, b))
            if measure == "kl":
                self.has_agreement = True
                self.agreeing += float((a.argmax(-1) == b.argmax(-1)).sum())

    def _add(self, losses: Tensor) -> None:
        if losses.numel():
            largest = float(losses.max())
            self.total += float(losses.double().sum())
            self.maximum = largest if math.isnan(largest) else max(self.maximum, largest)
            self.count += losses.numel()


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """One row per position; an image is one position."""
    flat = value.flatten(1) if value.ndim == 4 else value
    rows = flat.reshape(-1, flat.shape[-1])
    return rows if mask is None else rows[mask.bool().flatten()]


def kl_divergence(was: Tensor, now: Tensor) -> Tensor:
    """``sum_v p_v (ln p_v - ln q_v)`` per row of logits, in nats; never negative.

    Args:
        was: Logits of the original, ``[rows, entries]``.
        now: Logits of the edited model, likewise.
    """
    p, q = functional.log_softmax(was.float(), -1), functional.log_softmax(now.float(), -1)
    # An entry that the original rules out (a logit of -inf) contributes nothing.
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0.0)


def cosine_distance(was: Tensor, now: Tensor) -> Tensor:
    """One minus the cosine of each pair of rows; 0 for equal rows, 1 for one row of zeros."""
    a, b = was.double(), now.double()
    distance = 1.0 - functional.cosine_similarity(a, b, dim=-1, eps=1e-30)
    return torch.where((a == b).all(-1), 0.0, distance).clamp_min(0.0)


def deviation(was: Tensor, now: Tensor) -> float:
    """The largest error relative to the largest entry; for integers the share that differs.

    Places where both are the same Inf or both NaN agree; a NaN or Inf in one of them is an
    infinite error.
    """
    if was.shape != now.shape or was.dtype != now.dtype:
        return math.inf
    if not was.is_floating_point():
        return float((was != now).double().mean()) if was.numel() else 0.0
    a, b = was.double(), now.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, a - b).abs()
    if not error.numel():
        return 0.0
    finite = a[a.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    largest = float(error.nan_to_num(math.inf, math.inf).max())
    return largest / scale if scale > 0 else largest
