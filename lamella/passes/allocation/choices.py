"""The formats that weights may get, by name, and the floors that keep some weights wide."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lamella.ir.quantize import (
    BITS,
    BLOCKS,
    SCALE_DTYPES,
    USUAL_BLOCKS,
    Format,
    weight_bytes,
)
from lamella.passes.sites import Role, Site

Group = tuple[Site, ...]
Choices = Sequence[tuple[Group, tuple[Format, ...]]]

_GRID = re.compile(r"(\d+)(?:/(\d+))?(z?)")
_ROW = (1, 4096)


@dataclass(frozen=True)
class Menu:
    """What every weight may be stored in.

    A block that does not divide the inputs of a weight is padded, and some checkpoint formats do
    not hold it: a weight gets one only where no other block of that width is among the formats.

    Attributes:
        formats: The narrowest first; of one width the smaller first.
        floors: Role -> a weight with it never gets fewer bits.
        frozen: Name of a weight -> it never gets fewer bits.
    """

    formats: tuple[Format, ...]
    floors: Mapping[Role, int] = field(default_factory=dict[Role, int])
    frozen: Mapping[str, int] = field(default_factory=dict[str, int])

    def allowed(self, group: Group) -> tuple[Format, ...]:
        """The formats that every member may have; the widest if all are too narrow."""
        floor = max(
            max(self.floors.get(site.role, 0), self.frozen.get(site.weight, 0)) for site in group
        )
        wide = tuple(f for f in self.formats if f.bits >= floor) or self.formats[-1:]
        whole = {f for f in wide if all(site.shape[1] % f.block == 0 for site in group)}
        filled = {(f.bits, f.symmetric) for f in whole}
        return tuple(f for f in wide if f in whole or (f.bits, f.symmetric) not in filled)


def formats_of(
    choices: Sequence[int | str], block: int | None, symmetric: bool, scales: str
) -> tuple[Format, ...]:
    """Formats from their names: ``4``, ``"4/128"`` (bits/block), ``"4/32z"`` (with zeros).

    Args:
        choices: The names; a width alone has the block and the symmetry of the rest.
        block: Weights that share a scale, where a name doesn't say; None means every one of
            `USUAL_BLOCKS`.
        symmetric: Without zero points, where a name doesn't say.
        scales: ``"float16"`` or ``"float32"``.

    Returns:
        The distinct formats, the narrowest first.

    Raises:
        ValueError: A name, or what it stands for, is unknown.
    """
    if scales not in SCALE_DTYPES:
        raise ValueError(f"scales must be one of {', '.join(SCALE_DTYPES)}, got {scales!r}")
    blocks = USUAL_BLOCKS if block is None else (block,)
    several = [Format(4, one, symmetric, SCALE_DTYPES[scales]) for one in blocks]
    found = {_format(str(one), usual) for one in choices for usual in several}
    if not found:
        raise ValueError(f"choices must name at least one width, of {', '.join(map(str, BITS))}")
    return tuple(sorted(found, key=_width))


def _format(text: str, usual: Format) -> Format:
    match = _GRID.fullmatch(text.strip())
    bits = int(match[1]) if match else 0
    block = int(match[2]) if match and match[2] else usual.block
    if match is None or bits not in BITS or block not in BLOCKS:
        raise ValueError(
            f"choices must be among {', '.join(map(str, BITS))}, or bits/block such as 4/128 "
            f"(blocks {', '.join(map(str, BLOCKS))}; 4/128z with zero points), got {text!r}"
        )
    if bits == 32:
        return Format(32, BLOCKS[0], usual.symmetric, usual.scale_dtype)
    return Format(bits, block, not match[3] and usual.symmetric, usual.scale_dtype)


def _width(format: Format) -> tuple[int, int, bool]:
    return (format.bits, weight_bytes(_ROW, format), format.symmetric)
