"""Size budgets: ``4.5`` bits per weight, ``30%`` of the model, ``12MB``.

A plain number says by its size what it means: no model has less than one bit per weight, and
none has less than 64 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Unit = Literal["bits", "percent", "bytes"]

_UNITS = ("b", "kb", "mb", "gb")
_BYTES: Mapping[str, int] = MappingProxyType(
    {unit: 1000**power for power, unit in enumerate(_UNITS)}
    | {f"{unit[0]}ib": 1024**power for power, unit in enumerate(_UNITS) if power}
    | {"bytes": 1}
)
_MOST_BITS = 64
_SPELLING = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z%]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Model:
    """What a budget is about.

    Attributes:
        entries: Entries of the weights that get a format.
        fixed: Bytes of the weights that stay as they are.
        bytes: Bytes of all weights as they are now.
    """

    entries: int
    fixed: int
    bytes: int


@dataclass(frozen=True)
class Budget:
    """How large weights may be.

    Attributes:
        amount: A number of `unit`.
        unit: ``"bits"`` are bits per entry of the weights that get a format, scales and zeros
            included; ``"percent"`` of the bytes of all weights as they are; ``"bytes"`` of all
            weights afterwards.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Read ``4.5``, ``"4.5 bits"``, ``"30%"``, ``"12MB"`` or ``"1.5 GiB"``.

        A number without a unit is a share below 1 (0.3 is 30 %), bits per weight up to 64, and
        bytes above.

        Raises:
            ValueError: It is none of these, or not positive.
        """
        found = _SPELLING.fullmatch(str(text))
        if found is None or float(found[1]) <= 0:
            raise ValueError(f"{_EXPECTED}, got {str(text)!r}")
        amount, unit = float(found[1]), found[2].lower()
        if unit in ("bit", "bits"):
            return cls(amount, "bits")
        if unit == "%":
            return cls(amount, "percent")
        if unit == "":
            return cls._of_number(amount)
        if unit not in _BYTES:
            raise ValueError(f"{_EXPECTED}, got {str(text)!r}")
        return cls(amount * _BYTES[unit], "bytes")

    @classmethod
    def _of_number(cls, amount: float) -> Budget:
        if amount < 1:
            return cls(100 * amount, "percent")
        return cls(amount, "bits" if amount <= _MOST_BITS else "bytes")

    def bytes(self, model: Model) -> int:
        """What the weights that get a format may take, in bytes; may be negative."""
        if self.unit == "bits":
            return int(self.amount * model.entries / 8)
        total = self.amount if self.unit == "bytes" else self.amount / 100 * model.bytes
        return int(total) - model.fixed

    def __str__(self) -> str:
        if self.unit == "bits":
            return f"{self.amount:g} bits per weight"
        return f"{self.amount:g}%" if self.unit == "percent" else f"{self.amount:.0f} bytes"

    def text(self, price: int, model: Model) -> str:
        """`price` bytes of the weights that get a format, in the unit of this budget."""
        if self.unit == "bits":
            return f"{_up(price * 8 / max(model.entries, 1))} bits per weight"
        total = price + model.fixed
        if self.unit == "percent":
            return f"{_up(100 * total / max(model.bytes, 1))}%"
        return f"{total} bytes"


_EXPECTED = "a budget is a number of bits per weight (4.5), a share (30%) or a size (12MB)"


def _up(value: float) -> str:
    """Rounded up at the fourth decimal, so that the number is enough when given as a budget."""
    return f"{-(-value * 10**4 // 1) / 10**4:.4f}".rstrip("0").rstrip(".")
