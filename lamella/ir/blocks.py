"""From the branches of a stream to blocks, and names for blocks.

Branches are grouped by what they do: a block begins where the stream mixes positions again after
it has treated each by itself. So a block of a decoder is attention, cross-attention, MLP; a
block of a state-space model or of a residual convolution network is one branch; and a block that
lost a sublayer is still a block. Nothing needs a second block to compare with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from torch.fx import Node

from lamella.ir.kinds import CHANNEL_MIXERS, CROSS_ATTENTION, LAYERS
from lamella.ir.reach import base_name

B = TypeVar("B")

_STACKS = frozenset({"encoder", "decoder", "vision", "text"})

_MACARON = re.compile(r"(?:m[tx]+m){2,}")
"""Blocks that begin and end with an MLP (Conformer), two or more of them."""


def group(branches: Sequence[B], kinds: Sequence[str]) -> list[list[B]]:
    """`branches` of one spine, block by block; `kinds` says what each does."""
    letters = "".join(_letter(kind) for kind in kinds)
    macaron = _MACARON.fullmatch(letters) is not None
    blocks: list[list[B]] = []
    for place, branch in enumerate(branches):
        starts = place == 0 or _starts(letters, place, macaron)
        if starts:
            blocks.append([])
        blocks[-1].append(branch)
    return blocks


def _starts(letters: str, place: int, macaron: bool) -> bool:
    pair = letters[place - 1 : place + 1]
    if macaron:
        return pair == "mm"
    ranks = ["txm".index(letter) for letter in pair]
    return ranks[1] <= ranks[0]


def _letter(kind: str) -> str:
    """``t``: mixes tokens, ``x``: attends to another stream, ``m``: mixes channels."""
    if kind == CROSS_ATTENTION:
        return "x"
    return "m" if kind in CHANNEL_MIXERS else "t"


def block_names(owned: Sequence[Sequence[frozenset[Node]]]) -> list[str]:
    """A distinct name for every block, given the nodes of its sublayers.

    The name is the longest dotted name that the weights of its linear and convolution layers
    share. Where that says nothing
    (no names, or one that several blocks share), blocks are numbered.
    """
    shared = [_shared_name(frozenset().union(*nodes)) for nodes in owned]
    telling = [_is_telling(name, place, shared) for place, name in enumerate(shared)]
    return [
        name if good else (f"{name}.block.{place}" if name else f"block.{place}")
        for place, (name, good) in enumerate(zip(shared, telling, strict=True))
    ]


def block_labels(names: Sequence[str]) -> list[str]:
    """Short distinct labels for blocks called `names`: the numbers in them, if these do.

    ``model.layers.3`` is ``3``; ``encoder.block.3`` beside ``decoder.block.3`` is ``encoder.3``.
    """
    for short in (_last_number, _numbers, _first_and_numbers):
        labels = [short(name.split(".")) for name in names]
        if all(labels) and len(set(labels)) == len(names):
            return labels
    return [str(index) for index in range(len(names))]


def _last_number(parts: Sequence[str]) -> str:
    return next((part for part in reversed(parts) if part.isdigit()), "")


def _numbers(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part.isdigit())


def _first_and_numbers(parts: Sequence[str]) -> str:
    first = next((p for p in parts if p in _STACKS or p.split("_")[0] in _STACKS), parts[0])
    return f"{first}.{_numbers(parts)}" if _numbers(parts) else ""


def _is_telling(name: str, place: int, names: Sequence[str]) -> bool:
    others = [other for index, other in enumerate(names) if index != place]
    inside = any(other == name or other.startswith(f"{name}.") for other in others)
    return bool(name) and not inside


def _shared_name(nodes: frozenset[Node]) -> str:
    weights = [node for node in nodes if node.op == "get_attr" and _feeds_layer(node)]
    names = [str(node.target).split(".") for node in weights]
    if not names:
        return ""
    shared: list[str] = []
    for parts in zip(*(name[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    # "encoder.block.0.layer" is "encoder.block.0": a layer is called by its number.
    while shared and not shared[-1].isdigit() and any(part.isdigit() for part in shared):
        shared.pop()
    return ".".join(shared)


def _feeds_layer(weight: Node) -> bool:
    return any(base_name(user) in LAYERS for user in weight.users)


def sublayer_names(block: str, kinds: Sequence[str]) -> list[str]:
    """``<block>.<kind>``, numbered from the second of a kind on."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for kind in kinds:
        seen[kind] += 1
        names.append(f"{block}.{kind}" if seen[kind] == 1 else f"{block}.{kind}-{seen[kind]}")
    return names
