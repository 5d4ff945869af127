"""State-space recurrences as one operator while a model is traced.

The reference code of Mamba in transformers loops over the sequence in Python; traced, the loop
is unrolled and the length of the sample is baked in. While `traceable_scans` is active, the
recurrence is the operator `lamella::selective_scan`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MODULES = (
    "transformers.models.mamba.modeling_mamba",
    "transformers.models.falcon_mamba.modeling_falcon_mamba",
)


@contextlib.contextmanager
def traceable_scans() -> Generator[None]:
    """Replace the recurrences of the modeling code that is loaded, while the block runs."""
    loaded: list[Any] = [importlib.import_module(name) for name in _MODULES if name in sys.modules]
    patched = [module for module in loaded if hasattr(module, "mamba_selective_scan")]
    originals = [module.mamba_selective_scan for module in patched]
    for module in patched:
        module.mamba_selective_scan = _selective_scan
    try:
        yield
    finally:
        for module, original in zip(patched, originals, strict=True):
            module.mamba_selective_scan = original


def _selective_scan(  # noqa: PLR0913  (the signature of the function it stands in for)
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  (the names of the function it stands in for)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = functional.softplus(dt)
    # The reference has B and C as [batch, states, sequence], as the operator does.
    scanned = torch.ops.lamella.selective_scan(hidden_states, dt, A, B, C)
    if D is not None:
        scanned = scanned + hidden_states * D[None, :, None]
    if z is not None:
        scanned = scanned * functional.silu(z)
    if return_last_state:
        # Only the cache of a decoder reads the state, and graphs are captured without it.
        return scanned, hidden_states.new_zeros(*hidden_states.shape[:2], A.shape[-1])
    return scanned
