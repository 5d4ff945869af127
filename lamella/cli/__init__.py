"""The command line: a thin layer over `lamella.api`.

Nothing here imports PyTorch before a command runs, so that ``lamella --help`` is quick.
"""

from lamella.cli.app import main

__all__ = ["main"]
