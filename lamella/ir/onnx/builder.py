"""Adds the nodes that an ONNX operator stands for to a graph.

The functions of the operator tables speak ATen to a `Builder`. What depends on constants only
is computed at once if it is small, and integers computed from shapes stay integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import CaptureError
from lamella.ir.graph import Graph
from lamella.ir.onnx.names import WeightNames
from lamella.ir.onnx.quantized import Quantized
from lamella.ir.onnx.values import Constant, Integer, Integers, Value
from lamella.ir.torch_private import tree_leaves, tree_map

aten = torch.ops.aten

_VIEWS = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dims,
        aten.slice.Tensor,
        aten.select.int,
    }
)
"""Computed on constants of any size: the result shares their memory (or is no larger)."""
_CREATIONS = frozenset({aten.full.default, aten.arange.start_step, aten.scalar_tensor.default})

_FOLDED_ELEMENTS = 4096
_CREATED_ELEMENTS = 64
_LISTED_ELEMENTS = 256


class Builder:
    """Appends to a graph, with ONNX values as arguments.

    Attributes:
        graph: The graph that is built.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._names = WeightNames()
        self._weights: dict[object, Node] = {}
        self._integers: dict[Any, Node] = {}

    # ---- nodes --------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The value of `target`: a node, or a constant if all arguments are constants.

        Arguments may be ONNX values, also inside of lists.
        """
        args, kwargs = tree_map(self._settled, (args, kwargs))
        if not any(isinstance(leaf, Node | Integers) for leaf in tree_leaves((args, kwargs))):
            folded = self._fold(target, args, kwargs)
            if folded is not None:
                return folded
        args, kwargs = tree_map(self._argument, (args, kwargs))
        return self.graph.call(target, *args, before=self.graph.output, **kwargs)

    def pick(self, node: Node, place: int) -> Node:
        """One result of an operator that has several."""
        return self.graph.call(operator.getitem, node, place, before=self.graph.output)

    def node(self, value: Value) -> Node:
        """`value` as a tensor of the graph; a constant becomes a weight."""
        if isinstance(value, Node):
            return value
        if isinstance(value, Integers) and not value.known:
            items = [
                self.call(aten.scalar_tensor.default, i, dtype=value.dtype) for i in value.items
            ]
            stacked = items[0] if value.scalar else self.call(aten.stack.default, items)
            return self.node(stacked)
        return self.weight(self.constant(value))

    def weight(self, constant: Constant) -> Node:
        """The node that reads a constant; one node for the same memory or the same few numbers."""
        key = _identity(constant.tensor)
        if key not in self._weights:
            name = self._names.claim(constant.name)
            self._weights[key] = self.graph.add_weight(name, constant.tensor)
            if constant.transposed:
                self.graph.origin = self.graph.origin.with_transposed(name)
        return self._weights[key]

    # ---- facts --------------------------------------------------------------------------

    def dtype(self, value: Value) -> torch.dtype:
        """The type of the elements."""
        if isinstance(value, Node):
            return value.meta["val"].dtype
        if isinstance(value, Quantized):
            return value.scale.dtype
        return value.dtype if isinstance(value, Integers) else value.tensor.dtype

    def rank(self, value: Value) -> int:
        """The number of axes."""
        if isinstance(value, Node):
            return value.meta["val"].ndim
        if isinstance(value, Integers):
            return 0 if value.scalar else 1
        return value.codes.ndim if isinstance(value, Quantized) else value.tensor.ndim

    def shape(self, value: Value) -> tuple[Integer, ...]:
        """The sizes; a symbolic one is a node, the same node for the same size."""
        if isinstance(value, Integers):
            return () if value.scalar else (len(value.items),)
        if isinstance(value, Constant):
            return tuple(value.tensor.shape)
        if isinstance(value, Quantized):
            return tuple(value.codes.shape)
        sizes = value.meta["val"].shape
        return tuple(self._size(value, axis, size) for axis, size in enumerate(sizes))

    def static(self, value: Value, axis: int) -> int | None:
        """The size of one axis if it is a number."""
        size = self.shape(value)[axis]
        return size if isinstance(size, int) else None

    def axis(self, value: Value, axis: int) -> int:
        """`axis` counted from the front.

        Raises:
            CaptureError: There is no such axis.
        """
        rank = self.rank(value)
        if not -rank <= axis < max(rank, 1):
            raise CaptureError(f"there is no axis {axis} in a tensor of {rank} axes")
        return axis % max(rank, 1)

    # ---- what is known ------------------------------------------------------------------

    def constant(self, value: Value) -> Constant:
        """`value` as a constant.

        Raises:
            CaptureError: It depends on the inputs.
        """
        if isinstance(value, Constant):
            return value
        if isinstance(value, Quantized):
            return Constant(value.dequantized(), value.name)
        if isinstance(value, Integers) and value.known:
            numbers = value.items[0] if value.scalar else list(value.items)
            return Constant(torch.tensor(numbers, dtype=value.dtype))
        raise CaptureError("a value that must be constant depends on the inputs of the model")

    def is_constant(self, value: Value | None) -> bool:
        """Whether the data of `value` is known."""
        return isinstance(value, Constant | Quantized) or (
            isinstance(value, Integers) and value.known
        )

    def as_integers(self, value: Value | None, whole: bool = False) -> Integers | None:
        """`value` as integers if it is a short integer vector or number that is known.

        Args:
            value: Any value.
            whole: Take floats that are whole numbers too.
        """
        if isinstance(value, Integers):
            return value
        if not isinstance(value, Constant) or value.tensor.ndim > 1:
            return None
        floating = value.tensor.is_floating_point()
        if (floating and not whole) or value.tensor.numel() > _LISTED_ELEMENTS:
            return None
        numbers = value.tensor.reshape(-1).tolist()
        if floating and not all(number.is_integer() for number in numbers):
            return None
        items = tuple(int(number) for number in numbers)
        return Integers(items, value.tensor.ndim == 0, value.tensor.dtype)

    def integers(self, value: Value) -> tuple[Integer, ...]:
        """The elements of an integer vector.

        Raises:
            CaptureError: They depend on the data of an input, not only on shapes.
        """
        found = self.as_integers(value)
        if found is None:
            raise CaptureError(
                "a shape or an index that must follow from the shapes of the inputs depends on "
                "their data"
            )
        return found.items

    def numbers(self, value: Value) -> list[int]:
        """The elements of an integer vector that must be known.

        Raises:
            CaptureError: They depend on the inputs.
        """
        found = self.integers(value)
        if not all(isinstance(item, int) for item in found):
            raise CaptureError("a vector of integers that must be constant depends on the inputs")
        return [int(item) for item in found if isinstance(item, int)]

    def number(self, value: Value | None) -> float | int | bool | Node | None:
        """The only element of `value` if it is a number or an integer from shapes."""
        if isinstance(value, Integers) and len(value.items) == 1:
            return value.items[0]
        if isinstance(value, Constant) and value.tensor.numel() == 1 and value.bits is None:
            return value.tensor.item()
        return None

    # ---- integers -----------------------------------------------------------------------

    def integer(self, target: Callable[..., Any], *items: Integer) -> Integer:
        """Arithmetic on integers; the same expression is the same node."""
        if all(isinstance(item, int) for item in items):
            return int(target(*items))
        value = target(*(item.meta["val"] if isinstance(item, Node) else item for item in items))
        known = self._known(value)
        if known is not None:
            return known
        made = self.graph.call(target, *items, before=self.graph.output)
        self._integers[value.node.expr] = made
        return made

    def product(self, items: Iterable[Integer]) -> Integer:
        """The product of integers; 1 of none."""
        total: Integer = 1
        for item in items:
            total = self.integer(operator.mul, total, item)
        return total

    def same(self, first: Integer, second: Integer) -> bool:
        """Whether two integers are the same number or the same expression."""
        if isinstance(first, int) or isinstance(second, int):
            return isinstance(first, int) and isinstance(second, int) and first == second
        return first is second or first.meta["val"].node.expr == second.meta["val"].node.expr

    def equal(self, first: Integer, second: Integer) -> bool:
        """Whether two integers are equal; a symbolic one that is, by its example, is fixed."""
        one, other = (
            item.meta["val"] if isinstance(item, Node) else item for item in (first, second)
        )
        return self.same(first, second) or bool(one == other)

    def _size(self, value: Node, axis: int, size: int | torch.SymInt) -> Integer:
        known = self._known(size)
        if known is not None:
            return known
        made = self.graph.call(aten.sym_size.int, value, axis, before=self.graph.output)
        assert isinstance(size, torch.SymInt)
        self._integers[size.node.expr] = made
        return made

    def _known(self, size: int | torch.SymInt) -> Integer | None:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression) if expression.is_Integer else self._integers.get(expression)

    # ---- inside -------------------------------------------------------------------------

    def _settled(self, value: Any) -> Any:
        known = isinstance(value, Integers) and value.known
        return self.constant(value) if known or isinstance(value, Quantized) else value

    def _argument(self, value: Any) -> Any:
        return self.node(value) if isinstance(value, Constant | Integers) else value

    def _fold(
        self, target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Constant | None:
        """The result on constants, unless it would be large."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Constant)]
        if not inputs and target not in _CREATIONS:
            return None
        if any(constant.bits is not None for constant in inputs):
            raise CaptureError("an integer tensor smaller than a byte is used in arithmetic")
        if target not in _VIEWS and not _is_small(target, args, kwargs):
            return None
        args, kwargs = tree_map(_data, (args, kwargs))
        with torch.no_grad():
            result: Any = target(*args, **kwargs)
        if not isinstance(result, Tensor):
            return None
        return Constant(result, inputs[0].name if inputs else "constant")


def _is_small(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether arguments and result are short; the result is looked at without making it."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Constant)]
    if any(constant.tensor.numel() > _FOLDED_ELEMENTS for constant in given):
        return False
    limit = _CREATED_ELEMENTS if target in _CREATIONS else _FOLDED_ELEMENTS
    meta_args, meta_kwargs = tree_map(_shadow, (args, kwargs))
    if target in _CREATIONS:
        meta_kwargs = {**meta_kwargs, "device": "meta"}
    with torch.no_grad():
        result = target(*meta_args, **meta_kwargs)
    return isinstance(result, Tensor) and result.numel() <= limit


def _data(value: Any) -> Any:
    return value.tensor if isinstance(value, Constant) else value


def _shadow(value: Any) -> Any:
    return value.tensor.to("meta") if isinstance(value, Constant) else value


def _identity(tensor: Tensor) -> object:
    """Equal for the same view of the same memory, and for equal small tensors."""
    facts = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() <= 16:
        return (*facts, repr(tensor.tolist()))
    return (*facts, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
