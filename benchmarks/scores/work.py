"""What a score costs: products of matrices in forward runs, and seconds of one core."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")
aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What something took.

    Attributes:
        flops: Of products of matrices, convolutions and attention.
        seconds: Of one core, whoever else used the machine.
    """

    flops: float
    seconds: float


def work_of(run: Callable[[], T]) -> tuple[T, Work]:
    """What `run` gives, and what it took; counting adds a little to the seconds."""
    counter, started = _Counter(), time.process_time()
    with counter:
        found = run()
    return found, Work(counter.flops, time.process_time() - started)


def uncounted(run: Callable[[], T]) -> tuple[T, Work]:
    """What `run` gives, and its seconds."""
    started = time.process_time()
    return run(), Work(0.0, time.process_time() - started)


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
