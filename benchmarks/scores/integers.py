"""Linear layers in 8-bit integers: the score of each beside its measured loss."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.record import Result
from benchmarks.scores.cases import Case
from benchmarks.scores.judged import drawn, interval, spearman
from benchmarks.scores.truth import (
    Losses,
    Measured,
    measured_on_unseen,
    single_trials,
    sites_of_target,
)
from lamella.passes.base import Analyses
from lamella.passes.scores.integer_products import (
    Emulator,
    IntegerProducts,
    Numerics,
    emulators,
)
from lamella.passes.sites import Site

logger = logging.getLogger(__name__)

NUMERICS: tuple[str, ...] = get_args(Numerics)


def table(cases: Sequence[Case]) -> Result:
    """One row for each way to round inputs, with the figures of all models side by side."""
    found = [figures(case) for case in cases]
    parts = ("Spearman", "predicted / measured")
    return Result(
        "scores_integers",
        "Score of linear layers in 8-bit integers against the measured loss of each alone",
        ("inputs", *(f"{case.name}: {part}" for case in cases for part in parts)),
        [(one, *(cell for rows in found for cell in rows[one])) for one in (*NUMERICS, "all")],
        (
            "integer-products with its defaults on the first set of samples, static ranges from "
            "it too; losses on unseen sequences, one at a time: "
            + ", ".join(f"{case.name} {len(case.unseen)}" for case in cases),
            "all: all layers and ways together. Spearman: [95 % of unseen sequences drawn with "
            "replacement]. Predicted / measured: median over layers.",
        ),
    )


def figures(case: Case) -> Mapping[str, tuple[str, float]]:
    """Spearman and the median ratio, for each way and for all."""
    measured = measured_on_unseen(case)
    analyses = Analyses(case.graph, case.seen[0])
    scores = analyses.get(IntegerProducts()).losses
    truths = losses_of(measured, analyses, case.seen[0].digest)
    weights = drawn(len(measured.tokens))
    rows: dict[str, tuple[str, float]] = {}
    for label in (*NUMERICS, "all"):
        pairs = [(n, one) for n, one in truths if label in (one, "all")]
        each = torch.tensor([truths[pair] for pair in pairs], dtype=torch.float64)
        truth = weights @ each.T / (weights @ measured.tokens)[:, None]
        score = torch.tensor([scores[n][one] for n, one in pairs], dtype=torch.float64)
        ratio = float((score / truth[0]).median())
        rows[label] = (str(interval([spearman(truth, score)])), ratio)
        logger.info("%s: %s: %s", case.name, label, rows[label])
    return rows


def losses_of(
    measured: Measured, analyses: Analyses, samples: str
) -> dict[tuple[str, str], Losses]:
    """The losses of every layer in every way, all others left as they are."""
    sites = [site for site in sites_of_target(measured.graph) if site.linears]
    kernels = emulators(measured.graph, sites, analyses, NUMERICS)
    keys = {(s, one): f"{s.weight} {one} {_digest(s, kernels, samples)}"
            for s in sites for one in NUMERICS}  # fmt: skip
    new = [s for s in sites if not all(measured.knows(keys[s, one]) for one in NUMERICS)]
    for trial in single_trials(measured, new):
        for place, numerics in enumerate(NUMERICS):
            calls = {layer: _call(kernels[layer][place]) for layer in trial.site.linears}
            measure = functools.partial(trial.changed, calls)
            measured.of(keys[trial.site, numerics], measure)
    return {(s.weight, one): measured.known(key) for (s, one), key in keys.items()}


def _call(emulate: Emulator) -> Any:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        result = emulate(input)
        return result if bias is None else result + bias

    return linear


def _digest(site: Site, kernels: Mapping[Any, tuple[Emulator, ...]], samples: str) -> str:
    """Of what the kernels of a layer make of an input, and of the samples of its range."""
    width = site.shape[1]
    input = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    made = [kernel(input) for layer in site.linears for kernel in kernels[layer]]
    digest = hashlib.sha256(torch.stack(made).numpy().tobytes() + samples.encode())
    return digest.hexdigest()[:16]
