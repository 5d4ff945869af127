"""Text and plain data as an option of a pass: the way back from `lamella.passes.options`.

What `text_of_value` writes, `coerce` reads back as an equal value, given the type of the field.
"""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, cast

from lamella.errors import closest
from lamella.passes.options import SEQUENCES, ordered, text_of_value, type_text

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_POWERS = {unit: power for power, unit in enumerate("kmgt", start=1)}
_UNITS = {u: 1000**p for u, p in _POWERS.items()} | {f"{u}i": 1024**p for u, p in _POWERS.items()}


def coerce(kind: Any, value: Any) -> Any:
    """`value`, text or plain data, as an option of type `kind`.

    Text may carry units: ``"25%"`` is a float, ``"20MB"`` and ``"1GiB"`` are integers. A list
    of one looks like its only item, so a union of a list and a scalar takes it as the scalar.

    Raises:
        ValueError: It is not one; the message says what was expected.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(kind, arguments, value)
    if origin is Literal:
        return _coerce_literal(kind, arguments, value)
    if (origin or kind) in SEQUENCES:
        return _coerce_sequence(origin or kind, arguments, value)
    if (origin or kind) in (Mapping, dict):
        return _coerce_mapping(arguments, value)
    if hasattr(kind, "parse") and isinstance(value, str):
        return kind.parse(value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _coerce_enum(kind, value)
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        return scalar(value)
    if isinstance(value, kind):
        return value
    raise _expected(kind, value)


def _coerce_union(kind: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """The narrowest alternative that takes the value; text is taken as text last."""
    is_none = value is None or (isinstance(value, str) and value.strip().lower() == "none")
    if is_none and types.NoneType in arguments:
        return None
    for alternative in sorted(arguments, key=_width):
        try:
            return coerce(alternative, value)
        except ValueError:
            continue
    raise _expected(kind, value)


def _width(kind: Any) -> int:
    order = [types.NoneType, bool, int, float]
    return order.index(kind) if kind in order else 9 if kind in (str, Path) else 5


def _coerce_literal(kind: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    for argument in arguments:
        if type(argument) is type(value) and argument == value:
            return argument
    if isinstance(value, str):
        for argument in arguments:
            if text_of_value(argument).lower() == value.strip().lower():
                return argument
    raise _expected(kind, value, closest(str(value), map(str, arguments)))


def _coerce_enum(kind: type[enum.Enum], value: Any) -> enum.Enum:
    if isinstance(value, kind):
        return value
    for member in kind:
        if value == member.value or str(value).lower() in (
            str(member.value).lower(),
            member.name.lower(),
        ):
            return member
    raise _expected(kind, value, closest(str(value), (str(m.value) for m in kind)))


def _coerce_sequence(kind: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    items = _items(value)
    fixed = kind is tuple and len(arguments) > 0 and arguments[-1] is not Ellipsis
    inner = arguments if fixed else (arguments[0] if arguments else Any,) * len(items)
    if len(inner) != len(items):
        raise ValueError(f"expected {len(inner)} values, got {len(items)}")
    found = [coerce(one, item) for one, item in zip(inner, items, strict=True)]
    return kind(found) if kind in (list, set, frozenset) else tuple(found)


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            return list(_json(text))
        return [item.strip() for item in text.split(",")] if text else []
    if isinstance(value, tuple | list | set | frozenset):
        return ordered(cast(Iterable[Any], value))
    return [value]


def _coerce_mapping(arguments: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = _json(value) if isinstance(value, str) else value
    if not isinstance(data, Mapping):
        raise ValueError(f'expected a mapping such as {{"a": 1}}, got {value!r}')
    pairs = cast(Mapping[Any, Any], data).items()
    inner = arguments[1] if arguments else Any
    return {str(name): coerce(inner, item) for name, item in pairs}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON ({error.msg} at character {error.pos})") from None


def _coerce_none(value: Any) -> None:
    if value is not None:
        raise _expected(types.NoneType, value)


def _coerce_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    raise _expected(bool, value)


def _coerce_int(value: Any) -> int:
    if isinstance(value, str):
        value = _with_units(value, int)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise _expected(int, value)
    return int(value)


def _coerce_float(value: Any) -> float:
    if isinstance(value, str):
        value = _with_units(value, float)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _expected(float, value)
    return float(value)


def _with_units(text: str, kind: type) -> Any:
    """``"25%"`` -> 0.25, ``"20MB"`` -> 20000000; the text itself if it is no number."""
    found = re.fullmatch(r"\s*([-+]?[\d._]*(?:e[-+]?\d+)?)\s*(%|[kmgt]i?b?)?\s*", text.lower())
    number, unit = found.groups() if found else (text.strip(), None)
    try:
        value = int(number) if re.fullmatch(r"[-+]?[\d_]+", number) else float(number)
    except ValueError:
        return text
    if unit == "%":
        return value / 100 if kind is float else text
    return value * _UNITS[unit.removesuffix("b")] if unit else value


def _coerce_str(value: Any) -> str:
    if not isinstance(value, str):
        raise _expected(str, value, "; put it in quotes")
    if len(value) > 1 and value[0] == value[-1] == '"':
        return str(_json(value))
    return value


def _coerce_path(value: Any) -> Path:
    if not isinstance(value, str | PurePath) or str(value) == "":
        raise _expected(Path, value)
    return Path(value)


_SCALARS: dict[Any, Any] = {
    types.NoneType: _coerce_none,
    bool: _coerce_bool,
    int: _coerce_int,
    float: _coerce_float,
    str: _coerce_str,
    Path: _coerce_path,
}


def _expected(kind: Any, value: Any, hint: str = "") -> ValueError:
    return ValueError(f"expected {type_text(kind)}, got {value!r}{hint}")
