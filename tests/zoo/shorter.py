"""Models of transformers without some of their layers, edited as modules: no graph is involved."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LISTS = ("layers", "h", "block")
_COUNTS = (
    ("num_hidden_layers",),
    ("num_layers", "num_decoder_layers"),
    ("encoder_layers", "decoder_layers"),
)


def without_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy of `model` without one layer of each stack.

    Args:
        model: A language model of transformers.
        layers: Which layer of each stack goes, in the order encoder, decoder.
    """
    model = copy.deepcopy(model)
    stacks = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in _LISTS and len(module) == 3
    ]
    for stack, gone in zip(stacks, layers, strict=True):
        del stack[gone]
        for index, layer in enumerate(stack):
            _renumber(layer, index)
    for config in {id(one): one for one in _configs(model)}.values():
        _count(config, layers)
    return model


def without_sublayer(model: nn.Module, name: str) -> nn.Module:
    """A copy of `model` in which the module `name` gives zero."""
    model = copy.deepcopy(model)
    model.get_submodule(name).register_forward_hook(_zeroed)
    return model


def _renumber(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            setattr(module, "layer_idx", index)  # noqa: B010  (no attribute of nn.Module)


def _configs(model: nn.Module) -> list[Any]:
    """Every config in use: the stacks of T5 have copies of their own."""
    return [m.config for m in model.modules() if hasattr(m, "config")]


def _count(config: Any, layers: Sequence[int]) -> None:
    for names in _COUNTS:
        if len(names) == len(layers) and all(hasattr(config, name) for name in names):
            for name in names:
                setattr(config, name, getattr(config, name) - 1)
    computed = isinstance(getattr(type(config), "layer_types", None), property)
    kinds = None if computed else getattr(config, "layer_types", None)
    if kinds is not None and len(layers) == 1:
        config.layer_types = [kind for i, kind in enumerate(kinds) if i != layers[0]]


def _zeroed(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    assert isinstance(output, Tensor)
    return torch.zeros_like(output)
