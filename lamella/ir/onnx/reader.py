"""From an ONNX model to a graph.

The nodes of the model are walked once; each becomes ATen operators by the function that the
table has for it. Weights share the memory of the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
from torch import fx, nn

from lamella.errors import CaptureError, LamellaError, ModelFileError
from lamella.ir.graph import Graph
from lamella.ir.onnx import names, tensors
from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.dims import Input, Samples, make_inputs
from lamella.ir.onnx.experts import Experts, find_experts
from lamella.ir.onnx.file import ModelFile, display_name, op_key, open_model, unsupported
from lamella.ir.onnx.table import BUILDERS, integers
from lamella.ir.onnx.table.contraction import grouped_linear
from lamella.ir.onnx.table.scan import build_scan
from lamella.ir.onnx.values import Constant, Op, Value
from lamella.ir.signature import Signature
from lamella.ir.torch_private import tree_flatten
from lamella.ir.weights import Origin

logger = logging.getLogger(__name__)

_CONTROL = (("", "If"), ("", "Scan"))

Scope = dict[ir.Value, Value]


def read_onnx(
    model: str | os.PathLike[str] | ir.Model | onnx.ModelProto,
    inputs: Samples | None = None,
    *,
    dynamic: bool = True,
) -> Graph:
    """A graph of an ONNX model (not canonical yet: `rewrite.canonicalize` does that).

    The graph is called with the names of the model's inputs (``input.1`` is written
    ``input_1``) and returns a dictionary by output name. Sizes that the model leaves open stay
    symbolic. External data is read only below the folder of the model file, and is mapped into
    memory, not copied.

    Args:
        model: The path of a model file, or a model in memory.
        inputs: Sample inputs by name or by position; only their shapes are used, as examples
            of the sizes that the model leaves open.
        dynamic: False fixes the open sizes to those of `inputs`.

    Raises:
        ModelFileError: The file is missing, corrupt, or asks for data outside of its folder.
        CaptureError: The model uses operators, types or an operator set that are not
            supported; all operators are listed.
    """
    opened = open_model(model)
    missing = unsupported(opened.model, (*BUILDERS, *_CONTROL))
    if missing:
        listed = ", ".join(f"{name} (x{count})" for name, count in missing.items())
        raise CaptureError(f"the model has operators that can't be read: {listed}")
    made = make_inputs(opened.model.graph, inputs, dynamic)
    graph = _empty_graph(opened, made)
    reader = _Reader(Builder(graph), opened)
    scope: Scope = {each.value: node for each, node in zip(made, graph.inputs, strict=True)}
    results = reader.run_graph(opened.model.graph, scope, {})
    nodes = [reader.builder.node(value) for value in results]
    graph.set_outputs(nodes, graph.signature)
    integers.settle(graph)
    graph.finish()
    return graph


def _empty_graph(opened: ModelFile, made: list[Input]) -> Graph:
    """A graph with inputs and outputs and nothing between them."""
    traced = fx.Graph()
    placeholders = [traced.placeholder(each.name) for each in made]
    for node, each in zip(placeholders, made, strict=True):
        node.meta["val"] = each.fake
    traced.output(tuple(placeholders[:1]))
    outputs = tuple(value.name or "output" for value in opened.model.graph.outputs)
    if len(set(outputs)) < len(outputs):
        raise ModelFileError(f"two outputs of the model have one name: {', '.join(outputs)}")
    inputs = tuple(each.name for each in made)
    in_spec = tree_flatten(((), dict.fromkeys(inputs, 0)))[1]
    out_spec = tree_flatten(dict.fromkeys(outputs, 0))[1]
    signature = Signature(inputs, outputs, in_spec, out_spec)
    producer = opened.model.graph.name or "onnx"
    folder = None if opened.path is None else str(opened.path)
    origin = Origin(kind="onnx", architecture=producer, folder=folder)
    return Graph(fx.GraphModule(nn.Module(), traced), signature, origin=origin)


class _Reader:
    """Walks the nodes of a model, its functions and its branches.

    Attributes:
        builder: Where nodes are added.
    """

    def __init__(self, builder: Builder, opened: ModelFile) -> None:
        self.builder = builder
        self._model = opened.model
        self._files = opened.files

    def run_graph(
        self, graph: ir.Graph, scope: Scope, references: Mapping[str, ir.Attr]
    ) -> list[Value]:
        """The values of the outputs of a graph, from the values of its inputs in `scope`."""
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise ModelFileError(f"initializer {name!r} has no data")
            scope[value] = self._initializer(name, value)
        return self._run(graph, scope, references)

    def _run(
        self, graph: ir.Graph | ir.Function, scope: Scope, references: Mapping[str, ir.Attr]
    ) -> list[Value]:
        experts = find_experts(graph)
        for node in graph:
            if node in experts.inner:
                continue
            if node in experts.layers:
                results = (self._experts(experts.layers[node], scope),)
            else:
                results = self._results(node, scope, references)
            for value, result in zip(node.outputs, results, strict=False):
                if result is not None:
                    scope[value] = result
        return [self._value(value, scope, "the outputs") for value in graph.outputs]

    def _results(
        self, node: ir.Node, scope: Scope, references: Mapping[str, ir.Attr]
    ) -> tuple[Value | None, ...]:
        label = f"{display_name(node)} {node.name!r}" if node.name else display_name(node)
        inputs = tuple(
            None if value is None or value.name == "" else self._value(value, scope, label)
            for value in node.inputs
        )
        attributes = {
            name: found
            for name, given in node.attributes.items()
            if (found := _resolve(given, references)) is not None
        }
        function = self._model.functions.get(node.op_identifier())
        try:
            if function is not None:
                return tuple(self._call(function, inputs, attributes))
            if op_key(node) == ("", "If"):
                return tuple(self._branch(inputs, attributes, scope, references))
            if op_key(node) == ("", "Scan"):
                return build_scan(self.builder, label, inputs, attributes, scope)
            result = self._build(node, label, inputs, attributes)
        except LamellaError as error:
            if label not in str(error):
                error.add_note(f"while reading {label}")
            raise
        except Exception as error:
            raise CaptureError(
                f"{label} can't be read: {_first_line(error)} (its inputs: "
                f"{', '.join(self._describe(value) for value in inputs)})"
            ) from error
        return result if isinstance(result, tuple) else (result,)

    def _build(
        self,
        node: ir.Node,
        label: str,
        inputs: tuple[Value | None, ...],
        attributes: Mapping[str, ir.Attr],
    ) -> Any:
        op = Op(
            kind=node.op_type,
            label=label,
            version=self._version(node),
            inputs=self._named(node, inputs),
            attributes={name: self._plain(given, label) for name, given in attributes.items()},
            outputs=tuple(bool(value.name) for value in node.outputs),
            alone=tuple(_is_alone(value) for value in node.inputs),
        )
        return BUILDERS[op_key(node)](self.builder, op)

    # ---- parts of a model ---------------------------------------------------------------

    def _call(
        self,
        function: ir.Function,
        inputs: tuple[Value | None, ...],
        attributes: Mapping[str, ir.Attr],
    ) -> list[Value]:
        scope: Scope = {
            formal: value
            for formal, value in zip(function.inputs, inputs, strict=False)
            if value is not None
        }
        defaults = {
            name: given for name, given in function.attributes.items() if given.value is not None
        }
        return self._run(function, scope, {**defaults, **attributes})

    def _branch(
        self,
        inputs: tuple[Value | None, ...],
        attributes: Mapping[str, ir.Attr],
        scope: Scope,
        references: Mapping[str, ir.Attr],
    ) -> list[Value]:
        """The branch of an ``If`` whose condition is known."""
        condition = inputs[0] if inputs else None
        if condition is None or not self.builder.is_constant(condition):
            raise CaptureError("a branch that depends on the data of the inputs is not supported")
        chosen = "then_branch" if self.builder.number(condition) else "else_branch"
        return self.run_graph(attributes[chosen].as_graph(), scope, references)

    def _experts(self, layer: Experts, scope: Scope) -> Value:
        """Linear layers of experts, their matrices stacked as ``[experts, out, in]``."""
        rows, offsets, *matrices = (
            self._value(value, scope, "a layer of experts")
            for value in (layer.rows, layer.offsets, *layer.matrices)
        )
        return grouped_linear(self.builder, rows, offsets, matrices)

    def _initializer(self, name: str, value: ir.Value) -> Constant:
        tensor = value.const_value
        assert tensor is not None
        return self._constant(tensor, name)

    def _constant(self, tensor: ir.TensorProtocol, owner: str) -> Constant:
        data = tensors.load(tensor, self._files, owner)
        bits = tensors.PACKED[tensor.dtype][0] if tensor.dtype in tensors.PACKED else None
        return Constant(data, owner, bits)

    def _named(self, node: ir.Node, inputs: tuple[Value | None, ...]) -> tuple[Value | None, ...]:
        """Weights that an exporter gave no name are named after the layer that reads them."""
        leaves = {1: "weight", 2: "bias"} if node.op_type in ("MatMul", "Gemm", "Conv") else {}
        named = list(inputs)
        for place, value in enumerate(inputs):
            leaf = names.scoped(node.name or "", leaves.get(place, "constant"))
            if isinstance(value, Constant) and names.is_anonymous(value.name) and leaf:
                named[place] = Constant(value.tensor, leaf, value.bits, value.transposed)
        return tuple(named)

    def _plain(self, attribute: ir.Attr, label: str) -> Any:
        """An attribute as a Python value; a tensor as a constant."""
        if attribute.type is ir.AttributeType.TENSOR:
            return self._constant(attribute.as_tensor(), label)
        return attribute.value

    def _version(self, node: ir.Node) -> int:
        domain, _ = op_key(node)
        graph = node.graph
        imports = self._model.opset_imports
        if isinstance(graph, ir.Function) or (graph is not None and graph.opset_imports):
            imports = graph.opset_imports or imports
        return imports.get(domain, imports.get("ai.onnx", 1) if domain == "" else 1)

    def _value(self, value: ir.Value, scope: Scope, reader: str) -> Value:
        if value not in scope:
            raise ModelFileError(f"{reader} reads {value.name!r}, which no node before it computes")
        return scope[value]

    def _describe(self, value: Value | None) -> str:
        if value is None:
            return "none"
        if isinstance(value, fx.Node):
            return str(list(value.meta["val"].shape))
        return f"constant {list(self.builder.shape(value))}"


def _resolve(given: ir.Attr, references: Mapping[str, ir.Attr]) -> ir.Attr | None:
    """An attribute, or what the caller of a function gave for it."""
    if not given.is_ref():
        return given
    return references.get(given.ref_attr_name or "")


def _is_alone(value: ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
