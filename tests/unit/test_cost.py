"""Reports of cost: sums, blocks, caches and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.analyses.cost import Cost, cost_of
from lamella.passes.base import Analyses

Captured = Callable[[str], Graph]


def test_blocks_and_operations_add_up(captured: Captured):
    graph = captured("llama")
    report = Analyses(graph).get(Cost())
    at = report.at(batch=2, sequence=7)
    assert at.sizes == {"batch": 2, "sequence": 7}
    assert at.total.flops == sum(one.flops for one in at.per_operation.values())
    inside = {node.name for block in graph.blocks for node in block.nodes}
    for name in ("flops", "stored_bytes", "read_bytes", "cache_bytes"):
        blocks = sum(getattr(one, name) for one in at.per_block.values())
        operations = at.per_operation.items()
        assert blocks == sum(getattr(one, name) for node, one in operations if node in inside)
    first, *others = at.per_block.values()
    assert all(other == first for other in others)


def test_a_weight_is_stored_once_and_read_as_often_as_it_is_used():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    graph = capture_module(Tied(), {"ids": torch.zeros(2, 3, dtype=torch.long)})
    total = cost_of(graph).at(batch=5, sequence=6).total
    assert total.stored_bytes == 4 * 44
    # The head reads all of it, the embedding one row for each of 30 tokens.
    assert total.weight_bytes == 4 * 44 + 30 * 16


def test_stored_bytes_are_those_of_the_graph(family_graph: Graph):
    read = {user for node in family_graph.weight_nodes() for user in node.users}
    direct = {node for user in read for node in user.all_input_nodes if node.op == "get_attr"}
    report = cost_of(family_graph)
    assert direct == set(family_graph.weight_nodes())
    assert report.total.stored_bytes == family_graph.weight_bytes()


@pytest.fixture(params=["gpt2", "t5", "clip", "mixtral", "resnet"])
def family_graph(request: pytest.FixtureRequest, captured: Captured) -> Graph:
    return captured(request.param)


@pytest.mark.parametrize(
    ("family", "values_per_token"),
    [
        # 3 blocks x (keys + values) x heads of keys x head_dim.
        ("llama", 3 * 2 * 2 * 8),
        ("gemma2", 3 * 2 * 2 * 8),
        ("gpt2", 3 * 2 * 4 * 8),
        ("bert", 0),
        ("deberta-v2", 0),
        ("modernbert", 0),
    ],
)
def test_the_cache_is_that_of_causal_self_attention(
    family: str, values_per_token: int, captured: Captured
):
    report = cost_of(captured(family))
    assert report.at(batch=3, sequence=11).total.cache_bytes == 3 * 11 * 4 * values_per_token


def test_a_decoder_with_cross_attention_caches_only_its_own_tokens(captured: Captured):
    report = cost_of(captured("t5"))
    numbers = report.at(batch=2, sequence=50, decoder_sequence=5)
    assert numbers.total.cache_bytes == 3 * 2 * 4 * 8 * 2 * 5 * 4


def test_the_state_of_a_scan_does_not_grow_with_the_sequence(captured: Captured):
    report = cost_of(captured("mamba"))
    short, long = (report.at(batch=1, sequence=s).total.cache_bytes for s in (7, 70))
    assert short == long > 0


def test_peak_memory_follows_the_lifetimes_by_hand():
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = torch.exp(x)  # x and a: 2
            b = torch.cat((a, a), 1)  # a and b: 1 + 2, x is gone
            c = b.reshape(-1)  # a view: nothing new
            return torch.exp(c)  # b and the result: 2 + 2

    graph = capture_module(Chain(), (torch.randn(2, 4),), dynamic=False)
    assert cost_of(graph).at().peak_activation_bytes == 4 * 8 * 4


def test_memory_of_a_deep_model_is_that_of_one_block(captured: Captured):
    report = cost_of(captured("llama"))
    at = report.at(batch=1, sequence=64)
    assert at.peak_activation_bytes < at.total.written_bytes / 3


def test_sizes_are_checked_and_fall_back_to_their_plain_name(captured: Captured):
    report = cost_of(captured("t5"))
    assert report.symbols == ("batch", "sequence", "decoder_sequence")
    both = report.at(batch=1, sequence=9).sizes
    assert both == {"batch": 1, "sequence": 9, "decoder_sequence": 9}
    with pytest.raises(ValueError, match="unknown size length: the model has batch, sequence"):
        report.at(batch=1, length=9)
    with pytest.raises(ValueError, match="at least 1 for sequence"):
        report.at(batch=1)
    with pytest.raises(ValueError, match="at least 1 for batch"):
        report.at(batch=0, sequence=4)


def test_two_batches_of_different_size_stay_apart(captured: Captured):
    # The family has two texts and three images.
    report = cost_of(captured("clip"))
    batches = [name for name in report.symbols if name.startswith("batch")]
    assert len(batches) == 2


def test_dropping_work_lowers_the_cost(captured: Captured):
    graph = captured("llama")
    before = cost_of(graph).at(batch=1, sequence=8).total
    block = graph.blocks[1]
    graph.replace(block.exit, block.entry)
    graph.finish()
    after = cost_of(graph).at(batch=1, sequence=8).total
    assert before.flops > after.flops
    assert before.stored_bytes > after.stored_bytes
    assert len(graph.find(aten.scaled_dot_product_attention.default)) == 2
