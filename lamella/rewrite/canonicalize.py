"""From a graph as it was captured to one that holds canonical operators only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lamella.errors import RewriteError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.canonical.activations import ACTIVATION_SPELLING, ACTIVATIONS
from lamella.rewrite.canonical.arithmetic import ARITHMETIC
from lamella.rewrite.canonical.attention import ATTENTION, ATTENTION_SPELLING
from lamella.rewrite.canonical.cleanup import CLEANUP
from lamella.rewrite.canonical.constants import WEIGHT_NORM, fold_constants
from lamella.rewrite.canonical.contractions import CONTRACTIONS, raise_linears
from lamella.rewrite.canonical.creation import CREATION
from lamella.rewrite.canonical.decomposed import DECOMPOSED
from lamella.rewrite.canonical.functionalize import functionalize
from lamella.rewrite.canonical.masks import MASKS
from lamella.rewrite.canonical.moe import raise_grouped_linears
from lamella.rewrite.canonical.norms import NORMS
from lamella.rewrite.canonical.rotary import ROTARY
from lamella.rewrite.canonical.rows import ROWS
from lamella.rewrite.canonical.sharing import SIZES, share
from lamella.rewrite.canonical.views import VIEWS
from lamella.rewrite.driver import Skipped, rewrite
from lamella.rewrite.rule import Rule

SPELLING_RULES: tuple[Rule, ...] = (
    *CLEANUP,
    *VIEWS,
    *CREATION,
    *ARITHMETIC,
    *CONTRACTIONS,
    *ACTIVATION_SPELLING,
    *ATTENTION_SPELLING,
    *MASKS,
    *ROWS,
    *SIZES,
    *WEIGHT_NORM,
    *DECOMPOSED,
)
"""One spelling of every operator."""

IDIOM_RULES: tuple[Rule, ...] = (
    *NORMS,
    *ACTIVATIONS,
    *ROTARY,
    *ATTENTION,
)
"""Several operators that are one canonical operator."""

_ROUNDS = 20


@dataclass(frozen=True)
class Canonicalization:
    """What `canonicalize` did.

    Attributes:
        counts: Name of each rule or step that applied -> how often.
        nodes_before: Nodes of the graph before.
        nodes_after: Nodes of the graph after.
        near_misses: Idioms that were met and not raised, with the reason.
        written_inputs: Inputs that the model writes into; the graph leaves them alone.
    """

    counts: dict[str, int]
    nodes_before: int
    nodes_after: int
    near_misses: tuple[Skipped, ...]
    written_inputs: tuple[str, ...]


def canonicalize(graph: Graph) -> Canonicalization:
    """Rewrite `graph` in place until it holds canonical operators only, and finish it.

    Values stay as they are up to the rounding of operators that are computed as one. Operators
    that have no canonical form stay too; `noncanonical` counts them.

    Raises:
        CaptureError: The model writes into memory in a way that has no functional form.
    """
    before = len(graph.nodes)
    counts = Counter[str]()
    graph.finish()
    writes = functionalize(graph)
    counts["functionalize"] = writes.count
    done = Counter[str]()
    for _ in range(_ROUNDS):
        spelled = rewrite(graph, SPELLING_RULES)
        raised = rewrite(graph, IDIOM_RULES)
        steps = {step.__name__: step(graph) for step in _STEPS}
        done = Counter(spelled.counts) + Counter(raised.counts) + Counter(steps)
        counts += done
        if not done:
            break
    else:
        raise RewriteError(f"canonicalization does not end: {', '.join(sorted(done))}")
    graph.finish()
    return Canonicalization(
        counts=dict(counts),
        nodes_before=before,
        nodes_after=len(graph.nodes),
        near_misses=raised.skipped,
        written_inputs=writes.inputs,
    )


_STEPS: tuple[Callable[[Graph], int], ...] = (
    share,
    raise_linears,
    raise_grouped_linears,
    fold_constants,
)


def noncanonical(graph: Graph) -> dict[ops.Target, int]:
    """The operators of `graph` that are not canonical -> how often each occurs."""
    targets: list[Any] = [node.target for node in graph.nodes if node.op == "call_function"]
    return dict(Counter(target for target in targets if ops.facts(target) is None))
