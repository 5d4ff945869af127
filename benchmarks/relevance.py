"""Seconds and memory of a relevance graph, against input times gradient by autograd.

    python -m benchmarks.relevance [--rounds 10] [--subject vit] [--compiled FOLDER]
                                   [--peers PYTHON] [--record]

Everything takes turns in one run, with frozen weights: autograd a forward and a backward to the
input (or the embeddings), ours the graph that `lamella.passes.relevance.emit` makes, in eager
PyTorch and compiled by AOTInductor (packages are kept in FOLDER and used again). Memory is
measured in processes of their own (`benchmarks.relevance_peaks`). With an interpreter that has
zennit, LXT or Captum, `benchmarks/relevance_worker.py` runs them beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import lamella
from benchmarks.record import Result, load
from benchmarks.relevance_peaks import GRADIENT, calls_of, peaks_of
from benchmarks.relevance_peers import Peers
from benchmarks.relevance_subjects import SUBJECTS, Subject
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.backends.torch.aot import AotBackend
from lamella.timing import Timing, measure

Row = tuple[object, ...]
MEGABYTE = 1 << 20
COLUMNS = (
    *("model", "rules", "ms", "of input times gradient", "least ms", "of its least"),
    *("peak MiB", "of its peak"),
)


def main() -> None:
    """Measure and publish."""
    options = _options()
    torch.set_num_threads(physical_cores())
    names = [options.subject] if options.subject else list(SUBJECTS)
    peaks = {name: _peaks(name, options.peaks) for name in names}
    rows = [row for name in names for row in _rows(name, options, peaks[name])]
    rows = [*_recorded_beside(rows), *rows] if options.subject and options.record else rows
    result = Result(
        "relevance",
        "Relevance of the inputs: medians of interleaved calls, and peak memory of one",
        COLUMNS,
        rows,
        (
            "Each model in a run of its own. Input times gradient: forward and backward of "
            "autograd with frozen weights, in eager PyTorch",
            "Peak: resident memory above that before the call, on one thread, freed at once",
            "Peers run in an interpreter of their own; their figures are of the input times "
            "gradient measured there in the same turns",
        ),
    )
    result.publish() if options.record else result.show()


def _recorded_beside(rows: Sequence[Row]) -> list[Row]:
    """The rows of other models that were recorded before."""
    before, measured = load("relevance"), {row[0] for row in rows}
    if before.columns != COLUMNS:
        return []
    return [tuple(row) for row in before.rows if row[0] not in measured]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--subject", choices=SUBJECTS, help="only one of the models")
    parser.add_argument("--compiled", type=Path, help="folder for compiled graphs")
    parser.add_argument("--peaks", type=Path, help="folder where peaks of memory are kept")
    parser.add_argument("--peers", help="an interpreter that has zennit, LXT or Captum")
    parser.add_argument("--record", action="store_true", help="write the table of results")
    return parser.parse_args()


def _peaks(name: str, folder: Path | None) -> dict[str, int]:
    """Peaks of a subject, measured now unless `folder` has them."""
    path = None if folder is None else folder / f"{name}.json"
    if path is not None and path.exists():
        return json.loads(path.read_text())
    found = peaks_of(name)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def _rows(name: str, options: argparse.Namespace, peaks: dict[str, int]) -> Iterator[Row]:
    subject = SUBJECTS[name]()
    calls = calls_of(subject)
    if options.compiled:
        calls[f"{subject.compiled}, compiled"] = _compiled(
            subject, options.compiled / f"{name}-{subject.compiled}"
        )
    peers = Peers(options.peers, name) if options.peers else None
    if peers is not None:
        calls |= {f"{peer} (there)": call for peer, call in peers.calls().items()}
    times = measure(calls, rounds=options.rounds)
    if peers is not None:
        peers.close()
    there = f"{GRADIENT} (there)"
    for rules, timing in times.items():
        base = times[there if rules.endswith("(there)") and there in times else GRADIENT]
        yield (subject.name, rules, *_figures(timing, base), *_memory(rules, peaks))


def _figures(timing: Timing, base: Timing) -> tuple[float, ...]:
    median, best = timing.median_seconds, timing.best_seconds
    return median * 1e3, median / base.median_seconds, best * 1e3, best / base.best_seconds


def _memory(rules: str, peaks: dict[str, int]) -> tuple[object, object]:
    if rules not in peaks:
        return "", ""
    return peaks[rules] / MEGABYTE, peaks[rules] / peaks[GRADIENT]


def _compiled(subject: Subject, folder: Path) -> Callable[[], object]:
    """The relevance graph as an AOTInductor package, compiled unless it is there already."""
    if not folder.exists():
        AotBackend().lower(subject.emitted(subject.compiled).graph).save(folder)
    executable, given = lamella.load(folder), subject.with_seed()
    return lambda: executable(**given)


if __name__ == "__main__":
    main()
