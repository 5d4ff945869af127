"""Graphs of models whose weights are not in memory: from a config, or from a folder.

The model is built without data, its non-persistent buffers (rotary frequencies, position ids) are
computed, and it is traced with fake weights. The graph knows the shape and type of every weight;
for a folder, each is read from memory-mapped safetensors when a pass asks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lamella.ir.capture import Inputs, capture_module
from lamella.ir.checkpoint_names import source_of
from lamella.ir.default_inputs import default_inputs
from lamella.ir.graph import Graph
from lamella.ir.huggingface import model_class, origin_of, read_config
from lamella.ir.model_folder import read_weight_map
from lamella.ir.torch_private import FakeTensorMode, symbolic_mode


def capture_config(
    source: PreTrainedConfig | str | os.PathLike[str],
    inputs: Inputs | None = None,
    *,
    task_class: type[PreTrainedModel] | str | None = None,
    dtype: torch.dtype | None = None,
    dynamic: bool | Mapping[str, Sequence[int]] = True,
) -> Graph:
    """The graph of a model without its weights in memory; it is not canonical yet.

    Args:
        source: A config, or a folder with ``config.json``. Weights are read lazily from the
            safetensors of a folder; the graph of a config has none to read. A config that was
            never saved names no architecture: give `task_class`, or the base model is built.
        inputs: Sample inputs, or None to make them from the config.
        task_class: As in `load_pretrained`.
        dtype: Of the weights; None takes that of the config, or float32.
        dynamic: As in `capture_module`.

    Raises:
        CaptureError: The model can't be traced.
        ModelFileError: A file of the folder is missing, corrupt or lies, or the checkpoint lacks
            weights of the model.
    """
    folder = None if isinstance(source, PreTrainedConfig) else Path(source)
    config = source if isinstance(source, PreTrainedConfig) else read_config(Path(source))
    stored = {} if folder is None else read_weight_map(folder)
    model = build_without_data(config, task_class, dtype or _dtype_of(config))
    reader = None if folder is None else source_of(folder, model, stored)
    origin = dataclasses.replace(origin_of(model), folder=folder and str(folder.resolve()))
    chosen = default_inputs(model) if inputs is None else inputs
    with _fake_weights(model):
        graph = capture_module(model, chosen, dynamic=dynamic, origin=origin)
    graph.source = reader
    return graph


def build_without_data(
    config: PreTrainedConfig,
    task_class: type[PreTrainedModel] | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model in inference mode whose weights are on the meta device and whose tables are real."""
    made = model_class(config, task_class)
    # `from_config` of an automatic class is public; that of a model class is not.
    build = getattr(made, "_from_config", None) or made.from_config
    with torch.device("meta"):
        model: PreTrainedModel = build(config, dtype=dtype)
    model.tie_weights()
    for module in model.modules():
        _forget_data(module)
        _compute_tables(model, module)
    return model.eval()


def _forget_data(module: nn.Module) -> None:
    """Parameters that were made by constructors which ignore the meta device hold noise."""
    for name, value in list(module.named_parameters(recurse=False)):
        if not value.is_meta:
            empty = torch.empty_like(value, device="meta")
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def _compute_tables(model: PreTrainedModel, module: nn.Module) -> None:
    """Make the buffers of `module` real that no checkpoint holds."""
    persistent = module.state_dict(keep_vars=True)
    tables = {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta and name not in persistent
    }
    for name, buffer in tables.items():
        module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
    if tables:
        # This is how transformers itself fills them after it has built a model without data.
        with torch.no_grad():
            model._init_weights(module)  # pyright: ignore[reportPrivateUsage]


@contextlib.contextmanager
def _fake_weights(model: nn.Module) -> Generator[None]:
    """Weights that look as if they lay in the memory of the CPU, while the block runs."""
    mode = symbolic_mode()
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False)
        for name, value in [*parameters, *module.named_buffers(recurse=False)]:
            if value.is_meta:
                replaced.append((module, name, value))
                _put(module, name, fakes.setdefault(id(value), _fake(mode, value)))
    try:
        yield
    finally:
        for module, name, value in replaced:
            _put(module, name, value)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` stand for the parameter or (persistent) buffer `name`."""
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    with mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
        is_parameter = isinstance(value, nn.Parameter)
        return nn.Parameter(fake, requires_grad=False) if is_parameter else fake


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a config names, or float32."""
    named: Any = config.dtype
    found = getattr(torch, named, None) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) else torch.float32
