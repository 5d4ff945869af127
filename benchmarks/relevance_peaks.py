"""The most memory that relevance takes beside the model: a process that another one starts.

``python -m benchmarks.relevance_peaks SUBJECT`` prints a line of JSON, call -> bytes. Run with
``MALLOC_MMAP_THRESHOLD_=65536`` in the environment, so that freed tensors go back to the system
and the resident memory is what is alive.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.relevance_subjects import SUBJECTS, Subject
from lamella.memory import resident_bytes

GRADIENT = "input times gradient"
CHECKPOINT = "checkpoint=blocks"


def peaks_of(subject: str) -> dict[str, int]:
    """Bytes of each call of a subject, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.relevance_peaks", subject]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.strip().splitlines()[-1])


def calls_of(subject: Subject) -> dict[str, Callable[[], object]]:
    """Everything that is measured in eager PyTorch, by name."""
    calls: dict[str, Callable[[], object]] = {GRADIENT: subject.gradient}
    calls |= {preset: subject.eager(preset) for preset in subject.presets}
    if subject.graph.blocks:
        name = f"{subject.compiled}, {CHECKPOINT}"
        calls[name] = subject.eager(subject.compiled, "blocks")
    return calls


def main() -> None:
    """Measure one subject."""
    torch.set_num_threads(1)
    calls = calls_of(SUBJECTS[sys.argv[1]]())
    print(json.dumps({name: _peak(call) for name, call in calls.items()}), flush=True)


def _peak(call: Callable[[], object]) -> int:
    """How much more than before is resident at most during a call."""
    # The first call loads kernels and builds what later ones share.
    call()
    gc.collect()
    before = resident_bytes()
    assert before is not None
    Path("/proc/self/clear_refs").write_text("5")
    call()
    status = Path("/proc/self/status").read_text()
    highest = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(highest.split()[1]) * 1024 - before


if __name__ == "__main__":
    main()
