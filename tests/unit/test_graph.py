"""The graph: edits are counted, weights are values, copies are independent."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lamella.errors import GraphError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.weights import WeightSource
from tests.strategies import WIDTH, built, evaluated, graph_of, programs, returned

aten = torch.ops.aten
X = torch.linspace(-2, 2, 3 * WIDTH).reshape(3, WIDTH)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(scope="module")
def layers() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers().eval()


@pytest.fixture
def graph(layers: TwoLayers) -> Graph:
    return capture_module(layers, (X,))


# ---- random graphs ------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(programs())
def test_a_graph_computes_what_its_program_computes(program) -> None:
    graph = built(program)
    # The same kernels in the same order: equal to the last bit but for the matrix product.
    torch.testing.assert_close(graph(X)["result"], evaluated(program, X), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(programs())
def test_finish_changes_no_value_and_is_idempotent(program) -> None:
    graph = built(program)
    before = graph(X)["result"]
    graph.finish()
    edits = graph.edits
    assert torch.equal(graph(X)["result"], before)
    assert graph.finish() == 0
    assert graph.edits == edits


@settings(max_examples=25, deadline=None)
@given(programs())
def test_finish_leaves_only_what_the_output_needs(program) -> None:
    graph = built(program)
    graph.finish()
    needed, front = set(), [graph.output]
    while front:
        node = front.pop()
        if node not in needed:
            needed.add(node)
            front += node.all_input_nodes
    assert set(graph.nodes) == needed | set(graph.inputs)
    held = {name for name, _ in graph.module.named_buffers()}
    assert held == {str(node.target) for node in graph.weight_nodes()}


@settings(max_examples=15, deadline=None)
@given(programs())
def test_a_copy_is_equal_and_independent(program) -> None:
    graph = built(program)
    expected = graph(X)["result"]
    twin = graph.copy()
    assert str(twin) == str(graph)
    twin.replace(twin.outputs[0], twin.call(aten.neg.default, twin.inputs[0], before=twin.output))
    for node in twin.weight_nodes():
        twin.set_weight(node, torch.zeros_like(twin.weight(node)))
    assert torch.equal(twin(X)["result"], -X)
    assert torch.equal(graph(X)["result"], expected)


# ---- looking ------------------------------------------------------------------------------


def test_looking_is_no_edit(graph) -> None:
    graph.finish()
    edits = graph.edits
    _ = graph.nodes, graph.inputs, graph.outputs, graph.blocks, str(graph), graph.weight_bytes()
    graph(X)
    graph.copy()
    assert graph.edits == edits


def test_an_operand_is_read_by_name_with_its_default(graph) -> None:
    linear = graph.find(aten.linear.default)[0]
    assert graph.operand(linear, "bias") is linear.args[2]
    add = graph.call(aten.add.Tensor, linear, linear, after=linear)
    assert graph.operand(add, "alpha") == 1
    with pytest.raises(GraphError, match=r"aten.add.Tensor has no argument 'beta'; it has self"):
        graph.operand(add, "beta")


# ---- edits --------------------------------------------------------------------------------


def test_every_edit_counts(graph) -> None:
    counts = [graph.edits]
    relu = graph.find(aten.relu.default)[0]
    new = graph.call(aten.tanh.default, relu.args[0], before=relu)
    counts.append(graph.edits)
    graph.replace(relu, new)
    counts.append(graph.edits)
    graph.erase([relu])
    counts.append(graph.edits)
    node = graph.weight_node("first.bias")
    graph.set_weight(node, torch.zeros(WIDTH))
    counts.append(graph.edits)
    graph.add_weight("extra", torch.zeros(2))
    counts.append(graph.edits)
    graph.finish()
    counts.append(graph.edits)
    assert counts == sorted(set(counts))


def test_an_edit_takes_effect_before_finish(graph, layers) -> None:
    relu = graph.find(aten.relu.default)[0]
    graph.replace(relu, graph.call(aten.tanh.default, relu.args[0], before=relu))
    with torch.no_grad():
        expected = layers.second(layers.first(X).tanh())
    assert torch.equal(graph(X), expected)


def test_a_call_that_the_operator_refuses_leaves_the_graph_alone(graph) -> None:
    graph.finish()
    text, edits = str(graph), graph.edits
    wrong = graph.weight_node("second.weight")
    with pytest.raises(RuntimeError) as caught:
        graph.call(aten.matmul.default, wrong, wrong, before=graph.output)
    assert "while adding aten.matmul.default to the graph" in caught.value.__notes__
    assert (str(graph), graph.edits) == (text, edits)


def test_a_new_node_is_placed_before_or_after_exactly_one(graph) -> None:
    x = graph.inputs[0]
    with pytest.raises(GraphError, match="either before= or after="):
        graph.call(aten.relu.default, x)
    with pytest.raises(GraphError, match="either before= or after="):
        graph.call(aten.relu.default, x, before=graph.output, after=x)


def test_replace_wants_the_same_dtype_and_number_of_dims(graph) -> None:
    relu = graph.find(aten.relu.default)[0]
    half = graph.call(aten.to.dtype, relu, torch.float16, after=relu)
    with pytest.raises(GraphError, match=r"float16, 2 dims\) can't replace"):
        graph.replace(relu, half)
    flat = graph.call(aten.reshape.default, relu, [-1], after=relu)
    with pytest.raises(GraphError, match=r"1 dims\) can't replace"):
        graph.replace(relu, flat)


def test_what_replaces_a_node_may_read_it(graph, layers) -> None:
    relu = graph.find(aten.relu.default)[0]
    graph.replace(relu, graph.call(aten.neg.default, relu, after=relu))
    graph.finish()
    with torch.no_grad():
        assert torch.equal(graph(X), layers.second(-layers.first(X).relu()))


def test_what_is_read_can_not_be_erased(graph) -> None:
    relu = graph.find(aten.relu.default)[0]
    with pytest.raises(GraphError, match="is still read by linear_1"):
        graph.erase([relu])


def test_an_operand_is_set_by_name(graph, layers) -> None:
    last = graph.find(aten.linear.default)[1]
    graph.set_operand(last, "bias", None)
    graph.finish()
    with torch.no_grad():
        expected = nn.functional.linear(layers.first(X).relu(), layers.second.weight)
    # With and without a bias two kernels may be used: rounding of float32.
    torch.testing.assert_close(graph(X), expected, rtol=1e-6, atol=1e-6)
    assert "second.bias" not in {str(node.target) for node in graph.weight_nodes()}


def test_an_input_that_nothing_reads_goes_with_its_name() -> None:
    graph = graph_of({"x": X, "y": X})
    first, second = graph.inputs
    shorter = dataclasses.replace(graph.signature, inputs=("x",))
    with pytest.raises(GraphError, match="input x is still read by output"):
        graph.remove_input(first, shorter)
    graph.remove_input(second, shorter)
    assert graph.signature.inputs == ("x",)
    assert torch.equal(graph(x=X)["result"], X)


def test_new_nodes_are_signed_by_the_author(graph) -> None:
    relu = graph.find(aten.relu.default)[0]
    with graph.author("fold-norms"):
        inner = graph.call(aten.relu.default, relu, after=relu)
    outer = graph.call(aten.relu.default, relu, after=relu)
    assert (inner.meta["author"], outer.meta["author"]) == ("fold-norms", "capture")


def test_a_failed_edit_can_be_taken_back(graph, layers) -> None:
    graph.finish()
    saved, text = graph.copy(), str(graph)
    graph.set_weight(graph.weight_node("first.weight"), torch.zeros(WIDTH, WIDTH))
    relu = graph.find(aten.relu.default)[0]
    graph.replace(relu, graph.call(aten.tanh.default, relu, before=relu.next))
    before = graph.edits
    graph.restore(saved)
    assert str(graph) == text
    assert graph.edits > before
    with torch.no_grad():
        assert torch.equal(graph(X), layers(X))


# ---- weights ------------------------------------------------------------------------------


def test_a_weight_is_replaced_and_never_written_into(graph, layers) -> None:
    before = layers.first.weight.clone()
    node = graph.weight_node("first.weight")
    assert graph.weight(node).data_ptr() == layers.first.weight.data_ptr()
    graph.set_weight(node, graph.weight(node) * 2)
    assert torch.equal(layers.first.weight, before)
    assert torch.equal(graph.weight("first.weight"), before * 2)


def test_a_replaced_weight_may_have_another_shape(graph) -> None:
    first, second = graph.weight_node("first.weight"), graph.weight_node("second.weight")
    graph.set_weight(first, torch.ones(5, WIDTH))
    graph.set_weight(graph.weight_node("first.bias"), torch.zeros(5))
    graph.set_weight(second, torch.ones(4, 5))
    graph.refresh()
    hidden = graph.find(aten.relu.default)[0].meta["val"]
    assert tuple(hidden.shape)[1] == 5
    assert graph(X).shape == (3, 4)


def test_a_weight_name_is_taken_once(graph) -> None:
    with pytest.raises(GraphError, match=r"'first.weight' exists already"):
        graph.add_weight("first.weight", torch.zeros(1))
    node = graph.add_weight("first.scale", torch.full((WIDTH,), 3.0))
    assert graph.weight(node).sum() == 3.0 * WIDTH


def test_unread_weights_leave_the_module(graph) -> None:
    graph.add_weight("extra.deep.name", torch.zeros(7))
    assert "extra.deep.name" in dict(graph.module.named_buffers())
    graph.finish()
    assert "extra.deep.name" not in dict(graph.module.named_buffers())


def test_a_tied_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, WIDTH)
            self.head = nn.Linear(WIDTH, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    graph = capture_module(Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    assert graph.weight_bytes() == 10 * WIDTH * 4
    assert len(graph.weight_nodes()) == 1


def test_unknown_weights_are_named(graph) -> None:
    with pytest.raises(GraphError, match=r"'third.weight'"):
        graph.weight_node("third.weight")
    with pytest.raises(GraphError, match=r"no weight called 'third.weight'"):
        graph.weight("third.weight")
    with pytest.raises(GraphError, match="is not a weight"):
        graph.weight(graph.inputs[0])


class Counting(WeightSource):
    """Reads weights from a dictionary and counts."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights
        self.reads: list[str] = []

    def names(self) -> frozenset[str]:
        return frozenset(self._weights)

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self._weights[name].clone()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]


def test_weights_without_data_are_read_when_they_are_needed(layers) -> None:
    loaded = {name: value.detach() for name, value in layers.state_dict().items()}
    with torch.device("meta"):
        hollow = TwoLayers()
    graph = capture_module(hollow, (torch.empty(3, WIDTH, device="meta"),))
    assert not graph.is_loaded("first.weight")
    with pytest.raises(GraphError, match=r"'first.weight' has no data"):
        graph.weight("first.weight")
    source = Counting(loaded)
    graph.source = source
    with torch.no_grad():
        assert torch.equal(graph(X), layers(X))
    assert sorted(source.reads) == sorted(loaded)
    assert not graph.is_loaded("first.weight")


def test_attention_and_dropout_of_an_unused_branch_are_dead() -> None:
    x = torch.zeros(2, 1, 3, 4)
    graph = graph_of({"x": x})
    source = graph.inputs[0]
    attention = aten.scaled_dot_product_attention.default
    used = graph.call(aten.relu.default, source, before=graph.output)
    graph.call(attention, source, source, source, before=graph.output)
    graph.call(aten.dropout.default, source, 0.5, False, before=graph.output)
    returned(graph, used)
    assert graph.find(attention, aten.dropout.default) == []


def test_random_dropout_is_not_dead() -> None:
    graph = graph_of({"x": X})
    graph.call(aten.dropout.default, graph.inputs[0], 0.5, True, before=graph.output)
    graph.finish()
    assert len(graph.find(aten.dropout.default)) == 1
