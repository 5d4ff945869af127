"""State-space recurrences as one operator while a model is traced.

The reference code of Mamba in transformers loops over the sequence in Python, that of Mamba2 cuts
it into chunks; traced, the loop is unrolled and the length of the sample is baked in, and the
chunks hide that there is a state that goes from token to token. While `traceable_scans` is
active, the recurrences are the operators `lamella::selective_scan` and `lamella::head_scan`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lamella.errors import CaptureError

_NO_LIMIT = (0.0, float("inf"))


@contextlib.contextmanager
def traceable_scans() -> Generator[None]:
    """Replace the recurrences of the modeling code that is loaded, while the block runs."""
    places = [(m, name) for m in _modeling_code() for name in _STAND_INS if name in vars(m)]
    originals = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, _STAND_INS[name])
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def _modeling_code() -> list[ModuleType]:
    """The modules of transformers that hold models; other code is not looked into."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
    ]


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


def _chunk_scan(  # noqa: PLR0913  (the signature of the function it stands in for)
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  (the names of the function it stands in for)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    if initial_states is not None:
        raise CaptureError(
            "a state-space model is captured from the start of a sequence; call it without a cache"
        )
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    if not dt_softplus or tuple(dt_limit) != _NO_LIMIT:
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    wide = hidden_states.float()
    scanned = torch.ops.lamella.head_scan(wide, dt.float(), A.float(), B.float(), C.float())
    if D is not None:
        scanned = scanned + D[..., None] * wide
    if return_final_states:
        # As above.
        return scanned, wide.new_zeros(wide.shape[0], *wide.shape[2:], B.shape[-1])
    return scanned


_STAND_INS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"mamba_selective_scan": _selective_scan, "mamba2_chunk_scan": _chunk_scan}
)
"""Functions of modeling code -> what stands in for them."""
