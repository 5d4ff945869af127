"""How many nodes have a rule, and how many relevance really passes, on the 28 families.

``python -m benchmarks.coverage [--record]`` counts the nodes that autograd records for each model,
and the nodes of our graph of it in a sweep that runs (see ``tests/zoo/relevance_coverage.py``).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.record import Result
from lamella.rules.relevance.presets import PRESETS
from tests.zoo.autograd_nodes import (
    Count,
    count_as_published,
    count_nodes,
    states_not_zero,
)
from tests.zoo.families import FAMILIES
from tests.zoo.relevance_coverage import Coverage, coverage

SHOWN = ("gradient", "attnlrp", "cp")
_PUBLISHED = (
    "As published: as table 5 of [Lee2025] counts; weights require gradients too, leaves and what "
    "leads to weights are nodes, and a layer with a bias is two. VGG16 and ResNet-50 have as many "
    "nodes then as there, 90 and 339."
)
_COUNTED = (
    "Nodes of autograd: all that can be reached from the first output of the original model, but "
    "leaves; inputs and embeddings require gradients, weights do not. Passed: its backward reaches "
    "the node with a gradient that is finite and not zero. Scans start from a state of ones: from "
    "zeros, 15 nodes of mamba and mamba2, which multiply that state, get a gradient of zero.",
    "Nodes: values that carry a signal of the inputs to the first output in our graph, where "
    "operators are whole (a norm, an attention, a scan is one). Passed: the sweep that ran in "
    "float64 from a random seed gave a coefficient that is finite and not zero. Held fixed: all "
    "that read the node give it nothing, because their rules say so (norms, gates, step sizes; "
    "under cp queries and keys). No node has another coefficient than these two.",
)


@dataclass(frozen=True)
class Counted:
    """One family.

    Attributes:
        published: Nodes as published systems count, and those without a rule.
        passed: Nodes of autograd behind inputs, and what its backward passes.
        presets: Preset -> nodes of our graph.
    """

    published: tuple[int, Counter[str]]
    passed: Count
    presets: dict[str, Coverage]

    @classmethod
    def of(cls, name: str) -> Counted:
        """Count all."""
        family = FAMILIES[name]
        published = count_as_published(family.build(), family.inputs(), _has_rule)
        with states_not_zero():
            passed = count_nodes(family.build(), family.inputs(), _has_rule)
        return cls(published, passed, {preset: coverage(name, preset) for preset in PRESETS})


def _has_rule(target: object) -> bool:
    return target in PRESETS["gradient"].table


def by_family(found: dict[str, Counted]) -> Result:
    """A row for each family, and the sum."""
    rows = [(name, *_cells(one)) for name, one in found.items()]
    totals = [sum(cells) for cells in zip(*(row[1:] for row in rows), strict=True)]
    return Result(
        name="coverage",
        title="Nodes that have a rule, and nodes that relevance passed, in 28 tiny models",
        columns=(
            *("model", "nodes as published", "with a rule"),
            *("nodes of autograd", "with a rule", "passed"),
            *("nodes", "with a rule", "passed: gradient", "passed: attnlrp"),
            *("held fixed: attnlrp", "passed: cp", "held fixed: cp"),
        ),
        rows=[*rows, ("all", *totals)],
        notes=(_PUBLISHED, *_COUNTED),
    )


def _cells(found: Counted) -> Sequence[int]:
    gradient, attnlrp, cp = (found.presets[name] for name in SHOWN)
    (published, without), count = found.published, found.passed
    return (
        published,
        published - without.total(),
        count.nodes,
        count.nodes - count.without_rule.total(),
        count.nodes - count.not_passed.total(),
        len(gradient.nodes),
        len(gradient.nodes) - len(gradient.without_rule),
        len(gradient.passed),
        *(len(attnlrp.passed), len(attnlrp.held), len(cp.passed), len(cp.held)),
    )


def by_preset(found: dict[str, Counted]) -> Result:
    """A row for each preset, over all families."""
    rows = []
    for preset in PRESETS:
        all_of_it = [one.presets[preset] for one in found.values()]
        nodes, passed, held, lost = (
            sum(len(getattr(one, part)) for one in all_of_it)
            for part in ("nodes", "passed", "held", "lost")
        )
        without = sum(len(one.without_rule) for one in all_of_it)
        rows.append((preset, nodes, nodes - without, passed, held, lost))
    return Result(
        name="coverage_presets",
        title="Nodes that relevance passed under every preset, in 28 tiny models together",
        columns=("preset", "nodes", "with a rule", "passed", "held fixed", "zero or not finite"),
        rows=rows,
        notes=_COUNTED[1:],
    )


def main() -> None:
    """Count all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep the tables as JSON")
    record = parser.parse_args().record
    torch.set_num_threads(1)
    found = {name: Counted.of(name) for name in FAMILIES}
    for result in (by_family(found), by_preset(found)):
        if record:
            result.publish()
        else:
            result.show()


if __name__ == "__main__":
    main()
