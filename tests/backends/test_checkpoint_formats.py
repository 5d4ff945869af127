"""Checkpoints of few bits, read by the packages of their formats and by transformers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lamella.checkpoints.gguf_metadata import frequency_factors, neighbors
from lamella.checkpoints.gguf_types import encoded, kind_of, row_bytes
from lamella.checkpoints.packed import Packed
from lamella.checkpoints.save import save_checkpoint
from lamella.checkpoints.weights import Weight
from lamella.errors import CheckpointError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.huggingface import capture_pretrained
from lamella.ir.meta import build_without_data
from lamella.ir.ops import lam
from lamella.ir.quantize import Format, quantize
from lamella.passes.base import Analyses, Transform
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.rewrite.canonicalize import canonicalize
from tests.zoo.families import Family, _causal

FAMILIES = {
    "llama": _causal("llama", "Llama"),
    "mistral": _causal("mistral", "Mistral", sliding_window=None),
    "qwen2": _causal("qwen2", "Qwen2"),
    # The reader in transformers takes the default size of a head.
    "qwen3": _causal("qwen3", "Qwen3", head_dim=128),
}
# The same products of the same weights, in the same order.
SAME = {"rtol": 0, "atol": 1e-6}


@functools.cache
def _captured(name: str) -> Graph:
    family = FAMILIES[name]
    graph = capture_pretrained(family.build(), family.inputs())
    canonicalize(graph)
    return graph


def edited(name: str, *passes: Transform) -> Graph:
    graph = _captured(name).copy()
    for one in passes:
        one.run(graph, Analyses(graph))
        graph.finish()
    return graph


def mixed(name: str, **options: Any) -> Graph:
    """Without a block, with weights of 4 and 8 bits by a plan; rows of the embedding too."""
    plan = AllocateBits(budget=6, choices=(4, 8), by="weight-error", min_size=0, **options)
    graph = edited(name, DropBlocks(blocks=(1,)), plan)
    # A lookup multiplies in half precision, what reads a checkpoint doesn't.
    graph.plan = {k: f for k, f in graph.plan.items() if "embed" not in k}
    QuantizeWeights(int8_activations=False).run(graph, Analyses(graph))
    graph.finish()
    return graph


def logits(model: Callable[..., Any], family: Family) -> torch.Tensor:
    with torch.no_grad():
        return model(**family.inputs(3, 9, seed=5)).logits


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


# ---- compressed-tensors --------------------------------------------------------------------


def test_mixed_bits_load_as_compressed_tensors(tmp_path):
    graph = mixed("llama")
    report = save_checkpoint(graph, tmp_path / "out", format="compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        logits(model, FAMILIES["llama"]), logits(graph, FAMILIES["llama"]), **SAME
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    widths = {group["weights"]["num_bits"]: set(group["targets"]) for group in groups}
    assert set(widths) == {4, 8}
    # Runtimes merge these into one product.
    for layers in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for targets in widths.values():
            named = [name for name in targets if name.endswith(layers)]
            assert len(named) % len(layers) == 0
    assert report.types["4 bits/32"] == len(widths[4])
    QuantizationConfig.model_validate(config["quantization_config"])


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_narrow_grids_are_written_in_their_own_width(bits, tmp_path):
    graph = edited("llama", QuantizeWeights(bits=bits, min_size=0, int8_activations=False))
    report = save_checkpoint(graph, tmp_path / "out", format="compressed-tensors")
    assert f"{bits} bits/32" in report.types
    assert any("one stream of bits" in remark for remark in report.remarks)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig.model_validate(config).config_groups.values()))
    stored = load_file(tmp_path / "out/model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    parts = {n.rpartition(".")[2]: v for n, v in stored.items() if n.startswith(f"{layer}.weight")}
    weight = _captured("llama").weight(f"{layer}.weight")
    assert parts["weight_packed"].shape[1] == weight.shape[1] * bits // 32
    got = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    assert torch.equal(got, quantize(weight, Format(bits, 32)).dequantized())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    # The embedding is multiplied in half precision by the graph, in single by its reader.
    torch.testing.assert_close(
        logits(model, FAMILIES["llama"]), logits(graph, FAMILIES["llama"]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zero_points_are_packed_as_the_package_unpacks_them(bits, tmp_path):
    options: dict[str, Any] = {"symmetric": False, "min_size": 0, "int8_activations": False}
    graph = edited("llama", QuantizeWeights(bits=bits, block=32, **options))
    report = save_checkpoint(graph, tmp_path / "out", format="compressed-tensors")
    assert any("zero points" in remark for remark in report.remarks)
    assert any("2 bits" in remark for remark in report.remarks) == (bits == 2)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig.model_validate(config).config_groups.values()))
    stored = load_file(tmp_path / "out/model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    parts = {n.rpartition(".")[2]: v for n, v in stored.items() if n.startswith(f"{layer}.weight")}
    got = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    weight = _captured("llama").weight(f"{layer}.weight")
    want = quantize(weight, Format(bits, 32, symmetric=False)).dequantized()
    # The product of a float16 scale and a difference of codes is exact in single precision.
    assert torch.equal(got, want)


def test_layers_that_are_merged_and_differ_are_named(tmp_path):
    graph = edited("llama", QuantizeWeights(bits=4, min_size=600, int8_activations=False))
    report = save_checkpoint(graph, tmp_path / "out", format="compressed-tensors")
    found = [remark for remark in report.remarks if "merge" in remark]
    assert len(found) == 1
    assert "q_proj with model.layers.0.self_attn.k_proj" in found[0]


def test_a_graph_without_few_bits_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no linear layers of few bits.*run quantize-w"):
        save_checkpoint(edited("llama"), tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


# ---- gguf -----------------------------------------------------------------------------------


def load_gguf(folder: Path) -> Any:
    made = transformers.AutoModelForCausalLM
    return made.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_holds_codes_without_rounding_them(name, tmp_path):
    graph = mixed(name)
    report = save_checkpoint(graph, tmp_path / "out", format="gguf")
    family = FAMILIES[name]
    torch.testing.assert_close(
        logits(load_gguf(tmp_path / "out"), family), logits(graph, family), **SAME
    )
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds["blk.0.attn_q.weight"], kinds["blk.1.ffn_down.weight"]} <= {"Q4_0", "Q8_0"}
    assert set(report.types) == {"F32", "Q4_0", "Q8_0"}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert int(reader.fields[f"{graph_architecture(reader)}.block_count"].contents()) == 2


def graph_architecture(reader: Any) -> str:
    return reader.fields["general.architecture"].contents()


@pytest.mark.parametrize(
    ("options", "kind", "tolerance"),
    [
        # A larger block repeats its scale.
        ({"bits": 4, "block": 64}, "Q4_0", 0.0),
        ({"bits": 8, "block": 128}, "Q8_0", 0.0),
        # There is no legacy type of two bits: the codes fit into four.
        ({"bits": 2}, "Q4_0", 0.0),
        # The offset -s z is rounded to float16, 11 bits: 2^-12 of up to 15 steps s.
        ({"bits": 4, "symmetric": False}, "Q4_1", 15 * 2**-12),
        # Rounded again to steps d of max/127 in float16: max is at most 255 s, so that half of d
        # is 1.004 s, and 127 d loses 2^-12 of itself.
        ({"bits": 8, "symmetric": False}, "Q8_0", 255 / 127 / 2 + 255 * 2**-11),
        ({"bits": 5, "block": 64}, "Q5_0", 0.0),
        ({"bits": 5, "symmetric": False}, "Q5_1", 31 * 2**-12),
        # Rows of 160 are no whole groups of 256: the codes fit into four and eight.
        ({"bits": 3}, "Q4_0", 0.0),
        ({"bits": 3, "symmetric": False}, "Q4_1", 7 * 2**-12),
        ({"bits": 6}, "Q8_0", 0.0),
        # Scales are rounded to multiples of max/31 and max/127: half a multiple times the
        # largest code, 4 and 32. No scale of these weights is less than 0.45 of the largest; a
        # float16 adds 2^-11 of a weight, and a code may be the next one where it saves error.
        ({"bits": 3, "columns": 512}, "Q3_K", 4 / 62 / 0.45 + 4 * 2**-11),
        ({"bits": 6, "columns": 512, "block": 64}, "Q6_K", 32 / 254 / 0.45 + 32 * 2**-11),
        # Slope and offset in fifteenths, half of one: of three steps and of two.
        ({"bits": 2, "columns": 512}, "Q2_K", (3 + 2) / 30 / 0.45 + 5 * 2**-11),
        ({"bits": 2, "columns": 256, "symmetric": False}, "Q2_K", 6 / 30 / 0.4 + 6 * 2**-11),
    ],
)
def test_types_of_gguf(options, kind, tolerance):
    torch.manual_seed(0)
    options = dict(options)
    width = options.pop("columns", 160)
    layer = torch.nn.Linear(width, 24, bias=False)
    graph = capture_module(layer, (torch.randn(2, width),))
    canonicalize(graph)
    QuantizeWeights(min_size=0, int8_activations=False, **options).run(graph, Analyses(graph))
    reader = graph.find(lam.linear_nbits.default)[0]
    packed = Packed(graph, reader, (24, width))
    reverse = torch.arange(23, -1, -1)
    weight = Weight("weight", (24, width), torch.float32, layer.weight.detach, packed)
    made = encoded("x", weight, lambda value: value[reverse])
    assert made.kind.name == kind
    numbers = gguf.GGMLQuantizationType(int(made.kind))
    got = torch.from_numpy(gguf.dequantize(made.make().numpy(), numbers))[reverse]
    format = Format(options["bits"], options.get("block", 32), options.get("symmetric", True))
    stored = quantize(layer.weight, format)
    steps = stored.scales.float().abs().repeat_interleave(format.block, 1)[:, :width]
    assert bool(((got - stored.dequantized()).abs() <= tolerance * steps).all())
    assert bool(made.note) == (tolerance > 0 or options["bits"] != int(kind[1]))
    assert made.nbytes == 24 * row_bytes(kind_of(format.bits, format.symmetric, width), width)


def test_rows_of_rotary_pairs_become_neighbors():
    rows = torch.arange(2 * 8).reshape(16, 1)
    turned = neighbors(2)(rows).flatten().tolist()
    assert turned[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert turned[8:] == [8, 12, 9, 13, 10, 14, 11, 15]


def test_scaled_frequencies_divide_the_plain_ones():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, rope_parameters=rope
    )
    factors = frequency_factors(config, build_without_data(config, "LlamaForCausalLM"))
    assert factors is not None
    # High frequencies stay, low ones are divided by the factor, between them it grows.
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)
    assert bool((factors.diff() >= -1e-5).all())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"model_type": "gemma2"},
            "gguf is written for llama, mistral, qwen2, qwen3, not for gemma2",
        ),
        ({"hidden_act": "gelu"}, "no way to say that the activation is gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_what_the_format_cannot_say_is_refused(change, reason, tmp_path):
    graph = edited("llama")
    config = {**(graph.origin.config or {}), **change}
    graph.origin = dataclasses.replace(graph.origin, config=config)
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(graph, tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


# ---- tokenizers -----------------------------------------------------------------------------

TEXT = "a small model reads a large text, and a large model reads a small one"


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=60, special_tokens=special)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pieces() -> Any:
    """As sentencepiece: spaces are marked, unknown characters are bytes."""
    alphabet = sorted(set(TEXT.replace(" ", "▁")))
    merges = [("▁", "a"), ("▁", "s"), ("l", "l"), ("e", "l"), ("▁a", "n")]
    words = ["<unk>", "<s>", "</s>", "<0x0A>", *alphabet, *("".join(pair) for pair in merges)]
    vocab = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("make", [byte_level, pieces])
def test_the_tokenizer_goes_into_the_file(make, tmp_path):
    tokenizer = make()
    save_checkpoint(edited("llama"), tmp_path / "out", format="gguf", tokenizer=tokenizer)
    (tmp_path / "alone").mkdir()
    (tmp_path / "out/model.gguf").rename(tmp_path / "alone/model.gguf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="model.gguf")
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == tokenizer(TEXT)["input_ids"]
    reader = gguf.GGUFReader(tmp_path / "alone/model.gguf")
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == 99
    scores = reader.fields.get("tokenizer.ggml.scores")
    if scores is not None:
        words = reader.fields["tokenizer.ggml.tokens"].contents()
        value = dict(zip(words, np.asarray(scores.contents()), strict=True))
        assert value["▁a"] > value["▁s"] > value["ll"] > value["▁an"] > value["m"]


def test_a_tokenizer_without_a_place_is_left_out_and_said(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    report = save_checkpoint(edited("llama"), tmp_path / "out", format="gguf", tokenizer=fast)
    assert any("no place for a tokenizer of type WordLevel" in one for one in report.remarks)
    assert (tmp_path / "out/tokenizer.json").is_file()
