"""The functions that users call, on tiny models with the eager backend."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lamella
from lamella import api
from lamella.backends.manifest import read_manifest, write_manifest
from lamella.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    GraphError,
    LossError,
    ModelFileError,
    RecipeError,
    SamplesError,
)
from lamella.passes.analyses.cost import Cost
from tests.tiny import TEXTS, save_encoder, save_language_model


class Head(nn.Module):
    """Two linear layers between an embedding and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.inner = nn.Linear(64, 256)
        self.outer = nn.Linear(256, 64)

    def forward(self, ids):
        return {"y": self.outer(torch.relu(self.inner(self.table(ids))))}


@pytest.fixture
def head() -> Head:
    torch.manual_seed(0)
    return Head().eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("models") / "llm")


IDS = torch.arange(10).reshape(2, 5)


def test_capture_runs_like_the_module_and_keeps_its_output_type(head):
    graph = lamella.capture(head, {"ids": IDS})
    longer = torch.arange(12).reshape(3, 4) % 16
    # The graph runs the same kernels on the same weights.
    torch.testing.assert_close(graph(ids=longer), head(longer), rtol=0, atol=0)


def test_capture_gives_a_graph_back():
    graph = lamella.capture(Head(), {"ids": IDS})
    assert lamella.capture(graph) is graph


def test_capture_reads_a_folder_an_exported_program_and_its_file(encoder, head, tmp_path):
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    inputs = {"input_ids": IDS % 32, "attention_mask": torch.ones_like(IDS)}
    expected = model(**inputs)
    got = lamella.capture(encoder)(**inputs)
    assert type(got) is type(expected)
    # One rounding per operation: the graph may reorder a sum.
    torch.testing.assert_close(
        got.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5
    )

    program = torch.export.export(head, (), {"ids": IDS}, strict=False)
    torch.export.save(program, tmp_path / "head.pt2")
    for source in (program, tmp_path / "head.pt2", str(tmp_path / "head.pt2")):
        torch.testing.assert_close(lamella.capture(source)(ids=IDS), head(IDS), rtol=0, atol=0)


def test_capture_says_what_is_missing(tmp_path, head):
    with pytest.raises(CaptureError, match="Head needs sample inputs"):
        lamella.capture(head)
    with pytest.raises(ModelFileError, match="there is no file or folder"):
        lamella.capture(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match=r"config\.json"):
        lamella.capture(tmp_path)
    with pytest.raises(CaptureError, match="a int is no model"):
        lamella.capture(3)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="is a pickle"):
        lamella.capture(tmp_path / "model.bin")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ModelFileError, match="is no model"):
        lamella.capture(tmp_path / "model.json")


def test_a_hub_id_that_is_not_there_is_one_clear_error(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("lamella.ir.sources.snapshot_download", unreachable)
    with pytest.raises(ModelFileError, match="can't be downloaded"):
        lamella.capture("somebody/something")


def test_transform_edits_the_graph_and_not_the_model(head):
    before = {name: value.clone() for name, value in head.state_dict().items()}
    graph = lamella.capture(head, {"ids": IDS})
    report = lamella.transform(graph, ["quantize-weights bits=8 min_size=1"])
    assert report.weight_bytes < 0.4 * report.model.weight_bytes
    assert graph.weight_bytes() == report.weight_bytes
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])


def test_transform_leaves_the_graph_when_the_loss_is_too_much(llm):
    graph = lamella.capture(llm)
    text = str(graph)
    with pytest.raises(LossError, match="max_loss"):
        lamella.transform(graph, ["drop-blocks count=1 by=size"], max_loss=1e-9)
    assert str(graph) == text


def test_compile_takes_texts_for_a_folder_with_a_tokenizer(encoder):
    compiled = lamella.compile(
        encoder, passes=["quantize-weights bits=8 min_size=1"], samples=TEXTS, backend="eager"
    )
    assert compiled.report.samples_digest
    assert compiled.report.loss.value < 0.01
    assert compiled.recipe == {
        "version": 1,
        "passes": [{"quantize-weights": {"bits": 8, "min_size": 1}}],
    }


def test_compile_checks_recipe_and_backend_before_it_reads_the_model(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(RecipeError, match="did you mean 'quantize-weights'"):
        lamella.compile(nowhere, passes=["quantise-weights"])
    with pytest.raises(BackendError, match="did you mean 'onnxruntime'"):
        lamella.compile(nowhere, passes=[], backend="onxruntime")


def test_compile_leaves_a_graph_that_is_given_as_it_was(head):
    graph = lamella.capture(head, {"ids": IDS})
    text, edits = str(graph), graph.edits
    lamella.compile(graph, passes=["quantize-weights bits=4 min_size=1"], backend="eager")
    assert (str(graph), graph.edits) == (text, edits)


def test_samples_that_do_not_fit_are_refused(head):
    graph = lamella.capture(head, {"ids": IDS})
    with pytest.raises(SamplesError):
        lamella.transform(graph, ["quantize-weights bits=8"], samples=[{"idz": IDS}])
    with pytest.raises(SamplesError, match="tokenizer"):
        lamella.transform(graph, ["quantize-weights bits=8"], samples=["a text"])


def test_a_weight_with_nan_is_named_before_anything_runs(head):
    with torch.no_grad():
        head.inner.weight[3, 5] = float("nan")
        head.outer.bias[0] = float("inf")
    graph = lamella.capture(head, {"ids": IDS})
    with pytest.raises(GraphError, match=r"inner\.weight \(1 entries\).*outer\.bias"):
        lamella.transform(graph, [])


def test_analyze_answers_by_name_and_by_object(llm):
    graph = lamella.capture(llm)
    by_name, by_object = lamella.analyze(graph, "cost"), lamella.analyze(graph, Cost())
    assert by_name.total == by_object.total
    with pytest.raises(RecipeError, match="did you mean 'cost'"):
        lamella.analyze(graph, "costs")
    with pytest.raises(SamplesError, match="samples"):
        lamella.analyze(graph, "layer-input-modification")
    scores = lamella.analyze(llm, "layer-input-modification", samples=TEXTS)
    assert scores is not None


def test_save_and_load_give_the_same_outputs(head, tmp_path):
    compiled = lamella.compile(
        head, {"ids": IDS}, passes=["quantize-weights bits=4 min_size=1"], backend="eager"
    )
    compiled.save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    torch.testing.assert_close(loaded(ids=IDS), compiled(ids=IDS), rtol=0, atol=0)
    assert loaded.report == compiled.report
    assert loaded.inputs == compiled.inputs


def test_a_damaged_artifact_is_refused(head, tmp_path):
    lamella.lower(lamella.capture(head, {"ids": IDS}), "eager").save(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="digest"):
        lamella.load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ArtifactError, match="no saved executable"):
        lamella.load(tmp_path / "out")


def test_a_backend_nobody_has_is_named(head, tmp_path):
    lamella.lower(lamella.capture(head, {"ids": IDS}), "eager").save(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out/manifest.json")
    manifest["backend"] = "tensorrt"
    write_manifest(tmp_path / "out/manifest.json", manifest)
    with pytest.raises(ArtifactError, match="'tensorrt'"):
        lamella.load(tmp_path / "out")


def test_a_compiled_folder_is_no_model(head, tmp_path):
    lamella.lower(lamella.capture(head, {"ids": IDS}), "eager").save(tmp_path / "out")
    with pytest.raises(ModelFileError, match=r"lamella\.load"):
        lamella.capture(tmp_path / "out")


def test_a_backend_may_be_an_object(head):
    backend = api.find_backend("eager")
    assert api.find_backend(backend) is backend
    assert lamella.lower(lamella.capture(head, {"ids": IDS}), backend).backend == "eager"
