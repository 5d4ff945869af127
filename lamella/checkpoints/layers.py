"""Which layers of a model are left in a graph, and the config of the model that has only those."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from lamella.errors import CheckpointError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.meta import build_without_data

Route = tuple[str | int, ...]
"""Where a value lies in a nested config."""

_COUNTS_LAYERS = re.compile(r"layer|depth|block")
_INDICES = frozenset({"mlp_only_layers", "full_attn_idxs", "attn_layer_indices"})
"""Lists of a config that hold the numbers of layers, not one entry per layer."""

_FOLLOWING = frozenset({"stage_names", "out_features", "out_indices"})
"""Entries that the config of a backbone makes from the number of its stages."""


@dataclass(frozen=True)
class LayerList:
    """A list of layers of a model, and those that a graph still has.

    Attributes:
        name: Dotted name of the list: ``model.layers``.
        count: How many layers the model was built with.
        kept: Their numbers in the graph, ascending.
    """

    name: str
    count: int
    kept: tuple[int, ...]


def layer_lists(graph: Graph, model: PreTrainedModel) -> tuple[LayerList, ...]:
    """The lists of layers of `model` of which `graph` uses some, outermost first.

    A layer is gone when no contraction reads one of its weights: tables that layers share (the
    relative positions of T5) stay behind in a layer that is gone.
    """
    read = _contracted(graph)
    found: list[LayerList] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.")
        seen = {int(match[1]) for weight in read if (match := pattern.match(weight))}
        if seen:
            idle = {i for i, layer in enumerate(module) if not _has_matrices(layer)}
            found.append(LayerList(name, len(module), tuple(sorted(seen | idle))))
    return tuple(found)


def _has_matrices(layer: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in layer.parameters())


def config_of(data: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that a dictionary describes.

    Raises:
        CheckpointError: transformers doesn't know its type.
    """
    kind = str(data.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"the config has the model_type {kind!r}, which transformers doesn't know; a "
            f"checkpoint can be written for its own architectures only"
        )
    return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(data)))


def with_layers_left(
    data: Mapping[str, Any], architecture: str, lists: Sequence[LayerList]
) -> dict[str, Any]:
    """The config of the model that has only the layers that are kept, renumbered.

    The entry that says how many layers a list has is found by trying: the model is built without
    data for each number of the config that may be it. Lists of the config with one entry per
    layer lose those of the dropped ones.

    Raises:
        CheckpointError: No entry of the config makes the list shorter.
    """
    current = copy.deepcopy(dict(data))
    wanted = {one.name: one.count for one in lists}
    for one in lists:
        if len(one.kept) == one.count:
            continue
        wanted[one.name] = len(one.kept)
        for path in _counts(current, one.count):
            tried = _shortened(current, path, one)
            lengths = _lengths(tried, architecture, wanted)
            # Lists within a layer go with it.
            if one.name in lengths and all(wanted[n] == count for n, count in lengths.items()):
                current = tried
                break
        else:
            raise CheckpointError(
                f"no number in the config of {architecture} says that {one.name} has {one.count} "
                f"layers, so that it can't say {len(one.kept)}"
            )
    return current


def renamed(name: str, lists: Sequence[LayerList]) -> str:
    """The name of a weight of the shorter model in the model that was captured."""
    for one in lists:
        if name.startswith(f"{one.name}."):
            number, _, rest = name[len(one.name) + 1 :].partition(".")
            if number.isdigit() and int(number) < len(one.kept):
                name = f"{one.name}.{one.kept[int(number)]}.{rest}"
    return name


def _contracted(graph: Graph) -> frozenset[str]:
    """Names of the weights that contractions read."""
    names: set[str] = set()
    for node in graph.weight_nodes():
        kinds = {facts.category for user in node.users if (facts := ops.facts(user.target))}
        if "contraction" in kinds or "scan" in kinds:
            names.add(str(node.target))
    return frozenset(names)


def _counts(data: Any, count: int) -> Iterator[Route]:
    """Where a config holds the number `count` under a name that may count layers."""
    for path, value in _entries(data, ()):
        names = [part for part in path if isinstance(part, str)]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and value == count and _COUNTS_LAYERS.search(names[-1]):
            yield path


def _entries(data: Any, path: Route) -> Iterator[tuple[Route, Any]]:
    pairs: Any = ()
    if isinstance(data, dict):
        pairs = cast(dict[str, Any], data).items()
    elif isinstance(data, list):
        pairs = enumerate(cast(list[Any], data))
    for key, value in pairs:
        yield (*path, key), value
        yield from _entries(value, (*path, key))


def _shortened(data: dict[str, Any], path: Route, one: LayerList) -> dict[str, Any]:
    """A copy of the config that counts fewer layers at `path`."""
    made = copy.deepcopy(data)
    owner: Any = made
    for part in path[:-1]:
        owner = owner[part]
    owner[path[-1]] = len(one.kept)
    if isinstance(owner, dict):
        _shorten_lists(cast(dict[str, Any], owner), one)
    return made


def _shorten_lists(owner: dict[str, Any], one: LayerList) -> None:
    """Lists with an entry per layer, and lists of the numbers of layers."""
    place = {old: new for new, old in enumerate(one.kept)}
    for name in _FOLLOWING & owner.keys():
        del owner[name]
    for name, value in owner.items():
        if not isinstance(value, list):
            continue
        items = cast(list[Any], value)
        if name in _INDICES:
            owner[name] = [place[item] for item in items if item in place]
        elif len(items) == one.count and _COUNTS_LAYERS.search(name):
            owner[name] = [items[old] for old in one.kept]


def _lengths(
    data: Mapping[str, Any], architecture: str, names: Mapping[str, int]
) -> dict[str, int]:
    """The lengths of the lists `names` in the model of a config; none if it can't be built."""
    try:
        model = build_without_data(config_of(data), architecture, torch.float32)
    except (ValueError, TypeError, IndexError):
        # The number is another one than that of layers.
        return {}
    modules: dict[str, Any] = dict(model.named_modules())
    return {name: len(modules[name]) for name in names if name in modules}
