"""What a rounding method is: from weights that read one value, to what is stored of them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from lamella.ir.quantize import Format, Quantized
from lamella.passes.rounding.gram import InputGram


@dataclass(frozen=True)
class Rounded:
    """A weight after it was rounded.

    Attributes:
        codes: Its codes, or None for a weight that has no format of few bits.
        dense: The weight that stands for codes no kernel reads, ``[out, in]``.
        columns: Which columns are kept exactly beside the codes, ``[count]``.
        exact: These columns, ``[out, count]``; their codes are zero.
        stored_bytes: What a file needs for it, of what is dense.
        damping: Share of the mean of the diagonal that was added to the Gram matrix; infinite
            where no share was enough and the weight was rounded to nearest.
    """

    codes: Quantized | None
    dense: Tensor | None = None
    columns: Tensor | None = None
    exact: Tensor | None = None
    stored_bytes: int = 0
    damping: float = 0.0

    def value(self) -> Tensor:
        """The weight that is computed with, float32 ``[out, in]``."""
        if self.dense is not None:
            return self.dense.float()
        assert self.codes is not None
        value = self.codes.dequantized()
        if self.columns is not None and self.exact is not None:
            value[:, self.columns] = self.exact.float()
        return value

    def rows(self, start: int, stop: int) -> Rounded:
        """Some rows of it; bytes are shared out by their number."""
        if self.codes is None:
            assert self.dense is not None
            share = (stop - start) / self.dense.shape[0]
            kept = round(self.stored_bytes * share)
            return Rounded(None, self.dense[start:stop], stored_bytes=kept, damping=self.damping)
        exact = None if self.exact is None else self.exact[start:stop].contiguous()
        part = _rows(self.codes, start, stop)
        return Rounded(part, None, self.columns, exact, damping=self.damping)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, for a file; `rounded_of` is the way back."""
        named: dict[str, Tensor | None] = {
            "dense": self.dense,
            "columns": self.columns,
            "exact": self.exact,
            "stored_bytes": torch.tensor(self.stored_bytes),
            "damping": torch.tensor(self.damping, dtype=torch.float64),
        }
        if self.codes is not None:
            named |= {f.name: getattr(self.codes, f.name) for f in fields(self.codes)[:3]}
        return {name: value for name, value in named.items() if value is not None}


def rounded_of(tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Rounded:
    """What `Rounded.tensors` wrote.

    Raises:
        KeyError: A tensor is missing.
    """
    codes = None
    if "packed" in tensors:
        packed, scales = tensors["packed"], tensors["scales"]
        codes = Quantized(packed, scales, tensors.get("zero_points"), format, shape)
    return Rounded(
        codes,
        tensors.get("dense"),
        tensors.get("columns"),
        tensors.get("exact"),
        int(tensors["stored_bytes"]),
        float(tensors["damping"]),
    )


AT_ONCE = 1 << 22
"""Entries of a weight that are rounded at once where rows don't know of each other: the buffers of
a head, the largest weight of many models, would be larger than a block."""

ROWS = 1024
"""Fewer rows at once take longer: each column has costs of its own."""


def in_parts(weight: Tensor, round: Callable[[Tensor], Rounded]) -> Rounded:
    """Round some rows after the other, and put them together.

    Args:
        weight: ``[out, in]``.
        round: Of some rows; which columns are kept exactly must not hang on the rows.
    """
    rows = max(ROWS, AT_ONCE // max(1, weight.shape[1]))
    return joined([round(part) for part in weight.split(rows)])


def joined(parts: Sequence[Rounded]) -> Rounded:
    """Rows that were rounded apart, as one weight; the first says which columns are exact."""
    first = parts[0]
    if len(parts) == 1:
        return first
    codes = [part.codes for part in parts if part.codes is not None]
    exact = [part.exact for part in parts if part.exact is not None]
    zeros = [one.zero_points for one in codes if one.zero_points is not None]
    whole = Quantized(
        torch.cat([one.packed for one in codes]),
        torch.cat([one.scales for one in codes]),
        torch.cat(zeros) if zeros else None,
        codes[0].format,
        (sum(one.shape[0] for one in codes), codes[0].shape[1]),
    )
    kept = torch.cat(exact) if exact else None
    return Rounded(whole, None, first.columns, kept, damping=first.damping)


class Rounding(abc.ABC):
    """A way to round the weight of a linear layer whose inputs are known.

    Subclasses are frozen dataclasses; their fields are their options.

    Attributes:
        name: As in the option `method` of `quantize-weights`.
        joins_rows: Whether rows don't know of each other, so that the weights that read one
            value may be rounded as one.
    """

    name: ClassVar[str]
    joins_rows: ClassVar[bool] = True

    @abc.abstractmethod
    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """Round one weight.

        Args:
            weight: Float32 or float64, ``[out, in]``.
            format: Of fewer than 32 bits.
            inputs: What is known of the inputs; factors are computed once and shared.

        Raises:
            ValueError: The weight holds NaN or infinite entries.
        """


def _rows(stored: Quantized, start: int, stop: int) -> Quantized:
    zeros = stored.zero_points
    return Quantized(
        stored.packed[start:stop].contiguous(),
        stored.scales[start:stop].contiguous(),
        None if zeros is None else zeros[start:stop].contiguous(),
        stored.format,
        (stop - start, stored.shape[-1]),
    )
