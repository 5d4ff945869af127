"""Each ONNX operator against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamella.ir.onnx import read_onnx
from tests.unit.onnx_models import Case, model_of, run_in_onnxruntime

_draw = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return _draw.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(floats(*shape)) + np.float32(0.5)


def whole(low: int, high: int, *shape: int) -> np.ndarray:
    return _draw.integers(low, high, shape).astype(np.int64)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


X = floats(3, 4, 5)
IMAGE = floats(2, 3, 7, 8)
BITS = _draw.random((3, 4)) > 0.5

UNARY = [
    Case(kind, [X])
    for kind in (
        "Abs Atan Ceil Cos Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu LogSoftmax "
        "Mish Neg Relu Round Selu Sigmoid Sign Sin Softmax Softplus Softsign Tanh "
        "ThresholdedRelu Celu IsNaN IsInf"
    ).split()
]
UNARY += [Case(kind, [positive(3, 4)]) for kind in ("Log", "Sqrt", "Reciprocal")]
UNARY += [
    Case("Gelu", [X], attributes={"approximate": "tanh"}, label="tanh"),
    Case("Gelu", [X]),
    Case("Elu", [X], attributes={"alpha": 0.3}, label="alpha"),
    Case("Celu", [X], attributes={"alpha": 0.3}, label="alpha"),
    Case("HardSigmoid", [X], attributes={"alpha": 1 / 6, "beta": 0.5}, label="torch"),
    Case("LeakyRelu", [X], attributes={"alpha": 0.3}, label="alpha"),
    Case("Softmax", [X], attributes={"axis": 1}, label="axis"),
    Case("Not", [BITS]),
    Case("Clip", [X], [number(-0.5), number(0.5)]),
    Case("Clip", [X], [number(0.0), number(6.0)], label="relu6"),
    Case("Clip", [X], [number(0.2)], order=["x0", "", "c0"], label="only max"),
    Case("PRelu", [IMAGE], [floats(3, 1, 1)], label="channels"),
    Case("PRelu", [X], [number(0.1)], label="number"),
    Case("PRelu", [X], [floats(4, 1)], label="rows"),
    Case("Dropout", [X]),
]

BINARY = [
    Case(kind, [floats(3, 4), floats(4)], label="tensors") for kind in ("Add", "Sub", "Mul", "Div")
]
BINARY += [
    Case(kind, [floats(3, 4)], [number(2.5)], label="number")
    for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow")
    if kind != "Pow"
]
BINARY += [
    Case(kind, [floats(3, 4)], [number(2.5)], order=["c0", "x0"], label="number first")
    for kind in ("Add", "Sub", "Mul", "Div", "Max", "Less", "GreaterOrEqual")
]
BINARY += [
    Case(kind, [whole(-5, 5, 3, 4), whole(-5, 5, 4)], label="integers")
    for kind in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
]
BINARY += [
    Case("Div", [whole(-9, 9, 3, 4)], [ints(4)], label="integers"),
    Case("Div", [whole(-9, 9, 3, 4), whole(1, 5, 4)], label="integer tensors"),
    Case("Mod", [whole(-9, 9, 3, 4)], [np.array(4, np.int64)]),
    Case("Mod", [floats(3, 4), positive(4)], attributes={"fmod": 1}, label="fmod"),
    Case("Pow", [positive(3, 4)], [number(2.0)], label="square"),
    Case("Pow", [positive(3, 4)], [number(0.5)], label="root"),
    Case("Pow", [positive(3, 4), floats(4)], label="tensors"),
    Case("Pow", [floats(3, 4)], [number(2.0)], order=["c0", "x0"], label="base"),
    Case("And", [BITS, BITS[::-1].copy()]),
    Case("Or", [BITS, BITS[::-1].copy()]),
    Case("Xor", [BITS, BITS[::-1].copy()]),
    Case("BitwiseAnd", [whole(0, 9, 3, 4), whole(0, 9, 4)]),
    Case("BitwiseOr", [whole(0, 9, 3, 4), whole(0, 9, 4)]),
    Case("BitwiseNot", [whole(0, 9, 3, 4)]),
    Case("Max", [floats(3, 4), floats(4), floats(3, 1)], label="three"),
    Case("Sum", [floats(3, 4), floats(4), floats(3, 1)]),
    Case("Mean", [floats(3, 4), floats(4), floats(3, 1)]),
    Case("Where", [BITS, floats(3, 4), floats(4)]),
    Case("Where", [BITS, floats(3, 4)], [number(-1.0)], label="number"),
    Case("Where", [BITS, floats(3, 4)], [number(-1.0)], order=["x0", "c0", "x1"], label="first"),
    Case("Cast", [X * 3], attributes={"to": 7}, label="int64"),
    Case("Cast", [X], attributes={"to": 9}, label="bool"),
    Case("CastLike", [whole(-3, 3, 3, 4)], [number(1.0)]),
]

MOVES = [
    Case("Concat", [floats(3, 4), floats(3, 2)], attributes={"axis": 1}),
    Case("Split", [floats(3, 6)], [ints(2, 4)], {"axis": 1}, outputs=2),
    Case("Split", [floats(3, 7)], attributes={"axis": 1, "num_outputs": 3}, outputs=3),
    Case("Split", [floats(6, 2)], attributes={"axis": 0, "num_outputs": 2}, outputs=2, label="d"),
    Case("Reshape", [X], [ints(0, -1)]),
    Case("Reshape", [X], [ints(-1, 2, 10)], label="split"),
    Case("Flatten", [X]),
    Case("Flatten", [X], attributes={"axis": 0}, label="axis 0"),
    Case("Flatten", [X], attributes={"axis": 2}, label="axis 2"),
    Case("Squeeze", [floats(3, 1, 4, 1)], [ints(1, -1)]),
    Case("Squeeze", [floats(3, 1, 4)], label="all"),
    Case("Unsqueeze", [floats(3, 4)], [ints(0, -1)]),
    Case("Transpose", [X], attributes={"perm": [2, 0, 1]}),
    Case("Transpose", [X], label="reversed"),
    Case("Transpose", [X], attributes={"perm": [0, 2, 1]}, label="two"),
    Case("Expand", [floats(3, 1)], [ints(2, 1, 4)]),
    Case("Tile", [floats(3, 4)], [ints(1, 3)]),
    Case("Slice", [X], [ints(1, 0), ints(4, -1), ints(1, 2)]),
    Case("Slice", [X], [ints(4, -1), ints(0, -(2**62)), ints(1, 2), ints(-2, -1)], label="back"),
    Case("Slice", [X], [ints(0), ints(2**62), ints(2), ints(2)], label="steps"),
    Case("Pad", [floats(3, 4)], [ints(0, 1, 0, 2), number(0.5)]),
    Case(
        "Pad",
        [floats(3, 6)],
        [ints(1, 2), ints(1)],
        {"mode": "reflect"},
        order=["x0", "c0", "", "c1"],
        label="reflect",
    ),
    Case("Pad", [X], [ints(0, 0, 1, 0, 0, 2)], {"mode": "edge"}, label="edge"),
    Case("Pad", [X], [ints(0, 0, 1, 0, 0, 2)], {"mode": "wrap"}, label="wrap"),
    Case("Pad", [X], [ints(0, -1, 0, 0, 1, 0)], label="cut"),
    Case("DepthToSpace", [floats(2, 8, 3, 4)], attributes={"blocksize": 2}),
    Case(
        "DepthToSpace",
        [floats(2, 8, 3, 4)],
        attributes={"blocksize": 2, "mode": "CRD"},
        label="crd",
    ),
    Case("SpaceToDepth", [floats(2, 3, 4, 6)], attributes={"blocksize": 2}),
    Case("Trilu", [floats(3, 5, 5)], [np.array(1, np.int64)]),
    Case("Trilu", [floats(3, 5, 5)], attributes={"upper": 0}, label="lower"),
    Case("Shape", [X]),
    Case("Shape", [X], attributes={"start": 1, "end": -1}, label="part"),
    Case("Size", [X]),
    Case("EyeLike", [floats(3, 5)], attributes={"k": 1}, dynamic=False),
    Case("OneHot", [whole(-4, 4, 3, 2)], [np.array(4, np.int64), floats(2)]),
    Case(
        "OneHot", [whole(0, 4, 3, 2)], [np.array(4, np.int64), floats(2)], {"axis": 1}, label="axis"
    ),
]

INDEXING = [
    Case("Gather", [whole(0, 9, 3, 2)], [floats(9, 4)], order=["c0", "x0"], label="table"),
    Case("Gather", [X], [np.array(2, np.int64)], {"axis": 1}, label="number"),
    Case("Gather", [X], [ints(3, 0, -1)], {"axis": 1}, label="list"),
    Case("Gather", [X], [ints(1, 2)], {"axis": 1}, label="range"),
    Case("Gather", [X, whole(-4, 4, 2, 2)], attributes={"axis": 1}, label="tensor"),
    Case("GatherElements", [X, whole(0, 4, 3, 2, 5)], attributes={"axis": 1}),
    Case("GatherElements", [X], [whole(-4, 4, 3, 2, 5)], {"axis": 1}, label="negative"),
    Case("GatherND", [X, whole(0, 3, 6, 2)]),
    Case("GatherND", [X, whole(0, 4, 3, 2, 1)], attributes={"batch_dims": 1}, label="batch"),
    Case("ScatterND", [X], [np.array([[0, 1], [2, 3]]), floats(2, 5)]),
    Case(
        "ScatterND", [X], [np.array([[0], [0]]), floats(2, 4, 5)], {"reduction": "add"}, label="add"
    ),
    Case("ScatterElements", [floats(3, 4)], [ints(0, 2).reshape(1, 2), floats(1, 2)], {"axis": 1}),
    Case("TopK", [floats(3, 6)], [ints(2)], outputs=2),
    Case("TopK", [floats(6, 3)], [ints(2)], {"axis": 0, "largest": 0}, 2, label="smallest"),
]

REDUCTIONS = [
    Case(kind, [positive(3, 4, 5)], [ints(1, 2)], {"keepdims": keep}, label=f"keep {keep}")
    for kind in (
        "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceSumSquare"
    ).split()
    for keep in (0, 1)
]
REDUCTIONS += [
    Case("ReduceMean", [X], attributes={"axes": [-1]}, opset=13, label="opset 13"),
    Case("ReduceSum", [X], label="all"),
    Case("ReduceSum", [X], attributes={"noop_with_empty_axes": 1}, label="none"),
    Case("ReduceSum", [whole(0, 9, 3, 4)], [ints(1)], label="integers"),
    Case("ArgMax", [X], attributes={"axis": 2}),
    Case("ArgMin", [X], attributes={"axis": 1, "keepdims": 0}),
    Case(
        "ArgMax", [whole(0, 2, 3, 9)], attributes={"axis": 1, "select_last_index": 1}, label="last"
    ),
    Case("CumSum", [X], [np.array(1, np.int64)]),
    Case("CumSum", [X], [np.array(2, np.int64)], {"exclusive": 1, "reverse": 1}, label="reverse"),
    Case("LpNormalization", [X], attributes={"axis": 1}),
    Case("GlobalAveragePool", [IMAGE]),
    Case("GlobalMaxPool", [IMAGE]),
]

PRODUCTS = [
    Case("MatMul", [X], [floats(5, 6)], label="weight"),
    Case("MatMul", [X, floats(3, 5, 2)], label="tensors"),
    Case("MatMul", [X], [floats(2, 4)], order=["c0", "x0"], label="weight first"),
    Case("Gemm", [floats(3, 4)], [floats(4, 5), floats(5)]),
    Case("Gemm", [floats(3, 4)], [floats(5, 4), floats(5)], {"transB": 1}, label="transposed"),
    Case(
        "Gemm",
        [floats(4, 3)],
        [floats(4, 5), floats(3, 5)],
        {"transA": 1, "alpha": 0.5, "beta": 2.0},
        dynamic=False,
        label="scaled",
    ),
    Case("Gemm", [floats(3, 4), floats(4, 5)], label="tensors"),
    Case("Einsum", [floats(3, 4, 5), floats(3, 2, 5)], attributes={"equation": "bij, bkj -> bik"}),
    Case(
        "Conv", [IMAGE], [floats(4, 3, 3, 3), floats(4)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}
    ),
    Case("Conv", [IMAGE], [floats(6, 1, 3, 3)], {"group": 3, "dilations": [2, 2]}, label="groups"),
    Case("Conv", [IMAGE], [floats(4, 3, 3, 3)], {"pads": [0, 1, 2, 0]}, label="uneven"),
    Case(
        "Conv",
        [IMAGE],
        [floats(4, 3, 4, 3)],
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        label="same",
    ),
    Case("Conv", [IMAGE], [floats(4, 3, 4, 2)], {"auto_pad": "SAME_LOWER"}, label="same lower"),
    Case("Conv", [floats(2, 3, 9)], [floats(4, 3, 3), floats(4)], {"pads": [1, 0]}, label="1d"),
    Case("Conv", [floats(2, 3, 4, 5, 4)], [floats(4, 3, 2, 2, 2)], label="3d"),
    Case(
        "ConvTranspose",
        [IMAGE],
        [floats(3, 4, 3, 3), floats(4)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    ),
    Case(
        "ConvTranspose",
        [IMAGE],
        [floats(3, 4, 3, 3)],
        {"strides": [2, 2], "pads": [0, 1, 1, 0]},
        label="uneven",
    ),
    Case(
        "ConvTranspose",
        [IMAGE],
        [floats(3, 4, 3, 3)],
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        label="same",
    ),
    Case(
        "ConvTranspose",
        [IMAGE],
        [floats(3, 4, 3, 3)],
        {"strides": [2, 2], "output_shape": [15, 17]},
        label="shape",
    ),
    Case(
        "MaxPool",
        [IMAGE],
        attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    Case(
        "MaxPool",
        [IMAGE],
        attributes={"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "strides": [2, 2]},
        label="uneven",
    ),
    Case(
        "MaxPool",
        [IMAGE],
        attributes={"kernel_shape": [3, 2], "ceil_mode": 1, "strides": [2, 2]},
        label="ceil",
    ),
    Case("MaxPool", [floats(2, 3, 9)], attributes={"kernel_shape": [3]}, label="1d"),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case(
        "AveragePool",
        [IMAGE],
        attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        label="with padding",
    ),
    Case(
        "AveragePool",
        [IMAGE],
        attributes={"kernel_shape": [3, 2], "pads": [0, 0, 2, 1]},
        label="uneven",
    ),
    Case(
        "AveragePool",
        [floats(2, 3, 9)],
        attributes={"kernel_shape": [3], "strides": [2]},
        label="1d",
    ),
    Case("LRN", [IMAGE], attributes={"size": 3}),
]

NORMS = [
    Case("BatchNormalization", [IMAGE], [floats(3), floats(3), floats(3), positive(3)]),
    Case("InstanceNormalization", [IMAGE], [floats(3), floats(3)]),
    Case("GroupNormalization", [floats(2, 6, 5)], [floats(6), floats(6)], {"num_groups": 3}),
    Case("LayerNormalization", [X], [floats(5), floats(5)], {"epsilon": 1e-3}),
    Case("LayerNormalization", [X], [floats(4, 5)], {"axis": 1}, label="two axes"),
    Case("LayerNormalization", [X], [floats(5), floats(5)], outputs=3, label="statistics"),
    Case("RMSNormalization", [X], [floats(5)], opset=23),
    Case("SimplifiedLayerNormalization", [X], [floats(5)]),
    Case("MeanVarianceNormalization", [IMAGE]),
]

RESIZES = [
    Case("Resize", [IMAGE], [np.array([1, 1, 2, 2], np.float32)],
         {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
          "nearest_mode": "floor"}, order=["x0", "", "c0"], label="nearest"),
    Case("Resize", [IMAGE], [np.array([1, 1, 2, 3], np.float32)], order=["x0", "", "c0"],
         label="half pixel"),
    Case("Resize", [IMAGE], [ints(2, 3, 5, 5)], order=["x0", "", "", "c0"], label="smaller"),
    Case("Resize", [IMAGE], [ints(2, 3, 10, 11)], {"mode": "linear"}, order=["x0", "", "", "c0"],
         label="linear"),
    Case("Resize", [IMAGE], [ints(2, 3, 10, 11)],
         {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
         order=["x0", "", "", "c0"], label="corners"),
    Case("Resize", [IMAGE], [ints(10, 11)],
         {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel", "axes": [2, 3]},
         order=["x0", "", "", "c0"], label="cubic"),
]  # fmt: skip

ATTENTION = [
    Case("Attention", [floats(2, 4, 5, 8), floats(2, 2, 6, 8), floats(2, 2, 6, 8)], opset=23,
         label="groups"),
    Case("Attention", [floats(2, 5, 32), floats(2, 6, 16), floats(2, 6, 16)], opset=23,
         attributes={"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}, label="flat"),
    Case("Attention", [floats(2, 4, 5, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 8)], opset=23,
         attributes={"is_causal": 1}, label="causal"),
    Case("Attention", [floats(2, 4, 5, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 8),
         floats(5, 5) > -1], opset=23, attributes={"is_causal": 1}, label="causal and mask"),
    Case("Attention", [floats(2, 4, 5, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 8), floats(5, 5)],
         opset=23, attributes={"softcap": 2.0}, label="capped"),
    Case("RotaryEmbedding", [floats(2, 4, 5, 8), whole(0, 9, 2, 5)], [floats(9, 4), floats(9, 4)],
         order=["x0", "c0", "c1", "x1"], opset=23),
    Case("RotaryEmbedding", [floats(2, 5, 32), whole(0, 9, 2, 5)], [floats(9, 4), floats(9, 4)],
         {"interleaved": 1, "num_heads": 4}, order=["x0", "c0", "c1", "x1"], opset=23,
         label="interleaved"),
    Case("RotaryEmbedding", [floats(2, 4, 5, 8)], [floats(2, 5, 2), floats(2, 5, 2)],
         {"rotary_embedding_dim": 4, "num_heads": 4}, opset=23, label="part"),
]  # fmt: skip


def microsoft(kind: str, *args, **kwargs) -> Case:
    return Case(kind, *args, domain="com.microsoft", **kwargs)


PACKED = _draw.integers(0, 256, (6, 2, 8)).astype(np.uint8)
CONTRIB = [
    microsoft("BiasGelu", [X], [floats(5)]),
    microsoft("FastGelu", [X], [floats(5)]),
    microsoft("Gelu", [X]),
    microsoft("QuickGelu", [X]),
    microsoft("SkipLayerNormalization", [X, floats(3, 4, 5)], [floats(5), floats(5), floats(5)],
              {"epsilon": 1e-5}),
    microsoft("SkipSimplifiedLayerNormalization", [X, floats(3, 4, 5)], [floats(5)],
              {"epsilon": 1e-5}),
    microsoft("FusedMatMul", [X], [floats(6, 5)], {"transB": 1, "alpha": 0.5}),
    microsoft("FusedMatMul", [X, floats(3, 4, 6)], attributes={"transA": 1}, label="tensors"),
    microsoft("MatMulNBits", [floats(3, 32)], [PACKED, positive(6, 2)],
              {"K": 32, "N": 6, "bits": 4, "block_size": 16}),
    microsoft("MatMulNBits", [floats(3, 32)],
              [PACKED, positive(6, 2), _draw.integers(0, 256, (6, 1)).astype(np.uint8)],
              {"K": 32, "N": 6, "bits": 4, "block_size": 16}, label="zero points"),
    microsoft("GatherBlockQuantized", [whole(0, 6, 2, 3)],
              [PACKED.reshape(6, 16), positive(6, 2)],
              {"bits": 4, "block_size": 16, "gather_axis": 0, "quantize_axis": 1},
              order=["c0", "x0", "c1"]),
    microsoft("MultiHeadAttention", [floats(2, 5, 16), floats(2, 6, 16), floats(2, 6, 16)],
              attributes={"num_heads": 4}),
    microsoft("MultiHeadAttention", [floats(2, 5, 16), floats(2, 6, 16), floats(2, 6, 16),
              np.array([[1, 1, 1, 1, 0, 0], [1] * 6], np.int32)], [floats(48)], {"num_heads": 4},
              order=["x0", "x1", "x2", "c0", "x3"], label="bias and padding"),
    microsoft("RotaryEmbedding", [floats(2, 4, 5, 8), whole(0, 9, 2, 5)],
              [floats(9, 4), floats(9, 4)]),
]  # fmt: skip

CODES = _draw.integers(-128, 128, (32, 6)).astype(np.int8)
QUANTIZED = [
    Case("DequantizeLinear", [CODES], [number(0.1), np.array(3, np.int8)], label="tensor"),
    Case("DequantizeLinear", [CODES], [positive(6), CODES[0]], {"axis": 1}, label="axis"),
    Case("QuantizeLinear", [floats(3, 4) * 40], [number(0.1), np.array(3, np.uint8)]),
    Case("QuantizeLinear", [floats(3, 4) * 40], [positive(4), np.zeros(4, np.int8)], {"axis": 1},
         label="axis"),
]  # fmt: skip

CASES = [
    *(UNARY + BINARY + MOVES + INDEXING + REDUCTIONS + PRODUCTS + NORMS + RESIZES),
    *(ATTENTION + CONTRIB + QUANTIZED),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_computes_what_onnxruntime_computes(case):
    proto = model_of(case)
    graph = read_onnx(proto, case.inputs)
    fakes = [node.meta["val"] for node in graph.outputs]
    expected = run_in_onnxruntime(proto, {f"x{i}": x for i, x in enumerate(case.inputs)})
    outputs = graph(*[torch.from_numpy(x) for x in case.inputs])
    assert list(outputs) == [f"y{place}" for place in range(case.outputs)]
    for got, want, fake in zip(outputs.values(), expected, fakes, strict=True):
        # A symbolic size has the size of the sample as its example.
        sizes = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
        assert (sizes, fake.dtype) == (list(got.shape), got.dtype)
        # float32 sums in another order; the values are of order one to a hundred.
        torch.testing.assert_close(got, torch.from_numpy(want), rtol=2e-5, atol=2e-5)


def blocked(bits: int, signed: bool, zeros: bool):
    """Codes, scales and zero points of a weight ``[32, 6]`` in blocks of 16 rows."""
    low = -(1 << (bits - 1)) if signed else 0
    codes = _draw.integers(low, low + (1 << bits), (32, 6))
    zero = _draw.integers(low, low + (1 << bits), (2, 6)) if zeros else None
    return codes, positive(2, 6), zero


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (4, "UINT4"), (8, "INT8"), (8, "UINT8")])
def test_blocked_weight_of_a_matmul_stays_packed(bits, kind, zeros):
    from onnx import TensorProto, helper

    from tests.unit.onnx_models import model, tensor_input

    codes, scales, zero = blocked(bits, not kind.startswith("U"), zeros)
    data_type = getattr(TensorProto, kind)
    constants = [
        helper.make_tensor("codes", data_type, codes.shape, codes.flatten()),
        helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.flatten()),
    ]
    if zero is not None:
        constants.append(helper.make_tensor("zero", data_type, zero.shape, zero.flatten()))
    names = [c.name for c in constants]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    proto = model(nodes, [tensor_input("x", ["n", 32])], ["y"], constants)
    graph = read_onnx(proto)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        torch.ops.lamella.linear_nbits.default
    ]
    x = floats(3, 32)
    expected = run_in_onnxruntime(proto, {"x": x})[0]
    # Sums of 32 products of magnitude up to 128 in another order.
    torch.testing.assert_close(
        graph(torch.from_numpy(x))["y"], torch.from_numpy(expected), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_dynamically_quantized_linear_layers(signed, fused):
    from onnx import TensorProto, helper

    from tests.unit.onnx_models import model, tensor_input

    generator = np.random.default_rng(0)
    codes = generator.integers(-127, 128, (32, 24))
    kind, middle = (TensorProto.INT8, 0) if signed else (TensorProto.UINT8, 128)
    constants = [
        helper.make_tensor("w", kind, (32, 24), (codes + middle).flatten()),
        helper.make_tensor("ws", TensorProto.FLOAT, (24,), generator.random(24) / 128),
        helper.make_tensor("wz", kind, (24,), [middle] * 24),
        helper.make_tensor("b", TensorProto.FLOAT, (24,), generator.standard_normal(24)),
    ]
    if fused:
        inputs = ["x", "w", "ws", "wz", "b"]
        nodes = [helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")]
    else:
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["total"]),
            helper.make_node("Cast", ["total"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["s", "ws"], ["scale"]),
            helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "b"], ["y"]),
        ]
    proto = model(nodes, [tensor_input("x", ["n", 32])], ["y"], constants)
    graph = read_onnx(proto)
    if fused:
        assert [node.target for node in graph.nodes if node.op == "call_function"] == [
            torch.ops.lamella.linear_int8.default
        ]
    x = floats(5, 32)
    expected = run_in_onnxruntime(proto, {"x": x})[0]
    # Integers are summed exactly; a few roundings of float32 are left.
    torch.testing.assert_close(
        graph(torch.from_numpy(x))["y"], torch.from_numpy(expected), rtol=1e-5, atol=1e-5
    )
