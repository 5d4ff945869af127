"""ONNX models made by hand, and ONNX Runtime as an independent answer to what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One operator on inputs and constants.

    `inputs` become graph inputs, `constants` initializers; `order` says which input of the node
    each is ("x0", "c1", "" for one left out). Without it, inputs come first.
    """

    kind: str
    inputs: Sequence[Array]
    constants: Sequence[Array] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    domain: str = ""
    order: Sequence[str] | None = None
    dynamic: bool = True
    label: str = ""

    def __str__(self) -> str:
        name = f"{self.domain}.{self.kind}" if self.domain else self.kind
        return f"{name}-{self.label}" if self.label else name


def model_of(case: Case) -> onnx.ModelProto:
    """A model of one node; the first axis of every input is called ``batch``."""
    names = [f"x{place}" for place in range(len(case.inputs))]
    constants = [
        numpy_helper.from_array(value, f"c{place}") for place, value in enumerate(case.constants)
    ]
    order = case.order or [*names, *(c.name for c in constants)]
    results = [f"y{place}" for place in range(case.outputs)]
    node = helper.make_node(
        case.kind, order, results, name="layer/op", domain=case.domain, **case.attributes
    )
    given = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), _shape(value, case.dynamic)
        )
        for name, value in zip(names, case.inputs, strict=True)
    ]
    return model([node], given, results, constants, case.opset)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 21,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model whose outputs have no declared type."""
    graph = helper.make_graph(
        nodes, "main", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], constants
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    imports += [helper.make_opsetid(domain, 1) for domain in sorted({f.domain for f in functions})]
    made = helper.make_model(graph, opset_imports=imports, functions=functions)
    made.ir_version = 10
    return made


def _shape(value: Array, dynamic: bool) -> list[int | str]:
    sizes: list[int | str] = list(value.shape)
    if dynamic and value.ndim > 1:
        sizes[0] = f"batch_{value.shape[0]}"
    return sizes


def tensor_input(name: str, shape: Sequence[Any], kind: int = TensorProto.FLOAT) -> Any:
    """A declared input."""
    return helper.make_tensor_value_info(name, kind, shape)


def run_in_onnxruntime(
    proto: onnx.ModelProto, inputs: Mapping[str, Array], optimize: bool = False
) -> list[Array]:
    """What ONNX Runtime computes, without its rewrites unless they are wanted."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(inputs))
