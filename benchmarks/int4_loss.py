"""``python -m benchmarks.int4_loss``: what 4 bits cost the trained language model, by who rounds.

The models of the builder of onnxruntime-genai in its blocks of 32 and in longer ones, and ours:
latencies of decoders compare only at losses that compare. Bits are 4 for all weights, embedding
and head too.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

import lamella
from benchmarks.quantization import builder_peer
from benchmarks.quantization.judge import Judge
from benchmarks.record import Result
from benchmarks.scores.cases import CASES, outputs
from benchmarks.zoo.language_model import language_model
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.sites import find_sites

BUILDER = (("rtn", 32), ("k_quant", 32), ("rtn", 128), ("k_quant", 128), ("rtn", 256))
METHODS = ("rtn", "gptq", "quantease")
BLOCKS = (32, 128, 256)
BASE = "genai builder, rtn, blocks of 32"

logger = logging.getLogger(__name__)


def main() -> None:
    """Round, measure, show or record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("lamella").setLevel(logging.WARNING)
    judge, found = Judge(CASES["lm"]()), dict[str, tuple[int, Tensor]]()
    for name, size, losses in (*of_builder(judge), *ours(judge)):
        found[name] = size, losses
        logger.info("%s: %d bytes, %.5f", name, size, judge.mean(losses))
    result = table(judge, found)
    result.publish() if options.record else result.show()


def of_builder(judge: Judge) -> Iterator[tuple[str, int, Tensor]]:
    """Name, bytes and losses of what the builder makes, with activations in float32."""
    with tempfile.TemporaryDirectory() as place:
        for mode, block in BUILDER:
            folder = Path(place) / f"{mode}-{block}"
            path = builder_peer.build(language_model(), folder, mode, block)
            size, weights = builder_peer.weights_of(path, judge.case.graph)
            yield f"genai builder, {mode}, blocks of {block}", size, judge.of_weights(weights)


def ours(judge: Judge) -> Iterator[tuple[str, int, Tensor]]:
    """Name, bytes and losses of ours, with activations rounded as the kernels do it."""
    graph, seen = judge.case.graph, judge.case.seen[0]
    for block in BLOCKS:
        plan = {site.weight: Format(4, block) for site in find_sites(graph)}
        size = sum(weight_bytes(site.shape, plan[site.weight]) for site in find_sites(graph))
        for method in METHODS:
            edited = graph.copy()
            edited.plan = plan
            passes = [f"quantize-weights min_size=0 method={method}"]
            lamella.transform(edited, passes, samples=seen)
            losses = judge.of_outputs(outputs(edited, judge.case.unseen))
            yield f"lamella, {method}, blocks of {block}", size, losses
        lamella.transform(edited, ["quantize-cache"], samples=seen)
        losses = judge.of_outputs(outputs(edited, judge.case.unseen))
        yield f"lamella, {METHODS[-1]}, blocks of {block}, 8-bit cache", size, losses


def table(judge: Judge, found: Mapping[str, tuple[int, Tensor]]) -> Result:
    """A row for each."""
    rows: list[tuple[object, ...]] = []
    for name, (size, losses) in found.items():
        low, high = judge.difference(losses, found[BASE][1])
        beside = "" if name == BASE else f"{low:.2f}-{high:.2f}x"
        rows.append((name, size / 1e6, judge.mean(losses), beside))
    return Result(
        "int4_loss",
        f"Trained language model with all weights in 4 bits, {len(judge.tokens)} unseen sequences",
        ("who rounds", "MB", "KL", f"of {BASE}"),
        rows,
        (
            "95 % bootstrap intervals over sequences. The builder's own activations stay in "
            "float32 here, ours are rounded as the kernels do it.",
        ),
    )


if __name__ == "__main__":
    main()
