"""A graph as JSON text, without its weights: the portable form that the torch backends save.

Reading it back never runs code that the text chooses: a target is looked up by name among the
canonical operators, and an argument is a number, a string, a dtype, a node or a list of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from lamella.errors import ArtifactError, BackendError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.storage import set_tensor

FORMAT = 1
"""Version of the text; a reader refuses newer ones."""

_TARGETS: Mapping[str, Callable[..., Any]] = {ops.op_name(op): op for op in ops.CANONICAL}
_NAMED_FLOATS = ("inf", "-inf", "nan")


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """The nodes of `graph` as data.

    Raises:
        BackendError: The graph holds operators that are not canonical (all are listed).
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    strange = {ops.op_name(n.target) for n in calls} - set(_TARGETS)
    if strange:
        raise BackendError(
            f"only canonical operators can be saved, the graph also holds "
            f"{', '.join(sorted(strange))}; run lamella.rewrite.canonicalize on it"
        )
    return {"format": FORMAT, "nodes": [_encode_node(node) for node in graph.nodes]}


def module_from_json(data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> fx.GraphModule:
    """The fx module of a text, with `weights` under their dotted names.

    Raises:
        ArtifactError: The text is of a newer version or malformed, or names an operator or a
            weight that does not exist.
    """
    if data.get("format") != FORMAT:
        raise ArtifactError(
            f"the graph has format {data.get('format')!r}, this version of lamella reads {FORMAT}"
        )
    root, graph = nn.Module(), fx.Graph()
    made: dict[str, Node] = {}
    for record in data["nodes"]:
        try:
            made[record["name"]] = _decode_node(graph, record, made)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the graph is malformed at node {record!r} ({error})") from error
        if record["op"] == "get_attr":
            set_tensor(root, record["target"], _weight(weights, record["target"]))
    graph.lint()
    return fx.GraphModule(root, graph)


def _weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ArtifactError(f"the graph reads a weight {name!r} that the folder does not hold")
    return weights[name]


def _encode_node(node: Node) -> dict[str, Any]:
    target = ops.op_name(node.target) if node.op == "call_function" else str(node.target)
    record: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        record["args"] = [_encode(argument) for argument in node.args]
    if node.kwargs:
        record["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
    return record


def _decode_node(graph: fx.Graph, record: Mapping[str, Any], made: Mapping[str, Node]) -> Node:
    args = tuple(_decode(argument, made) for argument in record.get("args", ()))
    kwargs = {key: _decode(value, made) for key, value in record.get("kwargs", {}).items()}
    op, target = record["op"], record["target"]
    if op == "call_function":
        if target not in _TARGETS:
            raise ArtifactError(f"the graph calls {target!r}, which is not a canonical operator")
        target = _TARGETS[target]
    elif op not in ("placeholder", "get_attr", "output"):
        raise ArtifactError(f"the graph holds a node of kind {op!r}")
    return graph.create_node(op, target, args, kwargs, name=record["name"])


def _encode(value: Any) -> Any:
    """JSON of one argument; what JSON has no word for becomes an object with one key."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, EllipsisType):
        return {"ellipsis": True}
    return _encode_torch(value)


def _encode_torch(value: Any) -> dict[str, str]:
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise BackendError(f"an argument of type {type(value).__name__} can't be saved ({value!r})")


def _decode(value: Any, made: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, made) for item in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return made[content]
        case "tuple":
            return tuple(_decode(item, made) for item in content)
        case "slice":
            return slice(*(_decode(part, made) for part in content))
        case "float" if content in _NAMED_FLOATS:
            return float(content)
        case "ellipsis":
            return ...
        case _:
            return _decode_torch(kind, content)


def _decode_torch(kind: str, content: str) -> Any:
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content) if kind == "torch" else None
    if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
        raise ValueError(f"{kind} {content!r} is not known")
    return found
