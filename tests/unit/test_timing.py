"""Candidates are timed in turns."""

from __future__ import annotations

import pytest

from lamella.timing import measure


def test_candidates_take_turns_after_the_warmup():
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = measure(candidates, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert set(timings) == {"a", "b"}
    for timing in timings.values():
        assert timing.rounds == 3
        assert 0 <= timing.best_seconds <= timing.median_seconds
        assert timing.spread_ratio >= 0


def test_one_round_has_no_median():
    with pytest.raises(ValueError, match="at least 2"):
        measure({"a": list}, rounds=1)
