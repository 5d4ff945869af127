"""From a canonical graph straight to an ONNX model."""

from __future__ import annotations

import importlib.metadata
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import sympy
from torch import Tensor
from torch.fx import Node

from lamella.backends.onnxruntime.counts import add_counts
from lamella.backends.onnxruntime.emission import (
    MICROSOFT,
    Caches,
    Call,
    Emission,
    Emitter,
    Options,
)
from lamella.backends.onnxruntime.emit import EMITTERS, FUSIONS
from lamella.backends.onnxruntime.types import onnx_type
from lamella.backends.onnxruntime.weights import place_weight
from lamella.errors import BackendError, UnsupportedError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import named, size_of, symbol_names

Names = Mapping[sympy.Symbol, str]

_log = logging.getLogger(__name__)

_IR_VERSION = {21: 10, 22: 10, 23: 11, 25: 13}


@dataclass(frozen=True)
class Output:
    """Where a flat output of the model comes from.

    Attributes:
        name: Name in the ONNX model, or None for a constant.
        value: The constant (a number or None).
        integer: The output is a Python integer, which ONNX gives as a tensor.
    """

    name: str | None
    value: Any = None
    integer: bool = False


def write_onnx(
    graph: Graph,
    *,
    opset: int = 23,
    contrib: bool = True,
    caches: Caches = Caches.PLAIN,
    emitters: Mapping[Callable[..., Any], Emitter] = EMITTERS,
) -> ir.Model:
    """The ONNX model of a canonical graph.

    Shapes stay dynamic. The weights are not copied: the model reads them when it is saved
    (`files.save_model`), one at a time.

    Args:
        graph: Holds canonical operators; left as it is.
        opset: Version of the standard operators, 21 to 23. A model with codes of 2 bits that is
            written without `contrib` says 25, for the type of the codes alone.
        contrib: Use operators of ONNX Runtime beside the standard ones.
        caches: How a graph with a cache is called; others than `Caches.PLAIN` need one whose
            attentions `binding_of` finds fit.
        emitters: Canonical operator -> what writes it.

    Raises:
        UnsupportedError: Some operators have no emitter; all are listed.
        BackendError: A node can't be written; the message names it.
    """
    gaps = unsupported(graph, emitters)
    if gaps:
        listed = ", ".join(f"{name} (x{count})" for name, count in gaps.items())
        raise UnsupportedError(f"no ONNX emitter for {listed}")
    e = Emission(graph, Options(opset, contrib, caches))
    outputs = outputs_of(graph)
    for output in outputs:
        if output.name is not None:
            e.unique(output.name)
    names = symbol_names(graph.nodes)
    inputs = list(_inputs(e, names))
    for node in graph.nodes:
        if node.op == "get_attr":
            place_weight(e, node)
    for plan in FUSIONS:
        e.fused = plan(e, emitters) | e.fused
    for node in graph.nodes:
        if node.op == "call_function":
            _emit(e, node, emitters)
    results = _results(e, outputs, names)
    return _model(e, inputs, results)


def unsupported(
    graph: Graph, emitters: Mapping[Callable[..., Any], Emitter] = EMITTERS
) -> dict[str, int]:
    """The operators without an emitter and how often they occur, most frequent first."""
    missing = Counter(
        ops.op_name(node.target)
        for node in graph.nodes
        if node.op == "call_function"
        and node.target not in emitters
        and node.target is not operator.getitem
        and not ops.is_shape_arithmetic(node.target)
    )
    return dict(missing.most_common())


def outputs_of(graph: Graph) -> tuple[Output, ...]:
    """What becomes of each flat output, in the order of the signature."""
    found: list[Output] = []
    taken = {name for name, _ in _named_inputs(graph)}
    for name, value in zip(graph.signature.outputs, graph.outputs, strict=True):
        if not isinstance(value, Node):
            found.append(Output(None, value))
            continue
        while name in taken:
            name = f"{name}.out"
        taken.add(name)
        found.append(Output(name, integer=not isinstance(value.meta["val"], Tensor)))
    return tuple(found)


def _named_inputs(graph: Graph) -> Iterator[tuple[str, Node]]:
    """The inputs that are tensors, by name; numbers and None are part of the model."""
    for name, node in zip(graph.signature.inputs, graph.inputs, strict=True):
        if isinstance(node.meta.get("val"), Tensor):
            yield name, node


def _inputs(e: Emission, names: Names) -> Iterator[ir.Value]:
    slots = _slots(e)
    values: dict[str, ir.Value] = {}
    for name, node in _named_inputs(e.graph):
        held = node.meta["val"]
        shape = _shape(held, names)
        if name in slots:
            shape = ir.Shape([*shape[:2], "capacity", *shape[3:]])
        values[name] = ir.Value(name=e.unique(name), type=_type(held), shape=shape)
        e.values[node] = values[name]
    yield from values.values()
    yield from add_counts(e, values)
    for name, node in _named_inputs(e.graph):
        e.scope = name
        for axis, size in enumerate(node.meta["val"].shape):
            if str(size).isidentifier() and not (name in slots and axis == 2):
                e.know_extent(size, e.op("Shape", values[name], start=axis, end=axis + 1))


def _slots(e: Emission) -> frozenset[str]:
    """The inputs and outputs that are buffers with room to spare."""
    if e.options.caches is Caches.PLAIN or e.graph.cache is None:
        return frozenset()
    return frozenset(n for s in e.graph.cache.slots if s.grows for n in (s.input, s.output))


def _emit(e: Emission, node: Node, emitters: Mapping[Callable[..., Any], Emitter]) -> None:
    if node.target is operator.getitem:
        source, place = node.args[0], node.args[1]
        assert isinstance(source, Node)
        assert isinstance(place, int)
        parts = e.values[source]
        assert isinstance(parts, tuple)
        e.values[node] = parts[place]
        return
    if ops.is_shape_arithmetic(node.target):
        return
    e.scope, target = node.name, node.target
    assert not isinstance(target, str)
    emitter = e.fused.get(node) or emitters[target]
    try:
        e.values[node] = emitter(e, Call.of(node))
    except BackendError as error:
        raise BackendError(
            f"node {node.name} ({ops.op_name(node.target)}) can't be written to ONNX: {error}"
        ) from error
    except Exception as error:
        error.add_note(f"while writing node {node.name} ({ops.op_name(node.target)}) to ONNX")
        raise


def _results(e: Emission, outputs: tuple[Output, ...], names: Names) -> list[ir.Value]:
    """The outputs under their names; each is written by a node of its own name."""
    results: list[ir.Value] = []
    slots, layout = _slots(e), e.graph.cache
    one_row = layout.logits if layout and e.options.caches is Caches.SHARED else None
    for output, node in zip(outputs, e.graph.outputs, strict=True):
        if output.name is None:
            continue
        held = node.meta["val"]
        value = e.tensor(node)
        producer = value.producer()
        e.scope = output.name
        if producer is None or value in results or value.name in (r.name for r in results):
            value = e.op("Identity", value)
        value.name = output.name
        value.type = _type(held) if isinstance(held, Tensor) else ir.TensorType(ir.DataType.INT64)
        value.shape = _shape(held, names) if isinstance(held, Tensor) else ir.Shape([])
        if output.name in slots:
            value.shape = ir.Shape([*value.shape[:2], "capacity", *value.shape[3:]])
        if output.name == one_row:
            value.shape = ir.Shape([value.shape[0], 1, *value.shape[2:]])
        results.append(value)
    return results


def _model(e: Emission, inputs: list[ir.Value], results: list[ir.Value]) -> ir.Model:
    nodes, read = _live(e.nodes, results)
    if e.options.caches is not Caches.PLAIN:
        # Who binds buffers asks which inputs there are, and fills those for every token.
        inputs = [value for value in inputs if value in read]
    initializers = [value for value in e.initializers.values() if value in read]
    domains = {node.domain for node in nodes}
    opset = max(e.options.opset, e.least_opset)
    opsets = {"": opset} | ({MICROSOFT: 1} if MICROSOFT in domains else {})
    onnx_graph = ir.Graph(
        inputs,
        results,
        nodes=nodes,
        initializers=initializers,
        opset_imports=opsets,
        name=e.graph.origin.architecture or "model",
    )
    _log.debug("wrote %d nodes and %d initializers", len(nodes), len(initializers))
    return ir.Model(
        onnx_graph,
        ir_version=_IR_VERSION[opset],
        producer_name="lamella",
        producer_version=importlib.metadata.version("lamella"),
    )


def _live(nodes: list[ir.Node], results: list[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes that the results depend on, and every value that is read."""
    read, kept = set(results), list[ir.Node]()
    for node in reversed(nodes):
        if not read.isdisjoint(node.outputs):
            kept.append(node)
            read.update(_reads(node))
        else:
            _detach(node)
    return kept[::-1], read


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)


def _detach(node: ir.Node) -> None:
    for place in range(len(node.inputs)):
        node.replace_input_with(place, None)


def _type(held: Tensor) -> ir.TensorType:
    return ir.TensorType(onnx_type(held.dtype))


def _shape(held: Tensor, names: Names) -> ir.Shape:
    sizes = [size_of(size) for size in held.shape]
    return ir.Shape([size if isinstance(size, int) else named(size, names) for size in sizes])
