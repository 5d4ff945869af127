"""PB-LLM: a few weights in 8 bits, the rest with one bit each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lamella.ir.quantize import Format, quantize
from lamella.passes.rounding.base import Rounded, Rounding
from lamella.passes.rounding.feedback import fed_back
from lamella.passes.rounding.gram import Factor, InputGram
from lamella.passes.rounding.grid import Grid


@dataclass(frozen=True)
class PbLlm(Rounding):
    """Partial binarization, with the error feedback of GPTQ.

    The weights of largest saliency ``w^2 / (H^-1_kk)^2`` keep the bits of the format. Each other
    one is ``m + a sign(w - m)``, with the mean m and ``a = mean |w - m|`` over the binary weights
    of its row and block (the authors' code takes the mean over zeros in place of the salient
    weights as well, which makes `a` too small). No kernel reads this: the weight goes on as a
    dense one, and what a file would need is counted.

    Attributes:
        salient: Share of the weights of a matrix that keep the bits of the format, in [0, 1].
        damping: As for `Gptq`.

    References:
        [Shang2024], sections 3.2 and 3.3.
    """

    name: ClassVar[str] = "pb-llm"
    joins_rows: ClassVar[bool] = False

    salient: float = 0.1
    damping: float = 0.01

    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """Dense; codes to nearest, with infinite damping, if the matrix can't be factored."""
        factor = inputs.factor(self.damping, act_order=False)
        if factor is None:
            return Rounded(quantize(weight, format), damping=math.inf)
        kept = salient_entries(weight, factor, self.salient)
        grid = Grid.searched(weight * kept, format)
        mean, size = binary_levels(weight, kept, format.block)
        mask = kept.t().contiguous()

        def nearest(column: int, values: Tensor) -> Tensor:
            block = column // format.block
            sign = torch.where(values >= mean[block], 1.0, -1.0)
            return torch.where(
                mask[column], grid.nearest(column, values), mean[block] + size[block] * sign
            )

        values = fed_back(weight.t().contiguous(), factor, nearest)
        stored = stored_bytes(weight.shape, int(kept.sum()), format)
        return Rounded(None, values.t().contiguous(), stored_bytes=stored, damping=factor.damping)


def salient_entries(weight: Tensor, factor: Factor, share: float) -> Tensor:
    """Which entries are salient, bool ``[out, in]``."""
    identity = torch.eye(len(factor.order), dtype=weight.dtype)
    inverse = torch.linalg.solve_triangular(factor.lower.t(), identity, upper=True)
    curvature = (inverse.square() / factor.pivots[:, None]).sum(0)
    diagonal = torch.empty_like(curvature)
    diagonal[factor.order] = curvature
    saliency = (weight / diagonal).square().flatten()
    kept = torch.zeros_like(saliency, dtype=torch.bool)
    kept[saliency.topk(round(share * saliency.numel())).indices] = True
    return kept.reshape(weight.shape)


def binary_levels(weight: Tensor, kept: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean and size of the binary weights of each block of a row, ``[blocks, out]``; float16."""
    pad = -weight.shape[1] % block
    entries = functional.pad(weight, (0, pad)).unflatten(1, (-1, block))
    binary = functional.pad(~kept, (0, pad)).unflatten(1, (-1, block)).to(weight.dtype)
    count = binary.sum(2).clamp(min=1)
    mean = ((entries * binary).sum(2) / count).half().to(weight.dtype)
    size = ((entries - mean[..., None]).abs() * binary).sum(2) / count
    return mean.t().contiguous(), size.half().to(weight.dtype).t().contiguous()


def stored_bytes(shape: torch.Size, salient: int, format: Format) -> int:
    """Bytes in a file: the bit map, the codes, and three numbers for each block of a row."""
    out, features = shape
    blocks = math.ceil(features / format.block)
    bits = out * features + salient * format.bits + (out * features - salient)
    scales = out * blocks * (2 * 2 + format.scale_dtype.itemsize)
    zeros = 0 if format.symmetric else out * math.ceil(blocks * format.bits / 8)
    return math.ceil(bits / 8) + scales + zeros
