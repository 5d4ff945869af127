"""Reading ONNX models into graphs: inputs, shapes, names, control flow, exported models."""

from __future__ import annotations

import operator
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lamella.errors import CaptureError, ModelFileError, SamplesError
from lamella.ir.onnx import read_onnx
from lamella.ir.onnx.names import WeightNames, dotted, identifiers
from lamella.rewrite.canonicalize import canonicalize, noncanonical
from tests.unit.onnx_models import model, run_in_onnxruntime, tensor_input

aten = torch.ops.aten

node = helper.make_node


def constant(name: str, value: object, dtype: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def targets(graph) -> list[object]:
    return [each.target for each in graph.nodes if each.op == "call_function"]


# ---- inputs and outputs ---------------------------------------------------------------------


def adder(first: list[object], second: list[object]) -> onnx.ModelProto:
    inputs = [tensor_input("a", first), tensor_input("b", second)]
    return model([node("Add", ["a", "b"], ["sum"])], inputs, ["sum"])


def test_sizes_of_one_name_are_one_symbol():
    graph = read_onnx(adder(["batch", "length", 4], ["batch", "length", 4]))
    first, second = (each.meta["val"].shape for each in graph.inputs)
    assert first[0] == second[0]
    assert str(first) == str(second)
    assert first[0].node.expr != first[1].node.expr
    assert isinstance(first[2], int)
    x = torch.randn(3, 2, 4)
    assert torch.equal(graph(a=x, b=x)["sum"], x + x)


def test_sizes_without_a_name_are_symbols_of_their_own():
    proto = model([node("Relu", ["a"], ["y"])], [tensor_input("a", [None, None])], ["y"])
    rows, columns = read_onnx(proto).inputs[0].meta["val"].shape
    assert rows.node.expr != columns.node.expr
    # Two inputs that must agree have the same example, so that a sum of them can be shaped.
    x = torch.randn(3, 4)
    assert torch.equal(read_onnx(adder([None, 4], [None, 4]))(a=x, b=x)["sum"], x + x)


def test_size_that_is_an_expression_follows_its_symbols():
    proto = model(
        [node("Concat", ["past", "new"], ["all"], axis=1), node("Add", ["all", "mask"], ["y"])],
        [
            tensor_input("past", ["batch", "past_length"]),
            tensor_input("new", ["batch", "length"]),
            tensor_input("mask", ["batch", "past_length + length"]),
        ],
        ["y"],
    )
    graph = read_onnx(proto)
    past, new, mask = (each.meta["val"].shape[1].node.expr for each in graph.inputs)
    assert mask == past + new


def test_samples_give_examples_and_may_fix_the_sizes():
    graph = read_onnx(adder(["n", 4], ["m", 4]), {"a": torch.ones(6, 4), "b": torch.ones(6, 4)})
    assert graph.inputs[0].meta["val"].shape[0].node.hint == 6
    fixed = read_onnx(adder(["n", 4], ["n", 4]), [torch.ones(6, 4)] * 2, dynamic=False)
    assert [tuple(each.meta["val"].shape) for each in fixed.inputs] == [(6, 4), (6, 4)]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.ones(2, 4)], "1 sample inputs for a model of 2: a, b"),
        ({"aa": torch.ones(2, 4)}, "did you mean 'a'"),
        ({"a": torch.ones(2, 5)}, r"shape \[2, 5\], the model declares \[n, 4\]"),
        ({"a": torch.ones(2)}, r"shape \[2\]"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples, message):
    with pytest.raises(CaptureError, match=message):
        read_onnx(adder(["n", 4], ["n", 4]), samples)


def test_input_is_called_by_name_and_wrong_names_are_told():
    graph = read_onnx(adder(["n", 4], ["n", 4]))
    with pytest.raises(SamplesError, match="unknown input 'c'"):
        graph(a=torch.ones(2, 4), c=torch.ones(2, 4))


def test_initializer_with_a_default_is_no_input():
    proto = adder(["n", 4], [4])
    proto.graph.initializer.append(constant("b", [1, 2, 3, 4], np.float32))
    graph = read_onnx(proto)
    assert graph.signature.inputs == ("a",)
    assert graph(torch.zeros(2, 4))["sum"].tolist() == [[1, 2, 3, 4]] * 2


def test_channels_that_a_convolution_fixes_are_no_symbol():
    weight = constant("w", np.ones((2, 3, 1, 1)), np.float32)
    proto = model(
        [node("Conv", ["x", "w"], ["y"])],
        [tensor_input("x", ["b", "c", "h", "w_"])],
        ["y"],
        [weight],
    )
    sizes = read_onnx(proto).inputs[0].meta["val"].shape
    assert sizes[1] == 3
    assert [isinstance(size, torch.SymInt) for size in sizes] == [True, False, True, True]


def test_unusable_inputs_and_outputs_are_refused():
    shapeless = model([node("Relu", ["a"], ["y"])], [onnx.ValueInfoProto(name="a")], ["y"])
    with pytest.raises(CaptureError, match="'a'"):
        read_onnx(shapeless)
    with pytest.raises(CaptureError, match="no inputs"):
        read_onnx(
            model([node("Relu", ["w"], ["y"])], [], ["y"], [constant("w", [1.0], np.float32)])
        )
    with pytest.raises(ModelFileError, match="'nothing'"):
        read_onnx(model([node("Relu", ["a"], ["y"])], [tensor_input("a", [1])], ["nothing"]))


# ---- operators that can't be read -----------------------------------------------------------


def test_every_unsupported_operator_is_in_one_message():
    branch = helper.make_graph(
        [node("Det", ["x"], ["d"])], "b", [], [onnx.ValueInfoProto(name="d")]
    )
    nodes = [
        node("NonZero", ["x"], ["a"]),
        node("NonZero", ["x"], ["b"]),
        node("QMoE", ["x"], ["c"], domain="com.microsoft"),
        node("If", ["t"], ["e"], then_branch=branch, else_branch=branch),
    ]
    proto = model(
        nodes, [tensor_input("x", [2, 2])], ["a", "b", "c", "e"], [constant("t", True, bool)]
    )
    with pytest.raises(
        CaptureError, match=r"Det \(x2\), NonZero \(x2\), com.microsoft.QMoE \(x1\)"
    ):
        read_onnx(proto)


@pytest.mark.parametrize("opset", [12, 27])
def test_other_operator_sets_are_refused(opset):
    proto = model([node("Relu", ["x"], ["y"])], [tensor_input("x", [2])], ["y"], opset=opset)
    with pytest.raises(CaptureError, match=rf"opset {opset}, supported are 13 to 26"):
        read_onnx(proto)


def test_shape_that_depends_on_data_is_refused_by_name():
    proto = model(
        [node("Reshape", ["x", "s"], ["y"], name="bad")],
        [tensor_input("x", [2, 3]), tensor_input("s", [2], TensorProto.INT64)],
        ["y"],
    )
    with pytest.raises(CaptureError, match="depends on their data") as caught:
        read_onnx(proto)
    assert "Reshape 'bad'" in caught.value.__notes__[0]


def test_attribute_of_a_runtime_operator_that_is_not_known_is_refused():
    attention = node(
        "MultiHeadAttention", ["x", "x", "x"], ["y"], domain="com.microsoft", num_heads=2, window=4
    )
    with pytest.raises(CaptureError, match="attribute window is not supported"):
        read_onnx(model([attention], [tensor_input("x", ["n", 3, 4])], ["y"]))


def test_mistake_in_the_model_names_the_node_and_its_shapes():
    proto = model(
        [node("MatMul", ["x", "z"], ["y"], name="/block/MatMul")],
        [tensor_input("x", [2, 3]), tensor_input("z", [2, 5])],
        ["y"],
    )
    with pytest.raises(CaptureError, match=r"/block/MatMul.*\[2, 3\], \[2, 5\]"):
        read_onnx(proto)


# ---- shapes ---------------------------------------------------------------------------------


def test_shapes_computed_in_the_model_become_arithmetic_on_sizes():
    """The idiom of attention heads: Shape, Gather, Unsqueeze, Concat, Reshape."""
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"], axis=0),
        node("Gather", ["shape", "one"], ["length"], axis=0),
        node("Unsqueeze", ["batch", "axes"], ["batch1"]),
        node("Mul", ["length", "two"], ["double"]),
        node("Unsqueeze", ["double", "axes"], ["double1"]),
        node("Concat", ["batch1", "double1", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = [constant("zero", 0), constant("one", 1), constant("two", 2)]
    constants += [constant("axes", [0]), constant("minus", [-1])]
    graph = read_onnx(model(nodes, [tensor_input("x", ["b", "s", 6])], ["y"], constants))
    assert targets(graph) == [
        aten.sym_size.int,
        aten.sym_size.int,
        operator.mul,
        aten.reshape.default,
    ]
    assert graph(torch.ones(4, 5, 6))["y"].shape == (4, 10, 3)


def test_equal_sizes_are_one_node_and_known_results_none():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Relu", ["x"], ["r"]),
        node("Shape", ["r"], ["t"]),
        node("Mul", ["t", "two"], ["m"]),
        node("Div", ["m", "two"], ["d"]),
        node("Equal", ["s", "d"], ["same"]),
        node("Where", ["same", "s", "two"], ["w"]),
        node("Expand", ["r", "w"], ["y"]),
    ]
    graph = read_onnx(model(nodes, [tensor_input("x", ["b", 6])], ["y"], [constant("two", [2])]))
    assert targets(graph) == [aten.relu.default]


def test_sizes_that_pass_through_floats_stay_sizes():
    """What exporters write for interpolation by a factor."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "two", "four"], ["hw"]),
        node("Cast", ["hw"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "factor"], ["g"]),
        node("Floor", ["g"], ["h"]),
        node("Cast", ["h"], ["i"], to=TensorProto.INT64),
        node("Slice", ["s", "zero", "two"], ["bc"]),
        node("Concat", ["bc", "i"], ["target"], axis=0),
        node("Resize", ["x", "", "", "target"], ["y"], mode="nearest",
             coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    ]  # fmt: skip
    constants = [constant(n, [v]) for n, v in (("zero", 0), ("two", 2), ("four", 4))]
    constants.append(constant("factor", [2.0, 2.0], np.float32))
    graph = read_onnx(model(nodes, [tensor_input("x", ["b", 3, "h", "w"])], ["y"], constants))
    x = torch.randn(2, 3, 5, 4)
    expected = torch.nn.functional.interpolate(x, scale_factor=2.0)
    assert torch.equal(graph(x)["y"], expected)


def test_shape_as_an_output_is_a_tensor():
    graph = read_onnx(model([node("Shape", ["x"], ["y"])], [tensor_input("x", ["b", 6])], ["y"]))
    assert graph(torch.ones(3, 6))["y"].tolist() == [3, 6]


def test_large_constants_are_not_computed_ahead():
    proto = model(
        [node("ConstantOfShape", ["huge"], ["c"]), node("Add", ["x", "c"], ["y"])],
        [tensor_input("x", [1])],
        ["y"],
        [constant("huge", [1 << 40])],
    )
    assert aten.full.default in targets(read_onnx(proto))


# ---- weights --------------------------------------------------------------------------------


def test_tied_weights_are_one_weight_and_a_transposed_one_is_a_view():
    table = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Transpose", ["table"], ["t"], perm=[1, 0]),
        node("MatMul", ["e", "t"], ["y"]),
    ]
    graph = read_onnx(
        model(nodes, [tensor_input("ids", ["b", "s"], TensorProto.INT64)], ["y"],
              [numpy_helper.from_array(table, "table")])
    )  # fmt: skip
    assert [each.target for each in graph.weight_nodes()] == ["table"]
    assert targets(graph) == [aten.embedding.default, aten.linear.default]
    assert graph.weight_bytes() == table.nbytes
    assert graph.origin.transposed == frozenset()


def test_bias_added_after_a_product_joins_the_linear_layer_unless_the_product_is_read():
    constants = [constant("w", np.ones((4, 3)), np.float32), constant("b", np.ones(3), np.float32)]
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])]
    x = [tensor_input("x", ["n", 4])]
    assert targets(read_onnx(model(nodes, x, ["y"], constants))) == [aten.linear.default]
    both = read_onnx(model(nodes, x, ["y", "m"], constants))
    assert targets(both) == [aten.linear.default, aten.add.Tensor]


def test_anonymous_weight_is_named_after_its_layer():
    proto = model(
        [node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/layer.0/query/MatMul")],
        [tensor_input("x", ["n", 4])],
        ["y"],
        [constant("onnx::MatMul_7", np.ones((4, 3)), np.float32)],
    )
    assert read_onnx(proto).weight_nodes()[0].target == "layer.0.query.weight"


def test_weight_names_are_paths_of_their_own():
    names = WeightNames()
    assert [names.claim(n) for n in ("a.b", "a", "a.b.c", "a.b", "x::y/z", "forward", "", '"')] == [
        "a.b", "a_2", "a.b_c", "a.b_2", "x.y.z", "forward_", "weight", "_",
    ]  # fmt: skip
    assert dotted("encoder/layer.0::w") == "encoder.layer.0.w"


def test_input_names_are_distinct_identifiers():
    assert identifiers(["input.1", "input_1", "1", "class", "self", "", "ok"]) == [
        "input_1", "input_1_2", "_1", "class_", "self_", "input", "ok",
    ]  # fmt: skip


# ---- control flow and functions -------------------------------------------------------------


def test_branch_whose_condition_follows_from_shapes_is_taken():
    def branch(name: str, kind: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node(kind, ["x"], [name])], name, [], [onnx.ValueInfoProto(name=name)]
        )

    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "one"], ["width"]),
        node("Equal", ["width", "four"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branch("p", "Relu"), else_branch=branch("q", "Neg")),
    ]
    constants = [constant("one", 1), constant("four", 4)]
    graph = read_onnx(model(nodes, [tensor_input("x", ["n", 4])], ["y"], constants))
    assert targets(graph) == [aten.relu.default]
    data = model(
        nodes[3:], [tensor_input("x", [2, 4]), tensor_input("c", [], TensorProto.BOOL)], ["y"]
    )
    with pytest.raises(CaptureError, match="depends on the data"):
        read_onnx(data)


def test_function_of_the_model_is_unfolded_with_its_attributes():
    slope = node("LeakyRelu", ["a"], ["b"])
    reference = onnx.AttributeProto(
        name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT
    )
    slope.attribute.append(reference)
    function = helper.make_function(
        "own", "Twice", ["a"], ["c"], [slope, node("Add", ["b", "b"], ["c"])],
        [helper.make_opsetid("", 21)], attributes=["slope"],
    )  # fmt: skip
    nodes = [
        node("Twice", ["x"], ["m"], domain="own", slope=0.5),
        node("Twice", ["m"], ["y"], domain="own", slope=0.25),
    ]
    proto = model(nodes, [tensor_input("x", ["n", 4])], ["y"], functions=[function])
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    expected = run_in_onnxruntime(proto, {"x": x})[0]
    assert np.array_equal(read_onnx(proto)(torch.from_numpy(x))["y"].numpy(), expected)


# ---- exported models ------------------------------------------------------------------------


class _Tuples(nn.Module):
    """A model of transformers with positional inputs and a tuple of outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.inner(*inputs, return_dict=False))


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def bert():
    config = hf.BertConfig(vocab_size=99, max_position_embeddings=64, **_SMALL)
    inputs = {"input_ids": torch.randint(3, 99, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    inputs["attention_mask"][0, 4:] = 0
    return hf.BertModel(config), inputs, {0: "batch", 1: "sequence"}


def vit():
    config = hf.ViTConfig(image_size=32, patch_size=8, **_SMALL)
    return hf.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}, {0: "batch"}


def resnet():
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"
    )
    model = hf.ResNetForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, {0: "batch", 2: "high", 3: "wide"}


def export(build, path, dynamo: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    inner, inputs, axes = build()
    wrapped = _Tuples(inner.eval()).eval()
    options = {"dynamic_axes": dict.fromkeys(inputs, axes), "opset_version": 17}
    if dynamo:
        shapes = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for _ in inputs)
        options = {"dynamic_shapes": (shapes,), "opset_version": 18, "verbose": False}
    with warnings.catch_warnings():
        # The exporters warn about themselves.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapped,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            dynamo=dynamo,
            **options,
        )
    return wrapped, inputs


@pytest.mark.parametrize(
    ("build", "dynamo", "kinds"),
    [
        (bert, False, [["attention", "mlp"]] * 3),
        (vit, False, [["attention", "mlp"]] * 3),
        (resnet, False, [["conv"]] * 4),
        pytest.param(bert, True, [["attention", "mlp"]] * 3, marks=pytest.mark.slow),
        pytest.param(resnet, True, [["conv"]] * 4, marks=pytest.mark.slow),
    ],
    ids=["bert", "vit", "resnet", "bert-dynamo", "resnet-dynamo"],
)
def test_exported_model_computes_the_same_and_shows_its_blocks(tmp_path, build, dynamo, kinds):
    module, inputs = export(build, tmp_path / "m.onnx", dynamo)
    graph = read_onnx(tmp_path / "m.onnx", inputs)
    canonicalize(graph)
    assert noncanonical(graph) == {}
    assert [[each.kind for each in block.sublayers] for block in graph.blocks] == kinds
    larger = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    for given in (inputs, larger):
        with torch.no_grad():
            expected = module(*given.values())
        for got, want in zip(graph(**given).values(), expected, strict=True):
            # Constants of the exporter are rounded to float32, and sums have another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tensorflow_style_layout_is_read():
    """Channels last: transposed to channels first, convolved with SAME padding, and back."""
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[3, 3]),
        node("Transpose", ["c"], ["n"], perm=[0, 2, 3, 1]),
        node("Clip", ["n", "low", "high"], ["r"]),
        node("ReduceMean", ["r"], ["y"], axes=[1, 2], keepdims=0),
    ]
    constants = [numpy_helper.from_array(weight, "w")]
    constants += [constant("low", 0.0, np.float32), constant("high", 6.0, np.float32)]
    proto = model(nodes, [tensor_input("x", ["b", "h", "w_", 3])], ["y"], constants, opset=13)
    graph = read_onnx(proto)
    for size in (8, 11):
        x = draw.standard_normal((2, size, size + 1, 3)).astype(np.float32)
        expected = run_in_onnxruntime(proto, {"x": x})[0]
        # Sums of 27 products in another order.
        torch.testing.assert_close(
            graph(torch.from_numpy(x))["y"], torch.from_numpy(expected), rtol=1e-5, atol=1e-5
        )


def test_nothing_is_written_into_a_model_in_memory():
    proto = adder(["n", 4], ["n", 4])
    held = ir.from_proto(proto)
    before = ir.to_proto(held).SerializeToString()
    read_onnx(held)
    assert ir.to_proto(held).SerializeToString() == before
