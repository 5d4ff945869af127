"""Latency of several candidates, measured side by side.

On shared cores the speed of the machine drifts by more than the differences that are looked
for. So the candidates take turns (A B C A B C …), and medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SETTLE_SECONDS = 0.02
"""Pause before a call: idle threads of the candidate before it spin for a while on the cores."""


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        median_seconds: The median over the rounds.
        best_seconds: The fastest round.
        spread_ratio: Distance of the quartiles over the median.
        rounds: How many calls were timed.
    """

    median_seconds: float
    best_seconds: float
    spread_ratio: float
    rounds: int


def measure(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3
) -> dict[str, Timing]:
    """Time the candidates in turns.

    Args:
        candidates: Name -> a call without arguments.
        rounds: Timed calls of each candidate.
        warmup: Calls of each that are not timed.

    Raises:
        ValueError: `rounds` is less than 2.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warmup, rounds):
        for name, call in candidates.items():
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Timing(median, min(seconds), (high - low) / median, len(seconds))
