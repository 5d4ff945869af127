"""Plugins: the installed example, broken ones, clashes."""

from __future__ import annotations

import textwrap
from importlib import metadata
from pathlib import Path

import pytest

import lamella.plugins as subject
from lamella.errors import PluginError
from lamella.passes.registry import ANALYSES, TRANSFORMS
from lamella.plugins import catalog, known_passes, plugin_status, read_catalog
from lamella.recipe import parse_analysis, parse_passes
from tests.unit.planted import network

CODE = """
from dataclasses import dataclass
from typing import ClassVar
from lamella.passes.base import Analyses, Effect, Transform
from lamella.rules.table import RuleTable

@dataclass(frozen=True)
class Good(Transform):
    name: ClassVar[str] = "good"
    effect: ClassVar[Effect] = Effect.EXACT
    def run(self, graph, analyses): ...

@dataclass
class Thawed(Transform):
    name: ClassVar[str] = "thawed"
    def run(self, graph, analyses): ...

@dataclass(frozen=True)
class Abstract(Transform):
    name: ClassVar[str] = "abstract"

table = RuleTable("cost", {})
"""


def points(
    folder: Path, name: str, code: str, entries: dict[str, dict[str, str]]
) -> list[metadata.EntryPoint]:
    """The entry points of a distribution that is laid out in `folder`."""
    (folder / f"{name}_module.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines: list[str] = []
    for group, objects in entries.items():
        lines.append(f"[{group}]")
        lines += [f"{entry} = {name}_module:{target}" for entry, target in objects.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return list(metadata.PathDistribution(info).entry_points)


def passes(**objects: str) -> dict[str, dict[str, str]]:
    return {"lamella.passes": objects}


@pytest.fixture(autouse=True)
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)


def test_the_example_distribution_is_listed_and_runs():
    loaded = {entry.name: entry for entry in plugin_status()}
    for name in ("prune-by-magnitude", "sparsity"):
        assert loaded[name].error is None
        assert loaded[name].distribution == "lamella-example-plugin 0.1.0"
        assert name in known_passes()
        assert name not in known_passes(plugins=False)
    graph = network()
    import lamella.passes.manager as manager
    from lamella.passes.base import Analyses

    report = manager.run_passes(graph, parse_passes("prune-by-magnitude sparsity_ratio=25%"))
    assert report.passes[0].edits == 3
    ratios = Analyses(graph).get(parse_analysis("sparsity")).ratios
    assert ratios == {"up.weight": 0.25, "down.weight": 0.25, "head.weight": 0.25}


@pytest.mark.parametrize(
    ("objects", "error"),
    [
        (passes(missing="Missing"), "AttributeError"),
        (passes(thawed="Thawed"), "Thawed is not a frozen dataclass"),
        (passes(abstract="Abstract"), "Abstract has no method run"),
        (passes(other="Good"), "its entry point is called 'other', its name is 'good'"),
        (passes(table="table"), "it is neither a Transform nor an Analysis"),
        ({"lamella.backends": {"good": "Good"}}, "it is not a Backend"),
        ({"lamella.rules": {"cost": "Good"}}, "it is not a RuleTable"),
    ],
    ids=str,
)
def test_a_broken_plugin_is_named_and_does_not_hurt_the_rest(
    objects: dict[str, dict[str, str]], error: str, tmp_path: Path
):
    good = points(tmp_path, "fine", CODE, passes(good="Good"))
    bad = points(tmp_path, "rotten", CODE, objects)
    with pytest.warns(UserWarning, match=r"of rotten 1\.0 can't be used .*repair rotten"):
        found = read_catalog([*bad, *good])
    assert [e.cls.name for e in found.passes if e.distribution != "lamella"] == ["good"]
    (failed,) = [entry for entry in found.status if entry.error is not None]
    assert failed.distribution == "rotten 1.0"
    assert error in str(failed.error)
    assert len(found.failures) == 1
    assert "rotten 1.0" in found.failures[0]


@pytest.mark.parametrize("code", ["raise SystemError('boom')", "import no_such_module", "def ("])
def test_a_plugin_that_fails_to_import(code: str, tmp_path: Path):
    bad = points(tmp_path, "rotten", code, passes(x="X"))
    with pytest.warns(UserWarning, match="plugin 'x' of rotten 1.0 can't be used"):
        found = read_catalog(bad)
    assert found.status[0].error


def test_the_same_name_twice_is_an_error(tmp_path: Path):
    one = points(tmp_path, "first", CODE, passes(good="Good"))
    two = points(tmp_path, "second", CODE, passes(good="Good"))
    with pytest.raises(PluginError, match=r"first 1\.0 and second 1\.0 both bring a pass called"):
        read_catalog([*two, *one])


def test_a_built_in_name_can_not_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = points(tmp_path, "first", CODE, passes(good="Good"))
    good = one[0].load()
    monkeypatch.setattr(subject, "TRANSFORMS", (good,))
    with pytest.raises(
        PluginError, match=r"lamella and first 1\.0 both bring a pass called 'good'"
    ):
        read_catalog(one)


def test_rule_tables_are_collected_by_subject(tmp_path: Path):
    one = points(tmp_path, "first", CODE, {"lamella.rules": {"cost": "table"}})
    two = points(tmp_path, "second", CODE, {"lamella.rules": {"cost": "table"}})
    found = read_catalog([*one, *two])
    assert [table.subject for table in found.rules["cost"]] == ["cost", "cost"]


def test_plugins_can_be_left_out():
    built_in = {kind.name for kind in (*TRANSFORMS, *ANALYSES)}
    assert {entry.cls.name for entry in catalog(plugins=False).passes} == built_in
    assert catalog(plugins=False).status == ()
    assert known_passes(plugins=False).keys() == built_in
