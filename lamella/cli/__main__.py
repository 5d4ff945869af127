"""``python -m lamella.cli``."""

from lamella.cli import main

main()
