"""What is asked of a relevance graph: where it starts, and what it tells beside its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lamella.ir.ops import aten

Seed = Callable[..., Any]
"""From the output of the model (and labels) to its coefficient; a plain tensor function."""


@dataclass(frozen=True)
class Tap:
    """Something to compute from values and their coefficients.

    Attributes:
        name: The output is called ``"tap.<name>"``.
        nodes: Names of nodes of the model's graph.
        function: Called with one pair ``(value, coefficient)`` for each node; a plain tensor
            function. A value that no relevance reaches has the coefficient zero.
    """

    name: str
    nodes: tuple[str, ...]
    function: Callable[..., Any]


@dataclass(frozen=True)
class Request:
    """What a relevance graph is to compute.

    Attributes:
        output: Which flat output of the model is explained, by name or number.
        seed: Its coefficient; None adds an input ``seed`` of the shape of the output. A seed that
            is computed leaves out the tokens that an attention mask hides.
        label: Whether the seed is called with a second argument, a new integer input ``label``
            with one class for each row.
        inputs: Whether the relevance of the inputs is wanted.
        taps: What else is wanted.
        sources: Names of nodes that relevance reaches beside the inputs: what tables of positions
            and the like give, which no input that is attributed flows into.
        ledger: Whether to account for what every node keeps of the relevance it gets.
        checkpoint: ``"blocks"`` keeps the activations of one block of the residual stream at a
            time; the forward of a block runs again in the sweep. "" keeps all.

    Raises:
        ValueError: `checkpoint` is something else.
    """

    output: str | int = 0
    seed: Seed | None = None
    label: bool = False
    inputs: bool = True
    taps: tuple[Tap, ...] = ()
    sources: tuple[str, ...] = ()
    ledger: bool = False
    checkpoint: str = ""

    def __post_init__(self) -> None:
        if self.checkpoint not in ("", "blocks"):
            raise ValueError(f"checkpoint must be 'blocks' or '', got {self.checkpoint!r}")


MASKED = 1e8
"""A value at least this large hides something from a softmax; it is no activation."""


def relevance_of(value: Any, coefficient: Any) -> Any:
    """``value * coefficient``; zero for infinite values and others that stand for a mask.

    Where a whole row is masked, the coefficients of its scores are rounding that sums to zero;
    times the smallest number of a type it would drown everything else.
    """
    seen = aten.abs.default(value) < MASKED
    return aten.where.ScalarOther(seen, value * coefficient, 0.0)
