"""Calibration inputs: batches of named tensors with a digest.

The digest covers every byte, so that a cached result is never given for other data.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lamella.errors import SamplesError

Batch = Mapping[str, Any]
"""The inputs of one call by name; values are tensors, or nested lists and mappings of them."""


@dataclass(frozen=True)
class Batching:
    """How texts become batches.

    Attributes:
        batch_size: Texts per batch; the last batch may hold fewer.
        max_length: Tokens per text; longer ones are cut (`Samples.truncated` counts them).
        padding: Pad each batch to its longest text, or all batches to `max_length`.
    """

    batch_size: int = 8
    max_length: int = 128
    padding: Literal["longest", "max_length"] = "longest"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_length < 1:
            raise ValueError(
                f"batch_size and max_length must be at least 1, got {self.batch_size} and "
                f"{self.max_length}"
            )


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs to calibrate and to measure with.

    Attributes:
        batches: One mapping of input names to tensors per call of the model.
        seed: For analyses that draw from the samples.
        truncated: How many texts were cut at the length limit.
    """

    batches: tuple[Batch, ...]
    seed: int = 0
    truncated: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise SamplesError("there are no samples; give at least one input dict or text")
        for index, batch in enumerate(self.batches):
            for name, value in leaves_of(batch):
                _check_finite(index, name, value)

    @classmethod
    def of(
        cls,
        source: Iterable[Batch] | Iterable[str] | Samples,
        *,
        tokenizer: Callable[..., Any] | None = None,
        limit: int | None = None,
        batching: Batching | None = None,
        seed: int = 0,
    ) -> Samples:
        """Samples from input dicts, or from texts and the tokenizer of the model.

        Args:
            source: Input dicts (one per batch) or texts. An iterator is consumed once, up to
                `limit`.
            tokenizer: Turns a list of texts into ``input_ids`` (a Hugging Face tokenizer).
            limit: At most so many dicts or texts; None takes all.
            batching: How texts are batched; dicts are batches already.
            seed: For analyses that draw from the samples.

        Raises:
            SamplesError: The source is empty, holds something else, NaN or Inf, or texts come
                without a tokenizer.
        """
        if isinstance(source, Samples):
            return source if limit is None else source.take(limit)
        if isinstance(source, str | Mapping):
            raise SamplesError(
                f"samples must be an iterable of input dicts or of texts, got one "
                f"{'text' if isinstance(source, str) else 'dict'}; wrap it in a list"
            )
        items: list[Any] = list(itertools.islice(source, limit))
        if items and all(isinstance(item, str) for item in items):
            if tokenizer is None:
                raise SamplesError(
                    "texts need a tokenizer; give a model folder that holds one, or input dicts"
                )
            return _tokenized(items, tokenizer, batching or Batching(), seed)
        batches = tuple(_batch(index, item) for index, item in enumerate(items))
        return cls(batches, seed)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of all tensors, in order."""
        sha = hashlib.sha256()
        for batch in self.batches:
            sha.update(b"batch")
            for name, value in sorted(leaves_of(batch), key=lambda leaf: leaf[0]):
                sha.update(_header(name, value).encode())
                if isinstance(value, Tensor):
                    sha.update(_bytes_of(value))
        return sha.hexdigest()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]

    def take(self, count: int) -> Samples:
        """The first `count` batches."""
        return Samples(self.batches[:count], self.seed, self.truncated)

    def select(self, names: Iterable[str]) -> Samples:
        """Only the inputs in `names`: tokenizers give more than some models take."""
        wanted = set(names)
        batches = tuple({k: v for k, v in batch.items() if k in wanted} for batch in self.batches)
        return Samples(batches, self.seed, self.truncated)

    def bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (value for batch in self.batches for _, value in leaves_of(batch))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def leaves_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested structure with their dotted names."""
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = cast(Mapping[Any, Any], value).items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(cast(Sequence[Any], value))
    else:
        yield name, value
        return
    for key, item in pairs:
        yield from leaves_of(item, f"{name}.{key}" if name else str(key))


def _batch(index: int, item: Any) -> Batch:
    """An input dict with arrays turned into tensors."""
    if not isinstance(item, Mapping):
        raise SamplesError(
            f"sample {index} is a {type(item).__name__}; samples are dicts of input names to "
            f"tensors, or all texts"
        )
    pairs = cast(Mapping[Any, Any], item).items()
    return {str(name): _tensors(value) for name, value in pairs}


def _tensors(value: Any) -> Any:
    """`value` with numpy arrays and the like as tensors that share their memory."""
    return torch.as_tensor(value) if hasattr(value, "__array__") else value


def _check_finite(index: int, name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        what = "NaN" if bool(torch.isnan(value).any()) else "Inf"
        raise SamplesError(
            f"input {name!r} of sample {index} holds {what} in "
            f"{int((~finite).sum())} of {value.numel()} entries; clean the samples first"
        )


def _header(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"|{name}|{value.dtype}|{tuple(value.shape)}|"
    return f"|{name}|{value!r}|"


def _bytes_of(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _tokenized(
    texts: list[str], tokenizer: Callable[..., Any], batching: Batching, seed: int
) -> Samples:
    """Batches of right-padded token ids with a mask, whatever the padding of the tokenizer."""
    batches: list[Batch] = []
    truncated = 0
    for start in range(0, len(texts), batching.batch_size):
        chunk = texts[start : start + batching.batch_size]
        full = tokenizer(chunk)["input_ids"]
        truncated += sum(len(ids) > batching.max_length for ids in full)
        encoded = tokenizer(chunk, truncation=True, max_length=batching.max_length)
        batches.append(_padded(dict(encoded), tokenizer, batching))
    return Samples(tuple(batches), seed, truncated)


def _padded(
    encoded: dict[str, list[list[int]]], tokenizer: Callable[..., Any], batching: Batching
) -> Batch:
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if max(lengths) == 0:
        raise SamplesError("a batch of texts has no tokens at all; remove empty texts")
    width = batching.max_length if batching.padding == "max_length" else max(lengths)
    # Many decoders have no padding token; any id will do where the mask is zero.
    fill = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
    padded = {
        name: torch.tensor([row + [fill.get(name, 0)] * (width - len(row)) for row in rows])
        for name, rows in encoded.items()
    }
    masks = [[1] * length + [0] * (width - length) for length in lengths]
    return {**padded, "attention_mask": torch.tensor(masks)}
