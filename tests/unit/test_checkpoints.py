"""Writing checkpoints: what is refused, what is written, and that it is whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lamella
from lamella.backends import artifact
from lamella.backends.manifest import MANIFEST
from lamella.checkpoints.folded import unfolded
from lamella.checkpoints.matching import compare
from lamella.checkpoints.names import Stored
from lamella.checkpoints.reference import reference_of
from lamella.checkpoints.safetensors_writer import write_safetensors, write_shards
from lamella.checkpoints.save import save_checkpoint
from lamella.checkpoints.weights import weights_for
from lamella.errors import ArtifactError, CheckpointError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.huggingface import capture_pretrained
from lamella.ir.ops import aten
from lamella.passes.base import Analyses
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.drop_sublayers import DropSublayers
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.rewrite.canonicalize import canonicalize
from tests.tiny import TEXTS, save_encoder, save_language_model

GENAI = "onnxruntime-genai"


@functools.cache
def _captured() -> Graph:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    graph = capture_pretrained(model)
    canonicalize(graph)
    return graph


@pytest.fixture
def graph() -> Graph:
    """The graph of a tiny Llama."""
    return _captured().copy()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("models") / "llama", layers=2)


# ---- what is refused -------------------------------------------------------------------------


def refused(graph: Graph, place: Path, match: str, **options: Any) -> None:
    """There is an error, and nothing was written."""
    with pytest.raises(CheckpointError, match=match):
        save_checkpoint(graph, place / "out", **options)
    assert list(place.iterdir()) == []


def test_a_dropped_sublayer_is_named(graph, tmp_path):
    DropSublayers(sublayers=(2,)).run(graph, Analyses(graph))
    graph.finish()
    refused(graph, tmp_path, r"no layer without model\.layers\.1\.attention.*drop whole blocks")


def test_another_operator_is_named(graph, tmp_path):
    for node in graph.find(aten.silu.default):
        graph.replace(node, graph.call(aten.relu.default, *node.args, before=node))
    graph.finish()
    refused(graph, tmp_path, r"relu.* where the model has silu .*; relu.* where the .* silu_1")


def test_another_constant_is_named(graph, tmp_path):
    norm = graph.find(aten.rms_norm.default)[0]
    graph.set_operand(norm, "eps", 1e-3)
    refused(graph, tmp_path, r"eps of rms_norm\S* \(aten\.rms_norm\.default\) is 0\.001, not 1e-06")


def test_a_bias_that_the_architecture_lacks_is_named(graph, tmp_path):
    head = graph.find(aten.linear.default)[-1]
    graph.set_operand(head, "bias", graph.add_weight("extra", torch.zeros(64)))
    refused(graph, tmp_path, r"bias of linear\S* \(aten\.linear\.default\) is extra, not None")


def test_a_weight_of_another_shape_is_named(graph, tmp_path):
    for node in graph.find(aten.linear.default)[4:6]:
        weight = graph.operand(node, "weight")
        graph.set_weight(weight, graph.weight(weight)[:48])
    refused(graph, tmp_path, r"mlp\.(gate|up)_proj\.weight is \[48, 32\] where the model has \[64")


def test_other_tables_are_seen(graph, tmp_path):
    node = next(n for n in graph.weight_nodes() if "inv_freq" in str(n.target))
    graph.set_weight(node, graph.weight(node) * 2)
    refused(graph, tmp_path, "the constant .*inv_freq.* is not .*inv_freq.* of the model")


def test_tables_of_a_model_that_was_cast_are_computed_anew_and_said(graph, tmp_path):
    node = next(n for n in graph.weight_nodes() if "inv_freq" in str(n.target))
    exact = graph.weight(node)
    narrow = graph.add_weight("cast", exact.bfloat16())
    graph.replace(node, graph.call(aten.to.dtype, narrow, exact.dtype, before=node.next))
    graph.finish()
    report = save_checkpoint(graph, tmp_path / "out")
    assert "more exactly than the graph has them" in report.remarks[0]


def test_two_values_of_one_tied_weight_are_refused(graph, tmp_path):
    config = {**(graph.origin.config or {}), "tie_word_embeddings": True}
    graph.origin = dataclasses.replace(graph.origin, config=config)
    refused(graph, tmp_path, "embed_tokens.weight is one weight in the model, here there are")


def test_models_that_are_not_of_transformers_are_refused(tmp_path):
    plain = capture_module(nn.Linear(4, 4), (torch.ones(2, 4),))
    canonicalize(plain)
    refused(plain, tmp_path, r"for a model of transformers only.*another kind of model \(module\)")


def test_unknown_types_formats_and_sizes_are_refused(graph, tmp_path):
    refused(graph, tmp_path, "no checkpoint format 'hugingface'; did you mean", format="hugingface")
    refused(graph, tmp_path, "max_shard_size must be.*'5 apples'", max_shard_size="5 apples")
    refused(graph, tmp_path, "max_shard_size must be.*0", max_shard_size=0)
    config = {**(graph.origin.config or {}), "model_type": "lllama"}
    graph.origin = dataclasses.replace(graph.origin, config=config)
    refused(graph, tmp_path, "model_type 'lllama', which transformers doesn't know")


def test_a_folder_with_something_else_is_refused(graph, tmp_path, language_model):
    before = sorted(path.name for path in language_model.iterdir())
    with pytest.raises(ArtifactError, match="give a new or an empty folder"):
        save_checkpoint(graph, language_model)
    assert sorted(path.name for path in language_model.iterdir()) == before


def test_a_full_disk_is_seen_before_writing(graph, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough room.*1,000 bytes are free"):
        save_checkpoint(graph, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- what is written -------------------------------------------------------------------------


def test_companions_come_along_and_the_report_says_what_was_written(tmp_path, language_model):
    graph = lamella.capture(language_model)
    lamella.transform(graph, ["drop-blocks blocks=0"])
    report = lamella.save_checkpoint(graph, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert names == {*report.files, "manifest.json"}
    assert report.file_bytes == sum(
        (tmp_path / "out" / name).stat().st_size for name in report.files
    )
    assert report.types == {"float32": 12}
    assert str(report).startswith("huggingface in ")
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert pipeline(TEXTS[0], max_new_tokens=2)[0]["generated_text"].startswith("the")


def test_a_written_folder_can_be_captured_again_and_replaced(tmp_path, language_model):
    graph = lamella.capture(language_model)
    lamella.save_checkpoint(graph, tmp_path / "out")
    again = lamella.capture(tmp_path / "out")
    lamella.transform(again, ["drop-blocks blocks=1"])
    lamella.save_checkpoint(again, tmp_path / "out")
    last = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert last.config.num_hidden_layers == 1
    first = graph.weight("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(last.model.layers[0].mlp.up_proj.weight, first)


@pytest.mark.parametrize("format", ["huggingface", "compressed-tensors", "gguf", GENAI])
def test_a_changed_byte_in_any_file_is_refused(format, tmp_path, language_model):
    graph = lamella.capture(language_model)
    lamella.transform(graph, ["quantize-weights bits=8 block=32"])
    folder = tmp_path / "out"
    save_checkpoint(graph, folder, format=format)
    assert lamella.verify(folder).description.backend == f"checkpoint-{format}"
    doors = [lamella.verify, lamella.load]
    if (folder / "config.json").is_file():
        doors.append(lamella.capture)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        for door in doors:
            with pytest.raises(ArtifactError, match=rf"{path.name}'.* save .* again") as caught:
                door(folder)
            assert "differs from what was saved" in str(caught.value) or path.name == MANIFEST
        path.write_bytes(whole)
    lamella.verify(folder)


def test_a_missing_file_and_one_that_was_cut_are_refused(graph, tmp_path):
    save_checkpoint(graph, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors' has .* bytes, the manifest says"):
        lamella.verify(tmp_path / "out")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors' is missing; save it again"):
        lamella.verify(tmp_path / "out")


def test_a_folder_with_the_manifest_of_another_program_is_captured(tmp_path, language_model):
    shutil.copytree(language_model, tmp_path / "app")
    (tmp_path / "app" / MANIFEST).write_text('{"name": "an app"}')
    assert lamella.capture(tmp_path / "app").find(aten.linear.default)


def test_a_checkpoint_is_no_executable(graph, tmp_path):
    save_checkpoint(graph, tmp_path / "out")
    with pytest.raises(ArtifactError, match="is a checkpoint of format huggingface, no executable"):
        lamella.load(tmp_path / "out")


def test_weights_that_nothing_reads_come_from_the_folder(tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    graph = lamella.capture(folder)
    outputs = [graph.outputs[0]]
    # Without the pooled output nothing reads the pooler.
    signature = dataclasses.replace(graph.signature, outputs=graph.signature.outputs[:1])
    graph.set_outputs(outputs, signature)
    graph.finish()
    report = lamella.save_checkpoint(graph, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])
    assert not report.remarks

    graph.origin = dataclasses.replace(graph.origin, folder=None)
    report = lamella.save_checkpoint(graph, tmp_path / "out")
    assert "zeros for weights that nothing reads: pooler.dense.weight" in report.remarks[0]


def test_norms_without_a_scale_get_one(graph):
    FoldNorms().run(graph, Analyses(graph))
    graph.finish()
    found = {one.name: one for one in weights_for(graph, reference_of(graph)).weights}
    assert torch.equal(found["model.norm.weight"].read(), torch.ones(32))


def test_a_graph_that_was_not_edited_is_the_model(graph):
    comparison = compare(graph, reference_of(graph).graph)
    assert comparison.differences == []
    names = {str(one.wanted.target) for one in comparison.bound}
    assert names == {
        n for n in map(str, (w.target for w in graph.weight_nodes())) if "inv" not in n
    }


def test_layers_are_renumbered(graph):
    DropBlocks(blocks=(0,)).run(graph, Analyses(graph))
    graph.finish()
    reference = reference_of(graph)
    assert reference.config.num_hidden_layers == 1
    assert reference.name_before("model.layers.0.mlp.up_proj.weight") == (
        "model.layers.1.mlp.up_proj.weight"
    )


# ---- the command line ----------------------------------------------------------------------


def test_compile_writes_a_checkpoint_instead_of_an_executable_or_beside_it(
    lamella_cli, tmp_path, language_model
):
    options = ("--pass", "quantize-weights bits=8", "--checkpoint", tmp_path / "alone")
    formats = ("--format", "compressed-tensors")
    status, out, err = lamella_cli("compile", language_model, *options, *formats)
    assert (status, err) == (0, "")
    assert "compressed-tensors in " in out
    assert (tmp_path / "alone/config.json").is_file()

    both = ("--checkpoint", tmp_path / "model", "--out", tmp_path / "out", "-b", "eager", "--json")
    status, out, _ = lamella_cli("compile", language_model, "--pass", "drop-blocks blocks=0", *both)
    assert status == 0
    assert json.loads(out)["checkpoints"][0]["format"] == "huggingface"
    assert lamella.load(tmp_path / "out").backend == "eager"
    assert lamella.capture(tmp_path / "model").origin.config["num_hidden_layers"] == 1


def test_compile_refuses_places_and_formats_at_once(lamella_cli, tmp_path, language_model):
    drop = ("--pass", "drop-blocks blocks=0")
    status, _, err = lamella_cli("compile", language_model, *drop)
    assert status == 2
    assert "say where to write: --out" in err
    status, _, err = lamella_cli("compile", "nowhere", *drop, "--checkpoint", language_model)
    assert status == 2
    assert "give a new or an empty folder" in err
    place = ("--checkpoint", tmp_path / "out", "--format", "guff")
    status, _, err = lamella_cli("compile", "nowhere", *drop, *place)
    assert status == 2
    assert "did you mean 'gguf'?" in err


# ---- files -----------------------------------------------------------------------------------


def stored(name: str, value: Tensor) -> Stored:
    return Stored(name, tuple(value.shape), value.dtype, lambda: value)


TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "turned": torch.arange(12.0).reshape(3, 4).mT,
    "number": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def test_the_library_reads_what_is_written(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", [stored(n, v) for n, v in TENSORS.items()])
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(TENSORS)
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_a_shard_is_as_large_as_allowed_and_the_index_names_all(tmp_path):
    tensors = [stored(f"w{i}", torch.full((10,), float(i))) for i in range(5)]
    write_shards(tmp_path, tensors, 80)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = lamella.ir.model_folder.read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 200
    for name, file in index["weight_map"].items():
        assert float(load_file(tmp_path / file)[name][0]) == float(name[1:])


def test_tensors_are_made_one_by_one(tmp_path):
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def make() -> Tensor:
        alive.append(sum(one() is not None for one in made))
        value = torch.zeros(4)
        made.append(weakref.ref(value))
        return value

    tensors = [Stored(f"w{i}", (4,), torch.float32, make) for i in range(3)]
    assert made == []
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert alive == [0, 0, 0]


def test_a_tensor_that_is_not_what_was_announced_is_an_error(tmp_path):
    wrong = Stored("w", (3,), torch.float32, lambda: torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"weight w became torch.float32 \[4\]"):
        write_safetensors(tmp_path / "x.safetensors", [wrong])


# ---- folded constants ------------------------------------------------------------------------


class Folds(nn.Module):
    """A weight that is used through an expression of it."""

    def __init__(self, expression: Any, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.expression = expression

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expression(self.weight)


@pytest.mark.parametrize(
    "expression",
    [
        lambda w: 1.0 + w,
        lambda w: -torch.exp(w),
        lambda w: (3.0 - w) / 2.0,
        lambda w: w.flip(0).reshape(2, 3).permute(1, 0).reshape(6),
        lambda w: (2.0 * w)[torch.tensor([5, 0, 4, 1, 3, 2])],
    ],
)
def test_a_folded_constant_goes_back_to_its_weight(expression):
    weight = torch.tensor([0.3, -1.5, 1e-4, 2.5, -0.7, 0.0])
    captured = capture_module(Folds(expression, weight), (torch.ones(2, 6),))
    node = next(iter(captured.output.args[0])).args[1]
    captured.set_weight(captured.weight_node("weight"), weight.to("meta"))
    value = expression(weight)
    got = unfolded(captured, node, value)
    # One rounding of a value of size 1 to 12.
    torch.testing.assert_close(got, weight, rtol=0, atol=1e-6)
    assert torch.allclose(expression(got), value, rtol=0, atol=1e-6)


def test_what_cannot_be_turned_round_is_an_error():
    weight = torch.tensor([0.5, -1.0])
    captured = capture_module(Folds(torch.abs, weight), (torch.ones(2, 2),))
    node = next(iter(captured.output.args[0])).args[1]
    captured.set_weight(captured.weight_node("weight"), weight.to("meta"))
    with pytest.raises(CheckpointError, match=r"abs\.default of a weight can't be turned round"):
        unfolded(captured, node, weight.abs())
