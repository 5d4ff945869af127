"""Budgets: ``4.5`` bits per weight, ``30%`` of the model, ``12MB``, ``3.2ms`` a call.

A plain number says by its size what it means: no model has less than one bit per weight, and
none has less than 64 bytes. Several budgets stand in one text, ``"12MB, 3ms, 40ms prefill"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from lamella.errors import known_names

Unit = Literal["bits", "percent", "bytes", "seconds"]
Phase = Literal["", "decode", "prefill"]

_UNITS = ("b", "kb", "mb", "gb")
_BYTES: Mapping[str, int] = MappingProxyType(
    {unit: 1000**power for power, unit in enumerate(_UNITS)}
    | {f"{unit[0]}ib": 1024**power for power, unit in enumerate(_UNITS) if power}
    | {"bytes": 1}
)
_SECONDS: Mapping[str, float] = MappingProxyType({"us": 1e-6, "ms": 1e-3, "s": 1.0})
UNITS = ("bits", "%", *_BYTES, *_SECONDS)
"""What the unit of a budget may be called."""

_PHASES: Mapping[str, Phase] = MappingProxyType({"": "", "decode": "decode", "prefill": "prefill"})
_MOST_BITS = 64
_SPELLING = re.compile(
    r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z%]*)(?:\s+(decode|prefill)(?:=([0-9]+))?)?\s*",
    re.IGNORECASE,
)


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
    """How large weights may be, or how long a call may take.

    Attributes:
        amount: A number of `unit`.
        unit: ``"bits"`` are bits per entry of the weights that get a format, scales and zeros
            included; ``"percent"`` of the bytes of all weights as they are; ``"bytes"`` of all
            weights afterwards; ``"seconds"`` of a call.
        phase: Of a language model: which call is meant, or empty where nobody said.
        tokens: Of the prompt, or in the cache while decoding; None where nobody said.
    """

    amount: float
    unit: Unit
    phase: Phase = ""
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str | float, unit: str = "") -> Budget:
        """Read ``4.5``, ``"4.5 bits"``, ``"30%"``, ``"12MB"``, ``"1.5 GiB"`` or ``"3.2ms"``.

        A number without a unit is a share below 1 (0.3 is 30 %), bits per weight up to 64, and
        bytes above. After a time may stand which call of a language model is meant, and its
        tokens: ``"3ms decode=1024"``, ``"40ms prefill"``.

        Args:
            text: The budget.
            unit: The unit of a number that has none.

        Raises:
            ValueError: It is none of these, not positive, or has two units.
        """
        found = _SPELLING.fullmatch(str(text))
        if found is None or float(found[1]) <= 0:
            raise ValueError(f"{_EXPECTED}, got {str(text)!r}")
        if unit and found[2]:
            raise ValueError(f"a budget has one unit, got {str(text)!r} and unit={unit}")
        amount, called = float(found[1]), (found[2] or unit).lower()
        if found[3] and called not in _SECONDS:
            raise ValueError(f"only a time is of a call, got {str(text)!r}")
        if called in ("bit", "bits"):
            return cls(amount, "bits")
        if called == "%":
            return cls(amount, "percent")
        if called == "":
            return cls._of_number(amount)
        if called in _SECONDS:
            tokens = None if found[4] is None else int(found[4])
            return cls(
                amount * _SECONDS[called], "seconds", _PHASES[(found[3] or "").lower()], tokens
            )
        if called in _BYTES:
            return cls(amount * _BYTES[called], "bytes")
        raise ValueError(f"{_EXPECTED}, got the unit {called!r}{known_names(called, UNITS)}")

    @classmethod
    def parse_all(cls, text: str | float, unit: str = "") -> tuple[Budget, ...]:
        """Read several budgets with commas between them; see `parse`.

        Raises:
            ValueError: One of them is none, or there are two of one kind.
        """
        found = tuple(cls.parse(one, unit) for one in str(text).split(","))
        kinds = [one.kind for one in found]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"there are two budgets of one kind in {str(text)!r}; keep one")
        return found

    @property
    def kind(self) -> tuple[object, ...]:
        """Budgets of one kind limit the same thing."""
        return ("seconds", self.phase, self.tokens) if self.unit == "seconds" else ("bytes",)

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

    @property
    def seconds(self) -> float:
        """What a call may take; infinite for a budget of bytes."""
        return self.amount if self.unit == "seconds" else float("inf")

    def __str__(self) -> str:
        if self.unit == "bits":
            return f"{self.amount:g} bits per weight"
        if self.unit == "seconds":
            tokens = "" if self.tokens is None else f"={self.tokens}"
            return f"{self.amount * 1e3:g} ms {self.phase}{tokens}".rstrip()
        return f"{self.amount:g}%" if self.unit == "percent" else f"{self.amount:.0f} bytes"

    def text(self, price: int, model: Model) -> str:
        """`price` bytes of the weights that get a format, in the unit of this budget."""
        if self.unit == "bits":
            return f"{_up(price * 8 / max(model.entries, 1))} bits per weight"
        total = price + model.fixed
        if self.unit == "percent":
            return f"{_up(100 * total / max(model.bytes, 1))}%"
        return f"{total} bytes"

    def text_of_seconds(self, seconds: float) -> str:
        """`seconds` of a call, in the unit of a budget."""
        return f"{_up(seconds * 1e3)} ms"


_EXPECTED = (
    "a budget is a number of bits per weight (4.5), a share (30%), a size (12MB) or a time (3ms)"
)


def _up(value: float) -> str:
    """Rounded up at the fourth decimal, so that the number is enough when given as a budget."""
    return f"{-(-value * 10**4 // 1) / 10**4:.4f}".rstrip("0").rstrip(".")
