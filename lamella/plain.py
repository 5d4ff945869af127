"""Frozen dataclasses as plain data for JSON, and back: equal to what was written."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")
Plain = str | int | float | bool | None | list[Any] | dict[str, Any]


def as_plain(value: Any) -> Plain:
    """A value as data for `json.dumps`; a float that JSON has no number for as its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple | list):
        return [as_plain(item) for item in cast(list[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return cast(Plain, value)


def from_plain(kind: Any, data: Any, where: str) -> Any:
    """What `as_plain` made of a value of type `kind`, as a value again.

    Args:
        kind: A frozen dataclass, or the type of one of its fields.
        data: As `json.loads` gives it.
        where: What it is, for messages.

    Raises:
        ValueError: A field is missing, unknown or of the wrong type.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        inner = next(a for a in arguments if a is not type(None))
        return None if data is None else from_plain(inner, data, where)
    if origin is tuple:
        items = _expect(list, data, where)
        return tuple(from_plain(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin is Mapping:
        items = _expect(dict, data, where)
        return {k: from_plain(arguments[1], v, f"{where}.{k}") for k, v in items.items()}
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(arguments)}, got {data!r}")
        return data
    return _read_leaf(kind, data, where)


def _read_leaf(kind: Any, data: Any, where: str) -> Any:
    if isinstance(data, dict) and set(data) == {"float"} and kind in (float, Any):
        return float(data["float"])
    if kind is float:
        return float(_expect((int, float), data, where))
    return data if kind is Any else _expect(kind, data, where)


def _read_dataclass(kind: type[T], data: Any, where: str) -> T:
    items = _expect(dict, data, where)
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(cast(Any, kind))}
    if known != set(items):
        wrong = ", ".join(sorted(known ^ set(items)))
        raise ValueError(f"{where} has missing or unknown fields: {wrong}")
    return kind(
        **{name: from_plain(hints[name], v, f"{where}.{name}") for name, v in items.items()}
    )


def _expect(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, kind):
        raise ValueError(f"{where} has the wrong type {type(data).__name__}")
    return data
