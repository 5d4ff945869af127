"""The ONNX graph under construction, and the call that an emitter turns into ONNX nodes.

Emitters see a small vocabulary: `Emission.op` adds an ONNX node, `Emission.tensor` gives the
value of an operand, `Emission.const` a constant, `Emission.dims` a shape of numbers and
symbols. Constants are shared, weights are read when the file is written, and nodes that nothing
reads in the end are left out, so that an emitter may offer a value in several layouts.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lamella.backends.onnxruntime.extents import ARITHMETIC, is_fixed
from lamella.backends.onnxruntime.types import onnx_type
from lamella.errors import BackendError
from lamella.ir import ops
from lamella.ir.graph import Graph

Attribute = int | float | str | Sequence[int] | ir.Graph | ir.TensorProtocol
Emitted = ir.Value | tuple[ir.Value, ...]

MICROSOFT = "com.microsoft"
"""The domain of the operators that ONNX Runtime adds to ONNX."""


class Caches(enum.Enum):
    """How a graph that continues from a cache is called.

    Attributes:
        PLAIN: As its operators say: the past comes in as long as it is, past and new go out.
        BOUND: Past and present of a slot are one buffer, which has room to spare. The rows of a
            sequence start at the first and have no gaps; the inputs ``filled`` and ``total`` say
            how many there are, and ``rows`` of which new tokens the logits are wanted.
        SHARED: Buffers as for BOUND; how many rows are filled is what the mask sums up to, and
            logits are those of the last new token of each sequence that the mask doesn't hide.
            Runners that know only the names of a model's inputs use this.
    """

    PLAIN = "plain"
    BOUND = "bound"
    SHARED = "shared"


@dataclass(frozen=True)
class Options:
    """What the writer may use.

    Attributes:
        opset: Version of the standard operators, 21 to 23. From 23 on there are operators for
            attention, RMS norm and rotary embedding; below they are written out.
        contrib: Use the operators of ONNX Runtime beside the standard ones. Weights of few
            bits need them to be fast.
        caches: How a graph with a cache is called.
    """

    opset: int = 23
    contrib: bool = True
    caches: Caches = Caches.PLAIN

    def __post_init__(self) -> None:
        if not 21 <= self.opset <= 23:
            raise ValueError(f"opset must be 21, 22 or 23, got {self.opset}")


@dataclass(frozen=True)
class Call:
    """One node to emit.

    Attributes:
        node: The node.
        arguments: Its arguments by schema name, with the defaults filled in.
    """

    node: Node
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, node: Node) -> Call:
        """The call of a node."""
        return cls(node, ops.bind(node))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def fake(self, name: str) -> Tensor:
        """Shape and dtype of a tensor operand."""
        return self.arguments[name].meta["val"]

    @property
    def out(self) -> Tensor:
        """Shape and dtype of the result."""
        return self.node.meta["val"]

    def out_of(self, place: int) -> Tensor:
        """Shape and dtype of one of several results."""
        return self.node.meta["val"][place]

    def axis(self, name: str = "dim", operand: str = "self") -> int:
        """An axis of `operand`, counted from the front."""
        rank = max(self.fake(operand).ndim, 1)
        return int(self.arguments[name]) % rank


Emitter = Callable[["Emission", Call], Emitted]


@dataclass
class Emission:
    """An ONNX graph that grows node by node.

    Attributes:
        graph: The graph that is written.
        options: What may be used.
        values: The ONNX values of the nodes emitted so far.
        views: Other layouts of a node's value, by (node, name of the layout).
        fused: Nodes that something else than the emitter of their operator writes.
        counts: Values that no node of the graph computes, by name: the inputs that `Caches.BOUND`
            adds, and what attentions share.
        least_opset: Version of the standard operators that types need; operators are those of
            `options` all the same.
    """

    graph: Graph
    options: Options
    values: dict[Node, Emitted] = field(default_factory=dict[Node, Emitted])
    views: dict[tuple[Node, str], ir.Value] = field(
        default_factory=dict[tuple[Node, str], ir.Value]
    )
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    initializers: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    fused: dict[Node, Emitter] = field(default_factory=dict[Node, Emitter])
    counts: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    scope: str = ""
    least_opset: int = 21
    _taken: set[str] = field(default_factory=set[str])
    _constants: dict[tuple[Any, ...], ir.Value] = field(
        default_factory=dict[tuple[Any, ...], ir.Value]
    )
    _extents: dict[Any, ir.Value] = field(default_factory=dict[Any, ir.Value])

    # ---- nodes --------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Add a standard operator with one output."""
        return self.add(op_type, inputs, attributes)[0]

    def contrib(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Add an operator of ONNX Runtime with one output."""
        return self.add(op_type, inputs, attributes, domain=MICROSOFT)[0]

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute],
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        """Add an operator; trailing inputs that are None are left out."""
        last = max((i for i, value in enumerate(inputs) if value is not None), default=-1)
        name = self.unique(f"{self.scope}/{op_type}")
        names = [name] if outputs == 1 else [f"{name}:{index}" for index in range(outputs)]
        node = ir.Node(
            domain,
            op_type,
            inputs[: last + 1],
            [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()],
            outputs=[ir.Value(name=self.unique(output)) for output in names]
            if outputs > 1
            else [ir.Value(name=name)],
            name=name,
        )
        self.nodes.append(node)
        return tuple(node.outputs)

    def unique(self, name: str) -> str:
        """`name`, with a number if it is taken."""
        candidate, count = name, 0
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate

    def inside(self) -> Emission:
        """An emission for the body of a node: nodes of its own, names and constants shared."""
        return dataclasses.replace(self, nodes=[])

    # ---- operands -----------------------------------------------------------------------

    def tensor(self, operand: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """The value of an operand, cast to `dtype` where it has another.

        A Python number becomes a constant of `dtype`, an integer of the graph a scalar.
        """
        if not isinstance(operand, Node):
            return self.const(operand, dtype)
        held = operand.meta["val"]
        if not isinstance(held, Tensor):
            return self.cast(self.scalar(operand), torch.int64, dtype or torch.int64)
        value = self.values.get(operand)
        if not isinstance(value, ir.Value):
            raise BackendError(f"node {operand.name} is read before it has a value")
        return self.cast(value, held.dtype, dtype or held.dtype)

    def optional(self, operand: Any, dtype: torch.dtype | None = None) -> ir.Value | None:
        """The value of an operand that may be None."""
        return None if operand is None else self.tensor(operand, dtype)

    def cast(self, value: ir.Value, held: torch.dtype, wanted: torch.dtype) -> ir.Value:
        """`value` of dtype `held` as `wanted`."""
        return value if held == wanted else self.op("Cast", value, to=int(onnx_type(wanted)))

    def const(self, data: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A constant; equal ones are shared. Python integers become int64, floats float32."""
        wanted = None if dtype is None else onnx_type(dtype)
        array = np.asarray(data, None if wanted is None else wanted.numpy())
        if wanted is None and array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self.unique(f"constant_{len(self._constants)}")
            self._constants[key] = self.initializer(ir.Tensor(array, dtype=wanted, name=name))
        return self._constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        """A constant vector of int64."""
        return self.const(np.array(numbers, np.int64))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A value that holds `tensor`; its name must be new."""
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        assert tensor.name is not None
        self.initializers[tensor.name] = value
        return value

    # ---- integers and shapes ------------------------------------------------------------

    def extent(self, size: Any) -> ir.Value:
        """An integer of the graph or a number, as a vector with one entry."""
        held = size.meta["val"] if isinstance(size, Node) else size
        if is_fixed(held):
            return self.ints(int(held))
        key = str(held)
        if key not in self._extents:
            if not isinstance(size, Node):
                raise BackendError(f"the size {key} has no node that computes it")
            self._extents[key] = self._computed(size)
        return self._extents[key]

    def _computed(self, node: Node) -> ir.Value:
        """A vector with the one integer that `node` computes.

        Raises:
            BackendError: It is computed by something that is no shape arithmetic.
        """
        if node.target is torch.ops.aten.sym_size.int:
            source, axis = node.args[0], node.args[1]
            assert isinstance(source, Node)
            assert isinstance(axis, int)
            axis %= source.meta["val"].ndim
            return self.op("Shape", self.tensor(source), start=axis, end=axis + 1)
        if node.target in (operator.floordiv, operator.mod):
            return self._divided(node)
        kind = ARITHMETIC.get(node.target)
        if kind is None:
            raise BackendError(f"{ops.op_name(node.target)} computes no size (node {node.name})")
        return self.op(kind, *(self.extent(argument) for argument in node.args))

    def _divided(self, node: Node) -> ir.Value:
        """Division of integers that rounds down, and its remainder, as in Python."""
        numerator, divisor = (self.extent(argument) for argument in node.args)
        if node.target is operator.mod:
            return self.op("Mod", numerator, divisor)
        held: list[Any] = [o.meta["val"] if isinstance(o, Node) else o for o in node.args]
        if not all(statically_known_true(one >= 0) for one in held):
            # Div of ONNX rounds towards zero.
            numerator = self.op("Sub", numerator, self.op("Mod", numerator, divisor))
        return self.op("Div", numerator, divisor)

    def size(self, node: Node, axis: int) -> ir.Value:
        """One size of a tensor, as a vector with one entry; read where it is cheapest."""
        held = node.meta["val"]
        size = held.shape[axis]
        if is_fixed(size):
            return self.ints(int(size))
        if str(size) not in self._extents:
            place = axis % held.ndim
            shape = self.op("Shape", self.tensor(node), start=place, end=place + 1)
            self._extents[str(size)] = shape
        return self._extents[str(size)]

    def know_extent(self, size: Any, value: ir.Value) -> None:
        """Remember where a symbolic size can be read (a vector with one entry)."""
        self._extents.setdefault(str(size), value)

    def scalar(self, size: Any) -> ir.Value:
        """An integer of the graph or a number, as an int64 without axes."""
        held = size.meta["val"] if isinstance(size, Node) else size
        if is_fixed(held):
            return self.const(np.array(int(held), np.int64))
        key = ("scalar", str(held))
        if key not in self._extents:
            self._extents[key] = self.op("Squeeze", self.extent(size), self.ints(0))
        return self._extents[key]

    def dims(self, sizes: Sequence[Any]) -> ir.Value:
        """Some sizes as one vector of int64; a constant if all are numbers."""
        held = [size.meta["val"] if isinstance(size, Node) else size for size in sizes]
        if all(map(is_fixed, held)):
            return self.ints(*map(int, held))
        parts: list[ir.Value] = []
        run: list[int] = []
        for size, value in zip(sizes, held, strict=True):
            if is_fixed(value):
                run.append(int(value))
                continue
            if run:
                parts.append(self.ints(*run))
                run = []
            parts.append(self.extent(size))
        if run:
            parts.append(self.ints(*run))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
