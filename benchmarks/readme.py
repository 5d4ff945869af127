"""Put the tables of ``benchmarks/results`` between the markers of README and docs.

A table stands between ``<!-- benchmark: NAME -->`` and ``<!-- end benchmark -->``.
``python -m benchmarks.readme`` rewrites them; ``--check`` only says whether they are current.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.record import load

ROOT = Path(__file__).parents[1]
MARKED = re.compile(
    r"(<!-- benchmark: (?P<name>[\w-]+) -->\n).*?(<!-- end benchmark -->)", re.DOTALL
)


def current(text: str) -> str:
    """`text` with every marked table replaced by what was measured last."""
    return MARKED.sub(lambda m: f"{m[1]}{load(m['name']).markdown()}\n{m[3]}", text)


def main() -> int:
    """Rewrite or check all documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        if current(text) != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(current(text))
    for path in stale:
        print("stale" if check else "rewritten", path)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
