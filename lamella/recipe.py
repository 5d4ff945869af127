"""Pipelines as data: passes as text, as mappings, as objects; YAML files of them.

The three spellings of one pass::

    DropBlocks(count=2, by="lim")               # Python
    "drop-blocks count=2 by=lim"                # text
    {"drop-blocks": {"count": 2, "by": "lim"}}  # data

A recipe file is YAML::

    version: 1
    passes:
      - fold-norms
      - drop-blocks: {count: 2, by: lim}
      - quantize-weights bits=4
"""

from __future__ import annotations

import os
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from lamella.errors import RecipeError, closest, known_names
from lamella.passes.base import Analysis, Transform
from lamella.passes.coercion import coerce
from lamella.passes.options import changed_options, option_fields
from lamella.plugins import PassClass, known_passes

P = TypeVar("P", Transform, Analysis[Any])
Spec = Transform | Analysis[Any] | str | Mapping[str, Any]

VERSION = 1
"""The version of the recipes that are written, and the only one that is read."""

_MAX_BYTES = 1_000_000


def parse_passes(specs: Iterable[Spec] | str, *, plugins: bool = True) -> tuple[Transform, ...]:
    """Transforms from any mix of spellings.

    Args:
        specs: Each a transform, text or a mapping of one name to options; one text may hold
            several passes separated by ``;``.
        plugins: Whether passes of other distributions are known.

    Raises:
        RecipeError: Something is misspelled or malformed; every mistake is listed.
    """
    given: Iterable[Spec] = [specs] if isinstance(specs, str) else specs
    items: list[Spec] = []
    for spec in given:
        items += _split(spec) if isinstance(spec, str) else [spec]
    labels = [f"pass {index}" for index in range(1, len(items) + 1)]
    return _parsed(items, labels, known_passes(plugins=plugins))


def parse_pass(spec: Spec, *, plugins: bool = True) -> Transform:
    """One transform from any spelling; see `parse_passes`.

    Raises:
        RecipeError: It is misspelled or malformed, or an analysis.
    """
    return _one(Transform, spec, known_passes(plugins=plugins))


def parse_analysis(spec: Spec, *, plugins: bool = True) -> Analysis[Any]:
    """One analysis from any spelling.

    Raises:
        RecipeError: It is misspelled or malformed, or a transform.
    """
    return _one(Analysis[Any], spec, known_passes(plugins=plugins))


def load_recipe(path: str | os.PathLike[str], *, plugins: bool = True) -> tuple[Transform, ...]:
    """The passes of a YAML file.

    Raises:
        RecipeError: The file is missing, is not YAML, is of another version, or has misspelled
            passes; every mistake is listed with its line.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{file} is larger than {_MAX_BYTES} bytes; it is no recipe")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {file} can't be read ({error})") from error
    return parse_recipe(text, where=str(file), plugins=plugins)


def parse_recipe(
    text: str, *, where: str = "recipe", plugins: bool = True
) -> tuple[Transform, ...]:
    """The passes of a recipe as YAML text; `where` stands before every mistake.

    Raises:
        RecipeError: See `load_recipe`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}{_line_of(error)} is not YAML: {_problem(error)}") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping with 'version: {VERSION}' and 'passes:'")
    _check_head(where, root, cast(dict[str, Any], data))
    lines = _pass_lines(root)
    labels = [f"{where}, line {line}" for line in lines]
    return _parsed(data["passes"], labels, known_passes(plugins=plugins))


def recipe_of(passes: Iterable[Transform]) -> dict[str, Any]:
    """A pipeline as data for JSON or YAML; `parse_recipe` and `parse_passes` read it."""
    entries = [(one.name, changed_options(one)) for one in passes]
    return {"version": VERSION, "passes": [{n: o} if o else n for n, o in entries]}


def dump_recipe(passes: Iterable[Transform]) -> str:
    """A pipeline as YAML; `parse_recipe` gives back equal passes."""
    return yaml.safe_dump(recipe_of(passes), sort_keys=False, allow_unicode=True)


# ---- one pass ----------------------------------------------------------------------------


def _parsed(
    specs: Sequence[Any], labels: Sequence[str], known: Mapping[str, PassClass]
) -> tuple[Transform, ...]:
    found: list[Transform] = []
    mistakes: list[str] = []
    for label, spec in zip(labels, specs, strict=True):
        try:
            found.append(_one(Transform, spec, known))
        except RecipeError as error:
            mistakes.append(f"{label}: {error}" if len(specs) > 1 or "," in label else str(error))
    if mistakes:
        raise RecipeError("; ".join(mistakes))
    return tuple(found)


def _one(kind: type[P], spec: Spec, known: Mapping[str, PassClass]) -> P:
    """The pass that `spec` spells, of the kind that is wanted."""
    base = typing.get_origin(kind) or kind
    if isinstance(spec, Transform | Analysis):
        found: Transform | Analysis[Any] = spec
    else:
        name, options = _spelled(spec)
        found = _built(_class_of(name, base, known), options)
    if not isinstance(found, base):
        raise _wrong_kind(found.name, base)
    return cast(P, found)


def _spelled(spec: Any) -> tuple[str, dict[str, Any]]:
    """Name and options, not yet checked."""
    if isinstance(spec, str):
        return _spelled_in_text(spec)
    if not isinstance(spec, Mapping) or len(cast(Mapping[Any, Any], spec)) != 1:
        raise RecipeError(
            f"a pass is text such as 'drop-blocks count=2', or a mapping of one name to its "
            f"options, got {spec!r}"
        )
    name, options = next(iter(cast(Mapping[Any, Any], spec).items()))
    if options is None:
        return str(name), {}
    if not isinstance(options, Mapping):
        raise RecipeError(f"the options of {name!r} must be a mapping, got {options!r}")
    pairs = cast(Mapping[Any, Any], options).items()
    return str(name), {str(key): value for key, value in pairs}


def _spelled_in_text(text: str) -> tuple[str, dict[str, Any]]:
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise RecipeError(f"{text!r} can't be read ({error})") from None
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"{name}: {word!r} is no option; options look like count=2")
        if key in options:
            raise RecipeError(f"{name}: option {key!r} is given twice")
        options[key] = value
    return name, options


def _split(text: str) -> list[Spec]:
    """The passes in one text; a ``;`` in quotes does not separate."""
    passes, quote = [""], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == ";":
            passes.append("")
            continue
        passes[-1] += character
    found: list[Spec] = [one for one in passes if one.strip()]
    if not found:
        raise RecipeError("a pass is text such as 'drop-blocks count=2', got an empty text")
    return found


def _class_of(name: str, base: type[Any], known: Mapping[str, PassClass]) -> PassClass:
    plain = name.replace("_", "-")
    if plain in known:
        return known[plain]
    kind = _kind_text(base)
    names = sorted(one for one, cls in known.items() if issubclass(cls, base))
    raise RecipeError(f"there is no {kind} {name!r}{known_names(plain, names)}")


def _built(cls: PassClass, options: Mapping[str, Any]) -> Transform | Analysis[Any]:
    """The pass with its options coerced to the types of its fields; all mistakes at once."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in option_fields(cls)]
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    for given, value in options.items():
        name = given.replace("-", "_")
        if name not in names:
            known = f"; it has {', '.join(names)}" if names else "; it has no options"
            hint = closest(name, names)
            mistakes.append(f"{cls.name} has no option {given!r}{hint or known}")
            continue
        try:
            values[name] = coerce(hints[name], value)
        except ValueError as error:
            mistakes.append(f"option {name!r} of {cls.name}: {error}")
    if mistakes:
        raise RecipeError("; ".join(mistakes))
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{cls.name}: {error}") from error


def _wrong_kind(name: str, wanted: type[Any]) -> RecipeError:
    other = Analysis if wanted is Transform else Transform
    return RecipeError(f"{name!r} is {_article(other)}, not {_article(wanted)}")


def _kind_text(base: type[Any]) -> str:
    return "pass" if base is Transform else "analysis"


def _article(base: type[Any]) -> str:
    return "a transform" if base is Transform else "an analysis"


# ---- YAML --------------------------------------------------------------------------------


def _check_head(where: str, root: yaml.MappingNode, data: dict[str, Any]) -> None:
    """Everything that is wrong above the passes themselves."""
    mistakes = [f"{where}, line {line}: {key!r} is given twice" for key, line in _doubled(root)]
    for key in data:
        if key not in ("version", "passes"):
            hint = closest(str(key), ("version", "passes"))
            mistakes.append(f"{where} has an unknown key {key!r}{hint}")
    if data.get("version") != VERSION or isinstance(data.get("version"), bool):
        got = f"got {data['version']!r}" if "version" in data else "there is none"
        mistakes.append(f"{where} must have 'version: {VERSION}', {got}")
    if not isinstance(data.get("passes"), list):
        mistakes.append(f"{where} must have a list 'passes:'")
    if mistakes:
        raise RecipeError("; ".join(mistakes))


def _pass_lines(root: yaml.MappingNode) -> list[int]:
    pairs = cast(list[tuple[Any, Any]], root.value)
    entries = next(value for key, value in pairs if key.value == "passes")
    return [entry.start_mark.line + 1 for entry in entries.value]


def _doubled(root: yaml.Node) -> Iterable[tuple[str, int]]:
    """The keys that YAML would silently take the last of, with their lines."""
    waiting, met = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        inner = cast(list[Any], node.value if isinstance(node.value, list) else [])
        seen: set[str] = set()
        for item in inner:
            key, value = item if isinstance(item, tuple) else (None, item)
            if key is not None:
                name = str(key.value)
                if name in seen:
                    yield name, key.start_mark.line + 1
                seen.add(name)
            # An alias may lead back to where it stands.
            if id(value) not in met:
                met.add(id(value))
                waiting.append(value)


def _line_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
