"""Other systems of relevance, in a process with an interpreter of its own."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("relevance_worker.py")


class Peers:
    """Drives `relevance_worker.py`: one call at a time, so that turns can be taken."""

    def __init__(self, python: str, subject: str) -> None:
        """Start the worker for one model; it says which systems can explain it."""
        self.process = subprocess.Popen(
            [python, str(WORKER), subject, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names = self._answer().split(",")

    def calls(self) -> dict[str, Callable[[], object]]:
        """Name of a system and its rules -> a call that runs it once."""
        return {name: functools.partial(self._run, name) for name in self.names if name}

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _run(self, name: str) -> None:
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}")
        return line.strip()
