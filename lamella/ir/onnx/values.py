"""What the name of an ONNX value stands for while a model is read.

ONNX computes shapes with tensors of int64. Here such a tensor is a tuple of Python integers and
nodes that hold symbolic integers (`Integers`), so that the target of a ``Reshape`` becomes
arithmetic on sizes and never depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import CaptureError
from lamella.ir.onnx.quantized import Quantized

Integer = int | Node
"""A known integer, or a node that computes one from shapes."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor whose data is known: a weight, or a small constant.

    Attributes:
        tensor: The data; often a view of the memory-mapped file.
        name: What a weight made of it is called.
        bits: Bits of each element for integers smaller than a byte, else None.
        transposed: Whether it is the transpose of what the file holds.
    """

    tensor: Tensor
    name: str = "constant"
    bits: int | None = None
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Integers:
    """An integer tensor of up to one axis, computed from shapes.

    Attributes:
        items: Its elements.
        scalar: Whether it has no axis.
        dtype: Its type, when it is needed as a tensor.
    """

    items: tuple[Integer, ...]
    scalar: bool = False
    dtype: torch.dtype = torch.int64

    @property
    def known(self) -> bool:
        """Whether every element is a number."""
        return all(isinstance(item, int) for item in self.items)


Value = Node | Constant | Integers | Quantized


@dataclass(frozen=True)
class Op:
    """One ONNX node, as a builder sees it.

    Attributes:
        kind: The operator.
        label: Operator and name, for messages.
        version: Version of its operator set.
        inputs: The values of its inputs, None for one that is left out.
        attributes: Attributes as Python values.
        outputs: Which outputs have a name.
        alone: For each input, whether nothing else reads it.
    """

    kind: str
    label: str
    version: int
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[bool, ...] = (True,)
    alone: tuple[bool, ...] = field(default=())

    def __getitem__(self, place: int) -> Value:
        """A required input.

        Raises:
            CaptureError: It is missing.
        """
        value = self.optional(place)
        if value is None:
            raise CaptureError(f"{self.label} has no input {place}, which it needs")
        return value

    def optional(self, place: int) -> Value | None:
        """An input, or None where it is left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or `default`."""
        return self.attributes.get(name, default)

    def wants(self, place: int) -> bool:
        """Whether the output at `place` has a name."""
        return place < len(self.outputs) and self.outputs[place]

    def need(self, condition: bool, what: str) -> None:
        """Refuse this node unless `condition` holds.

        Raises:
            CaptureError: It doesn't; the message says that `what` is not supported.
        """
        if not condition:
            raise CaptureError(f"{self.label}: {what} is not supported")


Result = Value | tuple[Value | None, ...]
"""The value of a node, or the values of its outputs; None for one that must not be read."""
Handler = Callable[[Any, Op], Result]
"""A function of a `Builder` and an `Op` that adds the nodes of one ONNX node."""
Table = Mapping[str, Handler]
"""Operator type -> the function that builds it."""
