"""Move a factor for each channel from norms and linear layers into the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lamella.errors import SamplesError
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, dequantized
from lamella.ir.reducers import Gram, MaxAbs, Reducer, State
from lamella.ir.runner import Request, sweep_requests
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scale_places import NORMS, Place, find_places, move_scales

STRATEGIES = ("smoothquant", "awq")
"""How the factors are chosen."""

_SMALLEST = 1e-4
"""Factors lie between this and its inverse: larger ones cost digits and gain nothing."""


@dataclass(frozen=True)
class MeanMagnitude(Reducer):
    """Mean over tokens of the magnitude, float64 ``[channels]``."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """Sum and count."""
        (value,) = values
        total, count = value.double().abs().sum(0), torch.tensor(float(value.shape[0]))
        return (total, count) if state is None else (state[0] + total, state[1] + count)

    def result(self, state: State) -> Tensor:
        """``[channels]``."""
        return state[0] / state[1]


@dataclass(frozen=True)
class FoldScales(Transform):
    """Make weights and activations easier to round, with the function as it is.

    Channel `k` of a value is divided by ``s_k`` in what makes it (the scale and bias of a norm, the
    rows of a linear layer) and column `k` of all that reads it is multiplied by ``s_k``. Places
    are found by what operators do, never by names: norms before linear layers, the values of
    attention and its output layer (with grouped heads one factor serves all heads of a group),
    the upper and the lower layer of a gated MLP or of one with `relu`, experts; also where layers
    are merged, for the part of the channels for which it is exact. Where something else reads a
    channel (the residual stream, `gelu`), it keeps the factor 1, and the report says what.

    - ``smoothquant``: ``s_k = max|x_k|^alpha / max|W_k|^(1-alpha)`` over the samples and over all
      rows of all readers: the inputs become easier to round, the weights harder.
    - ``awq``: ``s_k = mean|x_k|^a`` with the `a` out of ``0, 1/grid, …`` that gives the least
      squared error of the outputs when the weights are rounded to `bits`:
      ``sum over readers tr(D G D^T)`` with ``D = Q(W s) / s - W`` and ``G`` the Gram matrix of the
      inputs. ``a = 0`` changes nothing, so on the samples the error never grows. The paper
      rounds without a search for the scale of a block; here the quantizer is that of
      `quantize-weights`, and rounding of activations does not count.

    Factors lie within 1e-4 and 1e4. Gram matrices are kept for one block at a time.

    Attributes:
        strategy: ``"smoothquant"`` or ``"awq"``.
        alpha: Of ``smoothquant``: 0 leaves the difficulty with the inputs, 1 moves all of it
            into the weights; in [0, 1].
        bits: Of ``awq``: the width that the weights will have.
        block: Of ``awq``: weights that share a scale.
        symmetric: Of ``awq``: whether the format has no zero points.
        grid: Of ``awq``: how many exponents are tried.
        layers: Also between linear layers, not only behind norms.

    Raises:
        ValueError: An option has another value.
        SamplesError: The inputs of a layer hold NaN or infinite entries, or squares overflow.

    References:
        [Xiao2023], section 4; [Lin2024], section 3.2.
    """

    name: ClassVar[str] = "fold-scales"
    effect: ClassVar[Effect] = Effect.EXACT

    strategy: str = "smoothquant"
    alpha: float = 0.5
    bits: int = 4
    block: int = 32
    symmetric: bool = True
    grid: int = 20
    layers: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.grid < 1:
            raise ValueError(f"grid must be at least 1, got {self.grid}")
        Format(self.bits, self.block, self.symmetric)

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Find the places, choose the factors of all of them, then move them."""
        places, refused = find_places(graph)
        wanted = [place for place in places if self.layers or place.is_norm]
        _tell_refused(graph, analyses, refused)
        if not wanted:
            analyses.remark("no norm and no linear layer can take factors")
            return
        choose = self._awq if self.strategy == "awq" else self._smoothquant
        chosen = list(choose(graph, analyses, wanted))
        for place, scales in chosen:
            move_scales(graph, place, scales, self.name)
        norms = sum(place.is_norm for place in wanted)
        least = min(float(scales.min()) for _, scales in chosen)
        most = max(float(scales.max()) for _, scales in chosen)
        analyses.note(
            f"moved factors behind {norms} norms and {len(wanted) - norms} linear layers, "
            f"from {least:.3g} to {most:.3g}"
        )

    def _smoothquant(
        self, graph: Graph, analyses: Analyses, places: list[Place]
    ) -> Iterator[tuple[Place, Tensor]]:
        requests = {place: _requests(place, MaxAbs()) for place in places}
        known = analyses.statistics([r for several in requests.values() for r in several])
        for place, several in requests.items():
            _check_finite(place, [known[request] for request in several])
            inputs = place.spread([known[request] for request in several], "amax")
            largest = [_weight(graph, reader.layer).abs().amax(0) for reader in place.readers]
            weights = place.spread(largest, "amax")
            scales = inputs.pow(self.alpha) / weights.pow(1.0 - self.alpha)
            # A channel that is always zero, or that nothing weighs, tells nothing.
            yield place, _bounded(scales, place.free & (inputs > 0) & (weights > 0))

    def _awq(
        self, graph: Graph, analyses: Analyses, places: list[Place]
    ) -> Iterator[tuple[Place, Tensor]]:
        requests = {
            place: (_requests(place, MeanMagnitude()), _requests(place, Gram())) for place in places
        }
        wanted = [r for pair in requests.values() for several in pair for r in several]
        known: dict[Request, Tensor] = {}
        before = after = 0.0
        samples = analyses.need_samples()
        for finished in sweep_requests(graph, samples, wanted, progress=analyses.progress):
            known.update(finished)
            ready = [p for p, pair in requests.items() if all(r in known for s in pair for r in s)]
            for place in ready:
                means, grams = requests.pop(place)
                _check_finite(place, [known[request] for request in (*means, *grams)])
                mean = place.spread([known[request] for request in means], "mean")
                scales, errors = self._searched(graph, place, mean, [known[r] for r in grams])
                before, after = before + errors[0], after + errors[1]
                yield place, scales
            still = {r for pair in requests.values() for several in pair for r in several}
            known = {request: value for request, value in known.items() if request in still}
        kept = f"{after / before:.3f} times" if before > 0 else "as large as"
        analyses.note(
            f"squared error of the outputs at {self.bits} bits: {kept} that without factors"
        )

    def _searched(
        self, graph: Graph, place: Place, mean: Tensor, grams: list[Tensor]
    ) -> tuple[Tensor, tuple[float, float]]:
        """The factors of least error, and the errors without and with them."""
        format = Format(self.bits, self.block, self.symmetric)
        errors: list[float] = []
        tried: list[Tensor] = []
        for step in range(self.grid):
            free = place.free & (mean > 0)
            scales = _bounded(_centred(mean.pow(step / self.grid), free), free)
            tried.append(scales)
            errors.append(
                sum(
                    output_error(_weight(graph, r.layer), gram, scales[r.channels], format)
                    for r, gram in zip(place.readers, grams, strict=True)
                )
            )
        best = min(range(self.grid), key=errors.__getitem__)
        return tried[best], (errors[0], errors[best])


def output_error(weight: Tensor, gram: Tensor, scales: Tensor, format: Format) -> float:
    """The mean squared error per token of the outputs of a rounded layer, ``tr(D G D^T)``.

    Args:
        weight: ``[out, in]``.
        gram: Mean of the outer product of the inputs, ``[in, in]``.
        scales: What the columns are multiplied by before they are rounded, ``[in]``.
        format: What they are rounded to.
    """
    factors = scales.to(torch.float32)
    change = dequantized(weight.float() * factors, format) / factors - weight.float()
    return float(((change @ gram.float()) * change).sum(dtype=torch.float64))


def _requests(place: Place, reducer: Reducer) -> list[Request]:
    return [Request.of(reducer, reader.value) for reader in place.readers]


def _check_finite(place: Place, statistics: Iterable[Tensor]) -> None:
    """Refuse inputs that overflow, which would give factors that are no numbers."""
    if not all(bool(torch.isfinite(one).all()) for one in statistics):
        names = ", ".join(reader.layer.name for reader in place.readers)
        raise SamplesError(
            f"the samples give the inputs of {names} entries that are NaN or infinite, or whose "
            f"squares overflow; look for inputs or weights that overflow"
        )


def _weight(graph: Graph, layer: torch.fx.Node) -> Tensor:
    """The weight of a layer as ``[rows, in]``; rows of experts below each other."""
    return graph.weight(graph.operand(layer, "weight")).flatten(0, -2)


def _bounded(scales: Tensor, free: Tensor) -> Tensor:
    """`scales` within bounds, and 1 where they are not free."""
    return torch.where(free, scales.clamp(_SMALLEST, 1.0 / _SMALLEST), 1.0)


def _centred(scales: Tensor, free: Tensor) -> Tensor:
    """`scales` over the root of the least times the largest of those that are free."""
    if not bool(free.any()):
        return scales
    return scales / (scales[free].min() * scales[free].max()).sqrt()


def _tell_refused(graph: Graph, analyses: Analyses, refused: dict[str, list[str]]) -> None:
    """Norms that layers read are a remark; that a linear layer has no place is the usual thing."""
    norms = {node.name for node in graph.find(*NORMS)}
    for text, of_norms in (("norms", True), ("linear layers", False)):
        parts = {
            reason: [name for name in names if (name in norms) is of_norms]
            for reason, names in refused.items()
        }
        told = [f"{', '.join(names)} ({reason})" for reason, names in parts.items() if names]
        if told:
            analyses.note(f"no factors for these {text}: {'; '.join(told)}")
