"""Memory of the process: what is held shows, and the peak stays."""

from __future__ import annotations

import pytest
import torch

from lamella.memory import peak_bytes, resident_bytes


def test_memory_that_is_held_is_counted_and_the_peak_remembers_it():
    before = resident_bytes()
    if before is None:
        pytest.skip("the system does not say what a process holds")
    held = torch.ones(16, 2**20, dtype=torch.uint8)
    with_it = resident_bytes()
    assert with_it is not None
    # Other allocations come and go at the same time: a quarter is room for them.
    assert with_it - before > 0.75 * held.numel()
    del held
    # The system counts pages of each thread in batches, and the two figures at other moments.
    assert peak_bytes() >= 0.99 * with_it
