"""Scans: only the recurrences of selective state-space layers.

A scan runs a graph once for each step of a sequence. The two that are known are
``state = exp(delta a) state + (delta x) b`` and ``y = <c, state>``, with one decay for each
entry of the state and with one for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from lamella.errors import CaptureError
from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.values import Value

lam = torch.ops.lamella

Pattern = str | tuple[Any, ...]
"""A name for a value, or an operator and the patterns of its inputs."""

_DECAY = ("Exp", ("Mul", ("Unsqueeze", "delta"), "a"))
_UPDATE = ("Mul", ("Unsqueeze", ("Mul", "delta", "x")), ("Unsqueeze", "b"))
_STATE = ("Add", ("Mul", _DECAY, "state"), _UPDATE)
_OUTPUT = ("Squeeze", ("MatMul", _STATE, ("Unsqueeze", "c")))

_HEAD_DECAY = ("Unsqueeze", ("Exp", ("Mul", "delta", "a")))
_HEAD_UPDATE = (
    "Mul",
    ("Unsqueeze", ("Mul", ("Unsqueeze", "delta"), "x")),
    ("Unsqueeze", "b"),
)
_HEAD_STATE = ("Add", ("Mul", _HEAD_DECAY, "state"), _HEAD_UPDATE)
_HEAD_OUTPUT = ("Squeeze", ("MatMul", _HEAD_STATE, ("Unsqueeze", "c")))


@dataclass(frozen=True)
class _Kind:
    """A recurrence: its operator, how one step computes it, and the axis of the sequence."""

    target: Any
    state: Pattern
    output: Pattern
    axis: int


_KNOWN = (
    _Kind(lam.selective_scan.default, _STATE, _OUTPUT, 2),
    _Kind(lam.head_scan.default, _HEAD_STATE, _HEAD_OUTPUT, 1),
)

_COMMUTE = frozenset({"Add", "Mul"})


def build_scan(
    g: Builder,
    label: str,
    inputs: tuple[Value | None, ...],
    attributes: Mapping[str, ir.Attr],
    outer: Mapping[ir.Value, Value],
) -> tuple[Value | None, ...]:
    """The selective scan that a ``Scan`` stands for.

    Args:
        g: Builder.
        label: The node, for messages.
        inputs: The state before the first step, then the sequences.
        attributes: Its attributes, the graph of one step among them.
        outer: Values of the graph around it.

    Raises:
        CaptureError: It is another scan.
    """
    known = next(((k, b) for k in _KNOWN if (b := _bindings(attributes, k)) is not None), None)
    if known is None:
        raise CaptureError(f"{label}: only the recurrence of a state-space layer can be read")
    kind, bound = known
    body = attributes["body"].as_graph()
    given = dict(zip(body.inputs, inputs, strict=True))
    values = {name: given.get(value, outer.get(value)) for name, value in bound.items()}
    start, missing = values["state"], [name for name, v in values.items() if v is None]
    if missing or not _is_zero(g, start):
        raise CaptureError(f"{label}: a scan from a state other than zero can't be read")
    parts = (values[name] for name in ("x", "delta", "a", "b", "c"))
    return None, g.call(kind.target, *parts)


def _bindings(attributes: Mapping[str, ir.Attr], kind: _Kind) -> dict[str, ir.Value] | None:
    """The values of one step by their names in the recurrence, if it is `kind`."""
    body = attributes["body"].as_graph()
    axes = attributes.get("scan_input_axes")
    out = attributes.get("scan_output_axes")
    directed = "scan_input_directions" in attributes or "scan_output_directions" in attributes
    if directed or axes is None or out is None or len(body.outputs) != 2 or len(body.inputs) != 5:
        return None
    if set(axes.as_ints()) != {kind.axis} or list(out.as_ints()) != [kind.axis]:
        return None
    bound: dict[str, ir.Value] = {}
    state, output = body.outputs
    fits = _matches(state, kind.state, bound) and _matches(output, kind.output, bound)
    return bound if fits and bound["state"] is body.inputs[0] else None


def _matches(value: ir.Value | None, pattern: Pattern, bound: dict[str, ir.Value]) -> bool:
    """Whether `value` is computed as `pattern` says; `bound` takes the named values."""
    if value is None:
        return False
    if isinstance(pattern, str):
        return bound.setdefault(pattern, value) is value
    node, (kind, *parts) = value.producer(), pattern
    if node is None or node.op_type != kind:
        return False
    inputs = list(node.inputs[: len(parts)])
    orders = [inputs, inputs[::-1]] if kind in _COMMUTE else [inputs]
    for order in orders:
        trial = dict(bound)
        if all(_matches(v, p, trial) for v, p in zip(order, parts, strict=True)):
            bound.update(trial)
            return True
    return False


def _is_zero(g: Builder, value: Value | None) -> bool:
    """Whether a state is filled with zeros."""
    if isinstance(value, torch.fx.Node):
        return value.target is torch.ops.aten.full.default and value.args[1] in (0, 0.0)
    return value is not None and not bool(g.constant(value).tensor.any())
