"""Models of Hugging Face: from a folder, safely, and with sample inputs from their config."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lamella.errors import CaptureError, ModelFileError, closest
from lamella.ir.capture import capture_module
from lamella.ir.default_inputs import default_inputs
from lamella.ir.graph import Graph
from lamella.ir.model_folder import CONFIG, check_finite, read_json, read_weight_map
from lamella.ir.weights import Origin

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Any] | Sequence[Any]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a model of transformers, with a config."""
    return isinstance(model, PreTrainedModel)


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    task_class: type[PreTrainedModel] | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, Any | None]:
    """A model from a folder with ``config.json`` and safetensors, and its tokenizer.

    Headers are checked and all weights are looked at for NaN before transformers builds the
    model. Pickles are never read and no code in the folder is run. Weights that the checkpoint
    lacks are an error (transformers would fill them with random numbers); those that it has
    too many of are logged.

    Args:
        path: The folder.
        task_class: The class to build, or its name in transformers; None takes the
            architecture that the config names, or `AutoModel` when it names none.
        dtype: Of the weights in memory, whatever the files hold.

    Returns:
        The model in inference mode, and the tokenizer or None when the folder has none.

    Raises:
        ModelFileError: A file is missing, corrupt or lies; the message names it.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = read_weight_map(folder)
    check_finite(weights)
    made = model_class(config, task_class)
    with _quiet():
        model, info = made.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    _check_loaded(folder, type(model).__name__, info)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in a folder, or None when there is none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def capture_pretrained(
    model: PreTrainedModel | nn.Module,
    inputs: Inputs | None = None,
    *,
    dynamic: bool | Mapping[str, Sequence[int]] = True,
) -> Graph:
    """The graph of a model of transformers; inputs are made from its config when not given.

    Raises:
        CaptureError: The model can't be traced, or no inputs are known for it.
    """
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(f"{type(model).__name__} is no model of transformers")
    chosen = default_inputs(model) if inputs is None else inputs
    return capture_module(model, chosen, dynamic=dynamic, origin=origin_of(model))


def origin_of(model: PreTrainedModel) -> Origin:
    """Where a model of transformers came from."""
    folder = model.name_or_path
    return Origin(
        kind="transformers",
        architecture=type(model).__name__,
        config=cast(dict[str, object], model.config.to_dict()),
        generation=_generation_of(model),
        folder=str(Path(folder).resolve()) if folder and Path(folder).is_dir() else None,
    )


def _generation_of(model: PreTrainedModel) -> dict[str, object] | None:
    config = getattr(model, "generation_config", None)
    return config.to_dict() if config is not None and model.can_generate() else None


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder.

    Raises:
        ModelFileError: It is missing, no JSON, or of a type that transformers doesn't know.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise ModelFileError(f"there is no folder {str(folder)!r}")
    data = read_json(path)
    known = transformers.CONFIG_MAPPING
    kind = data.get("model_type")
    if kind not in known:
        hint = closest(str(kind), known) if kind else ""
        code = "; the folder brings its own code, which is never run" if "auto_map" in data else ""
        raise ModelFileError(
            f"{str(path)!r} has the model_type {kind!r}, which transformers "
            f"{transformers.__version__} doesn't know{hint}{code}"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{str(path)!r} is no valid config of {kind}: {error}") from error


def model_class(config: PreTrainedConfig, task_class: type[PreTrainedModel] | str | None) -> Any:
    """The class to build for a config.

    Raises:
        ModelFileError: `task_class` is no model of transformers.
    """
    if isinstance(task_class, type):
        return task_class
    names = [task_class] if task_class else list(config.architectures or ())
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and (issubclass(found, PreTrainedModel) or "Auto" in name):
            return found
    if task_class:
        raise ModelFileError(f"transformers {transformers.__version__} has no model {task_class!r}")
    return AutoModel


def _check_loaded(folder: Path, name: str, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        raise ModelFileError(
            f"{str(folder)!r} lacks weights of {name}: {', '.join(missing)}; give the class that "
            f"the checkpoint was saved from"
        )
    if wrong:
        raise ModelFileError(
            f"{str(folder)!r} has weights of other shapes than its config says: {', '.join(wrong)}"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning("%s doesn't use weights of %s: %s", name, folder, ", ".join(unexpected))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """No progress bar and no report of transformers on the terminal while the block runs."""
    shown = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
