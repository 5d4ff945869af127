"""What an executable takes: dtype and shape of each flat input, checked before it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.parsing.sympy_parser import parse_expr
from torch import Tensor
from torch.fx import Node

from lamella.errors import ArtifactError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.symbols import named, shape_of, symbol_names

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class InputSpec:
    """One flat input.

    Attributes:
        name: As in the signature.
        dtype: ``"int64"``, ``"float32"``, …; empty for what is not a tensor.
        shape: Sizes; a name for every size that may vary, the same name for sizes that agree.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        """As data for a manifest; `specs_from_json` reads it back."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def specs_of(graph: Graph) -> tuple[InputSpec, ...]:
    """The inputs of `graph`, in the order of its signature."""
    names = symbol_names(graph.nodes)
    pairs = zip(graph.signature.inputs, graph.inputs, strict=True)
    return tuple(_spec(name, node, names) for name, node in pairs)


def specs_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[InputSpec, ...]:
    """Read what `InputSpec.to_json` wrote.

    Raises:
        ArtifactError: It is malformed.
    """
    try:
        return tuple(InputSpec(d["name"], d["dtype"], tuple(d["shape"])) for d in data)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"the inputs in the manifest are malformed ({error})") from error


def check_inputs(specs: Sequence[InputSpec], values: Sequence[Any]) -> None:
    """Refuse inputs that the model was not captured for.

    Raises:
        SamplesError: An input is no tensor, or has another dtype or shape.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for spec, value in zip(specs, values, strict=True):
        if not spec.dtype:
            continue
        _check_type(spec, value)
        for want, have in zip(spec.shape, value.shape, strict=True):
            if isinstance(want, int):
                if want != have:
                    raise _misfit(spec, value)
                continue
            size, owner = sizes.setdefault(want, (have, spec.name))
            if size != have and want.isidentifier():
                raise SamplesError(
                    f"input {spec.name!r} has size {have} where {owner!r} has {size}; the model "
                    f"was captured with these sizes equal"
                )


def example_inputs(
    specs: Sequence[InputSpec], *, batch: int, sequence: int, seed: int = 0
) -> list[Any]:
    """Random inputs of the given sizes, for timing.

    Integers are small (0 or 1), so that they are valid tokens, positions and masks; the first
    varying size of an input is its batch, further ones are its sequence. A size that is computed
    from others (``past + sequence``) fits them.
    """
    generator = torch.Generator().manual_seed(seed)
    first = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    values: list[Any] = []
    for spec in specs:
        shape = [
            size if isinstance(size, int) else batch if size in first else _computed(size, sequence)
            for size in spec.shape
        ]
        dtype = getattr(torch, spec.dtype) if spec.dtype else None
        if dtype is None:
            values.append(None)
        elif dtype.is_floating_point:
            values.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            values.append(torch.ones(shape, dtype=dtype))
    return values


def _computed(size: str, each: int) -> int:
    """A size where every name in it is `each`."""
    if size.isidentifier():
        return each
    # The names are given, or sympy would take some of them for its own functions.
    names: dict[str, Any] = dict.fromkeys(_NAME.findall(size), sympy.Integer(each))
    formula: Any = parse_expr(size, local_dict=names)
    return int(formula)


def _spec(name: str, node: Node, names: Mapping[sympy.Symbol, str]) -> InputSpec:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return InputSpec(name, "", ())
    sizes = [size if isinstance(size, int) else named(size, names) for size in shape_of(node)]
    return InputSpec(name, str(value.dtype).removeprefix("torch."), tuple(sizes))


def _check_type(spec: InputSpec, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise SamplesError(f"input {spec.name!r} is a {type(value).__name__}, not a tensor")
    if str(value.dtype) != f"torch.{spec.dtype}":
        raise SamplesError(
            f"input {spec.name!r} is {str(value.dtype).removeprefix('torch.')}, the model was "
            f"captured with {spec.dtype}; convert it with .to(torch.{spec.dtype})"
        )
    if value.ndim != len(spec.shape):
        raise _misfit(spec, value)


def _misfit(spec: InputSpec, value: Tensor) -> SamplesError:
    wanted = ", ".join(map(str, spec.shape))
    return SamplesError(
        f"input {spec.name!r} has shape {list(value.shape)}, the model was captured with [{wanted}]"
    )
