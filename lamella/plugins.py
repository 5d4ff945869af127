"""Passes, backends and rules from other distributions, found by their entry points.

A distribution declares, for example::

    [project.entry-points."lamella.passes"]
    "prune-by-magnitude" = "my_package.passes:PruneByMagnitude"

Nothing is imported before the first question for plugins. One that fails to load is named in a
warning and in `plugin_status`, and does not hurt the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any, Literal

from lamella.backends.base import Backend
from lamella.backends.registry import HOMES
from lamella.errors import PluginError
from lamella.passes.base import Analysis, Transform
from lamella.passes.registry import ANALYSES, TRANSFORMS
from lamella.rules.table import RuleTable

Group = Literal["lamella.passes", "lamella.backends", "lamella.rules"]
PassClass = type[Transform] | type[Analysis[Any]]

GROUPS: tuple[Group, ...] = ("lamella.passes", "lamella.backends", "lamella.rules")
"""The entry point groups that are read."""


@dataclass(frozen=True)
class PluginStatus:
    """One entry point and what became of it.

    Attributes:
        group: Entry point group.
        name: Name of the pass, the backend or the rule table.
        distribution: Name and version of the distribution that declares it.
        error: Why it could not be loaded, or None.
    """

    group: Group
    name: str
    distribution: str
    error: str | None = None


@dataclass(frozen=True)
class PassEntry:
    """A pass that can be asked for by name.

    Attributes:
        cls: Its class.
        kind: Whether it edits or answers.
        distribution: Who brings it.
    """

    cls: PassClass
    kind: Literal["transform", "analysis"]
    distribution: str

    @classmethod
    def of(cls, kind: PassClass, distribution: str) -> PassEntry:
        """The entry of a class."""
        is_transform = issubclass(kind, Transform)
        return cls(kind, "transform" if is_transform else "analysis", distribution)


@dataclass(frozen=True)
class Catalog:
    """What can be asked for by name, of Lamella and of plugins.

    Attributes:
        passes: Transforms and analyses; those of Lamella come first.
        backends: Backends of plugins by name (`lamella.backends.registry` has the others).
        rules: Rule tables of plugins by subject; each extends the built-in table.
        status: Every entry point, with the error of those that failed.
    """

    passes: tuple[PassEntry, ...]
    backends: Mapping[str, type[Backend]]
    rules: Mapping[str, tuple[RuleTable[Any], ...]]
    status: tuple[PluginStatus, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each plugin that could not be loaded."""
        return tuple(_failure(entry) for entry in self.status if entry.error is not None)


def catalog(*, plugins: bool = True) -> Catalog:
    """What there is in this environment; plugins are loaded at the first call.

    Args:
        plugins: False leaves out what other distributions bring.

    Raises:
        PluginError: A plugin takes the name of another pass or backend.
    """
    return _with_plugins() if plugins else read_catalog(())


def backends() -> Mapping[str, type[Backend]]:
    """The backends of plugins by name."""
    return catalog().backends


def plugin_status() -> tuple[PluginStatus, ...]:
    """Every plugin by entry point, with the error of those that failed to load."""
    return catalog().status


def known_passes(*, plugins: bool = True) -> Mapping[str, PassClass]:
    """All transforms and analyses by name; see `catalog`."""
    return {entry.cls.name: entry.cls for entry in catalog(plugins=plugins).passes}


def read_catalog(entry_points: Iterable[metadata.EntryPoint]) -> Catalog:
    """What Lamella has and what `entry_points` add; those that fail are named in a warning.

    Raises:
        PluginError: A plugin takes the name of another pass or backend.
    """
    passes = [PassEntry.of(kind, "lamella") for kind in (*TRANSFORMS, *ANALYSES)]
    owners = {("lamella.passes", entry.cls.name): "lamella" for entry in passes}
    owners |= {("lamella.backends", name): "lamella" for name in HOMES}
    more: dict[str, type[Backend]] = {}
    rules: dict[str, tuple[RuleTable[Any], ...]] = {}
    status: list[PluginStatus] = []
    for point in sorted(entry_points, key=lambda p: (p.group, p.name, _distribution(p))):
        loaded, problem = _load(point)
        entry = PluginStatus(_group(point.group), point.name, _distribution(point), problem)
        status.append(entry)
        if problem is not None:
            warnings.warn(_failure(entry), UserWarning, stacklevel=3)
        elif entry.group == "lamella.rules":
            rules[entry.name] = (*rules.get(entry.name, ()), loaded)
        elif _claim(owners, entry) == "lamella.backends":
            more[entry.name] = loaded
        else:
            passes.append(PassEntry.of(loaded, entry.distribution))
    return Catalog(tuple(passes), MappingProxyType(more), MappingProxyType(rules), tuple(status))


@functools.cache
def _with_plugins() -> Catalog:
    points = (point for group in GROUPS for point in metadata.entry_points(group=group))
    return read_catalog(dict.fromkeys(points))


def _claim(owners: dict[tuple[str, str], str], entry: PluginStatus) -> Group:
    """The group of an entry whose name is free.

    Raises:
        PluginError: Somebody else has it.
    """
    owner = owners.setdefault((entry.group, entry.name), entry.distribution)
    if owner != entry.distribution:
        what = "pass" if entry.group == "lamella.passes" else "backend"
        raise PluginError(
            f"{owner} and {entry.distribution} both bring a {what} called {entry.name!r}; "
            f"uninstall the plugin or rename what it brings"
        )
    return entry.group


def _load(point: metadata.EntryPoint) -> tuple[Any, str | None]:
    """The object of an entry point, or what is wrong with it."""
    try:
        loaded = point.load()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return loaded, _CHECKS[_group(point.group)](point.name, loaded)


def _wrong_pass(name: str, loaded: Any) -> str | None:
    if not isinstance(loaded, type) or not issubclass(loaded, Transform | Analysis):
        return "it is neither a Transform nor an Analysis"
    parameters = getattr(loaded, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or not dataclasses.is_dataclass(loaded):
        return f"{loaded.__name__} is not a frozen dataclass"
    if inspect.isabstract(loaded):
        return f"{loaded.__name__} has no method run"
    return _wrong_name(name, loaded)


def _wrong_backend(name: str, loaded: Any) -> str | None:
    if not isinstance(loaded, type) or not issubclass(loaded, Backend):
        return "it is not a Backend"
    return _wrong_name(name, loaded)


def _wrong_name(name: str, loaded: Any) -> str | None:
    own = getattr(loaded, "name", None)
    return None if own == name else f"its entry point is called {name!r}, its name is {own!r}"


def _wrong_rules(name: str, loaded: Any) -> str | None:
    return None if isinstance(loaded, RuleTable) else "it is not a RuleTable"


_CHECKS: Mapping[Group, Callable[[str, Any], str | None]] = {
    "lamella.passes": _wrong_pass,
    "lamella.backends": _wrong_backend,
    "lamella.rules": _wrong_rules,
}


def _group(name: str) -> Group:
    return next(group for group in GROUPS if group == name)


def _distribution(point: metadata.EntryPoint) -> str:
    return "unknown" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _failure(entry: PluginStatus) -> str:
    return (
        f"plugin {entry.name!r} of {entry.distribution} can't be used ({entry.error}); "
        f"uninstall or repair {entry.distribution.split(' ')[0]}"
    )
