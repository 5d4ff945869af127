"""FlexRound: learned rounding, so that a block gives what it gave before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import SamplesError
from lamella.ir.quantize import Format, Quantized, quantize
from lamella.ir.segments import Segment, Values
from lamella.passes.rounding.base import Rounded, Rounding
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.grid import Grid
from lamella.passes.scores.gradients import differentiable
from lamella.passes.sites import Site


@dataclass(frozen=True)
class FlexRound(Rounding):
    """Scales and rounding learned by gradients, block by block.

    ``W' = s1 round(W / (s1 S2 s3))`` with a scale s1 for each block of a row, S2 for each weight
    and s3 for each row, all positive and learned as logarithms by Adam; gradients pass by the
    rounding. What is minimized is the mean squared difference of what a block gives with the
    inputs of the rounded prefix to what it gave in the model as it was. It takes `steps` forward
    and backward runs of every block: minutes where the other methods take seconds.

    Attributes:
        steps: Updates for each block, each on one batch of the samples.
        rate: Learning rate.
        seed: Of the order of the batches.

    References:
        [LeeJ2023], equation 2 and section 3.2.
    """

    name: ClassVar[str] = "flexround"

    steps: int = 200
    rate: float = 3e-3
    seed: int = 0

    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """To nearest: where it starts."""
        return Rounded(quantize(weight, format))

    def reconstruct(self, block: BlockRun) -> tuple[dict[str, Rounded], tuple[float, float]]:
        """Learn the rounding of all weights of a block.

        Returns:
            The weights, and the loss relative to the mean square before and after.

        Raises:
            SamplesError: What the block gives is NaN or infinite.
        """
        learned = {
            site.node: Learned(block.weights[site.node], format)
            for site, format in block.formats.items()
        }
        before = block.loss({node: one.value() for node, one in learned.items()})
        if not math.isfinite(before):
            names = ", ".join(site.weight for site in block.formats)
            raise SamplesError(
                f"the samples give values behind {names} that are NaN or infinite, or whose "
                f"squares overflow; look for inputs or weights that overflow"
            )
        parameters = [p for one in learned.values() for p in one.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.rate)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            sample = int(torch.randint(len(block.inputs), (), generator=generator))
            with torch.enable_grad():
                weights = {node: one.value() for node, one in learned.items()}
                loss = block.sample_loss(sample, weights, gradients=True)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        stored = {node: one.store() for node, one in learned.items()}
        after = block.loss({node: one.dequantized() for node, one in stored.items()})
        if not after < before:
            return {s.weight: self.round(block.weights[s.node], f, _NO_INPUTS)
                    for s, f in block.formats.items()}, (before, before)  # fmt: skip
        return {s.weight: Rounded(stored[s.node]) for s in block.formats}, (before, after)


_NO_INPUTS = InputGram(torch.zeros(0, 0), 0)


@dataclass(frozen=True)
class BlockRun:
    """A block with its inputs from the rounded prefix, and what it gave before.

    Attributes:
        segment: What runs.
        weights: Of all nodes that read one.
        formats: The weights to learn.
        inputs: The values before the block, for each sample; not changed.
        targets: The values behind it in the model as it was.
        outputs: The nodes that are compared.
    """

    segment: Segment
    weights: Mapping[Node, Tensor]
    formats: Mapping[Site, Format]
    inputs: Sequence[Values]
    targets: Sequence[Values]
    outputs: tuple[Node, ...]

    def loss(self, weights: Mapping[Node, Tensor]) -> float:
        """The loss over all samples."""
        losses = [float(self.sample_loss(i, weights).detach()) for i in range(len(self.inputs))]
        return sum(losses) / len(losses)

    def sample_loss(
        self, sample: int, weights: Mapping[Node, Tensor], *, gradients: bool = False
    ) -> Tensor:
        """Squared difference of the outputs over the mean square of the targets."""
        values = dict(self.inputs[sample])
        cast = {n: w.to(self.weights[n].dtype) for n, w in weights.items()}
        self.segment.run(
            values,
            {**self.weights, **cast},
            calls=differentiable(self.segment.nodes),
            gradients=gradients,
        )
        total: Any = 0.0
        for node in self.outputs:
            want = self.targets[sample][node].float()
            scale = want.square().mean().clamp(min=1e-30)
            total = total + (values[node].float() - want).square().mean() / scale
        return total


class Learned:
    """The parameters of one weight."""

    def __init__(self, weight: Tensor, format: Format) -> None:
        """Start where rounding to nearest ends."""
        self._weight = weight.detach().float()
        self._grid = Grid.of(quantize(self._weight, format))
        scales = self._grid.scales.t()
        self._sign = scales.sign()
        self._scale = scales.abs().log().requires_grad_()
        self._entry = torch.zeros_like(self._weight, requires_grad=True)
        self._row = torch.zeros(weight.shape[0], 1, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        """Logarithms of s1, S2 and s3."""
        return [self._scale, self._entry, self._row]

    def value(self) -> Tensor:
        """The rounded weight, with gradients."""
        scale = self._sign * self._scale.exp()
        return self._multiples(scale) * self._spread(scale)

    @torch.no_grad()
    def store(self) -> Quantized:
        """Codes from the scales as they are stored."""
        format = self._grid.format
        scale = (self._sign * self._scale.exp()).to(format.scale_dtype).float()
        grid = replace(self._grid, scales=scale.t().contiguous())
        return grid.store((self._multiples(scale) * self._spread(scale)).t())

    def _multiples(self, scale: Tensor) -> Tensor:
        exact = self._weight / (self._spread(scale) * (self._entry + self._row).exp())
        rounded = exact + (exact.round() - exact).detach()
        low, high = self._spread(self._grid.low.t()), self._spread(self._grid.high.t())
        return torch.minimum(torch.maximum(rounded, low), high)

    def _spread(self, blocks: Tensor) -> Tensor:
        """A number for each block of a row as one for each entry."""
        wide = blocks.repeat_interleave(self._grid.format.block, 1)
        return wide[:, : self._weight.shape[1]]
