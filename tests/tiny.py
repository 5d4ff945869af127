"""Tiny models with tokenizers in folders, as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = (
    "the a of and is in to layer weight graph model small fast new old value input output "
    "number block every some reads writes keeps gives takes makes only one two"
).split()
TEXTS = tuple(
    f"the {WORDS[i % 13 + 7]} {WORDS[i % 9 + 20]} {WORDS[i % 5 + 10]} and every {WORDS[i % 7 + 12]}"
    for i in range(12)
)


def save_encoder(folder: Path) -> Path:
    """A BERT with two layers and a word tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    _save(transformers.BertModel(config).eval(), folder)
    return folder


def save_language_model(folder: Path, *, layers: int = 3, seed: int = 0) -> Path:
    """A Llama with a few layers and a word tokenizer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    _save(transformers.LlamaForCausalLM(config).eval(), folder)
    return folder


def _save(model: transformers.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)
