"""Traced values: what rules compute with when their operations become nodes of a graph.

A rule is a tensor function. On a `Traced` value each operation is remembered, and becomes a node
when something that stays is computed from it: what a rule offers and nobody wants costs nothing.
Equal operations are one node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from lamella.ir.graph import Graph
from lamella.ir.ops import OpOverload, aten
from lamella.ir.symbols import size_of
from lamella.ir.torch_private import tree_map

Target = Callable[..., Any]

Shapes = dict[Any, Any]
"""What is known of the results of operations: (operator, operands) -> fake value."""

_METHODS: Mapping[str, Target] = MappingProxyType(
    {
        "abs": aten.abs.default,
        "clamp": aten.clamp.default,
        "cos": aten.cos.default,
        "cumsum": aten.cumsum.default,
        "exp": aten.exp.default,
        "expand": aten.expand.default,
        "log": aten.log.default,
        "matmul": aten.matmul.default,
        "permute": aten.permute.default,
        "reshape": aten.reshape.default,
        "rsqrt": aten.rsqrt.default,
        "sigmoid": aten.sigmoid.default,
        "sign": aten.sign.default,
        "sin": aten.sin.default,
        "softmax": aten.softmax.int,
        "sqrt": aten.sqrt.default,
        "square": aten.square.default,
        "tanh": aten.tanh.default,
        "transpose": aten.transpose.int,
        "unsqueeze": aten.unsqueeze.default,
        "where": aten.where.self,
    }
)
"""Functions and methods of PyTorch by name -> the operator that is recorded for them."""


@dataclass
class Recorder:
    """Writes the operations on traced values into a graph, in front of its output.

    Attributes:
        graph: The graph that grows.
        shapes: Fake values of operations that are known already; may be shared by the emissions
            for one model, which have most operations in common.
        standing: Nodes of the model -> the nodes of the same value that the sweep reads instead.
        is_writing: Whether a node is being written, so that operators run on fake values.
    """

    graph: Graph
    shapes: Shapes = field(default_factory=dict[Any, Any])
    standing: dict[Node, Node] = field(default_factory=dict[Node, Node])
    is_writing: bool = False
    _written: dict[Any, Traced] = field(default_factory=dict[Any, "Traced"])
    _sizes: dict[str, Traced] = field(default_factory=dict[str, "Traced"])

    def value(self, node: Node) -> Traced:
        """A node as a traced value."""
        return Traced(self, node=self.standing.get(node, node))

    def values(self, arguments: Any) -> Any:
        """Arguments with traced values in the place of nodes."""
        return tree_map(lambda a: self.value(a) if isinstance(a, Node) else a, arguments)

    def write(self, target: Target, args: Any, kwargs: Mapping[str, Any]) -> Node:
        """The node of an operation; an old one if there was the same before."""
        args, kwargs = _plain(args), _plain(kwargs)
        key = (target, _frozen(args), _frozen(kwargs))
        if key not in self._written:
            self._written[key] = self.value(self._call(target, args, kwargs))
        return self._written[key].node

    def size(self, node: Node, axis: int) -> int | Traced:
        """A size of a tensor: a number, or a value that is computed when the graph runs."""
        size = size_of(node.meta["val"].shape[axis])
        if isinstance(size, int):
            return size
        if str(size) not in self._sizes:
            # An input is there all the time; a value would have to be kept for its size.
            read = self._inputs_by_size().get(str(size), (node, axis))
            self._sizes[str(size)] = self.value(self.write(aten.sym_size.int, read, {}))
        return self._sizes[str(size)]

    def _inputs_by_size(self) -> dict[str, tuple[Node, int]]:
        return {
            str(size_of(size)): (node, axis)
            for node in self.graph.inputs
            if isinstance(node.meta["val"], Tensor)
            for axis, size in enumerate(node.meta["val"].shape)
        }

    def _call(self, target: Target, args: Any, kwargs: Mapping[str, Any]) -> Node:
        case = (target, _described(args), _described(kwargs))
        known = self.shapes.get(case)
        like: Any = None if known is None else SimpleNamespace(meta={"val": known})
        last = self.graph.output
        self.is_writing = True
        node = self.graph.call(target, *args, before=last, like=like, **kwargs)
        self.is_writing = False
        self.shapes[case] = node.meta["val"]
        return node


class Recording(TorchFunctionMode):
    """While it is active, new constant tensors are traced values as well."""

    def __init__(self, recorder: Recorder) -> None:
        """Constants become nodes of the graph of `recorder`."""
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Remember what makes a tensor of numbers; leave the rest alone."""
        kwargs = kwargs or {}
        if func in _CREATING and not self.recorder.is_writing:
            return Traced(self.recorder, operation=(func, args, dict(kwargs)))
        return func(*args, **kwargs)


_CREATING = frozenset({aten.full.default, aten.arange.start_step, aten.scalar_tensor.default})


class Traced:
    """A tensor (or an integer, or several tensors) that a graph computes."""

    __slots__ = ("_node", "_operation", "recorder")

    def __init__(
        self, recorder: Recorder, *, node: Node | None = None, operation: Any = None
    ) -> None:
        """A node, or an operation that is written when it is needed."""
        self.recorder = recorder
        self._node = node
        self._operation = operation

    @property
    def node(self) -> Node:
        """The node that computes the value."""
        if self._node is None:
            operation: Any = self._operation
            self._node = self.recorder.write(*operation)
            self._operation = None
        return self._node

    @property
    def shape(self) -> tuple[Any, ...]:
        """Numbers, and traced integers for what varies."""
        node = self.node
        return tuple(self.recorder.size(node, axis) for axis in range(self.ndim))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._fake.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self._fake.dtype

    @property
    def _fake(self) -> Tensor:
        return self.node.meta["val"]

    @property
    def is_size(self) -> bool:
        """Whether it is an integer."""
        return self._node is not None and not isinstance(self._node.meta["val"], Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Remember a call of an operator, or of a function that is known by name."""
        kwargs = kwargs or {}
        target = func
        if not isinstance(func, OpOverload):
            target = _METHODS.get(getattr(func, "__name__", ""))
        recorder = _recorder_of((args, kwargs))
        if target is None or recorder is None:
            raise TypeError(
                f"{func} can't be traced; call the operator, torch.ops.aten.<name>.<overload>"
            )
        return Traced(recorder, operation=(target, args, dict(kwargs)))

    def __getattr__(self, name: str) -> Any:
        target = _METHODS.get(name)
        if target is None:
            raise AttributeError(
                f"a traced tensor has no {name!r}; call the operator, torch.ops.aten.{name}"
            )
        return lambda *args, **kwargs: self._then(target, self, *args, **kwargs)

    def sum(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Traced:
        """The sum over some axes, or over all."""
        return self._reduced(aten.sum.default, aten.sum.dim_IntList, dim, keepdim)

    def mean(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Traced:
        """The mean over some axes, or over all."""
        return self._reduced(aten.mean.default, aten.mean.dim, dim, keepdim)

    def to(self, dtype: torch.dtype) -> Traced:
        """The value in another dtype."""
        return self._then(aten.to.dtype, self, dtype)

    def _reduced(self, whole: Target, over: Target, dim: Any, keepdim: bool) -> Traced:
        if dim is None:
            return self._then(whole, self)
        return self._then(over, self, [dim] if isinstance(dim, int) else list(dim), keepdim)

    def __getitem__(self, place: int) -> Traced:
        """One of several results."""
        return self._then(operator.getitem, self, place)

    def _then(self, target: Target, *args: Any, **kwargs: Any) -> Traced:
        return Traced(self.recorder, operation=(target, args, kwargs))

    def _with(self, other: Any, tensors: Target, sizes: Target) -> Any:
        if self.is_size and not _is_tensor(other):
            return self._of_sizes(sizes, self, other)
        return self._then(tensors, self, other)

    def _of_sizes(self, target: Target, left: Any, right: Any) -> Any:
        made = self._then(target, left, right)
        number = size_of(made.node.meta["val"])
        return number if isinstance(number, int) else made

    def __add__(self, other: Any) -> Any:
        return self._with(other, aten.add.Tensor, operator.add)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, aten.add.Tensor, operator.add)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, aten.sub.Tensor, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        if self.is_size:
            return self._of_sizes(operator.sub, other, self)
        return self._then(aten.rsub.Scalar, self, other)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, aten.mul.Tensor, operator.mul)

    def __rmul__(self, other: Any) -> Any:
        return self._with(other, aten.mul.Tensor, operator.mul)

    def __neg__(self) -> Any:
        return self * -1

    def __truediv__(self, other: Any) -> Traced:
        return self._then(aten.div.Tensor, self, other)

    def __floordiv__(self, other: Any) -> Any:
        return self._of_sizes(operator.floordiv, self, other)

    def __matmul__(self, other: Any) -> Traced:
        return self._then(aten.matmul.default, self, other)

    def __gt__(self, other: Any) -> Traced:
        return self._compared(other, aten.gt.Tensor, aten.gt.Scalar)

    def __ge__(self, other: Any) -> Traced:
        return self._compared(other, aten.ge.Tensor, aten.ge.Scalar)

    def __lt__(self, other: Any) -> Traced:
        return self._compared(other, aten.lt.Tensor, aten.lt.Scalar)

    def __le__(self, other: Any) -> Traced:
        return self._compared(other, aten.le.Tensor, aten.le.Scalar)

    def __eq__(self, other: object) -> Any:
        return self._compared(other, aten.eq.Tensor, aten.eq.Scalar)

    def __ne__(self, other: object) -> Any:
        return self._compared(other, aten.ne.Tensor, aten.ne.Scalar)

    __hash__ = object.__hash__

    def _compared(self, other: Any, tensor: Target, scalar: Target) -> Traced:
        return self._then(tensor if _is_tensor(other) else scalar, self, other)


def _is_tensor(value: Any) -> bool:
    if isinstance(value, Traced):
        return not value.is_size
    return isinstance(value, Tensor)


def _recorder_of(arguments: Any) -> Recorder | None:
    if isinstance(arguments, Traced):
        return arguments.recorder
    parts: Any = arguments.values() if isinstance(arguments, dict) else arguments
    if isinstance(arguments, dict | list | tuple):
        return next((found for part in parts if (found := _recorder_of(part))), None)
    return None


def _plain(arguments: Any) -> Any:
    """Arguments with nodes in the place of traced values."""
    if isinstance(arguments, Traced):
        return arguments.node
    if isinstance(arguments, list | tuple):
        listed = [_plain(one) for one in arguments]
        return listed if isinstance(arguments, list) else tuple(listed)
    if isinstance(arguments, dict):
        return {name: _plain(one) for name, one in cast(dict[str, Any], arguments).items()}
    return arguments


def _frozen(arguments: Any) -> Any:
    if isinstance(arguments, list | tuple):
        return tuple(_frozen(one) for one in arguments)
    if isinstance(arguments, dict):
        return tuple((name, _frozen(one)) for name, one in arguments.items())
    return (type(arguments), arguments)


def _described(value: Any) -> Any:
    """What a fake value depends on: shapes and dtypes of tensors, constants as they are."""
    if isinstance(value, Node):
        return _described(value.meta["val"])
    if isinstance(value, Tensor):
        return (value.dtype, tuple(map(size_of, value.shape)))
    if isinstance(value, torch.SymInt):
        return ("size", size_of(value))
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return (type(value), value)
