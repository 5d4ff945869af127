"""The rounding methods by name, with the options of `quantize-weights` that each takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from lamella.errors import closest
from lamella.passes.rounding.base import Rounding
from lamella.passes.rounding.flexround import FlexRound
from lamella.passes.rounding.gptq import Gptq
from lamella.passes.rounding.pb_llm import PbLlm
from lamella.passes.rounding.quantease import QuantEase
from lamella.passes.rounding.tokens import TOKENS

Method = Literal["rtn", "gptq", "quantease", "flexround", "pb-llm"]

_CHAINED = ("gptq", "quantease", "flexround", "pb-llm")
_GRAM = ("gptq", "quantease", "pb-llm")

TAKEN_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "damping": _GRAM,
        "act_order": ("gptq", "quantease"),
        "refits": ("gptq", "quantease"),
        "sweeps": ("quantease",),
        "outliers": ("quantease",),
        "salient": ("pb-llm",),
        "steps": ("flexround",),
        "tokens": _GRAM,
        "sequential": _GRAM,
        "resume": _CHAINED,
        "by_inputs": ("rtn",),
        "experts": ("rtn", "gptq", "quantease"),
    }
)
"""Option -> the methods that take it."""


def check_method(method: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse a method that is not there, an option it does not take, or a value out of range.

    Raises:
        ValueError: With the methods that take the option.
    """
    known = get_args(Method)
    if method not in known:
        raise ValueError(
            f"method must be one of {', '.join(known)}, got {method!r}{closest(method, known)}"
        )
    for name, methods in TAKEN_BY.items():
        if method not in methods and options[name] != defaults[name]:
            raise ValueError(
                f"method={method} takes no option {name}; it is one of {', '.join(methods)}"
            )
    if options["tokens"] not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {options['tokens']!r}")
    for name, low, high in _RANGES:
        if not low <= options[name] <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {options[name]}")


_RANGES = (
    ("damping", 0, 1),
    ("outliers", 0, 0.5),
    ("salient", 0, 1),
    ("refits", 0, 100),
    ("sweeps", 1, 1000),
    ("steps", 1, 1_000_000),
)


def rounding_of(method: str, options: Mapping[str, Any]) -> Rounding | None:
    """The method with its options; None for rounding to nearest, which needs no samples."""
    gptq = Gptq(options["damping"], options["act_order"], options["refits"])
    if method == "gptq":
        return gptq
    if method == "quantease":
        return QuantEase(gptq, options["sweeps"], options["outliers"])
    if method == "flexround":
        return FlexRound(options["steps"])
    if method == "pb-llm":
        return PbLlm(options["salient"], options["damping"])
    return None
