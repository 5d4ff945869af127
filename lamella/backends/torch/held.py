"""A module while its operators of few bits are replaced, and the weights that are made for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx
from torch.fx import Node

from lamella.ir.storage import set_tensor

INTEGERS = "products of 8-bit integers (oneDNN)"
NATIVE = "products of 8-bit integers and what is behind them (compiled on this machine)"
TRACED = "products of 8-bit integers"
INT4 = "weights of 4 bits and bfloat16 (int4pack)"
INT8 = "weights of 8 bits and bfloat16 (int8pack)"
BFLOAT16 = "weights in bfloat16"
UNPACKED = "unpacked once"
ATTENTION = "attention in bfloat16"


Integers = Literal["onednn", "traced", "floats"]
"""What multiplies 8-bit integers; sums of integers are exact in floats too."""


@dataclass(frozen=True)
class Kernels:
    """Which kernels may be used.

    Attributes:
        integers: Those that multiply integers, exactly: by oneDNN, or by operators of ATen that a
            compiler can trace; or none.
        bfloat16: Those that multiply in bfloat16, which is an approximation.
        native: Those that are compiled on this machine, see `lamella.backends.torch.native`.
    """

    integers: Integers = "floats"
    bfloat16: bool = False
    native: bool = True


@dataclass
class Lowered:
    """A module while its operators of few bits are replaced.

    Attributes:
        module: Is changed.
        kernels: What may be used.
        counts: How many layers run by what.
        held: Weights that were made, by what they were made of.
        obstacle: Why kernels that are compiled on this machine are missing, where some would run.
    """

    module: fx.GraphModule
    kernels: Kernels = Kernels()
    counts: Counter[str] = field(default_factory=Counter[str])
    held: dict[tuple[object, ...], Node] = field(default_factory=dict[tuple[object, ...], Node])
    obstacle: str = ""

    @property
    def unpacked(self) -> int:
        """Weights that are held in full width."""
        return sum(key[-1] == UNPACKED for key in self.held)


def held(state: Lowered, key: tuple[object, ...], name: str, make: Callable[[], Tensor]) -> Node:
    """A node at the beginning that reads a new tensor of the module, made once."""
    if key not in state.held:
        set_tensor(state.module, name, make())
        graph = state.module.graph
        with graph.inserting_before(next(iter(graph.nodes))):
            state.held[key] = graph.create_node("get_attr", name)
    return state.held[key]


def read(module: fx.GraphModule, node: Node) -> Tensor:
    """The weight that a node reads."""
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found
