"""The model that a checkpoint of an edited graph will be loaded as, without its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lamella.checkpoints.layers import (
    LayerList,
    config_of,
    layer_lists,
    renamed,
    with_layers_left,
)
from lamella.errors import CheckpointError
from lamella.ir.capture import Inputs
from lamella.ir.graph import Graph
from lamella.ir.meta import build_without_data, capture_config
from lamella.ir.torch_private import tree_unflatten
from lamella.rewrite.canonicalize import canonicalize


@dataclass(frozen=True)
class Reference:
    """What transformers will build from the config that is written.

    Attributes:
        config: The config, with the layers that are left.
        model: The model without data: its names of weights are those of transformers.
        graph: The canonical graph of the model, without data.
        captured: The model that was captured, without data, before layers were dropped.
        lists: Its lists of layers, and which of them are left.
    """

    config: PreTrainedConfig
    model: PreTrainedModel
    graph: Graph
    captured: PreTrainedModel
    lists: tuple[LayerList, ...]

    def name_before(self, name: str) -> str:
        """What a weight was called when the model was captured."""
        return renamed(name, self.lists)


def captured_config(graph: Graph) -> PreTrainedConfig:
    """The config of the model that `graph` was captured from.

    Raises:
        CheckpointError: That was no model of transformers, or `graph` has a cache.
    """
    origin = graph.origin
    if origin.kind != "transformers" or origin.config is None:
        raise CheckpointError(
            f"a checkpoint can be written for a model of transformers only, and this graph was "
            f"captured from another kind of model ({origin.kind}); capture the model itself or "
            f"its folder"
        )
    if graph.cache is not None:
        raise CheckpointError(
            "a checkpoint is written from the graph without a cache, the one that passes edit"
        )
    return config_of(origin.config)


def reference_of(graph: Graph) -> Reference:
    """The model whose graph `graph` has become.

    Raises:
        CheckpointError: `graph` is not of a model of transformers, or no config says which
            layers are left.
    """
    before = captured_config(graph)
    architecture, dtype = graph.origin.architecture, _dtype_of(graph)
    captured = build_without_data(before, architecture, dtype)
    lists = layer_lists(graph, captured)
    config = config_of(with_layers_left(graph.origin.config or {}, architecture, lists))
    config.architectures = [architecture]
    config.dtype = dtype
    model = build_without_data(config, architecture, dtype)
    inputs, dynamic = _call_of(graph)
    built = capture_config(config, inputs, task_class=architecture, dtype=dtype, dynamic=dynamic)
    canonicalize(built)
    return Reference(config, model, built, captured, lists)


def _dtype_of(graph: Graph) -> torch.dtype:
    """The dtype that most floating weights have; scales of codes are no weights."""
    dtypes = Counter(
        node.meta["val"].dtype
        for node in graph.weight_nodes()
        if node.meta["val"].is_floating_point() and not str(node.target).endswith("_scales")
    )
    return dtypes.most_common(1)[0][0] if dtypes else torch.float32


def _call_of(graph: Graph) -> tuple[Inputs, bool | Mapping[str, list[int]]]:
    """Inputs of the sizes that `graph` was captured with, and which axes of them may vary."""
    values = [_sample(node.meta["val"]) for node in graph.inputs]
    args, kwargs = tree_unflatten(values, graph.signature.in_spec)
    if not args and set(kwargs) == set(graph.signature.inputs):
        return kwargs, {
            name: [axis for axis, size in enumerate(_sizes(node)) if isinstance(size, SymInt)]
            for name, node in zip(graph.signature.inputs, graph.inputs, strict=True)
        }
    varies = any(isinstance(size, SymInt) for node in graph.inputs for size in _sizes(node))
    return (args or kwargs), varies


def _sizes(node: Any) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _sample(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    sizes = [size.node.hint if isinstance(size, SymInt) else size for size in value.shape]
    return torch.ones(sizes, dtype=value.dtype)
