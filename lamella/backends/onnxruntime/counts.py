"""How many rows of a cache are filled: what attention over buffers needs to know.

`com.microsoft.GroupQueryAttention` takes, for each sequence, the last filled row after the new
tokens (``seqlens_k``) and, for all of them, how many columns a mask would have
(``total_sequence_length``, without axes or as a vector of one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Caches, Emission

FILLED = "filled"
"""Input of `Caches.BOUND`: the last filled row of each sequence, int32 ``[batch]``."""

TOTAL = "total"
"""Input of `Caches.BOUND`: tokens of the longest sequence, past and new, int32 without axes."""

ROWS = "rows"
"""Input of `Caches.BOUND`: the new tokens whose logits are wanted, int64 ``[batch, wanted, 1]``."""

CHUNK = 512
"""Most new tokens of a sequence in a call of `Caches.BOUND`, whose scores with all keys are held
in memory."""


def add_counts(e: Emission, inputs: Mapping[str, ir.Value]) -> Iterator[ir.Value]:
    """Make `FILLED`, `TOTAL` and `ROWS` known to the emission; gives those that are inputs."""
    layout, caches = e.graph.cache, e.options.caches
    if layout is None or caches is Caches.PLAIN:
        return
    tokens, mask = inputs[layout.tokens], inputs[layout.mask]
    e.scope = "cache"
    if caches is Caches.BOUND:
        yield from _as_inputs(e)
        total = e.op("Reshape", e.counts[TOTAL], e.ints(1))
        total = e.cast(total, torch.int32, torch.int64)
    else:
        total = e.op("Shape", mask, start=1, end=2)
        length = e.cast(total, torch.int64, torch.int32)
        summed = e.op("ReduceSum", mask, e.ints(1), keepdims=0)
        filled = e.cast(e.op("Sub", summed, e.ints(1)), torch.int64, torch.int32)
        e.counts |= {FILLED: filled, TOTAL: length, ROWS: _last(e, mask, total)}
    # The buffers are longer than what they hold: no shape of theirs says how long the past is.
    by_name = dict(zip(e.graph.signature.inputs, e.graph.inputs, strict=True))
    e.know_extent(by_name[layout.mask].meta["val"].shape[1], total)
    new = e.op("Shape", tokens, start=1, end=2)
    for slot in layout.slots:
        if slot.grows:
            past = by_name[slot.input].meta["val"].shape[2]
            e.know_extent(past, e.op("Sub", total, new))


def _last(e: Emission, mask: ir.Value, total: ir.Value) -> ir.Value:
    """The last token of each sequence that the mask does not hide, as `ROWS`: from the end."""
    place = e.op("ArgMax", mask, axis=1, keepdims=1, select_last_index=1)
    return e.op("Unsqueeze", e.op("Sub", place, total), e.ints(2))


def _as_inputs(e: Emission) -> Iterator[ir.Value]:
    kinds = {
        FILLED: (ir.DataType.INT32, ["batch"]),
        TOTAL: (ir.DataType.INT32, []),
        ROWS: (ir.DataType.INT64, ["batch", "wanted", 1]),
    }
    for name, (kind, shape) in kinds.items():
        value = ir.Value(name=e.unique(name), type=ir.TensorType(kind), shape=ir.Shape(shape))
        e.counts[name] = value
        yield value
