"""What is to be explained, as users say it, and the coefficient it starts with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.errors import SamplesError, known_names
from lamella.ir.graph import Graph
from lamella.passes.relevance.request import Seed
from lamella.passes.relevance.seeds import At, Logit, parse_seed

Target = int | str | tuple[int, ...] | Tensor
"""An index into the first output, a class or its label, a kind of seed, or a seed tensor."""


@dataclass(frozen=True)
class Start:
    """Where relevance starts.

    Attributes:
        text: For people.
        seed: Computes the coefficient from the output; None takes `tensor`.
        tensor: The coefficient, of the shape of the output.
        label: The class, where the place in a sequence is still to be found.
        index: The index, where it is one.
    """

    text: str
    seed: Seed | None = None
    tensor: Tensor | None = None
    label: int | None = None
    index: tuple[int, ...] = ()


def start_of(target: Target, graph: Graph, tokenizer: Callable[..., Any] | None) -> Start:
    """Read a target.

    Raises:
        SamplesError: It names nothing that the first output has.
    """
    name, value = graph.signature.outputs[0], graph.outputs[0].meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise SamplesError(f"the first output {name!r} is no tensor of floating-point numbers")
    if isinstance(target, Tensor):
        return Start("a seed tensor", tensor=target)
    if isinstance(target, tuple):
        return _at(target, name, value)
    if isinstance(target, str):
        return _named(target, graph, tokenizer)
    if type(target) is not int:
        raise SamplesError(
            f"a target is an index such as (0, -1, 17), a class, a label, a seed such as "
            f"'contrastive:3', or a tensor, got {target!r}"
        )
    return _of_class(target, f"class {target}", value)


def _at(index: tuple[int, ...], name: str, value: Tensor) -> Start:
    if not index or len(index) > value.ndim:
        raise SamplesError(
            f"target {index} has {len(index)} axes where output {name!r} has {value.ndim}"
        )
    if not all(type(place) is int for place in index):
        raise SamplesError(f"target {index} is no index: it takes whole numbers")
    _check_index(index, name, list(value.shape))
    return Start(f"{name}[{', '.join(map(str, index))}]", At(index), index=index)


def _check_index(index: tuple[int, ...], name: str, sizes: list[object]) -> None:
    """Sizes that vary are checked when they are known."""
    for axis, (place, size) in enumerate(zip(index, sizes, strict=False)):
        if isinstance(size, int) and not -size <= place < size:
            raise SamplesError(
                f"target {index} is no index into output {name!r}: axis {axis} has size {size}"
            )


def check_place(start: Start, name: str, output: Tensor) -> None:
    """Refuse an index that the output of these inputs does not have.

    Raises:
        SamplesError: The place is outside of it.
    """
    if start.index:
        _check_index(start.index, name, list(output.shape))


def _of_class(label: int, text: str, value: Tensor) -> Start:
    """A class of every row; in a sequence that of the last token, or of a word elsewhere."""
    _check_class(label, text, value)
    if value.ndim == 3:
        return Start(f"{text} at the last token", Logit(label, position=-1), label=label)
    return Start(text, Logit(label))


def _check_class(label: int, text: str, value: Tensor) -> None:
    sizes: list[object] = list(value.shape)
    size = sizes[-1]
    if isinstance(size, int) and not -size <= label < size:
        raise SamplesError(f"{text} does not exist: there are {size}")


def _named(text: str, graph: Graph, tokenizer: Callable[..., Any] | None) -> Start:
    value = graph.outputs[0].meta["val"]
    labels = _labels(graph, value.shape[-1])
    if text in labels:
        return _of_class(labels[text], f"class {text!r}", value)
    kind = text.partition(":")[0]
    if kind in ("logit", "contrastive", "softmax", "difference"):
        try:
            seed = parse_seed(text, -1 if value.ndim == 3 else None)
        except ValueError as error:
            raise SamplesError(str(error)) from error
        for label in text.partition(":")[2].split(",") if ":" in text else ():
            _check_class(int(label), f"class {label.strip()} of {text!r}", value)
        return Start(text + " at the last token" * (value.ndim == 3), seed)
    word = _token(text, tokenizer)
    if word is not None and value.ndim == 3:
        return _of_class(word, f"token {text!r}", value)
    known = known_names(text, labels) if labels else ""
    raise SamplesError(
        f"there is no class {text!r}{known}; a target is also an index, a "
        f"seed such as 'logit' or 'contrastive:3', or one token of the vocabulary"
    )


def _labels(graph: Graph, classes: object) -> dict[str, int]:
    """The names of classes; a model that has others keeps two that mean nothing in its config."""
    found: Any = (graph.origin.config or {}).get("id2label") or {}
    if len(found) != classes:
        return {}
    return {str(label): int(number) for number, label in dict(found).items()}


def _token(text: str, tokenizer: Callable[..., Any] | None) -> int | None:
    """The number of a text that is one token."""
    if tokenizer is None:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None


def at_last_seen(label: int, mask: Tensor, shape: torch.Size) -> Tensor:
    """One for a class at the last token that a mask shows, else zero; ``[batch, tokens, n]``."""
    seed = torch.zeros(shape)
    places = torch.arange(shape[1]) * mask.ne(0)
    seed[torch.arange(shape[0]), places.argmax(1), label] = 1.0
    return seed


def hides_the_last(mask: object) -> bool:
    """Whether a mask hides the last token of some row."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all())


def check_seed(tensor: Tensor, output: Tensor) -> None:
    """Refuse a seed that doesn't fit.

    Raises:
        SamplesError: It has another shape than the output, or numbers that are not finite.
    """
    if tensor.shape != output.shape:
        raise SamplesError(
            f"the seed has shape {list(tensor.shape)} where the output has {list(output.shape)}"
        )
    if not bool(tensor.isfinite().all()):
        raise SamplesError("the seed holds numbers that are not finite")


def masks_of(given: Mapping[str, Any]) -> object:
    """The attention mask among inputs, or None."""
    return given.get("attention_mask")
