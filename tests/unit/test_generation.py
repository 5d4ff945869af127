"""What `generate` of a compiled model can do, beside the model itself in transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lamella
from lamella import generation
from lamella.backends.manifest import read_manifest, write_manifest
from lamella.errors import ArtifactError, GenerationError, IncrementalError
from lamella.generation import GenerativeExecutable

VOCABULARY = 280


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    made = LlamaForCausalLM(config).eval()
    # Without this the tiny model stops wherever its random logits say so.
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    ids = torch.arange(4, 18).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def executable(request: Any, model: Any, inputs: Any) -> GenerativeExecutable:
    made = lamella.compile(copy.deepcopy(model), inputs, passes=[], backend=request.param)
    assert isinstance(made, GenerativeExecutable)
    return made


def both(model: Any, executable: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    """Generate with both, from the same random state, and compare."""
    found: list[Tensor] = []
    for one in (model, executable):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(one.generate(**inputs, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 10},
        {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3},
        {"max_new_tokens": 12, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 6, "use_cache": False},
        {"max_new_tokens": 8, "prefill_chunk_size": 3},
    ],
    ids=lambda options: ",".join(options),
)
def test_generates_what_the_model_generates(model, executable, inputs, options):
    both(model, executable, inputs, **options)


def test_prompt_lookup_takes_tokens_back(model, executable):
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7]])}
    both(model, executable, prompt, max_new_tokens=16, prompt_lookup_num_tokens=3)


def test_calls_like_the_model(model, executable, inputs):
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False)
    got = executable(**inputs)
    assert type(got) is type(wanted)
    real = inputs["attention_mask"].bool()
    # Rounding of float32 in another order of sums.
    torch.testing.assert_close(got.logits[real], wanted.logits[real], rtol=1e-4, atol=1e-4)
    assert executable(**inputs, use_cache=True).past_key_values.get_seq_length() == 7


def test_a_conversation_goes_on_from_its_cache(model, executable):
    first = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    options = {"max_new_tokens": 5, "return_dict_in_generate": True}
    for one in (model, executable):
        done = one.generate(**first, **options)
        longer = torch.cat((done.sequences, torch.tensor([[9, 10, 11]])), dim=1)
        with_cache = one.generate(
            input_ids=longer, past_key_values=done.past_key_values, max_new_tokens=6
        )
        assert torch.equal(with_cache, one.generate(input_ids=longer, max_new_tokens=6))


def test_streams_tokens_and_stops_at_strings(model, executable, tokenizer, inputs):
    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    one = {name: value[:1] for name, value in inputs.items()}
    streams = [Collect(), Collect()]
    for each, stream in zip((model, executable), streams, strict=True):
        each.generate(**one, max_new_tokens=9, streamer=stream)
    assert streams[0].seen == streams[1].seen
    fifth = tokenizer.decode(streams[0].seen[11])
    both(model, executable, one, max_new_tokens=9, stop_strings=[fifth], tokenizer=tokenizer)


def test_works_in_a_pipeline(model, executable, tokenizer):
    made = [
        transformers.pipeline("text-generation", model=one, tokenizer=tokenizer)
        for one in (model, executable)
    ]
    options = {"max_new_tokens": 6, "batch_size": 2, "do_sample": False}
    texts = [one(["the cat sat", "on the"], **options) for one in made]
    assert texts[0] == texts[1]


def test_saved_and_loaded_it_generates_the_same(executable, inputs, tmp_path):
    executable.save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    assert isinstance(loaded, GenerativeExecutable)
    assert loaded.backend == executable.backend
    both(executable, loaded, inputs, max_new_tokens=10)


def test_a_corrupted_byte_is_refused(executable, tmp_path):
    executable.save(tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 1
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=rf"{path.name}'.*(differs from what|corrupt)"):
            lamella.load(tmp_path / "out")
        path.write_bytes(whole)


def test_a_manifest_without_a_layout_is_refused(executable, tmp_path):
    executable.save(tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = read_manifest(path)
    del manifest["details"]["generation"]["layout"]
    write_manifest(path, manifest)
    with pytest.raises(ArtifactError, match="does not describe a language model"):
        lamella.load(Path(tmp_path / "out"))


def test_what_a_compiled_model_can_not_give_is_refused(executable, inputs):
    with pytest.raises(GenerationError, match="output_attentions"):
        executable.generate(
            **inputs, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        )
    with pytest.raises(GenerationError, match="mask has shape"):
        executable(
            input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 5).long(), use_cache=True
        )
    foreign = transformers.DynamicCache()
    with pytest.raises(GenerationError, match="its own cache"):
        executable(input_ids=inputs["input_ids"], past_key_values=foreign)


def test_a_model_that_does_not_generate_says_so():
    module = torch.nn.Linear(3, 3)
    executable = lamella.compile(module, (torch.zeros(2, 3),), passes=[], backend="eager")
    with pytest.raises(GenerationError, match="only a language model"):
        executable.generate()


@pytest.fixture
def refused(model, inputs, monkeypatch) -> lamella.Graph:
    """A language model that can't continue from a cache."""

    def refuse(graph: lamella.Graph) -> Any:
        raise IncrementalError("linear_3 mixes tokens")

    graph = lamella.capture(copy.deepcopy(model), inputs)
    monkeypatch.setattr(generation, "incremental", refuse)
    return graph


def test_a_language_model_without_a_cache_is_an_error_when_strict(refused):
    with pytest.raises(IncrementalError, match="mixes tokens") as caught:
        lamella.lower(refused, "eager", strict=True)
    assert any("strict" in note for note in caught.value.__notes__)
    with pytest.raises(IncrementalError, match="mixes tokens"):
        lamella.compile(refused, passes=[], backend="eager", strict=True)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_saved_and_loaded_it_still_knows_why_it_does_not_generate(
    refused, backend, tmp_path, caplog
):
    executable = lamella.lower(refused, backend)
    assert "no cache, so no generate" in caplog.text
    assert executable.report.remarks == ("no cache, so no generate: linear_3 mixes tokens",)
    executable.save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    assert loaded.report == executable.report
    for one in (executable, loaded):
        with pytest.raises(GenerationError, match=r"can't generate: no cache.*linear_3 mixes"):
            one.generate()
