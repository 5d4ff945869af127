"""``python -m benchmarks.runner``: our folders beside the builder's in the runner of both.

The folders of onnxruntime-genai: what its model builder makes of a model in 4 bits by default
(blocks of 32), and ours. Times differ by up to a tenth from process to process and stay so while a
process lives, so that several are timed; in each of them the folders take turns. Shown is the time
relative to the builder's in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import lamella
from benchmarks.decode import SOURCES, source_of
from benchmarks.decoders import genai, ours
from benchmarks.decoders.candidate import STEPS, Sizes
from benchmarks.record import Result
from lamella.timing import measure

BASE = "genai builder, blocks of 32"
FOLDERS = {
    "lamella, blocks of 32": (32, False),
    "lamella, blocks of 256": (256, False),
    "lamella, blocks of 256, 8-bit cache": (256, True),
}
"""Block, and whether the cache holds codes."""
FAR, PROMPT = 1024, 512


def main() -> None:
    """Make the folders, time them in processes of their own, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--far", type=int, default=FAR, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        json.dump(timed(given.folder, given.far, given.rounds), sys.stdout)
        return
    rows = [row for name in SOURCES for row in _rows(name, given.processes, given.rounds)]
    result = Result(
        "runner",
        "Folders of 4 bits in the runner of onnxruntime-genai, time relative to its builder's",
        ("model", "folder", "token behind 128", "behind 960 or 1024", f"prompt of {PROMPT}"),
        rows,
        (
            f"Medians over {given.processes} processes, each the median of {given.rounds} "
            f"interleaved turns of {STEPS} tokens (a third for prompts); in brackets the lowest "
            "and the highest. The builder's row is in milliseconds. Behind 960 for the trained "
            "model, which has 1024 positions",
        ),
    )
    result.publish() if given.record else result.show()


def _rows(name: str, processes: int, rounds: int) -> Iterator[tuple[object, ...]]:
    with tempfile.TemporaryDirectory() as place:
        model, folder = source_of(name, Path(place))
        sizes, root = Sizes.of(model), Path(place) / "folders"
        if not genai.build(folder, root / BASE, "int4", ("block_size=32",)):
            raise SystemExit("the model builder of onnxruntime-genai failed")
        graph = lamella.capture(folder)
        coded = ours.with_codes(graph)
        for title, (block, codes) in FOLDERS.items():
            made = ours.quantized(coded if codes else graph, 4, block)
            lamella.save_checkpoint(made, root / title, format="onnxruntime-genai")
        far = min(FAR, sizes.capacity - 64)
        found = [_process(root, far, rounds) for _ in range(processes)]
    for title in (BASE, *FOLDERS):
        columns = zip(*(_relative(times, title) for times in found), strict=True)
        yield SOURCES[name], title, *(_cell(column, title == BASE) for column in columns)


def _process(root: Path, far: int, rounds: int) -> dict[str, list[float]]:
    options = ["--folder", str(root), "--far", str(far), "--rounds", str(rounds)]
    command = [sys.executable, "-m", "benchmarks.runner", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def timed(root: Path, far: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each folder: a token behind 128 and behind `far`, a prompt."""
    found = {path.name: genai.run(path.name, path) for path in sorted(root.iterdir())}
    steps = [{name: one.decode(past) for name, one in found.items()} for past in (128, far)]
    prompts = {name: one.prefill(PROMPT) for name, one in found.items()}
    times = [measure(calls, rounds=rounds) for calls in steps]
    times.append(measure(prompts, rounds=max(rounds // 3, 3)))
    parts = (STEPS, STEPS, 1)
    return {
        name: [one[name].median_seconds * 1e3 / n for one, n in zip(times, parts, strict=True)]
        for name in found
    }


def _relative(times: dict[str, list[float]], title: str) -> list[float]:
    if title == BASE:
        return times[BASE]
    return [mine / theirs for mine, theirs in zip(times[title], times[BASE], strict=True)]


def _cell(values: Sequence[float], plain: bool) -> object:
    middle = statistics.median(values)
    return middle if plain else f"{middle:.2f}x ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
