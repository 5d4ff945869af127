"""Made-up inputs: that they fit, that they differ, and what samples are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lamella.data import Samples
from lamella.errors import GraphError, PassError, SamplesError
from lamella.ir.capture import capture_module
from lamella.passes.probes import check_samples, probe_samples
from tests.unit.planted import network

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def test_token_ids_are_below_the_size_of_their_table():
    samples = probe_samples(network(), count=4)
    sizes = [tuple(batch["input_ids"].shape) for batch in samples]
    assert sizes[:2] == [(2, 7), (3, 12)]
    assert len(set(sizes)) == len(sizes)
    values = torch.cat([batch["input_ids"].flatten() for batch in samples])
    assert int(values.min()) >= 0
    # The table has 50 rows; a hundred draws from a smaller range would not reach this far.
    assert int(values.max()) in range(40, 50)


def test_the_seed_is_all_that_is_random():
    graph = network()
    torch.manual_seed(7)
    first = probe_samples(graph, seed=3).digest
    torch.manual_seed(8)
    assert probe_samples(graph, seed=3).digest == first
    assert probe_samples(graph, seed=4).digest != first


@pytest.mark.parametrize("family", ["opt", "t5", "clip", "wav2vec2", "pix2struct"])
def test_every_kind_of_input_is_made_up(captured, family: str):
    graph = captured(family)
    samples = probe_samples(graph)
    assert len(samples) == 2
    check_samples(samples, graph)
    for batch in samples:
        outputs = graph.run(batch.values())
        assert all(bool(torch.isfinite(o).all()) for o in outputs if isinstance(o, torch.Tensor))


def test_lengths_that_need_not_agree_differ(captured):
    batch = probe_samples(captured("t5"))[0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] != batch["decoder_input_ids"].shape[1]


def test_masks_have_padding_in_one_batch(captured):
    first, second = probe_samples(captured("opt"))
    assert bool((first["attention_mask"] == 1).all())
    assert second["attention_mask"][-1].tolist() == [1] * 10 + [0, 0]


def test_a_short_table_of_positions_limits_the_length():
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.places = nn.Embedding(8, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) + self.places(torch.arange(ids.shape[1]))

    graph = capture_module(Short().eval(), {"ids": torch.zeros(2, 6, dtype=torch.long)})
    lengths = {batch["ids"].shape[1] for batch in probe_samples(graph)}
    assert max(lengths) <= 8


def test_a_graph_that_runs_on_nothing_is_said_to():
    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float("nan")

    graph = capture_module(Never(), {"x": torch.ones(2, 3)})
    with pytest.raises(PassError, match=r"can't be checked on made-up inputs .*pass samples="):
        probe_samples(graph)


def test_a_graph_without_data_has_no_probes():
    graph = network()
    node = graph.weight_node("up.weight")
    graph.set_weight(node, graph.weight(node).to("meta"))
    with pytest.raises(GraphError, match=r"weight 'up\.weight' has no data"):
        probe_samples(graph)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_idss": IDS}, r"sample 1: unknown input 'input_idss'; did you mean 'input_ids'"),
        ({}, "sample 1: missing input 'input_ids'"),
        ({"input_ids": IDS.int()}, r"is torch\.int32, the model takes torch\.int64"),
        ({"input_ids": IDS[0]}, r"has 1 axes \(\[3\]\), the model takes 2"),
        (
            {"input_ids": [[1], [2]]},
            r"the inputs hold 2 tensors|is a list, the model takes a tensor",
        ),
    ],
    ids=str,
)
def test_samples_that_do_not_fit(batch: dict[str, Any], message: str):
    samples = Samples.of([{"input_ids": IDS}, batch])
    with pytest.raises(SamplesError, match=message):
        check_samples(samples, network())


def test_sizes_must_be_those_of_the_model(captured):
    llama, vit = captured("llama"), captured("vit")
    mask = torch.ones(2, 4, dtype=torch.long)
    uneven = Samples.of([{"input_ids": IDS, "attention_mask": mask}])
    with pytest.raises(SamplesError, match="has size 4 on axis 1, but 'input_ids' has 3 there"):
        check_samples(uneven, llama)
    with pytest.raises(SamplesError, match="has size 30 on axis 2, the model takes 32"):
        check_samples(Samples.of([{"pixel_values": torch.zeros(1, 3, 30, 32)}]), vit)
