"""The vocabulary of a tokenizer in the words of GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lamella.checkpoints.gguf_metadata import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

_NONE: Mapping[str, Value] = MappingProxyType({"tokenizer.ggml.model": "no_vocab"})
"""What a file says that has no vocabulary: readers then take tokens by number."""

_SPLITS: Mapping[str, str] = MappingProxyType(
    {
        r"\p{N}{1,3}": "llama-bpe",
        r"\p{N}| ?": "qwen2",
    }
)
"""What tells the regular expressions of byte-level vocabularies apart -> their name."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokenizer.

    Attributes:
        entries: By the keys of the format.
        remarks: What is left out or guessed.
    """

    entries: Mapping[str, Value]
    remarks: tuple[str, ...] = ()


def vocabulary(tokenizer: Any | None, size: int) -> Vocabulary:
    """The entries for a fast tokenizer of transformers: byte-level or sentencepiece-like BPE.

    Args:
        tokenizer: The tokenizer, or None.
        size: Rows of the embedding; ids that no token has are filled up.
    """
    if tokenizer is None:
        return Vocabulary(_NONE, ("no tokenizer was given, and the model's folder has none",))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = data.get("model", {}).get("type", type(tokenizer).__name__)
    if kind != "BPE":
        return Vocabulary(
            _NONE, (f"gguf has no place for a tokenizer of type {kind}; it is left out",)
        )
    names = [str(step.get("type")) for step in _steps(data.get("pre_tokenizer"))]
    byte_level = "ByteLevel" in names
    entries = _tokens(data, size)
    notes: list[str] = []
    if byte_level:
        split = _split(data)
        if split == "default":
            notes.append("how the tokenizer splits text is not known to llama.cpp; its default is")
        entries |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split}
        entries["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(data)]
    else:
        entries |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        entries["tokenizer.ggml.scores"] = _scores(data, entries)
    return Vocabulary({**entries, **_special(tokenizer)}, tuple(notes))


def _tokens(data: Mapping[str, Any], size: int) -> dict[str, Value]:
    vocab: dict[str, int] = data["model"]["vocab"]
    words = [f"[PAD{place}]" for place in range(size)]
    types = [_UNUSED] * size
    for word, place in vocab.items():
        if place < size:
            words[place] = word
            is_byte = len(word) == 6 and word.startswith("<0x") and word.endswith(">")
            types[place] = _BYTE if is_byte else _NORMAL
    for added in data.get("added_tokens", ()):
        if added["id"] < size:
            words[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER
    unknown = data["model"].get("unk_token")
    if unknown in words:
        types[words.index(unknown)] = _UNKNOWN
    return {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": types}


def _merges(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for pair in data["model"]["merges"]:
        first, second = pair.split(" ", 1) if isinstance(pair, str) else pair
        yield first, second


def _scores(data: Mapping[str, Any], entries: Mapping[str, Any]) -> list[float]:
    """The later a merge, the lower the score of what it makes: sentencepiece merges the best."""
    rank: dict[str, int] = {}
    for place, (first, second) in enumerate(_merges(data)):
        rank.setdefault(first + second, place)
    last = len(rank)
    return [-float(rank.get(word, last)) for word in entries["tokenizer.ggml.tokens"]]


def _split(data: Mapping[str, Any]) -> str:
    patterns = [
        str(step["pattern"].get("Regex", ""))
        for step in _steps(data.get("pre_tokenizer"))
        if step.get("type") == "Split"
    ]
    if not patterns:
        return "gpt-2"
    known = (name for mark, name in _SPLITS.items() if mark in patterns[0])
    return next(known, "default")


def _steps(step: Any) -> list[Mapping[str, Any]]:
    """The pre-tokenizers one after the other."""
    if not step:
        return []
    if step.get("type") == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _steps(part)]
    return [step]


def _special(tokenizer: Any) -> dict[str, Value]:
    """Special tokens, and whether they are put around a text."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, Value] = {}
    for name, key in names.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = int(number)
    ids: list[int] = list(tokenizer("a")["input_ids"])
    # As the tokenizer behaves: its settings say so in several ways.
    found["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found
