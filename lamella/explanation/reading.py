"""What is explained, as the command line is given it: a text, a file of tensors, or an image."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import transformers

from lamella.errors import BackendError, SamplesError
from lamella.sample_files import read_samples

_TENSORS = (".safetensors", ".npz")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_inputs(model: str, given: str) -> str | Mapping[str, Any]:
    """The text, or the inputs that a file holds.

    Args:
        model: Folder or hub id, which says how images are prepared.
        given: The name of a file (``.safetensors``, ``.npz``, or an image), or else a text.

    Raises:
        SamplesError: The file is missing or corrupt, or the model takes no images.
        BackendError: The package that reads images is not installed.
    """
    path = Path(given)
    if path.suffix.lower() not in (*_TENSORS, *_IMAGES) or " " in given:
        return given
    if not path.is_file():
        raise SamplesError(f"there is no file {given!r}; a text that looks like one needs a space")
    if path.suffix.lower() in _IMAGES:
        return _image(model, path)
    return cast(Mapping[str, Any], read_samples(path)[0])


def _image(model: str, path: Path) -> Mapping[str, Any]:
    """An image as the processor of the model prepares it."""
    if importlib.util.find_spec("PIL") is None:
        raise BackendError(
            "images need the package pillow; install it with pip install 'lamella[plots]', or give "
            "the inputs as a .safetensors or .npz file"
        )
    prepare = _processor(model)
    pillow: Any = importlib.import_module("PIL.Image")
    try:
        image = pillow.open(path).convert("RGB")
    except (pillow.UnidentifiedImageError, OSError) as error:
        raise SamplesError(f"{str(path)!r} is no image that can be read ({error})") from error
    return {"pixel_values": prepare(image, return_tensors="pt")["pixel_values"]}


def _processor(model: str) -> Any:
    # It tells that it works without torchvision, which is no news.
    logging.getLogger("transformers.image_processing_utils").addFilter(lambda _: False)
    try:
        return transformers.AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SamplesError(
            f"model {model!r} says nothing of how images are prepared (it has no "
            f"preprocessor_config.json); give its inputs as a .safetensors or .npz file"
        ) from error
