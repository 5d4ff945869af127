"""Tiny random models of 28 families, and a few more, with what is known about their blocks.

Every model has a hidden width of 32 (or stages of 16 and 32) and three blocks (or two stages of
two). Weights are drawn so that every term matters: norms have scales and biases, branches are as
large as the stream, LayerScale is not close to zero. A graph that loses a term is caught.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Kinds = tuple[tuple[str, ...], ...]

VOCABULARY = 99
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
}
_CAUSAL = {
    **_TEXT,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "use_cache": False,
}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        name: As people call it.
        make: Builds the module with weights as its library initializes them.
        sample: Inputs for ``(batch, sequence, generator)``; what can't vary is ignored.
        expect: The kinds of the sublayers of every block, in order, from the config.
        vary: Which of ``"batch"`` and ``"sequence"`` may change after capture.
        sequence: Sequence length at which the family is captured.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[int, int, torch.Generator], Inputs]
    expect: Callable[[Any], Kinds]
    vary: tuple[str, ...] = ("batch", "sequence")
    sequence: int = field(default=7)

    def build(self, seed: int = 0) -> nn.Module:
        """The module in eval mode, with weights drawn from `seed`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
            draw_weights(model)
        return model.eval()

    def inputs(self, batch: int = 2, sequence: int | None = None, seed: int = 0) -> Inputs:
        """Inputs of the model by keyword."""
        generator = torch.Generator().manual_seed(seed)
        return self.sample(batch, sequence or self.sequence, generator)

    def kinds(self, model: nn.Module) -> Kinds:
        """The kinds of the sublayers of every block that the model should show."""
        return self.expect(model.config)

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The captured batch and sequence, and three others that the model allows."""
        batches = (2, 1, 3, 5) if "batch" in self.vary else (2, 2, 2, 2)
        times = (1.0, 1.5, 0.5, 2.5) if "sequence" in self.vary else (1.0, 1.0, 1.0, 1.0)
        lengths = (max(2, int(self.sequence * factor)) for factor in times)
        return tuple(dict.fromkeys(zip(batches, lengths, strict=True)))


def draw_weights(model: nn.Module) -> None:
    """Redraw every weight from the global generator so that no term of the model is negligible."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                # LayerScale starts at 1e-6, biases at 0, scales of norms at 1.
                small = parameter.abs().max() < 1e-3
                parameter.add_(noise * (0.3 if small else 0.1))
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn_like(module.weight) * 0.5)
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)


# ---- inputs -------------------------------------------------------------------------------


def _ids(batch: int, sequence: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)


def _mask(batch: int, sequence: int) -> Tensor:
    """All ones, but the last row is padded by one token at its end."""
    mask = torch.ones(batch, sequence, dtype=torch.long)
    mask[-1, -1] = 0
    return mask


def _tokens(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    ids = _ids(batch, sequence, generator)
    return {"input_ids": ids, "attention_mask": _mask(batch, sequence)}


def _tokens_only(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    return {"input_ids": _ids(batch, sequence, generator)}


def _pair(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    decoder = _ids(batch, max(2, sequence - 2), generator)
    return {**_tokens(batch, sequence, generator), "decoder_input_ids": decoder}


def _image(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def _captioned(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    images = torch.randn(batch + 1, 3, 32, 32, generator=generator)
    return {**_tokens(batch, sequence, generator), "pixel_values": images}


def _spectrum(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    return {
        "input_features": torch.randn(batch, 8, 32, generator=generator),
        "decoder_input_ids": _ids(batch, sequence, generator),
    }


def _wave(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(batch, sequence, generator=generator)}


def _patches(batch: int, sequence: int, generator: torch.Generator) -> Inputs:
    count = 12
    place = torch.arange(count)
    where = torch.stack((place // 4 + 1, place % 4 + 1), dim=-1).float().expand(batch, -1, -1)
    pixels = torch.randn(batch, count, 48, generator=generator)
    return {
        "flattened_patches": torch.cat((where, pixels), dim=-1),
        "attention_mask": torch.ones(batch, count),
        "decoder_input_ids": _ids(batch, sequence, generator),
    }


# ---- what the blocks hold -----------------------------------------------------------------


def _layers(*kinds: str) -> Callable[[Any], Kinds]:
    return lambda config: (kinds,) * config.num_hidden_layers


def _stages(*kinds: str) -> Callable[[Any], Kinds]:
    return lambda config: (kinds,) * sum(config.depths)


_ENCODER = ("attention", "mlp")
_DECODER = ("attention", "cross-attention", "mlp")


def _t5_kinds(config: Any) -> Kinds:
    return (_ENCODER,) * config.num_layers + (_DECODER,) * config.num_decoder_layers


def _bart_kinds(config: Any) -> Kinds:
    return (_ENCODER,) * config.encoder_layers + (_DECODER,) * config.decoder_layers


def _pix2struct_kinds(config: Any) -> Kinds:
    encoder = (_ENCODER,) * config.vision_config.num_hidden_layers
    return encoder + (_DECODER,) * config.text_config.num_layers


def _clip_kinds(config: Any) -> Kinds:
    towers = (config.vision_config, config.text_config)
    return (_ENCODER,) * sum(tower.num_hidden_layers for tower in towers)


# ---- builders -----------------------------------------------------------------------------


def _causal(name: str, kind: str, /, kinds: tuple[str, ...] = _ENCODER, **more: Any) -> Family:
    """A decoder of transformers: ``<kind>Config`` and ``<kind>ForCausalLM``."""
    config = more.pop("config", f"{kind}Config")

    def make() -> nn.Module:
        settings = getattr(hf, config)(**{**_CAUSAL, **more})
        return getattr(hf, f"{kind}ForCausalLM")(settings)

    return Family(name, make, _tokens, _layers(*kinds))


def _encoder(name: str, kind: str, head: str, /, **more: Any) -> Family:
    def make() -> nn.Module:
        settings = getattr(hf, f"{kind}Config")(**{**_TEXT, **more})
        return getattr(hf, f"{kind}{head}")(settings)

    return Family(name, make, _tokens, _layers(*_ENCODER))


def _vision(name: str, kind: str, head: str, expect: Callable[[Any], Kinds], **more: Any) -> Family:
    def make() -> nn.Module:
        return getattr(hf, f"{kind}{head}")(getattr(hf, f"{kind}Config")(**more))

    return Family(name, make, _image, expect, vary=("batch",))


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=96,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


def _opt(**more: Any) -> nn.Module:
    settings = {
        **{key: value for key, value in _TEXT.items() if key != "intermediate_size"},
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "use_cache": False,
    }
    return hf.OPTForCausalLM(hf.OPTConfig(**{**settings, **more}))


def _mamba() -> nn.Module:
    config = hf.MambaConfig(
        hidden_size=32, num_hidden_layers=3, vocab_size=VOCABULARY, state_size=4, use_cache=False
    )
    return hf.MambaForCausalLM(config)


def _mamba2() -> nn.Module:
    config = hf.Mamba2Config(
        hidden_size=32,
        num_hidden_layers=3,
        vocab_size=VOCABULARY,
        state_size=4,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        chunk_size=4,
        use_cache=False,
    )
    return hf.Mamba2ForCausalLM(config)


def _t5() -> nn.Module:
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return hf.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ, max_position_embeddings=96))


def _clip() -> nn.Module:
    text = {**_TEXT, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 98}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config=dict(_IMAGE), projection_dim=16)
    )


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        **_SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def _wav2vec2(**more: Any) -> nn.Module:
    settings = {key: value for key, value in _TEXT.items() if key != "max_position_embeddings"}
    config = hf.Wav2Vec2Config(
        **{**settings, "vocab_size": 32, **more},
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return hf.Wav2Vec2ForCTC(config)


def _pix2struct() -> nn.Module:
    text = {
        "hidden_size": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
        "use_cache": False,
        "decoder_start_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 48,
        "d_ff": 64,
        "d_kv": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 4,
        "seq_len": 64,
    }
    config = hf.Pix2StructConfig(text_config=text, vision_config=vision)
    return hf.Pix2StructForConditionalGeneration(config)


# ---- the tables ---------------------------------------------------------------------------

_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
_MODERNBERT = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 8,
}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
_RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [2, 2],
    "layer_type": "basic",
    "num_labels": 5,
}
_CONVNEXT = {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "num_labels": 5}
_CLASSIFY = "ForImageClassification"
_MOE = ("attention", "moe")
_QWEN3_MOE = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

_THE_28 = (
    _causal("llama", "Llama"),
    _causal("qwen2", "Qwen2"),
    _causal("qwen3", "Qwen3", head_dim=8),
    _causal("gemma2", "Gemma2", head_dim=8, sliding_window=8),
    _causal("gemma3", "Gemma3", config="Gemma3TextConfig", head_dim=8, sliding_window=8),
    _causal("mistral", "Mistral", sliding_window=8),
    Family("gpt2", _gpt2, _tokens, _layers(*_ENCODER)),
    Family("opt", _opt, _tokens, _layers(*_ENCODER)),
    _causal("mixtral", "Mixtral", kinds=_MOE, num_local_experts=4),
    _causal("qwen3_moe", "Qwen3Moe", kinds=_MOE, **_QWEN3_MOE),
    Family("mamba", _mamba, _tokens_only, _layers("ssm")),
    Family("mamba2", _mamba2, _tokens_only, _layers("ssm")),
    _encoder("bert", "Bert", "Model"),
    _encoder("roberta", "Roberta", "ForSequenceClassification"),
    _encoder("deberta-v2", "DebertaV2", "Model", **_DEBERTA),
    _encoder("modernbert", "ModernBert", "ForMaskedLM", **_MODERNBERT),
    Family("t5", _t5, _pair, _t5_kinds),
    Family("bart", _bart, _pair, _bart_kinds),
    _vision("vit", "ViT", _CLASSIFY, _layers(*_ENCODER), **_IMAGE, num_labels=5),
    _vision("deit", "DeiT", _CLASSIFY, _layers(*_ENCODER), **_IMAGE, num_labels=5),
    _vision("swin", "Swin", _CLASSIFY, _stages(*_ENCODER), **_SWIN),
    _vision("dinov2", "Dinov2", "Model", _layers(*_ENCODER), **_IMAGE),
    _vision("resnet", "ResNet", _CLASSIFY, _stages("conv"), **_RESNET),
    _vision("convnext", "ConvNext", _CLASSIFY, _stages("conv"), **_CONVNEXT),
    Family("clip", _clip, _captioned, _clip_kinds),
    Family("whisper", _whisper, _spectrum, _bart_kinds),
    Family("wav2vec2", _wav2vec2, _wave, _layers(*_ENCODER), sequence=800),
    Family("pix2struct", _pix2struct, _patches, _pix2struct_kinds),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _THE_28}
"""The 28 families that every pass and backend is tested on."""


def _gptj() -> nn.Module:
    config = hf.GPTJConfig(
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        vocab_size=VOCABULARY,
        n_positions=96,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPTJForCausalLM(config)


def _albert() -> nn.Module:
    return hf.AlbertModel(hf.AlbertConfig(**_TEXT, embedding_size=16))


def _parallel(name: str, kind: str, **more: Any) -> Family:
    """A decoder whose attention and MLP read the same value and are added together."""
    return _causal(name, kind, **more)


_GRANITE = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0}
_EXTRA = (
    _parallel("gpt_neox", "GPTNeoX"),
    _parallel("phi", "Phi"),
    _parallel("cohere", "Cohere"),
    Family("gptj", _gptj, _tokens, _layers(*_ENCODER)),
    _causal("granite", "Granite", **_GRANITE),
    Family(
        "opt-post-norm",
        lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
        _tokens,
        _layers(*_ENCODER),
    ),
    Family("albert", _albert, _tokens, _layers(*_ENCODER)),
    Family(
        "wav2vec2-stable",
        lambda: _wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer"),
        _wave,
        _layers(*_ENCODER),
        sequence=800,
    ),
    _causal("llama-1", "Llama", num_hidden_layers=1),
    _causal("llama-2", "Llama", num_hidden_layers=2),
    _causal("llama-12", "Llama", num_hidden_layers=12),
    _encoder("bert-1", "Bert", "Model", num_hidden_layers=1),
)

EXTRA: dict[str, Family] = {family.name: family for family in _EXTRA}
"""Further shapes of residual streams: parallel arms, scaled branches, few and many blocks."""
