"""Further families that generate: parallel branches, other positions, attention beside states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lamella
from lamella.generation import GenerativeExecutable
from tests.zoo.families import VOCABULARY, draw_weights

NEW = 16
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_HEADS = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_ZAMBA2 = {
    "layers_block_type": ["mamba", "hybrid"],
    "num_key_value_heads": 4,
    "mamba_d_state": 4,
    "n_mamba_heads": 4,
    "mamba_headdim": 16,
    "mamba_ngroups": 2,
    "chunk_size": 4,
    "num_mem_blocks": 1,
    "use_mem_rope": True,
    "adapter_rank": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}


def _like_llama(kind: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(hf, f"{kind}Config")(**{**_TEXT, **more})
        return getattr(hf, f"{kind}ForCausalLM")(config)

    return make


def _like_gpt(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        more = {"vocab_size": VOCABULARY, "use_cache": False, "pad_token_id": 0}
        config = getattr(hf, f"{kind}Config")(**{**more, **settings})
        return getattr(hf, f"{kind}ForCausalLM")(config)

    return make


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "phi": _like_llama("Phi"),
    "phi3": _like_llama("Phi3"),
    "stablelm": _like_llama("StableLm"),
    "gpt_neox": _like_llama("GPTNeoX"),
    # Channels of a head are paired side by side.
    "cohere": _like_llama("Cohere"),
    "gptj": _like_gpt("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=96),
    "falcon": _like_gpt("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    # Distances are added to the scores.
    "bloom": _like_gpt("Bloom", hidden_size=32, n_layer=2, n_head=4),
    "mpt": _like_gpt("Mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=96),
    "falcon_mamba": _like_gpt("FalconMamba", hidden_size=32, num_hidden_layers=2, state_size=4),
    # Some layers attend, the others keep a state.
    "jamba": _like_llama("Jamba", **_JAMBA),
    "bamba": _like_llama("Bamba", attn_layer_indices=[1], **_HEADS),
    "zamba2": _like_llama("Zamba2", **_ZAMBA2),
}


@functools.cache
def built(name: str) -> tuple[nn.Module, lamella.Graph]:
    """A model that never stops by itself, and its graph."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = FAMILIES[name]()
        draw_weights(model)
    model.eval()
    # Zamba2 of transformers drifts from itself when it continues from its cache.
    model.config.use_cache = name != "zamba2"
    model.generation_config.update(
        eos_token_id=None, pad_token_id=0, use_cache=model.config.use_cache
    )
    given = prompts(2, 7, padded=True)
    if name == "falcon_mamba":
        del given["attention_mask"]
    return model, lamella.capture(model, given)


def prompts(batch: int, length: int, *, padded: bool) -> dict[str, Tensor]:
    """With `padded` each row but the first has one more token of padding on the left."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        mask[row, :row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_greedy_tokens_are_those_of_transformers(name, backend):
    model, graph = built(name)
    executable = lamella.lower(graph, backend)
    assert isinstance(executable, GenerativeExecutable)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    cases = [prompts(1, 7, padded=False), prompts(3, 9, padded=name != "falcon_mamba")]
    for given in cases:
        got, wanted = (
            one.generate(**given, **options, output_logits=True, use_cache=cached)
            for one, cached in ((executable, True), (model, model.config.use_cache))
        )
        assert torch.equal(got.sequences, wanted.sequences)
        for ours, theirs in zip(got.logits, wanted.logits, strict=True):
            # Sums of float32 in another order.
            assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


def test_layers_of_both_kinds_are_numbered_in_order():
    executable = lamella.lower(built("jamba")[1], "eager")
    assert isinstance(executable, GenerativeExecutable)
    found = [(slot.layer, slot.kind) for slot in executable.layout.slots]
    assert found == [(0, "convolution"), (0, "scan"), (1, "key"), (1, "value")]
