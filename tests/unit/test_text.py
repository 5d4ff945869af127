"""The text of a graph is readable and stable, and its diff is small."""

from __future__ import annotations

import difflib
import re
import textwrap

import torch
from hypothesis import example, given, settings

from lamella.ir.bypass import bypass
from tests.strategies import WIDTH, built, graph_of, programs, returned

aten = torch.ops.aten


def changed(before, after) -> list[str]:
    """The lines of two texts that are new or gone."""
    lines = difflib.unified_diff(*(str(graph).splitlines() for graph in (before, after)), n=0)
    return [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]


def test_the_text_of_a_small_graph() -> None:
    graph = graph_of({"x": torch.zeros(3, WIDTH)})
    x = graph.inputs[0]
    weight = graph.add_weight("layer.weight", torch.eye(WIDTH))
    y = graph.call(aten.linear.default, x, weight, before=graph.output)
    y = graph.call(aten.add.Tensor, y, 2.0, before=graph.output)
    y = graph.call(aten.sum.dim_IntList, y, [1], True, dtype=torch.float64, before=graph.output)
    parts = graph.call(aten.split_with_sizes.default, x, [3, 5], 1, before=graph.output)
    returned(graph, y)
    expected = """\
        graph: 3 operators, 1 weights, 0.00 MB
          %x: f32[3, 8]
        before the blocks
          %linear: f32[3, 8] = aten.linear(%x, weight=@layer.weight)
          %add: f32[3, 8] = aten.add.Tensor(%linear, other=2.0)
          %sum: f64[3, 1] = aten.sum.dim_IntList(%add, dim=[1], keepdim=True, dtype=f64)
        return result=%sum
        """
    assert str(graph) == textwrap.dedent(expected)
    assert parts not in graph.nodes


def test_several_results_and_integers_have_types(captured) -> None:
    graph = graph_of({"x": torch.zeros(3, WIDTH)})
    graph.call(aten.split_with_sizes.default, graph.inputs[0], [3, 5], 1, before=graph.output)
    assert "%split_with_sizes: (f32[3, 3], f32[3, 5]) = " in str(graph)
    assert re.search(r"%sym_size: (batch|sequence) = aten.sym_size.int\(", str(captured("t5")))


def test_blocks_are_headings(captured) -> None:
    text = str(captured("t5"))
    assert "\nencoder block encoder.0 encoder.block.0\n  attention\n" in text
    assert "\ndecoder block decoder.2 decoder.block.2\n  attention\n" in text
    assert "%decoder.1.cross-attention.scaled_dot_product_attention: f32[batch, 4, " in text


def test_dropping_a_sublayer_changes_its_own_lines_only(captured) -> None:
    graph = captured("llama")
    after = graph.copy()
    dropped = after.blocks[1].sublayers[1]
    operators = sum(node.op == "call_function" for node in dropped.nodes)
    bypass(after, [dropped])
    after.finish()
    lines = changed(graph, after)
    gone = [line for line in lines if line.startswith("-")]
    # Its operators, the add, its heading, the title, and the two readers of the stream.
    assert len(gone) == operators + 5
    assert len(lines) - len(gone) == 3


def test_dropping_a_block_renames_no_other(captured) -> None:
    graph = captured("llama")
    after = graph.copy()
    bypass(after, after.blocks[0].sublayers)
    after.finish()
    lines = changed(graph, after)
    assert [line for line in lines if "2.mlp" in line] == []
    # The title, and the two readers of the stream that began behind block 0.
    assert len([line for line in lines if line.startswith("+")]) == 3


def test_equal_graphs_have_equal_texts(captured) -> None:
    graph = captured("gpt2")
    assert str(graph) == str(graph.copy())


def test_the_text_does_not_depend_on_names_of_nodes(captured) -> None:
    graph = captured("bert")
    text = str(graph)
    for number, node in enumerate(graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{number}"
    assert str(graph) == text


@settings(max_examples=25, deadline=None)
@given(programs())
@example([("linear", 0, 0), ("add", 0, 1), ("relu", 0, 0), ("add", 0, 1)]).via("a branch twice")
def test_every_operator_has_a_line_and_every_name_a_definition(program) -> None:
    graph = built(program)
    text = str(graph)
    defined = re.findall(r"^ *%(\S+): ", text, flags=re.MULTILINE)
    assert len(defined) == len(set(defined))
    assert len(defined) == sum(node.op in {"call_function", "placeholder"} for node in graph.nodes)
    used = set(re.findall(r"[(\[, =]%([^\s,:)\]]+)", text))
    assert used <= set(defined)
    places = {name: place for place, name in enumerate(defined)}
    for line in text.splitlines():
        found = re.match(r" *%(\S+): .* = (.*)", line)
        if found:
            sources = re.findall(r"%([^\s,)\]]+)", found.group(2))
            assert all(places[source] < places[found.group(1)] for source in sources)
