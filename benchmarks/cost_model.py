"""Predicted against measured milliseconds of random bit plans of a Llama of 88 million parameters.

    python -m benchmarks.cost_model [--part decode|prompt] [--plans N] [--record]

A plan draws a format for every group of weights that are one kernel. Its time is predicted from
measured kernels and a measured rest (`lamella.tuning`), and measured on the whole model: one token
behind 128 (2, 4 and 8 bits in blocks of 64), or a prompt of 128 tokens (4 and 8 bits, and integers
by integers). Models take turns in groups, and uniform plans are in every group: the machine is
faster in some seconds than in others, and what these take in a turn tells by how much. Kernels are
measured anew beside every group for the same reason; their median counts.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv

import torch
from scipy.stats import spearmanr

from benchmarks.decode import llama
from benchmarks.record import Result
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, Integers
from lamella.passes.analyses.latency import predicted
from lamella.passes.products import kernels_of, products_of
from lamella.passes.sites import Site, find_sites, tie_groups
from lamella.passes.times import Kernel, Table, Workload
from lamella.passes.transforms.integer_layers import rewire
from lamella.rewrite.canonicalize import canonicalize
from lamella.timing import SETTLE_SECONDS
from lamella.tuning.chain import MadeUp
from lamella.tuning.machine import cache_bytes
from lamella.tuning.measure import measure_kernels
from lamella.tuning.stand_in import stand_in
from lamella.tuning.whole import Call, call_of_graph

Choice = Format | str
Plan = Mapping[str, Choice]

INT8 = "int8"
GRIDS: tuple[Choice, ...] = (Format(2, 64), Format(4, 64), Format(8, 64))
PARTS: Mapping[str, tuple[Workload, tuple[Choice, ...]]] = {
    "decode": (Workload(1, 1, 128), GRIDS),
    "prompt": (Workload(1, 128, 0), (*GRIDS[1:], INT8)),
}
TITLES = {
    "decode": "one token behind 128, batch 1",
    "prompt": "a prompt of 128 tokens, with int8 activations where the plan says so",
}
PLANS = {"decode": 30, "prompt": 18}
GROUP = 6
"""Plans that take turns, beside the references."""


@dataclass(frozen=True)
class Point:
    """A plan.

    Attributes:
        bits: Mean width of its weights.
        integers: Share of the weights that multiply integers.
        predicted: Seconds.
        measured: Seconds, the median of its turns, each relative to that of the references.
        raw: Seconds, as timed.
    """

    bits: float
    integers: float
    predicted: float
    measured: float
    raw: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=sorted(PARTS), default="decode")
    parser.add_argument("--plans", type=int, help="30 for decode, 18 for prompt")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--record", action="store_true", help="keep the table as JSON")
    given = parser.parse_args(arguments)
    points = measured(given.part, given.plans or PLANS[given.part], given.rounds)
    result = table(given.part, points)
    if given.record:
        result.publish()
    else:
        result.show()


def table(part: str, points: Sequence[Point]) -> Result:
    """The figures of all plans, and of every fifth in the order of their times."""
    errors = [abs(p.predicted - p.measured) / p.measured for p in points]
    raw = [abs(p.predicted - p.raw) / p.raw for p in points]
    rank = float(spearmanr([p.predicted for p in points], [p.measured for p in points])[0])
    raw_rank = float(spearmanr([p.predicted for p in points], [p.raw for p in points])[0])
    ordered = sorted(points, key=lambda p: p.measured)
    picked = ordered[:: max(1, len(ordered) // 6)]
    return Result(
        name=f"cost_model_{part}",
        title=(
            f"{len(points)} random plans of a Llama of 88 million parameters, {TITLES[part]}: rank "
            f"correlation {rank:.3f}, median error {statistics.median(errors):.1%}, largest "
            f"{max(errors):.1%}"
        ),
        columns=(
            "mean bits",
            "int8 products",
            "predicted ms",
            "measured ms",
            "predicted / measured",
        ),
        rows=[
            (
                p.bits,
                f"{p.integers:.0%}",
                p.predicted * 1e3,
                p.measured * 1e3,
                p.predicted / p.measured,
            )
            for p in picked
        ],
        notes=(
            "Some of the plans, in the order of their times; plans hold made-up codes.",
            "Measured: the median over turns of the time relative to that of three uniform plans "
            f"in the same turn. Medians of plain times: rank correlation {raw_rank:.3f}, median "
            f"error {statistics.median(raw):.1%}.",
        ),
    )


def measured(part: str, count: int, rounds: int) -> list[Point]:
    """Predict and time the plans of a part."""
    workload, choices = PARTS[part]
    graph = captured()
    lab = Lab(graph, workload, tuple(uniform(graph, choice) for choice in choices))
    plans = list(random_plans(graph, choices, count))
    groups = [plans[i : i + GROUP] for i in range(0, count, GROUP)]
    timed = [lab.turns(group, rounds) for group in groups]
    usual = statistics.median(seconds for references, _ in timed for seconds in references)
    raws = [statistics.median(turns) for _, plans_of in timed for turns in plans_of]
    steady = [
        usual * statistics.median(map(truediv, turns, references))
        for references, plans_of in timed
        for turns in plans_of
    ]
    expected = lab.predictions()
    sizes = {site.weight: site.size for site in find_sites(graph) if site.role != "embedding"}
    return [
        Point(*_widths(plan, sizes), guess, seconds, raw)
        for plan, guess, seconds, raw in zip(plans, expected, steady, raws, strict=True)
    ]


class Lab:
    """Times models and the kernels of a graph side by side.

    The `references` are in every group; what their times leave over after their kernels is the
    rest, and together they tell how fast the machine is in a turn.
    """

    def __init__(self, graph: Graph, workload: Workload, references: Sequence[Plan]) -> None:
        self._graph, self._workload = graph, workload
        self._backend, self._made_up = OnnxRuntimeBackend(), MadeUp()
        self._models = [self._model(plan) for plan in references]
        self._calls = [self._call(model) for model in self._models]
        self._kernels = list(dict.fromkeys(k for m in self._models for k in self._counts(m)))
        self._seconds: dict[Kernel, list[float]] = {kernel: [] for kernel in self._kernels}
        self._planned: list[Graph] = []
        self._wholes: list[list[float]] = [[] for _ in references]

    def turns(self, plans: Sequence[Plan], rounds: int) -> tuple[list[float], list[list[float]]]:
        """Seconds of all references in each turn, and of each plan; kernels are measured too."""
        for found in measure_kernels(self._backend, self._kernels, cache_bytes()):
            for kernel, seconds in found.items():
                self._seconds[kernel].append(seconds)
        models = [self._model(plan) for plan in plans]
        self._planned += models
        calls = [*self._calls, *map(self._call, models)]
        found = take_turns(calls, rounds)
        del calls
        gc.collect()
        references = found[: len(self._calls)]
        for several, turns in zip(self._wholes, references, strict=True):
            several += turns
        return [sum(turn) for turn in zip(*references, strict=True)], found[len(self._calls) :]

    def predictions(self) -> list[float]:
        """Seconds of each plan so far, from the medians of what was measured."""
        known = {kernel: statistics.median(several) for kernel, several in self._seconds.items()}
        rests = [
            statistics.median(whole) - sum(n * known[k] for k, n in self._counts(model).items())
            for whole, model in zip(self._wholes, self._models, strict=True)
        ]
        table = Table(known, statistics.mean(rests), cache_bytes=cache_bytes())
        return [predicted(model, self._workload, table).seconds for model in self._planned]

    def _counts(self, model: Graph) -> Mapping[Kernel, int]:
        times = Table({}, cache_bytes=cache_bytes())
        return kernels_of(products_of(model, self._workload, times), merged=True)

    def _model(self, plan: Plan) -> Graph:
        grids = {name: choice for name, choice in plan.items() if isinstance(choice, Format)}
        model = stand_in(self._graph, grids, self._made_up)
        for site in find_sites(model):
            if plan.get(site.weight) == INT8:
                codes = self._made_up.codes(*site.shape).view(torch.int8)
                scales = self._made_up.numbers(site.shape[0]).abs()
                rewire(model, site, Integers(codes, scales), per_row=False)
        model.finish()
        return model

    def _call(self, model: Graph) -> Call:
        return call_of_graph(model, self._backend, self._workload)


def take_turns(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Seconds that a call of each model takes in each turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-2, rounds):
        for (run, count), taken in zip(calls, seconds, strict=True):
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            run()
            if turn >= 0:
                taken.append((time.perf_counter() - start) / count)
    return seconds


def captured() -> Graph:
    """The canonical graph of the model of `benchmarks.decode`."""
    ids = torch.ones(2, 9, dtype=torch.int64)
    graph = capture_module(llama(), {"input_ids": ids, "attention_mask": ids.clone()})
    canonicalize(graph)
    return graph


def uniform(graph: Graph, choice: Choice) -> Plan:
    """One format for all but the embedding, which has no kernel of integers."""
    return {site.weight: _fitting(site, choice) for site in find_sites(graph)}


def random_plans(graph: Graph, choices: Sequence[Choice], count: int) -> Iterator[Plan]:
    """Plans that prefer one format or another, each to its own degree: few bits and many."""
    draw = random.Random(0)
    groups = tie_groups(find_sites(graph))
    for _ in range(count):
        weights = [draw.random() ** 3 for _ in choices]
        plan: dict[str, Choice] = {}
        for group in groups:
            (choice,) = draw.choices(choices, weights)
            plan |= {site.weight: _fitting(site, choice) for site in group}
        yield plan


def _fitting(site: Site, choice: Choice) -> Choice:
    return Format(8, 64) if choice == INT8 and site.role == "embedding" else choice


def _widths(plan: Plan, sizes: Mapping[str, int]) -> tuple[float, float]:
    """The mean width of the weights in `sizes`, and the share of those that are integers."""
    widths = {name: 8 if isinstance(c, str) else c.bits for name, c in plan.items()}
    total = sum(sizes.values())
    integers = sum(size for name, size in sizes.items() if plan[name] == INT8)
    return sum(widths[name] * size for name, size in sizes.items()) / total, integers / total


if __name__ == "__main__":
    main()
