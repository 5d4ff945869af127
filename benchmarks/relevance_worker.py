"""Input times gradient, LXT, zennit and Captum, as a process that another one drives.

``python relevance_worker.py llama|vgg THREADS`` runs in an environment of its own: ``torch``, and
``transformers`` 4.52 with ``lxt`` for the language model or ``zennit`` and ``captum`` for the
network of convolutions; it imports nothing of this project. It prints the names of what it can
run, separated by commas, then obeys: a name on its standard input is run once and answered with
``done``. The models have the sizes of those in `relevance_subjects.py`, and random weights.
"""

from __future__ import annotations

import contextlib
import sys
import types

import torch
from torch import nn

GRADIENT = "input times gradient"


def main() -> None:
    """Say what there is, then obey."""
    torch.set_num_threads(int(sys.argv[2]))
    with contextlib.redirect_stdout(sys.stderr):
        calls = {"llama": llama, "vgg": vgg}.get(sys.argv[1], dict)()
    print(",".join(calls), flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print("done", flush=True)


def without_torchvision() -> None:
    """Two of them import classes of torchvision for models that are not used here."""

    class Module(types.ModuleType):
        __path__: tuple[str, ...] = ()

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (nn.Module,), {})

    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    for name in (*names, "torchvision.models.vision_transformer", "torchvision.models.vgg"):
        sys.modules[name] = Module(name)
    transformer = sys.modules["torchvision.models.vision_transformer"]
    transformer.nn = nn
    sys.modules["torchvision.models"].vision_transformer = transformer


def llama() -> dict:
    """LXT's AttnLRP of a decoder, beside the same decoder without its patches."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    ids = torch.randint(0, 4096, (2, 128))
    plain = LlamaForCausalLM(config).eval().requires_grad_(False)

    def explain(model: nn.Module) -> torch.Tensor:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.mean().backward()
        return embedded.detach() * embedded.grad

    calls = {GRADIENT: lambda: explain(plain)}
    try:
        without_torchvision()
        from lxt.efficient import monkey_patch
    except ImportError as error:
        print(f"without LXT: {error}", file=sys.stderr)
        return calls
    # LXT patches classes: the plain model would run its forwards, so it gets a copy of them.
    before = {
        name: (getattr(modeling_llama, name), dict(vars(getattr(modeling_llama, name))))
        for name in ("LlamaMLP", "LlamaRMSNorm")
    }
    attention = dict(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    eager = modeling_llama.eager_attention_forward
    monkey_patch(modeling_llama, verbose=False)
    after = {name: kind.forward for name, (kind, _) in before.items()}
    patched = dict(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    patched_eager = modeling_llama.eager_attention_forward

    def switch(on: bool) -> None:
        for name, (kind, held) in before.items():
            kind.forward = after[name] if on else held["forward"]
        modeling_llama.ALL_ATTENTION_FUNCTIONS.update(patched if on else attention)
        modeling_llama.eager_attention_forward = patched_eager if on else eager

    def run(on: bool) -> torch.Tensor:
        switch(on)
        return explain(plain)

    return {GRADIENT: lambda: run(False), "LXT attnlrp": lambda: run(True)}


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

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.features(pixels).flatten(1))


def vgg() -> dict:
    """Rules of zennit and Captum for a network of convolutions."""
    model, pixels = Vgg().eval().requires_grad_(False), torch.randn(8, 3, 64, 64)
    start = torch.full((8, 10), 1 / 80)

    def gradient() -> torch.Tensor:
        x = pixels.clone().requires_grad_()
        model(x).mean().backward()
        return x.detach() * x.grad

    calls = {GRADIENT: gradient}
    for add in (_zennit, _captum):
        try:
            calls |= add(model, pixels, start)
        except ImportError as error:
            print(f"without {add.__name__[1:]}: {error}", file=sys.stderr)
    return calls


def _zennit(model: nn.Module, pixels: torch.Tensor, start: torch.Tensor) -> dict:
    without_torchvision()
    import zennit.composites
    import zennit.rules
    import zennit.types

    def of(rule: object) -> object:
        return zennit.composites.LayerMapComposite(
            [(zennit.types.Activation, zennit.rules.Pass()), (zennit.types.Linear, rule)]
        )

    def run(composite: object) -> torch.Tensor:
        x = pixels.clone().requires_grad_()
        with composite.context(model) as hooked:
            (found,) = torch.autograd.grad(hooked(x), x, start)
        return found

    rules = {
        "zennit epsilon": of(zennit.rules.Epsilon()),
        "zennit z-plus": of(zennit.rules.ZPlus()),
        "zennit gamma": of(zennit.rules.Gamma(0.25)),
        "zennit alpha2-beta1": of(zennit.rules.AlphaBeta(2.0, 1.0)),
    }
    return {name: lambda composite=composite: run(composite) for name, composite in rules.items()}


def _captum(model: nn.Module, pixels: torch.Tensor, start: torch.Tensor) -> dict:
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.rule = EpsilonRule()
    explainer = LRP(model)
    target = torch.zeros(8, dtype=torch.int64)
    return {"Captum epsilon": lambda: explainer.attribute(pixels.clone(), target=target)}


if __name__ == "__main__":
    main()
