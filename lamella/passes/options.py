"""The options of a pass, as text, as data and described.

The fields of a dataclass are the options; `lamella.passes.coercion` is the way back.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, cast

SEQUENCES = (tuple, list, frozenset, set, Sequence, Iterable)


@dataclass(frozen=True)
class Option:
    """An option of a pass, for people.

    Attributes:
        name: As in a recipe.
        type: ``"int"``, ``"float or none"``, ``"lim, zd or size"``.
        default: As text, or None if the option must be given.
        doc: What the docstring of the pass says about it.
    """

    name: str
    type: str
    default: str | None
    doc: str


def options_of(a_pass: Any) -> dict[str, Any]:
    """The options of a pass by name, as they are."""
    return {field.name: getattr(a_pass, field.name) for field in option_fields(type(a_pass))}


def option_fields(kind: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a pass that are options."""
    return tuple(field for field in dataclasses.fields(kind) if field.init)


def spelling_of(a_pass: Any) -> str:
    """The name of a pass and its options that differ from the defaults."""
    words = [a_pass.name]
    for field in option_fields(type(a_pass)):
        value = getattr(a_pass, field.name)
        if not _is_default(field, value):
            words.append(f"{field.name}={shlex.quote(text_of_value(value))}")
    return " ".join(words)


def changed_options(a_pass: Any) -> dict[str, Any]:
    """The options that differ from the defaults, as plain data for a recipe."""
    fields = option_fields(type(a_pass))
    values = {field: getattr(a_pass, field.name) for field in fields}
    return {f.name: plain(v) for f, v in values.items() if not _is_default(f, v)}


def text_of_value(value: object) -> str:
    """An option as text: ``2``, ``lim``, ``1,2,3``, ``none``, ``true``; JSON where it must be."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, str):
        return json.dumps(value) if _is_ambiguous(value) else value
    if isinstance(value, Mapping):
        return json.dumps(plain(cast(object, value)))
    if isinstance(value, tuple | list | set | frozenset):
        texts = [text_of_value(item) for item in ordered(cast(Iterable[object], value))]
        simple = texts and not any(set(text) & set(',"[]{}') for text in texts)
        return ",".join(texts) if simple else json.dumps(plain(cast(object, value)))
    return str(plain(value))


def plain(value: object) -> Any:
    """An option as data for JSON and YAML: numbers, strings, lists, mappings, None."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        pairs = cast(Mapping[str, object], value).items()
        return {str(name): plain(item) for name, item in pairs}
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in ordered(cast(Iterable[object], value))]
    # A model given as an object has no text that could be read back; its kind must do.
    is_text = isinstance(value, PurePath) or hasattr(type(value), "parse")
    return str(value) if is_text else f"<{type(value).__name__}>"


def ordered(items: Iterable[object]) -> list[object]:
    """Sets have no order of their own."""
    return sorted(items, key=repr) if isinstance(items, set | frozenset) else list(items)


def _is_ambiguous(text: str) -> bool:
    """Whether text would be read back as something else: nothing, a list, a quoted string."""
    return text == "" or text.lower() == "none" or text[0] in '"[{' or text != text.strip()


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return False
    return type(default) is type(value) and default == value


def described(kind: type[Any]) -> tuple[Option, ...]:
    """The options of a pass class with their types, defaults and documentation."""
    hints = typing.get_type_hints(kind)
    docs = _attribute_docs(inspect.getdoc(kind) or "")
    return tuple(
        Option(field.name, type_text(hints[field.name]), _default(field), docs.get(field.name, ""))
        for field in option_fields(kind)
    )


def summary_of(kind: type[Any]) -> str:
    """The first sentence of the docstring."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").strip()


def type_text(kind: Any) -> str:
    """A type for people: ``"int"``, ``"lim, zd or size"``, ``"list of int"``, ``"… or none"``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is types.NoneType:
        return "none"
    if origin is Literal:
        return _either([text_of_value(argument) for argument in arguments])
    if origin in (types.UnionType, typing.Union):
        return _either([type_text(argument) for argument in arguments])
    if (origin or kind) in SEQUENCES:
        return f"list of {type_text(arguments[0])}" if arguments else "list"
    if (origin or kind) in (Mapping, dict):
        return f"mapping of {type_text(arguments[1])}" if arguments else "mapping"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _either([str(member.value) for member in kind])
    names = {bool: "true or false", str: "text", Path: "path", int: "integer", float: "number"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return text_of_value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return text_of_value(field.default_factory())
    return None


def _attribute_docs(doc: str) -> dict[str, str]:
    """The entries of the ``Attributes`` section of a Google docstring."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^ {4}(\w+): ", section.group(1), flags=re.MULTILINE)[1:]
    texts = (" ".join(text.split()) for text in entries[1::2])
    return dict(zip(entries[::2], texts, strict=True))
