"""Statistics of samples: against plain sums over what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import GraphError, SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.reducers import (
    Count,
    Gram,
    MaxAbs,
    Mean,
    MeanCosine,
    MeanSquare,
    Reducer,
    RoundingVariance,
    State,
    divergence,
)
from lamella.ir.runner import Request, run_outputs, run_requests, sweep_requests, token_mask
from lamella.ir.segments import program
from lamella.rewrite.canonicalize import canonicalize

aten = torch.ops.aten
Captured = Callable[[str], Graph]
Batches = list[dict[str, Tensor]]


@pytest.fixture
def padded(sample_inputs: Callable[..., dict[str, Tensor]]) -> Batches:
    """Two batches of four; the ends of some rows are padding."""
    batches = [sample_inputs("llama", 4, 9, seed) for seed in (0, 1)]
    for batch in batches:
        batch["attention_mask"][1, 5:] = 0
        batch["attention_mask"][3, 8:] = 0
    return batches


def values_of(graph: Graph, name: str, batches: Batches) -> Tensor:
    """The rows of a value that are no padding, from the fx interpreter of PyTorch."""
    rows: list[Tensor] = []
    for batch in batches:
        kept: dict[str, Tensor] = {}

        class Recording(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                result = super().run_node(n)
                if n.name == name:
                    kept[name] = result  # noqa: B023  (used within the loop)
                return result

        with torch.no_grad():
            Recording(graph.module).run(*graph.signature.flatten((), batch))
        rows.append(kept[name][batch["attention_mask"].bool()])
    return torch.cat(rows)


def linear_input(graph: Graph, place: int) -> str:
    return graph.find(aten.linear.default)[place].args[0].name


def test_reducers_give_what_plain_sums_over_unmasked_tokens_give(
    captured: Captured, padded: Batches
):
    graph = captured("llama")
    name = linear_input(graph, 3)
    rows = values_of(graph, name, padded).double()
    expected = {
        Mean(): rows.mean(0),
        MeanSquare(): rows.square().mean(0),
        MaxAbs(): rows.abs().amax(0),
        Gram(): rows.T @ rows / len(rows),
        Gram(double=True): rows.T @ rows / len(rows),
        Count(): torch.tensor(len(rows)),
    }
    got = run_requests(graph, padded, [Request.of(reducer, name) for reducer in expected])
    for reducer, value in expected.items():
        # The values themselves are float32; sums differ from float64 by a few units of 6e-8.
        torch.testing.assert_close(
            got[Request.of(reducer, name)].double(), value.double(), rtol=2e-6, atol=1e-7
        )


def test_results_do_not_depend_on_how_samples_are_batched(captured: Captured, padded: Batches):
    graph = captured("llama")
    blocks = graph.blocks
    requests = [
        Request.of(Gram(), linear_input(graph, 5)),
        Request.of(MeanCosine(), blocks[0].entry, blocks[0].exit),
        Request.of(MaxAbs(), linear_input(graph, 0)),
        Request.of(Mean(), blocks[-1].exit),
    ]
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for batch in padded for i in range(4)]
    together = run_requests(graph, padded, requests)
    apart = run_requests(graph, singles, requests)
    for request in requests:
        torch.testing.assert_close(together[request], apart[request], rtol=1e-6, atol=1e-6)


def test_requests_are_merged_and_the_samples_run_once(captured: Captured, padded: Batches):
    graph = captured("llama")
    calls: list[Mapping[str, Tensor]] = []

    def samples():
        for batch in padded:
            calls.append(batch)
            yield batch

    twice = [Request.of(Mean(), linear_input(graph, 0))] * 2
    assert len(run_requests(graph, samples(), twice)) == 1
    assert len(calls) == len(padded)
    assert run_requests(graph, samples(), []) == {}


def test_cosine_and_divergence_follow_their_definitions():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2.0, torch.sin(x)

    graph = capture_module(Two(), (torch.randn(2, 3, 5),))
    first, second = graph.outputs
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    cosine = Request.of(MeanCosine(), first, second)
    got = run_requests(graph, [{graph.signature.inputs[0]: x}], [cosine])
    a, b = (2 * x).double().flatten(0, 1), torch.sin(x).double().flatten(0, 1)
    cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    p, q = a.softmax(1), b.softmax(1)
    # Float32 inside, float64 here.
    torch.testing.assert_close(got[cosine], cosines.mean(), rtol=1e-6, atol=1e-6)
    wanted = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(a.float(), b.float()), wanted, rtol=1e-6, atol=1e-6)


def test_rounding_variance_is_the_mean_squared_step_over_twelve():
    rows = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    reducer = RoundingVariance(32)
    state: State | None = None
    for part in rows.split(20):
        state = reducer.add(state, part)
    assert state is not None
    got = reducer.result(state)
    expected = torch.empty(70, dtype=torch.float64)
    for start in (0, 32, 64):
        steps = rows[:, start : start + 32].double().abs().amax(1) / 127
        expected[start : start + 32] = steps.square().mean() / 12
    # Steps are float32.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_a_reducer_of_the_user_is_a_small_class(captured: Captured, padded: Batches):
    @dataclass(frozen=True)
    class Positive(Reducer):
        def add(self, state: State | None, *values: Tensor) -> State:
            count = (values[0] > 0).sum(0)
            return (count if state is None else state[0] + count,)

        def result(self, state: State) -> Tensor:
            return state[0]

    graph = captured("llama")
    name = linear_input(graph, 0)
    request = Request.of(Positive(), name)
    got = run_requests(graph, padded, [request])[request]
    assert torch.equal(got, (values_of(graph, name, padded) > 0).sum(0))


def test_images_have_their_channels_in_front(
    captured: Captured, sample_inputs: Callable[..., dict[str, Tensor]]
):
    graph = captured("resnet")
    node = graph.find(aten.conv2d.default)[0]
    batch = sample_inputs("resnet", 2, 0, 0)
    request = Request.of(Mean(), node, channel_axis=1)
    got = run_requests(graph, [batch], [request])[request]
    with torch.no_grad():
        weight = graph.weight(graph.operand(node, "weight"))
        value = aten.conv2d.default(batch["pixel_values"], weight, *node.args[2:])
    # The mean of a few hundred float32 values.
    torch.testing.assert_close(got.float(), value.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_rows_below_each_other_and_heads_side_by_side_know_their_tokens():
    class Shapes(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
            y = x * attention_mask[..., None]
            return torch.exp(y.flatten(0, 1)), torch.exp(y.unflatten(2, (2, 3)))

    inputs = {"x": torch.randn(2, 5, 6), "attention_mask": torch.ones(2, 5)}
    graph = capture_module(Shapes(), inputs)
    canonicalize(graph)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    rows, heads = graph.outputs
    assert {token_mask(graph, node).name for node in (rows, heads)} == {"attention_mask"}
    requests = [Request.of(Mean(), rows), Request.of(Mean(), heads)]
    got = run_requests(graph, [{"x": x, "attention_mask": mask}], requests)
    kept = torch.exp(x[mask.bool()].double())
    # Float32 exponentials against float64.
    torch.testing.assert_close(got[requests[0]], kept.mean(0), rtol=1e-6, atol=0)
    by_head = kept.reshape(-1, 2, 3).mean((0, 1))
    torch.testing.assert_close(got[requests[1]], by_head, rtol=1e-6, atol=0)


def test_outputs_are_those_of_the_graph(captured: Captured, padded: Batches):
    graph = captured("llama")
    outputs = run_outputs(graph, padded)
    for batch, got in zip(padded, outputs, strict=True):
        expected = graph.run(graph.signature.flatten((), batch))
        assert torch.equal(got[0], expected[0])


def test_a_program_is_cut_behind_every_block_and_frees_what_nothing_reads(
    captured: Captured, padded: Batches
):
    graph = captured("llama")
    running = program(graph, [graph.outputs[0]])
    assert len(running.segments) == len(graph.blocks) + 1
    states = [running.start(padded[0])]
    alive: list[int] = []
    for _ in running.sweep(states):
        tensors = [value for value in states[0].values() if isinstance(value, Tensor)]
        alive.append(sum(value.numel() for value in tensors))
    # The stream, the mask and the rotary tables; not the depth of the model.
    assert max(alive[:-1]) == alive[0]
    assert set(states[0]) == {graph.outputs[0]}


def test_weights_of_a_segment_are_read_once(captured: Captured, padded: Batches):
    graph = captured("llama")
    reads: list[str] = []
    original = graph.weight

    def counting(node: torch.fx.Node | str) -> Tensor:
        reads.append(str(node))
        return original(node)

    graph.weight = counting  # type: ignore[method-assign]
    run_outputs(graph, padded)
    assert len(reads) == len(set(reads))


def test_statistics_of_a_segment_are_given_when_it_is_done(captured: Captured, padded: Batches):
    graph = captured("llama")
    requests = [Request.of(Gram(), linear_input(graph, place)) for place in (0, 8, 15)]
    pieces = [set(found) for found in sweep_requests(graph, padded, requests) if found]
    assert [len(piece) for piece in pieces] == [1, 1, 1]


def test_bad_requests_say_what_is_wrong(captured: Captured, padded: Batches):
    graph = captured("llama")
    name = linear_input(graph, 0)
    with pytest.raises(GraphError, match=r"no node called.*did you mean"):
        run_requests(graph, padded, [Request.of(Mean(), name + "x")])
    with pytest.raises(GraphError, match="is not an activation"):
        run_requests(graph, padded, [Request.of(Mean(), graph.weight_nodes()[0])])
    with pytest.raises(ValueError, match="reads 2 values, got 1"):
        Request.of(MeanCosine(), name)
    with pytest.raises(SamplesError, match="no samples"):
        run_requests(graph, [], [Request.of(Mean(), name)])


def test_samples_without_a_single_token_are_an_error(captured: Captured, padded: Batches):
    graph = captured("llama")
    empty = {**padded[0], "attention_mask": torch.zeros_like(padded[0]["attention_mask"])}
    with pytest.raises(SamplesError, match="every token is masked"):
        run_requests(graph, [empty], [Request.of(Mean(), linear_input(graph, 3))])
