"""``python -m benchmarks.mixed_decode``: plans of mixed widths beside 4 bits in blocks of 32.

Milliseconds a token behind 128 others, and the divergence from the unchanged model on unseen
tokens, for the trained language model and for one of 88 million random weights. ``--part loss``
and ``--part time`` do one of the two, ``--models`` and ``--budgets`` some of them; time alone
needs the machine for itself. Budgets are bits a weight with scales: 4 bits in blocks of 32 take
4.5, and 4.25 bits beside them without scales 4.75 with.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import lamella
from benchmarks.decoders.candidate import STEPS, llama
from benchmarks.decoders.ours import candidate
from benchmarks.record import RESULTS, Result
from benchmarks.scores.cases import outputs
from benchmarks.zoo.language_model import language_model, windows
from lamella import api
from lamella.data import Batch, Samples
from lamella.ir.graph import Graph
from lamella.ir.plan import Plan, PlanEntry
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.base import Analyses
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import find_sites
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.timing import measure

logger = logging.getLogger(__name__)

UNIFORM = "4 bits, blocks of 32"
BUDGETS = (4.25, 4.5, 4.75)
METHODS = {"trained, 10 M": ("rtn", "gptq"), "random, 88 M": ("rtn",)}
"""Ways of rounding whose losses are measured."""

SCORES = {"trained, 10 M": "fisher", "random, 88 M": "weight-error"}
"""What plans are made by: nothing more is known of weights that are random."""

PAST, ROUNDS = 128, 40
KEPT = RESULTS / "mixed_decode_loss.json"


def trained() -> tuple[Graph, list[Batch], list[Batch]]:
    """The trained language model with what is seen and unseen."""
    source = api.read(language_model())
    seen, unseen = (
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(8)]
        for rows in (
            windows(source.tokenizer, "calibration", 128, 32),
            windows(source.tokenizer, "test", 128, 32),
        )
    )
    return source.graph, seen, unseen


def random() -> tuple[Graph, list[Batch], list[Batch]]:
    """88 million random weights and random tokens."""
    graph = lamella.capture(llama())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8192, (12, 64), generator=generator)
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(4)]
    return graph, batches[:2], batches[2:]


MODELS: dict[str, Callable[[], tuple[Graph, list[Batch], list[Batch]]]] = {
    "trained, 10 M": trained,
    "random, 88 M": random,
}


def main() -> None:
    """Quantize, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("loss", "time"))
    parser.add_argument("--plans", type=Path, default=Path(".cache/mixed_decode"))
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("lamella").setLevel(logging.WARNING)
    if options.part != "time":
        for name in options.models:
            found = losses(name, options.budgets, options.plans)
            kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
            kept[name] = kept.get(name, {}) | found
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    if options.part != "loss":
        publish(options.plans)


def losses(name: str, budgets: Sequence[float], folder: Path) -> dict[str, float]:
    """The divergence of each candidate; their plans are kept in `folder`."""
    graph, seen, unseen = MODELS[name]()
    target, reference = loss_target(graph), outputs(graph, unseen)
    found: dict[str, float] = {}
    for label, plan in plans(graph, seen, budgets, SCORES[name]).items():
        plan.write(path_of(folder, name, label))
        for method in METHODS[name]:
            edited = graph.copy()
            edited.plan, edited.plan_made = plan.formats, plan
            lamella.transform(edited, [f"quantize-weights method={method}"], samples=seen)
            rows = zip(reference, outputs(edited, unseen), strict=True)
            total = sum(target.loss(one, two) for one, two in rows)
            found[f"{label}, {method}"] = total / sum(len(one) for one in reference)
            logger.info("%s, %s, %s: %.4g", name, label, method, found[f"{label}, {method}"])
    return found


def plans(
    graph: Graph, seen: Sequence[Batch], budgets: Sequence[float], by: str
) -> dict[str, Plan]:
    """One width for all, and what `allocate-bits` does with each budget; scored once."""
    wide = Format(4, 32)
    uniform = {
        s.weight: PlanEntry(wide, s.shape, weight_bytes(s.shape, wide)) for s in find_sites(graph)
    }
    found = {UNIFORM: Plan(uniform)}
    analyses = Analyses(graph, Samples.of(seen))
    for budget in budgets:
        AllocateBits(budget=budget, by=by, min_size=0).run(graph, analyses)
        assert graph.plan_made is not None
        found[f"mixed, {budget:g} bits"] = graph.plan_made
    return found


def path_of(folder: Path, name: str, label: str) -> Path:
    """Where a plan is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}, {label}.json"


def publish(folder: Path) -> None:
    """Time the steps in turns, and publish them with the losses."""
    kept = json.loads(KEPT.read_text())
    rows: list[tuple[object, ...]] = []
    for name, of_model in kept.items():
        graph, *_ = MODELS[name]()
        calls, bits = {}, {}
        for label in dict.fromkeys(one.rpartition(", ")[0] for one in of_model):
            plan = Plan.read(path_of(folder, name, label))
            edited = graph.copy()
            edited.plan = plan.formats
            # Time does not hang on how the codes were found.
            lamella.transform(edited, ["quantize-weights"])
            entries = sum(shape[0] * shape[1] for shape in (e.shape for e in plan.entries.values()))
            bits[label] = 8 * plan.bytes / entries
            calls[label] = candidate(label, edited, 512).decode(PAST)
        timings = measure(calls, rounds=ROUNDS)
        rows += [
            (
                name,
                label,
                bits[label],
                timings[label].median_seconds * 1e3 / STEPS,
                of_model[f"{label}, rtn"],
                of_model.get(f"{label}, gptq", "-"),
            )
            for label in calls
        ]
    Result(
        "mixed_decode",
        f"One token behind {PAST}, medians of {ROUNDS} interleaved turns of {STEPS} tokens",
        ("model", "plan", "bits a weight, with scales", "ms", "KL, rtn", "KL, gptq"),
        rows,
        (
            "KL from the unchanged model on unseen tokens. Mixed: allocate-bits budget=BITS "
            "min_size=0, scored for rounding to nearest; 4.25 bits beside 4 without scales are "
            "4.75 with the half bit of scales that blocks of 32 have.",
            "The losses of random weights say only how much is rounded; their plans are by "
            "weight-error.",
        ),
    ).publish()


if __name__ == "__main__":
    main()
