"""Recipes: three spellings of one pass, coercion, every mistake at once."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamella import recipe
from lamella.errors import RecipeError
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.coercion import coerce
from lamella.passes.registry import TRANSFORMS
from lamella.recipe import (
    dump_recipe,
    load_recipe,
    parse_analysis,
    parse_pass,
    parse_passes,
    parse_recipe,
    recipe_of,
)
from tests.unit.planted import CountLinears, Nothing, Shrink


class Order(enum.Enum):
    """Which blocks go first."""

    FRONT = "front"
    BACK = "back-to-front"


@dataclass(frozen=True)
class Everything(Transform):
    """Has an option of every type.

    Attributes:
        count: How many.
        by: The score that
            decides.
    """

    name: ClassVar[str] = "everything"
    effect: ClassVar[Effect] = Effect.LOSSY

    count: int
    share: float = 0.5
    flag: bool = False
    by: Literal["lim", "zd", "similarity"] = "lim"
    bits: Literal[2, 4, 8] | None = None
    text: str = "a"
    maybe: str | None = None
    order: Order = Order.FRONT
    blocks: tuple[int, ...] = ()
    names: tuple[str, ...] = ("x",)
    pair: tuple[int, float] = (1, 2.0)
    where: Path = Path("here")
    limit_bytes: int = 10**6
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must be 0 or more, got {self.count}")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Nothing."""


KNOWN = {kind.name: kind for kind in (Everything, Shrink, Nothing, CountLinears)}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "known_passes", lambda plugins=True: KNOWN)


words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=10)
floats = st.floats(allow_nan=False)
EVERYTHING = st.builds(
    Everything,
    count=st.integers(0, 10**12),
    share=floats,
    flag=st.booleans(),
    by=st.sampled_from(["lim", "zd", "similarity"]),
    bits=st.sampled_from([None, 2, 4, 8]),
    text=words,
    maybe=st.none() | words,
    order=st.sampled_from(Order),
    blocks=st.lists(st.integers(), max_size=3).map(tuple),
    names=st.lists(words, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), floats),
    where=st.sampled_from([Path("a b"), Path("/x"), Path('q"uote')]),
    ratios=st.none() | st.lists(floats, max_size=3).map(tuple),
)


@settings(max_examples=150)
@given(EVERYTHING)
def test_the_three_spellings_are_equal(one: Everything):
    assert parse_pass(one.spelling, plugins=False) == one
    assert parse_passes(one.spelling, plugins=False) == (one,)
    assert parse_recipe(dump_recipe([one, one]), plugins=False) == (one, one)
    data = json.loads(json.dumps(recipe_of([one]), allow_nan=True))
    assert parse_passes(data["passes"], plugins=False) == (one,)
    assert parse_pass(one) is one


def strategy_of(kind: type[Transform]) -> st.SearchStrategy[Transform]:
    """Objects of a registered pass: each option is its default or one of its alternatives."""
    hints = typing.get_type_hints(kind)
    options: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            options[field.name] = st.just(field.default) | alternatives(hints[field.name])
    required = {f.name for f in dataclasses.fields(kind)} - set(options)
    options |= {name: alternatives(hints[name]) for name in required}
    return st.fixed_dictionaries(options).map(lambda values: built(kind, values))


def alternatives(hint: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    simple = {
        int: st.integers(0, 64),
        float: st.sampled_from([0.25, 0.5, 4.5]),
        str: words,
        bool: st.booleans(),
        type(None): st.none(),
    }
    if typing.get_origin(hint) is tuple:
        return st.lists(alternatives(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        # Modules and graphs have no spelling; a path reads back as text where both may stand.
        known = [one for one in typing.get_args(hint) if one not in (nn.Module, Graph, Path)]
        return st.one_of([alternatives(one) for one in known])
    return simple[hint]


def built(kind: type[Transform], values: dict[str, Any]) -> Transform | None:
    try:
        return kind(**values)
    except ValueError:
        return None


@pytest.mark.parametrize("kind", TRANSFORMS, ids=lambda kind: kind.name)
def test_registered_passes_spell_themselves(kind: type[Transform], monkeypatch):
    monkeypatch.setattr(recipe, "known_passes", lambda plugins=True: {kind.name: kind})

    @settings(max_examples=25)
    @given(strategy_of(kind))
    def check(one: Transform | None) -> None:
        if one is not None:
            assert parse_pass(one.spelling) == one
            assert parse_recipe(dump_recipe([one])) == (one,)

    check()


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (int, "20MB", 20_000_000),
        (int, "1GiB", 2**30),
        (int, "1.5k", 1500),
        (int, 2.0, 2),
        (float, "25%", 0.25),
        (float, "-1e-3", -0.001),
        (float, 3, 3.0),
        (bool, "yes", True),
        (bool, "OFF", False),
        (int | None, "none", None),
        (str | None, '"none"', "none"),
        (float | str, "4.5", 4.5),
        (float | str, "20MB", 2e7),
        (Literal["lim", "zd"], "ZD", "zd"),
        (Literal[2, 4, 8], "4", 4),
        (Order, "back-to-front", Order.BACK),
        (Order, "front", Order.FRONT),
        (tuple[int, ...], "1, 2,3", (1, 2, 3)),
        (tuple[int, ...], 7, (7,)),
        (tuple[int, ...], "", ()),
        (tuple[str, ...], '["a,b","c"]', ("a,b", "c")),
        (list[float], [1, 2], [1.0, 2.0]),
        (frozenset[int], "3,1", frozenset({1, 3})),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Path, "a/b", Path("a/b")),
    ],
    ids=str,
)
def test_coercion(kind: Any, given: Any, expected: Any):
    got = coerce(kind, given)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (int, "x", "expected integer, got 'x'"),
        (int, "25%", "expected integer"),
        (int, True, "expected integer, got True"),
        (int, 2.5, "expected integer, got 2.5"),
        (int, "inf", "expected integer"),
        (float, "abc", "expected number"),
        (bool, "1", "expected true or false"),
        (str, 3, "expected text, got 3; put it in quotes"),
        (Literal["lim", "zd"], "limm", "expected lim or zd, got 'limm'; did you mean 'lim'"),
        (Order, "frnt", "did you mean 'front'"),
        (tuple[int, int], "1,2,3", "expected 2 values, got 3"),
        (tuple[int, ...], "1,x", "expected integer, got 'x'"),
        (tuple[int, ...], "[1", "is not JSON"),
        (dict[str, int], [1], "expected a mapping"),
        (int | None, "x", "expected integer or none, got 'x'"),
    ],
    ids=str,
)
def test_refused_by_coercion(kind: Any, given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        coerce(kind, given)


def test_several_passes_in_one_text():
    passes = parse_passes("nothing; shrink factor=0.25;everything count=1 text='a;b'")
    assert passes == (Nothing(), Shrink(0.25), Everything(1, text="a;b"))


def test_dashes_and_underscores_are_the_same():
    assert parse_pass("everything count=1 limit-bytes=2kB") == Everything(1, limit_bytes=2000)


@pytest.mark.parametrize(
    ("specs", "messages"),
    [
        (["shrnk"], ["there is no pass 'shrnk'; did you mean 'shrink'?", "known are everything"]),
        (["shrink facto=2"], ["shrink has no option 'facto'; did you mean 'factor'?"]),
        (["nothing x=1"], ["nothing has no option 'x'; it has no options"]),
        (["shrink 3"], ["shrink: '3' is no option; options look like count=2"]),
        (["shrink factor=1 factor=2"], ["option 'factor' is given twice"]),
        (["shrink factor='1"], ["can't be read (No closing quotation)"]),
        (["everything"], ["everything: ", "count"]),
        (["everything count=-1"], ["everything: count must be 0 or more, got -1"]),
        (["count-linears"], ["'count-linears' is an analysis, not a transform"]),
        ([3], ["a pass is text such as 'drop-blocks count=2'", "got 3"]),
        ([{"shrink": {}, "nothing": {}}], ["a mapping of one name"]),
        ([{"shrink": [1]}], ["the options of 'shrink' must be a mapping, got [1]"]),
        ([" "], ["got an empty text"]),
        (
            ["shrnk", "nothing", {"everything": {"count": "x", "cuont": 1}}],
            [
                "pass 1: there is no pass 'shrnk'",
                "pass 3: option 'count' of everything: expected integer, got 'x'",
                "everything has no option 'cuont'; did you mean 'count'?",
            ],
        ),
    ],
    ids=str,
)
def test_mistakes_are_named_all_at_once(specs: list[Any], messages: list[str]):
    with pytest.raises(RecipeError) as caught:
        parse_passes(specs)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("version: 1\npasses:\n  - a: [1\n", ["r.yaml, line 4 is not YAML"]),
        ("passes: !!python/object:os.system {}\nversion: 1", ["line 1 is not YAML"]),
        ("- nothing", ["must be a mapping with 'version: 1' and 'passes:'"]),
        ("", ["must be a mapping"]),
        ("version: 2\npasses: []", ["must have 'version: 1', got 2"]),
        ("version: true\npasses: []", ["must have 'version: 1', got True"]),
        ("pases: []", ["unknown key 'pases'; did you mean 'passes'?", "there is none", "a list"]),
        ("version: 1\nversion: 1\npasses: []", ["line 2: 'version' is given twice"]),
        (
            "version: 1\npasses:\n- shrink: {factor: 1, factor: 2}",
            ["r.yaml, line 3: 'factor' is given twice"],
        ),
        (
            "version: 1\npasses:\n- nothing\n\n- shrnk\n- shrink: {factor: x}",
            ["r.yaml, line 5: there is no pass 'shrnk'", "line 6: option 'factor' of shrink"],
        ),
        ("version: 1\npasses: &a [*a]", ["r.yaml, line 2: a pass is text"]),
    ],
    ids=range(11),
)
def test_mistakes_in_a_file_have_lines(text: str, messages: list[str], tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    for message in messages:
        assert message in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"missing\.yaml can't be read"):
        load_recipe(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(binary)
    binary.write_bytes(b" " * 1_000_001)
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(binary)


def test_a_file_in_all_spellings(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "version: 1\npasses:\n- nothing\n- nothing:\n- shrink factor=25%\n"
        "- everything:\n    count: 2\n    blocks: [1, 2]\n    bits: null\n    by: zd\n"
    )
    everything = Everything(2, blocks=(1, 2), by="zd")
    assert load_recipe(file) == (Nothing(), Nothing(), Shrink(0.25), everything)


def test_analyses_are_parsed_too():
    assert parse_analysis("count-linears offset=2") == CountLinears(2)
    assert parse_analysis({"count-linears": {"offset": 2}}) == CountLinears(2)
    with pytest.raises(RecipeError, match=r"'shrink' is a transform, not an analysis"):
        parse_analysis("shrink")
    with pytest.raises(
        RecipeError, match=r"there is no analysis 'cost'; .*known are count-linears"
    ):
        parse_analysis("cost")


def test_options_are_described():
    options = {option.name: option for option in Everything.describe()}
    assert options["count"].default is None
    assert (options["count"].type, options["count"].doc) == ("integer", "How many.")
    assert options["by"].doc == "The score that decides."
    assert options["by"].type == "lim, zd or similarity"
    assert options["bits"].type == "2, 4 or 8 or none"
    assert options["names"].default == "x"
