"""Scores for compression beside the measured loss of each single change.

``python -m benchmarks.scores [--models vit minilm lm] [--parts bits equal integers plans drops]
[--record]``: every weight in 2, 4 and 8 bits, every branch and every block that can go, on the
trained models.
Losses and scores are kept on disk: a run that was stopped goes on, and a second one only judges.
"""

from __future__ import annotations

import argparse
import logging

from benchmarks.record import Result
from benchmarks.scores import bits, drops, equal, integers, plans
from benchmarks.scores.cases import CASES

PARTS = ("bits", "equal", "integers", "plans", "drops")


def main() -> None:
    """Measure every single change, then see what each score would have said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", nargs="*", default=[], help="labels of scores")
    parser.add_argument("--record", action="store_true", help="keep the tables as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cases = [CASES[name]() for name in options.models]
    results: list[Result] = []
    if "bits" in options.parts:
        results += [bits.table(case, options.only) for case in cases]
    if "equal" in options.parts:
        results.append(equal.table(cases, options.only))
    if "integers" in options.parts:
        results.append(integers.table(cases))
    if "drops" in options.parts:
        for level in ("sublayer", "block"):
            found = [drops.scored(case, level, options.only) for case in cases]
            results.append(drops.table(level, cases, found))
    if "plans" in options.parts:
        results.append(plans.table(cases))
    for result in results:
        result.publish() if options.record else result.show()


if __name__ == "__main__":
    main()
