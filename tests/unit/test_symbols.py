"""Symbols have readable names, distinct ones."""

from __future__ import annotations

import sympy
import torch
from torch import nn

from lamella.ir.capture import capture_module
from lamella.ir.symbols import named, shape_of, symbol_names


class Sum(nn.Module):
    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return sum(value.sum() for value in inputs.values())


class Pair(nn.Module):
    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.sum(1) + decoder_input_ids.sum(1)


class Shapes(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.cat((a.reshape(-1), b.reshape(-1), c.reshape(-1)))


def names_of(graph) -> list[tuple[str, ...]]:
    names = symbol_names(graph.nodes)
    return [tuple(named(size, names) for size in shape_of(node)) for node in graph.inputs]


def test_an_axis_gives_its_name_to_its_symbol() -> None:
    graph = capture_module(Pair(), (torch.zeros(2, 7), torch.zeros(2, 5)))
    # The two batches are added, so they are one symbol.
    assert names_of(graph) == [("batch", "sequence"), ("batch", "decoder_sequence")]


def test_a_second_symbol_of_a_name_is_numbered() -> None:
    inputs = (torch.zeros(2, 7), torch.zeros(3, 5, 4), torch.zeros(4, 3, 8, 8))
    names = names_of(capture_module(Shapes(), inputs))
    assert names == [
        ("batch", "sequence"),
        ("batch_2", "sequence_2", "features"),
        ("batch_3", "3", "8", "8"),
    ]


def test_fixed_sizes_are_numbers() -> None:
    graph = capture_module(Pair(), (torch.zeros(2, 7), torch.zeros(2, 5)), dynamic=False)
    assert symbol_names(graph.nodes) == {}
    assert [shape_of(node) for node in graph.inputs] == [(2, 7), (2, 5)]


def test_expressions_are_written_in_names() -> None:
    graph = capture_module(Shapes(), (torch.zeros(2, 7), torch.zeros(3, 5, 4), torch.zeros(1)))
    names = symbol_names(graph.nodes)
    (size,) = shape_of(graph.outputs[0])
    assert isinstance(size, sympy.Expr)
    text = named(size, names)
    values = {"batch": 2, "sequence": 7, "batch_2": 3, "sequence_2": 5, "features": 4}
    symbols = {name: sympy.Symbol(name) for name in values}
    assert sympy.sympify(text, locals=symbols).subs(values) == 2 * 7 + 3 * 5 * 4 + 1


def test_every_symbol_of_every_shape_has_a_name(captured) -> None:
    graph = captured("t5")
    names = symbol_names(graph.nodes)
    assert len(set(names.values())) == len(names)
    used = {
        symbol
        for node in graph.nodes
        for size in shape_of(node)
        if not isinstance(size, int)
        for symbol in size.free_symbols
    }
    assert used <= set(names)


def test_what_is_no_tensor_has_no_shape(captured) -> None:
    graph = captured("bert")
    assert shape_of(graph.output) == ()
