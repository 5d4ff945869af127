"""The presets `attnlrp` and `cp` beside LXT, which is no dependency: skipped where it is missing.

LXT replaces forwards of classes so that gradient times input is relevance; what it replaces is put
back. Where it has code for a model, that runs: its maps for Llama, Qwen3 and torchvision's ViT,
and its own classes of BERT. It has no `cp` for BERT and no `attnlrp` for a ViT: there its patches
of norms, activations and attention are put on the classes of transformers.

Both sides compute in float64 all through: transformers and LXT ask for float32 in norms and get
float64. LXT divides by the input of an activation plus 1e-10, and so do we here; our own secants,
without it, give up to 5e-8 of the largest relevance more or less (Qwen3, `attnlrp`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import pytorch_utils
from transformers.activations import GELUActivation
from transformers.modeling_utils import AttentionInterface
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.vit import modeling_vit

from lamella.ir.capture import capture_module
from lamella.passes.relevance.emit import emit
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance.elementwise import stabilized_activations
from lamella.rules.relevance.presets import PRESETS
from tests.instead import Instead
from tests.zoo.families import FAMILIES, Inputs, draw_weights

# The bound of issue 4 for peers in float64, of the largest relevance.
RELATIVE = 1e-8

EPSILON = 1e-10
"""That of LXT, in its identity rule."""

PRESETS_OF_LXT = ("attnlrp", "cp")
NOT_INSTALLED = "a peer to compare with, no part of the test extra: LXT brings torchvision"

Patches = Mapping[Any, Callable[[Any], bool]]


@dataclass(frozen=True)
class Lxt:
    """The parts of LXT that are used."""

    models: ModuleType
    patches: ModuleType
    monkey_patch: Callable[[ModuleType, Patches], None]

    def by_hand(self, modeling: ModuleType, preset: str) -> Patches:
        """LXT's patches for a model of transformers with LayerNorm and GELU."""
        one = self.patches
        attention = {"attnlrp": one.patch_attention, "cp": one.patch_cp_attention}[preset]
        secant = partial(one.patch_method, one.non_linear_forward, keep_original=True)
        norm = partial(one.patch_method, one.layer_norm_forward)
        return {GELUActivation: secant, nn.LayerNorm: norm, modeling: attention}


@pytest.fixture
def lxt(monkeypatch: pytest.MonkeyPatch) -> Lxt:
    """LXT in float64."""
    pytest.importorskip("lxt", reason=NOT_INSTALLED)
    pytest.importorskip("torchvision.models.vision_transformer", reason=NOT_INSTALLED)
    # Heads are not pruned any more in transformers 5; LXT's copy of BERT imports the name.
    monkeypatch.setattr(pytorch_utils, "find_pruneable_heads_and_indices", None, raising=False)
    names = ("models", "patches", "core")
    models, patches, core = (importlib.import_module(f"lxt.efficient.{name}") for name in names)
    wide = Instead(torch, float32=torch.float64)
    for module in (modeling_llama, modeling_qwen3, patches):
        monkeypatch.setattr(module, "torch", wide)
    return Lxt(models, patches, core.monkey_patch)


@contextlib.contextmanager
def patched(lxt: Lxt, modeling: ModuleType, patches: Patches) -> Iterator[None]:
    """LXT's patches; classes and modules are afterwards as before."""
    before = [(target, dict(vars(target))) for target in patches]
    if modeling in patches:
        # The functions of transformers are shared by all models, and no plain dict.
        modeling.ALL_ATTENTION_FUNCTIONS = AttentionInterface()
    lxt.monkey_patch(modeling, patches)
    if modeling in patches:
        functions = AttentionInterface()
        functions.update(modeling.ALL_ATTENTION_FUNCTIONS)
        modeling.ALL_ATTENTION_FUNCTIONS = functions
    try:
        yield
    finally:
        for target, held in before:
            _restore(target, held)


def _restore(target: Any, held: Mapping[str, Any]) -> None:
    for name in vars(target).keys() - held.keys():
        delattr(target, name)
    for name, value in held.items():
        if vars(target)[name] is not value:
            setattr(target, name, value)


def gradient_times(start: Tensor, call: Callable[[Tensor], Tensor], seed: Tensor) -> Tensor:
    """Input times gradient at `start`, which is relevance while the patches hold."""
    leaf = start.detach().clone().requires_grad_()
    call(leaf).backward(seed)
    assert leaf.grad is not None
    return leaf.detach() * leaf.grad


def ours(model: nn.Module, inputs: Inputs, preset: str, seed: Tensor) -> Tensor:
    """Relevance of the first input that carries some."""
    graph = capture_module(model, inputs)
    canonicalize(graph)
    emitted = emit(graph, PRESETS[preset].where(stabilized_activations(EPSILON)))
    return emitted.graph(**inputs, seed=seed)[f"relevance.{next(iter(emitted.sources))}"]


def seed_for(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64)


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=RELATIVE * float(want.abs().max()))


def assert_same_on_text(
    lxt: Lxt,
    family: str,
    modeling: ModuleType,
    patches: Patches,
    preset: str,
    twin: Callable[[Any], Callable[..., Any]] = lambda model: model,
) -> None:
    """Relevance of the embeddings of tokens; LXT explains `twin` of the model."""
    model, inputs = FAMILIES[family].build().double(), FAMILIES[family].inputs()
    mask = inputs["attention_mask"]
    seed = seed_for(model(**inputs)[0])
    got = ours(model, inputs, preset, seed)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with patched(lxt, modeling, patches):
        explained = twin(model)
        want = gradient_times(
            embedded, lambda x: explained(inputs_embeds=x, attention_mask=mask)[0], seed
        )
    assert_same(got, want)


@pytest.mark.parametrize("preset", PRESETS_OF_LXT)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoders_are_as_in_lxt(lxt: Lxt, family: str, preset: str):
    modeling = {"llama": modeling_llama, "qwen3": modeling_qwen3}[family]
    known = getattr(lxt.models, family)
    patches = {"attnlrp": known.attnLRP, "cp": known.cp_LRP}[preset]
    assert_same_on_text(lxt, family, modeling, patches, preset)


@pytest.mark.filterwarnings("ignore:The attention mask API:FutureWarning")  # LXT's copy calls it.
def test_bert_is_as_the_bert_of_lxt(lxt: Lxt):
    """Its own classes, with the same weights, explained by its own map."""

    def twin(model: Any) -> Callable[..., Any]:
        # What transformers 5 does not have any more: a kind of positions, and hidden heads.
        model.config.position_embedding_type = "absolute"
        made = modeling_bert.BertModel(model.config).double().eval()
        assert type(made).__module__.startswith("lxt.")
        made.load_state_dict(model.state_dict())
        made.get_head_mask = lambda mask, layers: [mask] * layers
        return partial(made, return_dict=False)

    patches = lxt.models.bert.attnLRP
    assert_same_on_text(lxt, "bert", modeling_bert, patches, "attnlrp", twin)


@pytest.mark.parametrize("preset", PRESETS_OF_LXT)
def test_bert_is_as_under_the_patches_of_lxt(lxt: Lxt, preset: str):
    patches = lxt.by_hand(modeling_bert, preset)
    assert_same_on_text(lxt, "bert", modeling_bert, patches, preset)


@pytest.mark.parametrize("preset", PRESETS_OF_LXT)
def test_vit_is_as_under_the_patches_of_lxt(lxt: Lxt, preset: str):
    model = FAMILIES["vit"].build().double()
    pixels = FAMILIES["vit"].inputs()["pixel_values"].double()
    seed = seed_for(model(pixels).logits)
    got = ours(model, {"pixel_values": pixels}, preset, seed)
    with patched(lxt, modeling_vit, lxt.by_hand(modeling_vit, preset)):
        want = gradient_times(pixels, lambda x: model(x).logits, seed)
    assert_same(got, want)


def test_the_vit_of_torchvision_is_as_in_lxt(lxt: Lxt):
    """By LXT's own map, which is `cp` in attention."""
    vision = importlib.import_module("torchvision.models.vision_transformer")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vision.VisionTransformer(**sizes, hidden_dim=32, mlp_dim=64)
        draw_weights(model)
    model = model.double().eval()
    x = FAMILIES["vit"].inputs()["pixel_values"].double()
    seed = seed_for(model(x))
    got = ours(model, {"x": x}, "cp", seed)
    with patched(lxt, vision, lxt.models.vit_torch.cp_LRP):
        want = gradient_times(x, model, seed)
    assert_same(got, want)
