"""What a score costs, in forward runs: by products of matrices, and by time of one core."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")
aten = torch.ops.aten


ENOUGH = 0.5
"""Seconds of forward runs, at least, before and after a score that is timed."""


def products(run: Callable[[], T]) -> tuple[T, float]:
    """What `run` gives, and its products of matrices in FLOPs; counting takes time."""
    with _Counter() as counter:
        found = run()
    return found, counter.flops


def timed(run: Callable[[], T], forward: Callable[[], object]) -> tuple[T, float]:
    """What `run` gives, and its time over that of `forward`.

    Times are of one core, whoever else uses the machine, and those of `forward` are taken
    just before and after: the same load makes both slower.
    """
    before = _seconds(forward)
    started = time.process_time()
    found = run()
    taken = time.process_time() - started
    return found, 2.0 * taken / (before + _seconds(forward))


def _seconds(run: Callable[[], object]) -> float:
    """The mean of as many runs as take `ENOUGH`."""
    started, runs = time.process_time(), 0
    while runs == 0 or time.process_time() - started < ENOUGH:
        run()
        runs += 1
    return (time.process_time() - started) / runs


class _Counter(TorchDispatchMode):
    """Adds up what `flop_registry` says of every operation on numbers.

    Values without numbers, from which shapes are worked out, are let through: to compare their
    sizes would fix them in the graph that is captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "FakeTensor" for kind in types):
            return func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        found = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=found)
        return found


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(given: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(given.shape, query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The counter of torch knows the attention of graphics cards only, and takes ours for free."""
