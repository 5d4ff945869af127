"""Opening a model file: parse it, believe nothing, and know what it asks for.

Everything that can be known to be wrong with a file is said here, before a graph is built.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from lamella.errors import CaptureError, ModelFileError
from lamella.ir.onnx import tensors
from lamella.ir.onnx.external import ExternalFiles

OPSETS = range(13, 27)
"""Versions of the default operator set that are read. From 24 on, operators that mean the same
as in 23 are read; the operators that are new there are reported as unsupported."""

_MAX_NODES = 1_000_000

OpKey = tuple[str, str]


@dataclass(frozen=True)
class ModelFile:
    """A model whose structure was checked, and the files it may read.

    Attributes:
        model: The model.
        files: Where external data may lie.
        path: The model file, or None for a model that was given in memory.
    """

    model: ir.Model
    files: ExternalFiles
    path: Path | None


def open_model(source: str | os.PathLike[str] | ir.Model | onnx.ModelProto) -> ModelFile:
    """Parse and check a model.

    Raises:
        ModelFileError: The file is missing, is not ONNX, or says something that is not so.
        CaptureError: The version of its operators is not supported.
    """
    if isinstance(source, ir.Model):
        opened = ModelFile(source, ExternalFiles(_base_folder(source)), None)
    elif isinstance(source, onnx.ModelProto):
        opened = ModelFile(_deserialize(source, "the model"), ExternalFiles(None), None)
    else:
        path = Path(source)
        model = _deserialize(_parse(path), str(path))
        opened = ModelFile(model, ExternalFiles(path.parent), path)
    _check_names(opened.model)
    _check_versions(opened.model)
    _check_growth(opened.model)
    for owner, tensor in _all_tensors(opened.model):
        tensors.check(tensor, opened.files, owner)
    return opened


def unsupported(model: ir.Model, known: Iterable[OpKey]) -> dict[str, int]:
    """Operators without a builder that the graph really reaches, with their counts."""
    table = set(known)
    missing: Counter[str] = Counter()
    pending: list[Iterable[ir.Node]] = [model.graph]
    reached: set[object] = set()
    while pending:
        for node in pending.pop():
            function = model.functions.get(node.op_identifier())
            if function is not None:
                if node.op_identifier() not in reached:
                    reached.add(node.op_identifier())
                    pending.append(function)
                continue
            if op_key(node) not in table:
                missing[display_name(node)] += 1
            if node.op_type != "Scan":
                pending.extend(_subgraphs(node))
    return dict(sorted(missing.items()))


def op_key(node: ir.Node) -> OpKey:
    """``(domain, type)``, with the two spellings of the default domain made one."""
    return ("" if node.domain == "ai.onnx" else node.domain), node.op_type


def display_name(node: ir.Node) -> str:
    """The name that people read: ``NonZero``, ``com.microsoft.QMoE``."""
    domain, kind = op_key(node)
    return f"{domain}.{kind}" if domain else kind


def _parse(path: Path) -> onnx.ModelProto:
    if path.exists() and not path.is_file():
        raise ModelFileError(f"{str(path)!r} is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"can't read {str(path)!r} ({error.strerror})") from error
    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelFileError(
            f"{str(path)!r} is not an ONNX model or is truncated ({len(data)} bytes)"
        ) from error


def _deserialize(proto: onnx.ModelProto, where: str) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import or not proto.graph.output:
        raise ModelFileError(f"{where!r} is not an ONNX model: it has no graph with outputs")
    sparse = _count_sparse(proto)
    if sparse:
        raise CaptureError(f"{where!r} holds {sparse} sparse tensors, which are not supported")
    try:
        return ir.from_proto(proto)
    except Exception as error:
        raise ModelFileError(
            f"{where!r} is not a valid ONNX model ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _count_sparse(proto: onnx.ModelProto) -> int:
    count = 0
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            count += len(graph.sparse_initializer)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            count += attribute.HasField("sparse_tensor") + len(attribute.sparse_tensors)
            graphs.extend(attribute.graphs)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
    return count


def _base_folder(model: ir.Model) -> Path | None:
    """The folder of a model in memory: the one that its external tensors agree on."""
    folders = {
        os.fspath(tensor.base_dir)
        for _, tensor in _all_tensors(model)
        if isinstance(tensor, ir.ExternalTensor)
    }
    if len(folders) > 1:
        raise ModelFileError(
            f"the external data of the model lies in several folders: {', '.join(sorted(folders))}"
        )
    return Path(folders.pop()) if folders else None


def _check_names(model: ir.Model) -> None:
    """Refuse names that are not text, which protobuf hands out as bytes."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while graphs:
        graph = graphs.pop()
        values: list[ir.Value | None] = [*graph.inputs, *graph.outputs]
        for node in graph:
            graphs.extend(_subgraphs(node))
            values += [*node.inputs, *node.outputs]
            for name in (node.name, node.op_type, node.domain, *node.attributes):
                _check_text(name)
        for value in values:
            _check_text(None if value is None else value.name)


def _check_text(name: object) -> None:
    if name is not None and not isinstance(name, str):
        raise ModelFileError(f"the model holds a name that is not text: {name!r}")


def _check_versions(model: ir.Model) -> None:
    sets = [("the model", model.opset_imports)]
    sets += [(f"function {f.name!r}", f.opset_imports) for f in model.functions.values()]
    for where, imports in sets:
        version = imports.get("", imports.get("ai.onnx"))
        if version is not None and version not in OPSETS:
            raise CaptureError(
                f"{where} uses opset {version}, supported are {OPSETS[0]} to {OPSETS[-1]}; "
                f"convert it with onnx.version_converter.convert_version"
            )


def _check_growth(model: ir.Model) -> None:
    """Refuse functions that call themselves, or that unfold to an absurd number of nodes."""
    sizes: dict[object, int] = {}

    def size(nodes: Iterable[ir.Node], open_calls: tuple[object, ...]) -> int:
        total = 0
        for node in nodes:
            key = node.op_identifier()
            total += 1 + sum(size(graph, open_calls) for graph in _subgraphs(node))
            if key in model.functions:
                if key in open_calls or len(open_calls) > 100:
                    raise ModelFileError(f"function {node.op_type!r} calls itself")
                if key not in sizes:
                    sizes[key] = size(model.functions[key], (*open_calls, key))
                total += sizes[key]
        return total

    count = size(model.graph, ())
    if count > _MAX_NODES:
        raise ModelFileError(f"the model unfolds to {count} nodes, at most {_MAX_NODES} are read")


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _all_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor of a model: initializers and attributes, of subgraphs and functions too."""
    pending: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while pending:
        graph = pending.pop()
        if isinstance(graph, ir.Graph):
            for name, value in graph.initializers.items():
                if value.const_value is not None:
                    yield name, value.const_value
        for node in graph:
            pending.extend(_subgraphs(node))
            for tensor in _attribute_tensors(node):
                yield f"{node.op_type} {node.name or ''}".strip(), tensor


def _attribute_tensors(node: ir.Node) -> Iterator[ir.TensorProtocol]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type is ir.AttributeType.TENSOR:
            yield attribute.as_tensor()
        elif attribute.type is ir.AttributeType.TENSORS:
            yield from attribute.as_tensors()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"
