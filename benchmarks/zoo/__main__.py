"""Train the models of the zoo that are not in the cache.

``python -m benchmarks.zoo [language-model | digits-vit | digits-cnn]``
"""

from __future__ import annotations

import argparse
import logging

from benchmarks.zoo.digits import digits_cnn, digits_vit
from benchmarks.zoo.language_model import language_model

BUILDERS = {"language-model": language_model, "digits-vit": digits_vit, "digits-cnn": digits_cnn}


def main() -> None:
    """Train the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*BUILDERS, []], help="default: all")
    chosen = parser.parse_args().models or list(BUILDERS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in chosen:
        print(name, BUILDERS[name]())


if __name__ == "__main__":
    main()
