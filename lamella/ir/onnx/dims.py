"""The inputs of an ONNX model as fake tensors with symbolic sizes.

A named size (``dim_param``) is one symbol wherever the name stands; a size without name or
number is a symbol of its own. An expression of names that stand alone elsewhere
(``past_sequence_length + 1``) is computed from their symbols. Each symbol has an example size
that decides where a shape rule needs an answer ("is it the same as that one?"): from the sample
inputs if there are any, else a number that is unlikely to equal another size by chance.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from lamella.errors import CaptureError, closest
from lamella.ir.onnx.names import identifiers
from lamella.ir.onnx.tensors import dtype_of
from lamella.ir.torch_private import FakeTensorMode, symbolic_mode, symbolic_size

_NAMED = (5, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
"""Examples of named sizes, in the order in which the names appear."""
_UNNAMED = (5, 17, 13, 11)
"""Examples of sizes without a name, by axis: inputs that must agree there then do."""
_EXTENTS = {1: 16_000, 2: 224, 3: 32}
"""Examples of the spatial sizes of images and sounds, by the number of spatial axes."""

_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}

Dim = int | str | None
"""A declared size: a number, a name or an expression of names, or nothing."""
Samples = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Input:
    """An input of the model.

    Attributes:
        name: What the caller passes it as: an identifier.
        value: Its value in the ONNX graph.
        fake: Its shape and type.
    """

    name: str
    value: ir.Value
    fake: Tensor


def make_inputs(graph: ir.Graph, samples: Samples | None, dynamic: bool) -> list[Input]:
    """Fake tensors for the inputs of `graph` (an initializer with a default is not one).

    Args:
        graph: The main graph of the model.
        samples: Sample inputs, whose sizes are the examples for dynamic axes.
        dynamic: False takes the example of every size as fixed.

    Raises:
        CaptureError: An input has no shape or is not a tensor, or `samples` don't fit.
    """
    values = [value for value in graph.inputs if value.name not in graph.initializers]
    if not values:
        raise CaptureError("the model has no inputs: it computes a constant")
    names = identifiers([value.name or "input" for value in values])
    given = _match_samples(values, names, samples)
    declared = [_declared(v, s) for v, s in zip(values, given, strict=True)]
    examples = _examples(values, declared, given)
    mode = symbolic_mode()
    sizes = _Sizes(mode, declared, dynamic)
    made: list[Input] = []
    for name, value, dims, example in zip(names, values, declared, examples, strict=True):
        shape = [sizes.of(dim, e, f"{name}_{axis}") for axis, (dim, e) in _each(dims, example)]
        with mode:
            fake = torch.empty(shape, dtype=_dtype(value))
        made.append(Input(name, value, fake))
    return made


class _Sizes:
    """The symbolic sizes made so far, by name."""

    def __init__(
        self, mode: FakeTensorMode, declared: Iterable[Sequence[Dim]], dynamic: bool
    ) -> None:
        self._mode = mode
        self._dynamic = dynamic
        self._alone = {d for dims in declared for d in dims if isinstance(d, str) and _plain(d)}
        self._symbols: dict[str, int | torch.SymInt] = {}

    def of(self, dim: Dim, example: int, place: str) -> int | torch.SymInt:
        """The size for a declared `dim`; `place` names one that has no name."""
        if isinstance(dim, int):
            return dim
        if not self._dynamic:
            return example
        tree = _expression(dim, self._alone) if dim is not None else None
        if tree is not None:
            return self._evaluate(tree)
        return self._symbol(dim if dim is not None else place, example)

    def _symbol(self, name: str, example: int) -> int | torch.SymInt:
        if name not in self._symbols:
            # A size of 0 or 1 would be taken for a constant.
            self._symbols[name] = symbolic_size(self._mode, name, max(example, 2))
        return self._symbols[name]

    def _evaluate(self, tree: ast.expr) -> Any:
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.BinOp):
            compute = _ARITHMETIC[type(tree.op)]
            return compute(self._evaluate(tree.left), self._evaluate(tree.right))
        assert isinstance(tree, ast.Name)
        return self._symbol(tree.id, _NAMED[1])


def _expression(text: str, known: set[str]) -> ast.expr | None:
    """The tree of ``a + 1`` if it is arithmetic on names in `known`; None for a plain name."""
    if text in known or len(text) > 200:
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if all(_is_arithmetic(part, known) for part in _walk(tree)) else None


def _walk(tree: ast.expr) -> Iterator[ast.AST]:
    return (part for part in ast.walk(tree) if not isinstance(part, ast.expr_context))


def _is_arithmetic(part: ast.AST, known: set[str]) -> bool:
    if isinstance(part, ast.Name):
        return part.id in known
    if isinstance(part, ast.Constant):
        return type(part.value) is int
    return isinstance(part, ast.BinOp) or type(part) in _ARITHMETIC


def _plain(name: str) -> bool:
    return name.isidentifier()


def _each(dims: Sequence[Dim], examples: Sequence[int]) -> Iterator[tuple[int, tuple[Dim, int]]]:
    return enumerate(zip(dims, examples, strict=True))


# ---- what the model and the samples say -----------------------------------------------------


def _dtype(value: ir.Value) -> torch.dtype:
    if not isinstance(value.type, ir.TensorType):
        kind = type(value.type).__name__ if value.type is not None else "no type"
        raise CaptureError(f"input {value.name!r} is not a tensor ({kind})")
    return dtype_of(value.type.dtype, f"input {value.name!r}")


def _declared(value: ir.Value, sample: Tensor | None) -> list[Dim]:
    """The declared sizes; channels that a convolution fixes are numbers."""
    if value.shape is None:
        if sample is None:
            raise CaptureError(f"input {value.name!r} declares no shape; pass sample inputs")
        return [None] * sample.ndim
    dims = [_dim(dim) for dim in value.shape]
    channels = _channels(value)
    if channels is not None and len(dims) > 1 and not isinstance(dims[1], int):
        dims[1] = channels
    if sample is not None:
        _check_sample(value.name or "", dims, sample)
    return dims


def _dim(dim: int | ir.SymbolicDim) -> Dim:
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value or None


def _channels(value: ir.Value) -> int | None:
    """The number of channels that a convolution of this input reads."""
    for node in value.consumers():
        if node.op_type != "Conv" or len(node.inputs) < 2 or node.inputs[0] is not value:
            continue
        weight = node.inputs[1]
        group = node.attributes.get("group")
        if weight is not None and weight.const_value is not None and group is not None:
            return int(weight.const_value.shape.numpy()[1]) * group.as_int()
        if weight is not None and weight.const_value is not None:
            return int(weight.const_value.shape.numpy()[1])
    return None


def _match_samples(
    values: Sequence[ir.Value], names: Sequence[str], samples: Samples | None
) -> list[Tensor | None]:
    """The sample of each input, found by either of its names, or by position."""
    if samples is None:
        return [None] * len(values)
    if not isinstance(samples, Mapping):
        if len(samples) != len(values):
            raise CaptureError(
                f"{len(samples)} sample inputs for a model of {len(values)}: {', '.join(names)}"
            )
        return [torch.as_tensor(sample) for sample in samples]
    spellings = {name: name for name in names}
    spellings.update((v.name or name, name) for v, name in zip(values, names, strict=True))
    unknown = [name for name in samples if name not in spellings]
    if unknown:
        raise CaptureError(
            f"unknown sample inputs {', '.join(map(repr, unknown))}"
            f"{closest(unknown[0], spellings)} (the model has {', '.join(names)})"
        )
    found = {spellings[name]: torch.as_tensor(sample) for name, sample in samples.items()}
    return [found.get(name) for name in names]


def _check_sample(name: str, dims: Sequence[Dim], sample: Tensor) -> None:
    fits = len(dims) == sample.ndim and all(
        not isinstance(dim, int) or dim == size
        for dim, size in zip(dims, sample.shape, strict=False)
    )
    if not fits:
        declared = ", ".join("?" if dim is None else str(dim) for dim in dims)
        raise CaptureError(
            f"the sample of input {name!r} has the shape {list(sample.shape)}, the model "
            f"declares [{declared}]"
        )


# ---- examples -------------------------------------------------------------------------------


def _examples(
    values: Sequence[ir.Value],
    declared: Sequence[Sequence[Dim]],
    given: Sequence[Tensor | None],
) -> list[list[int]]:
    """A size for every axis: of the sample, the same for the same name, else a likely one."""
    fresh = iter((*_NAMED, *range(101, 100_000, 2)))
    by_name: dict[str, int] = {}
    chosen: list[list[int]] = []
    for value, dims, sample in zip(values, declared, given, strict=True):
        row: list[int] = []
        for axis, dim in enumerate(dims):
            if isinstance(dim, int):
                row.append(dim)
                continue
            likely = _likely(value, dims, sample, axis)
            if dim is None:
                row.append(likely or _UNNAMED[min(axis, len(_UNNAMED) - 1)])
            else:
                row.append(by_name.setdefault(dim, likely or next(fresh)))
        chosen.append(row)
    return chosen


def _likely(value: ir.Value, dims: Sequence[Dim], sample: Tensor | None, axis: int) -> int | None:
    """The size that the sample or the kind of the input suggests, if any."""
    if sample is not None:
        return sample.shape[axis]
    floating = _dtype(value).is_floating_point
    convolved = any(node.op_type == "Conv" for node in value.consumers())
    spatial = len(dims) - 2
    if axis >= 2 and (convolved or (floating and len(dims) == 4)):
        return _EXTENTS.get(spatial)
    if axis == 1 and floating and len(dims) == 2:
        return _EXTENTS[1]
    return None
