"""Two small image classifiers on scikit-learn's handwritten digits."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.zoo.cache import cached

logger = logging.getLogger(__name__)

Split = Literal["train", "calibration", "test"]


@dataclass(frozen=True)
class Training:
    """How a classifier is trained; every field is part of the key of the cache."""

    kind: Literal["vit", "cnn"]
    epochs: int = 40
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    threads: int = 2
    seed: int = 0


def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Images of a split, enlarged to 32 x 32, and their labels.

    Returns:
        Pixels, float32 ``[images, 1, 32, 32]``, about zero mean and unit scale; labels, int64.
    """
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:1200], "calibration": order[1200:1400], "test": order[1400:]}
    pixels = (torch.tensor(data.images, dtype=torch.float32)[parts[split]] - 4.9) / 6.0
    images = torch.nn.functional.interpolate(pixels.unsqueeze(1), size=32, mode="nearest")
    return images, torch.tensor(data.target)[parts[split]]


def digits_vit() -> Path:
    """The folder of a 6-block vision transformer."""
    return _trained(Training("vit"))


def digits_cnn() -> Path:
    """The folder of a small ResNet."""
    return _trained(Training("cnn"))


def accuracy(model: object, split: Split = "test") -> float:
    """Share of right labels, of anything that returns ``.logits``."""
    images, labels = digits(split)
    predicted = model(pixel_values=images).logits.argmax(-1)  # type: ignore[operator]
    return float((predicted == labels).float().mean())


def _trained(training: Training) -> Path:
    key = {**asdict(training), "torch": torch.__version__.split("+")[0]}
    return cached(f"digits-{training.kind}", key, lambda folder: _train(folder, training))


def _model(kind: str) -> PreTrainedModel:
    if kind == "vit":
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=96,
                num_hidden_layers=6,
                num_attention_heads=6,
                intermediate_size=192,
                image_size=32,
                patch_size=4,
                num_channels=1,
                num_labels=10,
            )
        )
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[2, 2, 2],
            layer_type="basic",
            num_labels=10,
        )
    )


def _train(folder: Path, training: Training) -> None:
    started = time.monotonic()
    torch.set_num_threads(training.threads)
    images, labels = digits("train")
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = _model(training.kind)
        steps = training.epochs * (len(images) // training.batch)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=training.learning_rate, total_steps=steps
        )
        model.train()
        generator = torch.Generator().manual_seed(training.seed)
        for _ in range(training.epochs):
            for order in torch.randperm(len(images), generator=generator).split(training.batch):
                if len(order) < training.batch:
                    continue
                loss = model(pixel_values=images[order], labels=labels[order]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    model.eval()
    with torch.no_grad():
        reached = accuracy(model)
    model.save_pretrained(folder)
    record = {
        "seconds": round(time.monotonic() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": reached,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    logger.info("accuracy %.4f after %.0f s", reached, record["seconds"])
