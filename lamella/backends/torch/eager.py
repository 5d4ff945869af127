"""The eager backend: the graph as it is, run operator by operator by PyTorch.

It is the reference for other backends and the fallback where nothing else runs. It is not
faster than the model it came from, except by what the passes took away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.backends.artifact import Artifact
from lamella.backends.base import Backend, Executable
from lamella.backends.inputs import check_inputs
from lamella.backends.torch import wide
from lamella.backends.torch.portable import Portable
from lamella.errors import ArtifactError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.packing import dequantize
from lamella.ir.signature import Signature
from lamella.ir.storage import set_tensor
from lamella.report import Report

aten = torch.ops.aten
lam = torch.ops.lamella


class EagerExecutable(Executable):
    """A graph that PyTorch runs operator by operator, without gradients."""

    backend = "eager"

    def __init__(self, portable: Portable, signature: Signature, report: Report | None) -> None:
        """Build the module that runs from the portable graph."""
        super().__init__(signature, report, portable.inputs)
        self._portable = portable
        self._module, self.unpacked = unpacked(portable.module())

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs of flat inputs."""
        check_inputs(self.inputs, values)
        with torch.inference_mode():
            return self._module(*values)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return self._portable.weight_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that `save` writes."""
        return self._portable.file_bytes

    def write_files(self, folder: Path) -> Mapping[str, Any]:
        """Write the portable graph."""
        self._portable.write(folder)
        return {}


class EagerBackend(Backend):
    """Runs graphs in PyTorch as they are."""

    name: ClassVar[str] = "eager"

    def unsupported(self, graph: Graph) -> dict[str, int]:
        """Operators that are not canonical; they would run, but could not be saved."""
        return not_canonical(graph)

    def lower(self, graph: Graph, report: Report | None = None) -> EagerExecutable:
        """An executable with weights of its own.

        Raises:
            UnsupportedError: Some operators are not canonical.
        """
        self.check(graph)
        executable = EagerExecutable(Portable.of(graph), graph.signature, report)
        if report is not None and executable.unpacked:
            executable.report = report.extended(remarks=(_remark(executable.unpacked),))
        return executable

    def load(self, artifact: Artifact) -> EagerExecutable:
        """The executable in a folder.

        Raises:
            ArtifactError: The folder is corrupt.
        """
        described = artifact.description
        report = None if described.report is None else Report.from_json(described.report)
        signature = Signature.from_json(described.signature)
        return EagerExecutable(Portable.read(artifact.folder), signature, report)


def not_canonical(graph: Graph) -> dict[str, int]:
    """The operators of `graph` that are not canonical, with how often they occur."""
    calls = (node.target for node in graph.nodes if node.op == "call_function")
    return dict(Counter(ops.op_name(target) for target in calls if target not in ops.CANONICAL))


def unpacked(module: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """Replace packed weights by dense ones; gives the module and how many there were.

    PyTorch has no kernel for the packed layout: unpacking in every call would cost more than
    the layer itself, so that a weight is unpacked once and held as it is computed with.
    """
    dense: dict[tuple[object, ...], Node] = {}
    for node in list(module.graph.nodes):
        if node.target is lam.linear_nbits.default:
            bound = ops.bind(node)
            block = bound["block"] if bound["int8_activations"] else 0
            weight = _dense(module, node, dense)
            _swap(node, wide.linear, (bound["input"], weight, bound["bias"], block))
        elif node.target is lam.linear_int8.default:
            bound = ops.bind(node)
            rest = (bound["scales"], bound["bias"], bound["per_row"])
            _swap(node, wide.linear_int8, (bound["input"], _dense(module, node, dense), *rest))
        elif node.target in wide.STATIC:
            bound = ops.bind(node)
            bound["weight"] = _wide(module, bound["weight"], dense)
            _swap(node, wide.STATIC[node.target], tuple(bound.values()))
        elif node.target is lam.embedding_nbits.default:
            table = _dense(module, node, dense)
            _swap(node, aten.embedding.default, (table, ops.bind(node)["indices"]))
    remove_unread_weights(module)
    module.recompile()
    return module, len(dense)


def remove_unread_weights(module: fx.GraphModule) -> None:
    """Remove the readers of weights that nothing uses, and the weights."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in read]:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)


def _dense(module: fx.GraphModule, node: Node, known: dict[tuple[object, ...], Node]) -> Node:
    """The node that reads the dense weight of `node`; layers that share codes share it."""
    bound = ops.bind(node)
    if node.target is lam.linear_int8.default:
        return _wide(module, bound["weight"], known)
    is_linear = node.target is lam.linear_nbits.default
    operands = (bound["packed"], bound["scales"], bound["zero_points"])
    key = (*operands, bound["bits"], bound["block"], is_linear)
    if key not in known:
        codes, scales, zeros = (None if o is None else _read(module, o) for o in operands)
        if codes is None or scales is None:
            raise ArtifactError(f"node {node.name} has no packed weight")
        if is_linear:
            scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
        width = codes.shape[-2] * bound["block"] if is_linear else bound["features"]
        value = dequantize(codes, scales, zeros, bound["bits"], bound["block"], width)
        known[key] = _held(module, f"{operands[0].target}_dense{len(known)}", value)
    return known[key]


def _wide(module: fx.GraphModule, weight: Node, known: dict[tuple[object, ...], Node]) -> Node:
    """The node that reads a matrix of integers as float32."""
    key = (weight,)
    if key not in known:
        name = f"{weight.target}_dense{len(known)}"
        known[key] = _held(module, name, _read(module, weight).float())
    return known[key]


def _held(module: fx.GraphModule, name: str, value: Tensor) -> Node:
    """A node at the beginning that reads a new tensor of the module."""
    set_tensor(module, name, value)
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        return module.graph.create_node("get_attr", name)


def _read(module: fx.GraphModule, node: Node) -> Tensor:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _swap(node: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Let `node` call another function."""
    node.target, node.args, node.kwargs = target, args, {}


def _remark(count: int) -> str:
    return (
        f"{count} packed weights were unpacked once: the eager backend holds them in full width "
        f"in memory, its files hold the codes"
    )
