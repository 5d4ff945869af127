"""Models from folders: loaded safely, captured with and without their data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import CaptureError, GraphError, ModelFileError
from lamella.ir.default_inputs import default_inputs
from lamella.ir.graph import Graph
from lamella.ir.huggingface import capture_pretrained, is_pretrained, load_pretrained, read_config
from lamella.ir.meta import build_without_data, capture_config
from lamella.ir.model_folder import check_finite, read_weight_map
from lamella.passes.analyses.cost import cost_of
from lamella.rewrite.canonicalize import canonicalize
from tests.zoo.families import FAMILIES

Build = Callable[[str], nn.Module]


@pytest.fixture
def folder(tmp_path: Path, model: Build) -> Path:
    """A saved tiny Llama."""
    save(model("llama"), tmp_path)
    return tmp_path


def save(model: Any, folder: Path, **options: Any) -> None:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the checkpoint in `folder`."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---- loading ----------------------------------------------------------------------------


def test_a_folder_gives_the_model_that_was_saved(folder: Path, model: Build):
    loaded, tokenizer = load_pretrained(folder)
    saved = model("llama")
    assert type(loaded) is type(saved)
    assert tokenizer is None
    assert not loaded.training
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path, model: Build):
    save(model("llama").to(torch.bfloat16), tmp_path)
    assert load_pretrained(tmp_path)[0].dtype == torch.float32
    assert load_pretrained(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_task_may_be_chosen(folder: Path):
    base, _ = load_pretrained(folder, task_class="LlamaModel")
    assert type(base).__name__ == "LlamaModel"
    with pytest.raises(ModelFileError, match="no model 'LlamaForChess'"):
        load_pretrained(folder, task_class="LlamaForChess")


def test_weights_that_are_missing_are_an_error_and_not_random(folder: Path):
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    for load in (load_pretrained, capture_config):
        with pytest.raises(ModelFileError, match=r"lacks weights.*layers\.1\.mlp\.up_proj\.weight"):
            load(folder)


def test_weights_that_are_too_many_are_logged(folder: Path, caplog: pytest.LogCaptureFixture):
    edit(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    with caplog.at_level(logging.WARNING, logger="lamella.ir.huggingface"):
        load_pretrained(folder)
    assert "doesn't use weights" in caplog.text
    assert "extra" in caplog.text


def test_weights_of_another_shape_are_an_error(folder: Path):
    name = "model.norm.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(31)}))
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight"):
        capture_config(folder)


@pytest.mark.parametrize(("number", "what"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_numbers_that_are_none_are_named(folder: Path, number: float, what: str):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.gate_proj.weight"][3, 4] = number

    edit(folder, spoil)
    with pytest.raises(ModelFileError, match=rf"layers\.2\.mlp\.gate_proj\.weight \({what}\)"):
        load_pretrained(folder)


def test_weights_are_checked_for_numbers_one_by_one(folder: Path):
    check_finite(read_weight_map(folder))


# ---- files ------------------------------------------------------------------------------


def test_a_config_that_is_no_config_is_named(folder: Path):
    config = folder / "config.json"
    data = json.loads(config.read_text())
    config.write_text("{oops")
    with pytest.raises(ModelFileError, match=r"config\.json.*no JSON"):
        load_pretrained(folder)
    config.write_text("[1]")
    with pytest.raises(ModelFileError, match=r"config\.json.*no mapping"):
        load_pretrained(folder)
    config.write_text(json.dumps({**data, "model_type": "lama"}))
    with pytest.raises(ModelFileError, match=r"model_type 'lama'.*did you mean 'llama'"):
        load_pretrained(folder)
    config.write_text(json.dumps({**data, "model_type": "own", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ModelFileError, match="brings its own code, which is never run"):
        load_pretrained(folder)
    config.unlink()
    with pytest.raises(ModelFileError, match=r"config\.json.*can't be read"):
        load_pretrained(folder)
    with pytest.raises(ModelFileError, match="there is no folder"):
        read_config(folder / "nowhere")


def test_a_pickle_is_never_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pickle \(pytorch_model\.bin\).*save_pretrained"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFileError, match=r"holds no \.safetensors file"):
        load_pretrained(folder)


@pytest.fixture
def sharded(tmp_path: Path, model: Build) -> Path:
    save(model("llama"), tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_shards_are_one_model(sharded: Path, model: Build):
    loaded, _ = load_pretrained(sharded)
    for name, value in model("llama").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_an_index_that_lies_is_named(sharded: Path):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = list(index["weight_map"])
    first = index["weight_map"][names[0]]
    last = next(shard for shard in index["weight_map"].values() if shard != first)

    def written(**change: str) -> None:
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **change}}))

    for outside in ("../secret.safetensors", "/etc/passwd", "sub/x.safetensors", ".."):
        written(**{names[0]: outside})
        with pytest.raises(ModelFileError, match="files outside of its folder"):
            load_pretrained(sharded)
    written(**{names[0]: last})
    with pytest.raises(ModelFileError, match="tensors that their files don't hold"):
        load_pretrained(sharded)
    written()
    (sharded / first).unlink()
    with pytest.raises(ModelFileError, match=rf"lacks {first}"):
        load_pretrained(sharded)
    for lacking in ("weight_map", "metadata"):
        path.write_text(json.dumps({name: {} for name in index if name != lacking}))
        with pytest.raises(ModelFileError, match=f"no {lacking}"):
            load_pretrained(sharded)


# ---- capture ----------------------------------------------------------------------------


TRACED = ("llama", "bert", "t5", "vit", "clip", "wav2vec2", "whisper", "pix2struct")


@pytest.mark.parametrize("family", TRACED)
def test_default_inputs_are_taken_by_the_model(family: str, model: Build):
    module: Any = model(family)
    inputs = default_inputs(module)
    assert inputs[module.main_input_name].shape[0] == 2
    with torch.no_grad():
        module(**inputs)
    again = default_inputs(module)
    assert all(torch.equal(again[name], value) for name, value in inputs.items())


def test_a_captured_model_knows_where_it_came_from(folder: Path):
    loaded, _ = load_pretrained(folder)
    graph = capture_pretrained(loaded)
    assert graph.signature.inputs == ("input_ids", "attention_mask")
    assert graph.origin.kind == "transformers"
    assert graph.origin.architecture == "LlamaForCausalLM"
    assert graph.origin.folder == str(folder.resolve())
    assert graph.origin.config is not None
    assert graph.origin.config["hidden_size"] == 32
    assert is_pretrained(loaded)
    assert not is_pretrained(nn.Linear(2, 2))
    with pytest.raises(CaptureError, match="Linear is no model of transformers"):
        capture_pretrained(nn.Linear(2, 2))


def lazily(family: str, folder: Path, model: Build) -> tuple[Graph, nn.Module]:
    """A graph whose weights lie in `folder`, and the model that was saved there."""
    module = model(family)
    save(module, folder)
    graph = capture_config(folder, FAMILIES[family].inputs())
    canonicalize(graph)
    return graph, module


# Plain, tied and transposed (Conv1D), fused from single experts, with batch norms.
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "resnet"])
def test_a_graph_without_data_computes_what_the_model_computes(
    family: str, tmp_path: Path, model: Build
):
    graph, module = lazily(family, tmp_path, model)
    large = [node for node in graph.weight_nodes() if node.meta["val"].numel() > 512]
    assert large
    assert not any(graph.is_loaded(node) for node in large)
    inputs = FAMILIES[family].inputs(seed=3)
    with torch.no_grad():
        expected = module(**inputs)[0]
    # The same kernels in another order (folded norms, fused attention).
    torch.testing.assert_close(graph(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    name = str(large[-1].target)
    if name not in graph.origin.transposed:
        assert graph.source is not None
        assert torch.equal(graph.source.read_rows(name, 1, 3), graph.weight(name)[1:3])


def test_a_config_alone_has_shapes_and_no_data(model: Build):
    config: Any = model("llama").config
    graph = capture_config(config, task_class="LlamaForCausalLM", dtype=torch.bfloat16)
    canonicalize(graph)
    parameters = sum(p.numel() for p in model("llama").parameters())
    # The rotary frequencies are a table of four float32 numbers, which no operator folds.
    assert cost_of(graph).total.stored_bytes == 2 * parameters + 4 * 4
    assert "lm_head" in str(graph)
    with pytest.raises(GraphError, match="without a folder"):
        graph.weight("lm_head.weight")


def test_tables_are_computed_although_weights_are_not(model: Build):
    module: Any = model("gemma3")
    built = build_without_data(module.config, type(module))
    assert all(parameter.is_meta for parameter in built.parameters())
    persistent = module.state_dict()
    tables = {n: b for n, b in module.named_buffers() if n not in persistent}
    assert tables
    for name, value in tables.items():
        assert torch.equal(built.get_buffer(name), value)
