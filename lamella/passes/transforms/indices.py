"""Lists of blocks in words: ``1,5`` and ``3-7``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


def parse_indices(items: Iterable[int | str]) -> tuple[int, ...]:
    """The indices that numbers and ranges name, ascending and without repetition.

    Args:
        items: ``5``, ``"5"`` or ``"3-7"`` (both ends are meant).

    Raises:
        ValueError: An item is neither, or a range runs backwards.
    """
    found: set[int] = set()
    for item in items:
        match = _RANGE.fullmatch(str(item))
        if match is None:
            raise ValueError(f"expected an index or a range such as 3-7, got {item!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {item!r} runs backwards")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
