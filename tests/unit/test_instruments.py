"""Instruments: the order of their hooks, dumps, progress."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lamella.errors import NumericError
from lamella.ir.graph import Graph
from lamella.passes.instruments import DumpOnFailure, Instrument, Progress, Step, Timing
from lamella.passes.manager import run_passes
from lamella.recipe import load_recipe
from tests.unit.planted import LyingShrink, Nothing, Raise, RoundToHalf, Shrink, network

IDS = {"input_ids": torch.tensor([[3, 1, 4], [1, 5, 9]])}


class Diary(Instrument):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def before_pass(self, step: Step) -> None:
        self.lines.append(f"before {step.transform.name}")

    def after_pass(self, step: Step) -> None:
        self.lines.append(f"after {step.transform.name}: {step.edits}, {step.seconds > 0}")

    def failed(self, step: Step, error: BaseException) -> None:
        self.lines.append(f"failed {step.transform.name}: {type(error).__name__}")


def test_hooks_see_every_pass_and_the_failure():
    diary = Diary()
    with pytest.raises(KeyError):
        run_passes(network(), [Nothing(), RoundToHalf(), Raise()], instruments=[diary])
    assert diary.lines == [
        "before nothing",
        "after nothing: 0, True",
        "before round-to-half",
        "after round-to-half: 9, True",
        "before raise",
        "failed raise: KeyError",
    ]


def test_a_failure_is_dumped_whole(tmp_path: Path):
    graph = network()
    before = str(graph)
    passes = [RoundToHalf(), LyingShrink(0.5)]
    for _ in range(2):
        with pytest.raises(NumericError) as caught:
            run_passes(graph, passes, samples=[IDS], instruments=[DumpOnFailure(tmp_path / "d")])
    folders = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert folders == ["failed-2-lying-shrink", "failed-2-lying-shrink-2"]
    first = tmp_path / "d" / folders[0]
    assert {path.name for path in first.iterdir()} == {
        "before.txt",
        "after.txt",
        "recipe.yaml",
        "samples.txt",
        "error.txt",
    }
    assert (first / "before.txt").read_text() == before
    assert "NumericError" in (first / "error.txt").read_text()
    assert len((first / "samples.txt").read_text().strip()) == 64
    assert "lying-shrink factor=0.5" in (first / "recipe.yaml").read_text()
    assert f"dumped to {tmp_path / 'd' / folders[1]}" in caught.value.__notes__


def test_a_dump_that_can_not_be_written_does_not_hide_the_error(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(NumericError) as caught:
        run_passes(network(), [LyingShrink()], instruments=[DumpOnFailure(blocked)])
    assert any("DumpOnFailure failed as well" in note for note in caught.value.__notes__)


def test_no_failure_no_dump(tmp_path: Path):
    run_passes(network(), [Shrink()], instruments=[DumpOnFailure(tmp_path / "d")])
    assert not (tmp_path / "d").exists()


def test_progress_draws_on_a_terminal_only():
    for is_terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, width=100)
        run_passes(network(), [Nothing(), Shrink()], instruments=[Progress(console)])
        assert ("shrink" in out.getvalue()) == is_terminal
        assert is_terminal or out.getvalue() == ""


def test_progress_stops_on_failure():
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(console)
    with pytest.raises(KeyError):
        run_passes(network(), [Raise()], instruments=[progress])
    # A second bar on the same console would be refused if the first were still drawn.
    run_passes(network(), [Shrink()], instruments=[progress])


def test_timing_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "lamella"):
        run_passes(network(), [Shrink()], instruments=[Timing()])
    assert any(m.startswith("shrink took ") for m in caplog.messages)


def test_the_recipe_of_a_dump_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "lamella.recipe.known_passes",
        lambda plugins=True: {"shrink": Shrink, "lying-shrink": LyingShrink},
    )
    passes = [Shrink(0.25), LyingShrink(0.5)]
    with pytest.raises(NumericError):
        run_passes(network(), passes, instruments=[DumpOnFailure(tmp_path)])
    assert load_recipe(next(tmp_path.iterdir()) / "recipe.yaml") == tuple(passes)


def test_an_instrument_that_raises_ends_the_pipeline():
    class Refuse(Instrument):
        def after_pass(self, step: Step) -> None:
            raise ValueError("no")

    graph: Graph = network()
    before = str(graph)
    with pytest.raises(ValueError, match="no"):
        run_passes(graph, [Shrink()], instruments=[Refuse()])
    assert str(graph) == before
