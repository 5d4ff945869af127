"""`quantize-weights` with methods that look at inputs: the chain, its report, and its files."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import lamella
from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format, quantize
from lamella.ir.segments import program
from lamella.ir.stored_plan import stored_plan
from lamella.passes.base import Analyses
from lamella.passes.rounding.gptq import Gptq
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.tokens import LEAST, concentration
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from tests.meta.source import ROOT
from tests.unit.killed_chain import Block

WIDTH, BLOCKS = 32, 3
OFF: dict[str, Any] = {"min_size": 0, "int8_activations": False}


@functools.cache
def _captured() -> tuple[Graph, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(WIDTH) for _ in range(BLOCKS))).eval()
    return lamella.capture(model, {"input": torch.randn(2, 5, WIDTH)}), model


def mlp() -> Graph:
    return _captured()[0].copy()


def samples(count: int = 4, tokens: int = 48) -> Samples:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    draws = (torch.randn(2, tokens, WIDTH, generator=generator) for _ in range(count))
    return Samples.of([{"input": draw @ mix} for draw in draws])


def run(graph: Graph, data: Samples | None, *, strict: bool = False, **options: Any) -> list[str]:
    analyses = Analyses(graph, data, strict=strict)
    QuantizeWeights(**{**OFF, **options}).run(graph, analyses)
    graph.finish()
    return list(analyses.take_remarks())


def weights_of(graph: Graph) -> dict[str, Tensor]:
    return {str(node.target): graph.weight(node) for node in graph.weight_nodes()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_see_what_the_rounded_layers_before_them_give(sequential):
    graph, data = mlp(), samples()
    run(graph, data, bits=3, method="gptq", sequential=sequential)
    format = Format(3, 32)
    streams = [sample["input"] for sample in data]
    with torch.no_grad():
        for index, block in enumerate(_captured()[1]):
            inner = []
            exact = [block.norm(x) for x in streams]
            up = rounded(exact, block.up.weight, format)
            for x in exact:
                weight = up if sequential else block.up.weight
                inner.append(nn.functional.silu(nn.functional.linear(x, weight, block.up.bias)))
            down = rounded(inner, block.down.weight, format)
            for name, want in (("up", up), ("down", down)):
                stored = graph.weight(f"{index}.{name}.weight_packed")
                node = next(
                    n
                    for n in graph.find(lam.linear_nbits.default)
                    if str(graph.operand(n, "packed").target) == f"{index}.{name}.weight_packed"
                )
                assert stored.dtype == torch.uint8
                got = lam.linear_nbits(
                    torch.eye(want.shape[1]),
                    stored,
                    graph.weight(f"{index}.{name}.weight_scales"),
                    None,
                    None,
                    *node.args[5:7],
                    False,
                ).t()
                # The same sums in the same order: the codes are the same.
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
            weight = down if sequential else block.down.weight
            streams = [
                x + nn.functional.linear(y, weight, block.down.bias)
                for x, y in zip(streams, inner, strict=True)
            ]


def rounded(inputs: list[Tensor], weight: Tensor, format: Format) -> Tensor:
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    count = sum(map(len, rows))
    gram = InputGram(sum(one.t() @ one for one in rows) / count, count)
    return Gptq().round(weight.detach(), format, gram).value()


def test_the_output_is_closer_than_with_rounding_to_nearest():
    data = samples(8)
    errors = {}
    for method in ("rtn", "gptq", "quantease", "flexround"):
        graph = mlp()
        options = {"steps": 60} if method == "flexround" else {}
        run(graph, None if method == "rtn" else data, bits=3, method=method, **options)
        inputs = samples(1, tokens=50)[0]
        want = mlp()(**inputs)
        errors[method] = float((graph(**inputs) - want).norm() / want.norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["quantease"] < errors["gptq"]
    assert errors["flexround"] < 0.9 * errors["rtn"]


def test_the_plan_of_the_graph_names_the_method():
    graph = mlp()
    run(graph, samples(), bits=4, method="quantease")
    plan = stored_plan(graph)
    assert {entry.quantizer for entry in plan.entries.values()} == {"quantease"}
    assert len(plan.entries) == 2 * BLOCKS
    plain = mlp()
    run(plain, None, bits=4)
    assert {entry.quantizer for entry in stored_plan(plain).entries.values()} == {"rtn"}


def test_learning_lowers_the_loss_of_blocks():
    (note,) = [n for n in run(mlp(), samples(), bits=2, method="flexround") if "learning" in n]
    first, last = (float(note.split(word)[1].split()[0]) for word in ("from ", " to "))
    assert last < 0.8 * first


def test_pb_llm_stays_dense_and_says_its_bytes():
    graph = mlp()
    notes = " ".join(run(graph, samples(), bits=8, method="pb-llm", salient=0.125))
    assert not graph.find(lam.linear_nbits.default)
    # A bit map, an eighth of 8 bits and the rest of one, and three float16 per block of 32.
    each = (1 + 0.125 * 8 + 0.875) / 8 + 3 * 2 / 32
    size = round(each * BLOCKS * 2 * 2 * WIDTH * WIDTH)
    assert f"a file of their codes would have {size} bytes" in notes
    assert not same(weights_of(graph), weights_of(mlp()))


def test_exact_columns_are_a_second_layer():
    graph, data = mlp(), samples()
    run(graph, data, bits=2, method="quantease", outliers=0.07)
    assert len(graph.find(aten.index_select.default)) == 2 * BLOCKS
    assert {graph.weight(n).shape[-1] for n in graph.weight_nodes() if "exact" in str(n)} == {2, 4}
    for backend in ("eager", "onnxruntime"):
        got = lamella.lower(graph, backend)(**data[0])
        # Without rounded activations kernels differ in the order of sums only.
        torch.testing.assert_close(got, graph(**data[0]), rtol=1e-4, atol=1e-4)
    plain = mlp()
    run(plain, data, bits=2, method="quantease")
    want = mlp()(**data[0])
    assert (graph(**data[0]) - want).norm() < (plain(**data[0]) - want).norm()


def test_embeddings_and_experts_are_rounded_to_nearest_with_the_reason(captured, sample_inputs):
    graph = captured("qwen3_moe")
    data = Samples.of([sample_inputs("qwen3_moe", seed=seed) for seed in range(3)])
    notes = " ".join(run(graph, data, bits=4, method="gptq"))
    assert "because only embeddings read them: model.embed_tokens.weight" in notes
    assert "experts.gate_up_proj (3 axes in lamella.grouped_linear" in notes
    table = quantize(captured("qwen3_moe").weight("model.embed_tokens.weight"), Format(4))
    assert torch.equal(graph.weight("model.embed_tokens.weight_packed"), table.packed)
    graph = captured("gpt2")
    data = Samples.of([sample_inputs("gpt2", seed=seed) for seed in range(3)])
    notes = " ".join(run(graph, data, bits=4, method="gptq"))
    assert "because an embedding reads them too: transformer.wte.weight" in notes


def routed(graph: Graph, data: Samples, layer: Node) -> list[Tensor]:
    """The rows that each expert of a layer multiplies, collected one by one."""
    stops_of, input_of = graph.operand(layer, "offsets"), graph.operand(layer, "input")
    count, _, width = graph.operand(layer, "weight").meta["val"].shape
    rows: list[list[Tensor]] = [[] for _ in range(count)]

    def watch(node: Node, values: dict[Node, Any]) -> None:
        if node is layer:
            stops = values[stops_of].tolist()
            for place, row in enumerate(values[input_of]):
                expert = next((e for e, stop in enumerate(stops) if place < stop), None)
                if expert is not None:
                    rows[expert].append(row)

    running = program(graph, [layer])
    for _ in running.sweep([running.start(sample) for sample in data], watch):
        pass
    return [torch.stack(some) if some else torch.empty(0, int(width)) for some in rows]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_rounded_for_the_tokens_that_are_routed_to_them(
    family, captured, sample_inputs
):
    data = Samples.of([sample_inputs(family, seed=seed) for seed in range(2)])
    before, graph = captured(family), captured(family)
    options = {"bits": 3, "min_size": 1 << 30, "method": "gptq", "experts": True}
    notes = " ".join(run(graph, data, **options))
    layers = graph.find(lam.grouped_linear.default)
    assert len(layers) > 2
    told, size = 0, 0
    for layer in layers:
        count, out, width = graph.operand(layer, "weight").meta["val"].shape
        # Codes of 3 bits are held in 4, 32 of them beside a float16.
        size += count * out * -(-width // 32) * (16 + 2)
        name = str(graph.operand(layer, "weight").target)
        # The rounded graph itself gives the inputs that the layers behind rounded ones see.
        for expert, rows in enumerate(routed(graph, data, layer)):
            weight = before.weight(name)[expert]
            inputs = InputGram(rows.t() @ rows / max(len(rows), 1), len(rows))
            want = quantize(weight, Format(3)).dequantized()
            if len(rows):
                want = Gptq().round(weight, Format(3), inputs).value()
            # The same rows in sums of another order: codes at a tie may differ.
            same = torch.isclose(graph.weight(name)[expert], want, rtol=1e-3, atol=1e-6)
            assert same.float().mean() > 0.97
            if len(rows) < width:
                told += 1
                # A list names the first twelve.
                assert told > 12 or f"{name}[{expert}] ({len(rows)} of {width})" in notes
    assert told
    assert f"are routed to {told} experts" in notes
    assert f"would have {size} bytes" in notes
    with pytest.raises(PassError, match="too few tokens are routed to"):
        run(captured(family), data, strict=True, **options)


def test_experts_to_nearest_need_no_samples(captured):
    before, graph = captured("qwen3_moe"), captured("qwen3_moe")
    run(graph, None, bits=4, experts=True)
    for layer in graph.find(lam.grouped_linear.default):
        name = str(graph.operand(layer, "weight").target)
        want = quantize(before.weight(name), Format(4)).dequantized()
        assert torch.equal(graph.weight(name), want)
    assert "finds no experts" in " ".join(run(mlp(), None, bits=4, experts=True))


@pytest.mark.parametrize("tokens", ["attention", "gradient"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_may_count_differently(tokens, family, captured, sample_inputs):
    data = Samples.of([sample_inputs(family, seed=seed) for seed in range(3)])
    graph, plain = captured(family), captured(family)
    notes = " ".join(run(graph, data, bits=3, method="gptq", tokens=tokens))
    run(plain, data, bits=3, method="gptq")
    assert not same(weights_of(graph), weights_of(plain))
    alike = notes.partition("tokens count alike")[2].split(";")[0]
    assert alike.count("weight") <= len(graph.find(lam.linear_nbits.default)) / 2


def test_concentration_is_the_attention_that_tokens_get():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    got = concentration({"query": query, "key": key, "is_causal": True, "attn_mask": None})
    want = torch.zeros(2, 5)
    for b in range(2):
        for h in range(4):
            for q in range(5):
                logits = [float(query[b, h, q] @ key[b, h // 2, k]) / 8**0.5 for k in range(q + 1)]
                want[b, : q + 1] += torch.tensor(logits).softmax(0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # Every query of every head hands out 1.
    torch.testing.assert_close(got.sum(1), torch.full((2,), 20.0), rtol=1e-5, atol=0)
    assert 0 < LEAST < 1


def test_too_few_tokens_are_told_with_the_number_needed():
    few = samples(1, tokens=10)
    (note,) = [n for n in run(mlp(), few, bits=4, method="gptq") if "too few" in n]
    assert "too few tokens for the Gram matrix of 6 weights" in note
    assert "hold 20, 64 are needed" in note
    with pytest.raises(PassError, match="too few tokens"):
        run(mlp(), few, bits=4, method="gptq", strict=True)


def test_a_matrix_without_a_factor_is_told(monkeypatch):
    real = torch.linalg.cholesky_ex

    def failing(matrix: Tensor) -> Any:
        found = real(matrix)
        broken = matrix.shape[0] == WIDTH
        return found.L, torch.tensor(1) if broken else found.info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    graph = mlp()
    notes = " ".join(run(graph, samples(), bits=4, method="gptq"))
    assert "because their Gram matrix has no factor: 0.up.weight, 1.up.weight" in notes
    want = quantize(mlp().weight("0.up.weight"), Format(4))
    assert torch.equal(graph.weight("0.up.weight_packed"), want.packed)
    with pytest.raises(PassError, match="has no factor"):
        run(mlp(), samples(), bits=4, method="gptq", strict=True)


def test_more_damping_is_told(monkeypatch):
    real = torch.linalg.cholesky_ex
    seen: list[int] = []

    def once(matrix: Tensor) -> Any:
        found = real(matrix)
        seen.append(matrix.shape[0])
        return found.L, torch.tensor(1) if len(seen) == 1 else found.info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", once)
    notes = " ".join(run(mlp(), samples(), bits=4, method="gptq"))
    assert "singular with a damping of 0.1, 1 was needed: 0.up.weight" in notes


def overflowing() -> Graph:
    """A graph whose second norm gives more than float32 holds."""
    graph = mlp()
    node = graph.weight_node("1.norm.weight")
    graph.set_weight(node, graph.weight(node) * float("inf"))
    return graph


@pytest.mark.parametrize("method", ["gptq", "quantease", "pb-llm", "flexround"])
def test_samples_that_overflow_name_the_layer(method):
    options = {"bits": 8 if method == "pb-llm" else 4, "method": method}
    with pytest.raises(SamplesError, match=r"1\.up\.weight.* NaN or infinite"):
        run(overflowing(), samples(), **options)


def test_samples_that_overflow_leave_no_importance():
    with pytest.raises(PassError, match=r"'1\.up\.weight' can't be quantized: importance holds"):
        run(overflowing(), samples(), bits=4, by_inputs=True)


@pytest.mark.parametrize("method", ["gptq", "quantease", "pb-llm", "flexround"])
def test_every_method_with_samples_says_that_there_are_none(method):
    options = {"bits": 8 if method == "pb-llm" else 4, "method": method}
    with pytest.raises(SamplesError, match=f"method={method} .* pass samples="):
        run(mlp(), None, **options)


def test_values_that_overflow_name_the_node():
    graph = mlp()
    node = graph.weight_node("1.norm.weight")
    graph.set_weight(node, graph.weight(node) * 1e30)
    with pytest.raises(SamplesError, match=r"the input of 1.up.weight, is so large .*overflow"):
        run(graph, samples(), bits=4, method="gptq")
    graph = mlp()
    node = graph.weight_node("0.norm.weight")
    graph.set_weight(node, graph.weight(node) * float("inf"))
    with pytest.raises(SamplesError, match=r"layer_norm.*0.up.weight, holds \d+ NaN or infinite"):
        run(graph, samples(), bits=4, method="gptq")


@pytest.mark.parametrize("method", ["gptq", "flexround"])
def test_a_broken_weight_is_named(method):
    graph = mlp()
    node = graph.weight_node("1.down.weight")
    broken = graph.weight(node).clone()
    broken[2, 3] = float("nan")
    graph.set_weight(node, broken)
    with pytest.raises(PassError, match=r"'1.down.weight' can't be quantized: 1 entries"):
        run(graph, samples(), bits=4, method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gtpq"}, "method must be one of .*did you mean 'gptq'"),
        ({"sweeps": 5}, "method=rtn takes no option sweeps; it is one of quantease"),
        ({"method": "gptq", "outliers": 0.01}, "takes no option outliers"),
        ({"method": "gptq", "by_inputs": True}, "takes no option by_inputs"),
        ({"method": "gptq", "damping": -1.0}, r"damping must be in \[0, 1\]"),
        ({"method": "gptq", "tokens": "all"}, "tokens must be one of uniform"),
        ({"method": "quantease", "sweeps": 0}, "sweeps must be in"),
        ({"method": "gptq", "refits": -1}, r"refits must be in \[0, 100\]"),
        ({"refits": 1}, "method=rtn takes no option refits; it is one of gptq, quantease"),
        ({"method": "flexround", "experts": True}, "method=flexround takes no option experts"),
        ({"bits": None, "experts": True}, "experts=true needs bits="),
        ({"method": "pb-llm"}, "pb-llm stores salient weights in 8 bits"),
        ({"resume": Path("x")}, "method=rtn takes no option resume"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizeWeights(**{"bits": 4, **options})


# ---- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"method": "quantease", "outliers": 0.05},
        {"method": "flexround", "steps": 3},
        {"method": "pb-llm", "bits": 8},
        {"method": "gptq", "symmetric": False, "int8_activations": True},
    ],
    ids=["quantease", "flexround", "pb-llm", "gptq"],
)
@pytest.mark.parametrize("lost", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_run_goes_on_with_the_blocks_that_are_there(options, lost, tmp_path):
    options = {"bits": 3, "resume": tmp_path, **options}
    first, second = mlp(), mlp()
    run(first, samples(), **options)
    files = sorted(tmp_path.iterdir())
    assert len(files) == BLOCKS
    for index in lost:
        files[index].unlink()
    notes = " ".join(run(second, samples(), **options))
    assert same(weights_of(first), weights_of(second))
    assert (f"{BLOCKS - len(lost)} blocks were read from files" in notes) == (len(lost) < BLOCKS)
    assert sorted(tmp_path.iterdir()) == files


def test_a_finished_run_needs_no_samples_to_run_again(tmp_path, monkeypatch):
    run(mlp(), samples(), bits=3, method="gptq", resume=tmp_path)

    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Gptq, "round", never)
    monkeypatch.setattr("lamella.ir.segments.Segment.run", never)
    graph = mlp()
    run(graph, samples(), bits=3, method="gptq", resume=tmp_path)
    assert len(graph.find(lam.linear_nbits.default)) == 2 * BLOCKS


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "swap"])
def test_a_damaged_file_is_never_used(damage, tmp_path):
    first, second = mlp(), mlp()
    run(first, samples(), bits=3, method="gptq", resume=tmp_path)
    files = sorted(tmp_path.iterdir())
    data = bytearray(files[1].read_bytes())
    if damage == "swap":
        shutil.copy(files[0], files[1])
    else:
        data[-5] ^= 1
        cut = {"cut": data[:-9], "flip": data, "empty": b""}[damage]
        files[1].write_bytes(bytes(cut))
    notes = " ".join(run(second, samples(), bits=3, method="gptq", resume=tmp_path))
    assert same(weights_of(first), weights_of(second))
    assert files[1].name in notes
    assert "rounded again" in notes


@pytest.mark.parametrize("changed", ["samples", "weights", "options", "graph"])
def test_files_of_another_run_are_not_used(changed, tmp_path):
    run(mlp(), samples(), bits=3, method="gptq", resume=tmp_path)
    data, options, graph = samples(), {"bits": 3}, mlp()
    if changed == "samples":
        data = samples(3)
    elif changed == "weights":
        node = graph.weight_node("2.norm.bias")
        graph.set_weight(node, graph.weight(node) + 1e-3)
    elif changed == "options":
        options = {"bits": 3, "damping": 0.02}
    else:
        (first, *_) = graph.find(aten.silu.default)
        graph.replace(first, graph.operand(first, "self"))
        graph.finish()
    want = graph.copy()
    run(want, data, method="gptq", **options)
    notes = " ".join(run(graph, data, method="gptq", resume=tmp_path, **options))
    assert same(weights_of(want), weights_of(graph))
    assert "are of another model, other samples, options or versions" in notes
    assert "read from files" not in notes
    assert len(list(tmp_path.iterdir())) == 2 * BLOCKS


def test_a_file_in_the_place_of_the_folder_is_told_at_once(tmp_path):
    place = tmp_path / "blocks"
    place.write_text("")
    with pytest.raises(PassError, match=r"there is a file in its place; name a folder"):
        run(mlp(), samples(), bits=3, method="gptq", resume=place)


def test_a_killed_run_goes_on_and_gives_the_same_bits(tmp_path):
    sizes = ["--kills", "3", "--width", "32", "--blocks", "4", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "tests.unit.killed_chain", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, *others, _, last = done.stdout.splitlines()
    digest = first.removeprefix("uninterrupted: ")
    assert len(others) == 3
    for line in others:
        assert line.endswith(f"of 4 blocks, {digest}")
    assert last == "3 processes killed, 3 with the same sha256"
