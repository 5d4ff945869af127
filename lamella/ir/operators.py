"""The operators that Lamella adds to ATen, with their reference implementations.

Each is an ordinary `torch.library` operator, so that a graph that holds it runs in eager
PyTorch. `REFERENCE` maps each to a plain function of ATen operators with the same arguments:
a backend that has no kernel traces the function instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lamella.ir.packing import dequantize

_library = torch.library.Library("lamella", "DEF")


def rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels: ``input * cos + rotate_half(input) * sin``.

    Args:
        input: Queries or keys, ``[batch, heads, sequence, head_dim]``.
        cos: Cosines, broadcastable to `input` (both halves are given).
        sin: Sines, likewise.
        interleaved: Pairs are channels ``(2i, 2i+1)``; otherwise ``(i, i + head_dim/2)``.
    """
    if interleaved:
        rotated = torch.stack((-input[..., 1::2], input[..., ::2]), dim=-1).flatten(-2)
    else:
        half = input.shape[-1] // 2
        rotated = torch.cat((-input[..., half:], input[..., :half]), dim=-1)
    return input * cos + rotated * sin


def linear_nbits(  # noqa: PLR0913  (the arguments of the operator)
    input: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    int8_activations: bool,
) -> Tensor:
    """A linear layer whose weight is stored in blocks of 2, 4 or 8 bits.

    Args:
        input: ``[..., in]``.
        packed: Codes as uint8, ``[out, blocks, block * bits / 8]``, low bits first.
        scales: One per block, ``[out, blocks]``; their dtype is how they are stored (float16 or
            float32), whatever that of `input`.
        zero_points: Packed likewise along the blocks, ``[out, ceil(blocks * bits / 8)]``; None
            means ``2**(bits - 1)`` (symmetric).
        bias: ``[out]`` or None.
        bits: 2, 4 or 8.
        block: Weights along `in` that share a scale.
        int8_activations: Round each block of `input` to 8 bits as the fast kernels do
            (``scale = max|x| / 127`` per row and block, half to even).
    """
    in_features = input.shape[-1]
    # Products of codes and float16 scales are exact in float32, and kernels compute them there.
    wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
    weight = dequantize(packed, wide, zero_points, bits, block, in_features).to(input.dtype)
    rounded = round_to_int8(input, block) if int8_activations else input
    return torch.nn.functional.linear(rounded, weight, bias)


def round_to_int8(input: Tensor, block: int) -> Tensor:
    """`input` as a kernel with 8-bit activations sees it: blocks of the last axis rounded."""
    width = input.shape[-1]
    padded = torch.nn.functional.pad(input, (0, -width % block))
    grouped = padded.unflatten(-1, (padded.shape[-1] // block, block))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((grouped / scale).round() * scale).flatten(-2)[..., :width]


def linear_int8(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, per_row: bool
) -> Tensor:
    """A linear layer that multiplies 8-bit integers by 8-bit integers, exactly.

    The input is rounded when it arrives. With a scale per row, the result for a token does not
    depend on the tokens beside it. With one scale for the whole input it depends on the batch
    and its padding, and a row of small entries keeps few levels; kernels are faster by about a
    tenth.

    Args:
        input: ``[..., in]``.
        weight: Codes as int8, ``[out, in]``; entry ``[o, i]`` stands for ``scales[o] * code``.
            The reference takes codes as floats too (see `exact`).
        scales: float32, ``[out]``.
        bias: ``[out]`` or None.
        per_row: Round each row with a scale of its own, symmetric (see `rounded_rows`); otherwise
            all rows with one scale and one zero (see `rounded_tensor`).
    """
    if per_row:
        codes, step = rounded_rows(input)
        factors = scales
    else:
        codes, step = rounded_tensor(input)
        step, factors = None, step * scales
    held = exact(weight)
    total = torch.nn.functional.linear(codes.to(held.dtype), held).float() * factors
    total = total if step is None else total * step
    return (total if bias is None else total + bias).to(input.dtype)


def exact(codes: Tensor) -> Tensor:
    """Codes of 8 bits as floats whose sums of products are exact.

    float64 holds sums of any length; a backend may give codes as float32, which holds those of
    up to 1024 of the largest products.
    """
    return codes if codes.is_floating_point() else codes.double()


SMALLEST_STEP = 1e-30
"""The scale of a row of zeros; any will do, but zero can't be divided by."""


def rounded_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in [-127, 127] and scales ``max|x| / 127`` of the rows, half to even.

    Returns:
        Both as float32, ``[..., in]`` and ``[..., 1]``.
    """
    wide = input.float()
    step = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_STEP)
    return (wide / step).round(), step


def rounded_tensor(input: Tensor) -> tuple[Tensor, Tensor]:
    """Codes around zero and the scale of all rows, as `DynamicQuantizeLinear` of ONNX has them.

    ``lo = min(x, 0)``, ``hi = max(x, 0)``, ``s = (hi - lo) / 255``, ``z = round(-lo / s)``; a code
    is ``clip(round(x / s) + z, 0, 255) - z``.

    Returns:
        Both as float32, ``[..., in]`` and a scalar.
    """
    wide = input.float()
    # The range always holds zero, also where there is nothing else.
    low, high = torch.nn.functional.pad(wide.flatten(), (0, 1)).aminmax()
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    zero = (-low / step).round().clamp(0, 255)
    return ((wide / step).round() + zero).clamp(0, 255) - zero, step


def embedding_nbits(  # noqa: PLR0913  (the arguments of the operator)
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    indices: Tensor,
    bits: int,
    block: int,
    features: int,
) -> Tensor:
    """Rows of a table stored in blocks of 2, 4 or 8 bits; layouts as in `linear_nbits`.

    The result has the dtype of `scales`; a cast follows where the model goes on in another.

    Args:
        indices: Rows to read, any shape.
        features: Width of a row.
    """
    zeros = None if zero_points is None else zero_points[indices]
    rows = dequantize(packed[indices], scales[indices], zeros, bits, block, features)
    # A row that ends within a block leaves a gap; the fake kernel promises that there is none.
    return rows.contiguous()


def selective_scan(input: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of a selective state-space layer (Mamba), from a zero state.

    ``state_t = exp(delta_t a) state_(t-1) + delta_t b_t input_t`` and ``y_t = <c_t, state_t>``.

    Args:
        input: ``[batch, channels, sequence]``.
        delta: Step sizes, as `input`.
        a: ``[channels, states]``, negative.
        b: ``[batch, states, sequence]``.
        c: As `b`.

    Returns:
        ``[batch, channels, sequence]``.
    """
    decay = torch.exp(delta.unsqueeze(-1) * a[None, :, None, :])
    update = (delta * input).unsqueeze(-1) * b.transpose(1, 2).unsqueeze(1)
    state = torch.zeros_like(update[:, :, 0])
    outputs: list[Tensor] = []
    for step in range(input.shape[-1]):
        state = decay[:, :, step] * state + update[:, :, step]
        outputs.append(torch.matmul(state, c[:, :, step].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=-1)


def head_scan(input: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of a state-space layer with heads (Mamba2), from a zero state.

    Each head decays as a whole, and heads of a group share `b` and `c`: with the state of a
    head ``[width, states]``, ``state_t = exp(delta_t a) state_(t-1) + delta_t input_t b_t^T``
    and ``y_t = state_t c_t``.

    Args:
        input: ``[batch, sequence, heads, width]``.
        delta: Step sizes, ``[batch, sequence, heads]``.
        a: ``[heads]``, negative.
        b: ``[batch, sequence, groups, states]``; `heads` is a multiple of `groups`.
        c: As `b`.

    Returns:
        As `input`.
    """
    state = input.new_zeros(input.shape[0], *input.shape[2:], b.shape[-1])
    return scan_heads(input, delta, a, b, c, state)[0]


def scan_heads(
    input: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of `head_scan` from `state`, and the state after it.

    Args:
        input: As all but `state` for `head_scan`.
        delta: See there.
        a: See there.
        b: See there.
        c: See there.
        state: ``[batch, heads, width, states]``.
    """
    heads = input.shape[2]
    b, c = (x.repeat_interleave(heads // x.shape[2], 2, output_size=heads) for x in (b, c))
    decay = torch.exp(delta * a)[..., None, None]
    update = (delta.unsqueeze(-1) * input).unsqueeze(-1)
    outputs: list[Tensor] = []
    for step in range(input.shape[1]):
        state = decay[:, step] * state + update[:, step] * b[:, step].unsqueeze(2)
        outputs.append(torch.matmul(state, c[:, step].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def grouped_linear(input: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Linear layers of experts over rows that are sorted by expert.

    Args:
        input: ``[rows, in]``; the rows of expert `e` end at ``offsets[e]``.
        weight: ``[experts, out, in]``.
        offsets: Cumulative row counts, ``[experts]``, integers.

    Returns:
        ``[rows, out]``; rows past the last offset are zero.
    """
    output = input.new_zeros(input.shape[0], weight.shape[1])
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        output[start:stop] = torch.nn.functional.linear(input[start:stop], weight[expert])
        start = stop
    return output


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``lamella::name`` with its kernel and the shapes of its results."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamella::{name}", fake, lib=_library)


def _fake_linear_nbits(
    input: Tensor, packed: Tensor, scales: Tensor, *_: object, **__: object
) -> Tensor:
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


def _fake_linear_int8(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, per_row: bool
) -> Tensor:
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"an input of {input.shape[-1]} features meets a weight for {weight.shape[1]}"
        )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_embedding_nbits(  # noqa: PLR0913  (the arguments of the operator)
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    indices: Tensor,
    bits: int,
    block: int,
    features: int,
) -> Tensor:
    return scales.new_empty((*indices.shape, features))


define(
    "rotary_embedding(Tensor input, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    rotary_embedding,
    lambda input, cos, sin, interleaved=False: torch.empty_like(
        input, memory_format=torch.contiguous_format
    ),
)
define(
    "linear_nbits(Tensor input, Tensor packed, Tensor scales, Tensor? zero_points, Tensor? bias, "
    "int bits, int block, bool int8_activations) -> Tensor",
    linear_nbits,
    _fake_linear_nbits,
)
define(
    "linear_int8(Tensor input, Tensor weight, Tensor scales, Tensor? bias, bool per_row) -> Tensor",
    linear_int8,
    _fake_linear_int8,
)
define(
    "embedding_nbits(Tensor packed, Tensor scales, Tensor? zero_points, Tensor indices, int bits, "
    "int block, int features) -> Tensor",
    embedding_nbits,
    _fake_embedding_nbits,
)
define(
    "selective_scan(Tensor input, Tensor delta, Tensor a, Tensor b, Tensor c) -> Tensor",
    selective_scan,
    lambda input, delta, a, b, c: torch.empty_like(input, memory_format=torch.contiguous_format),
)
define(
    "head_scan(Tensor input, Tensor delta, Tensor a, Tensor b, Tensor c) -> Tensor",
    head_scan,
    lambda input, delta, a, b, c: torch.empty_like(input, memory_format=torch.contiguous_format),
)
define(
    "grouped_linear(Tensor input, Tensor weight, Tensor offsets) -> Tensor",
    grouped_linear,
    lambda input, weight, offsets: input.new_empty((input.shape[0], weight.shape[1])),
)

REFERENCE: Mapping[Callable[..., object], Callable[..., Tensor]] = MappingProxyType(
    {
        torch.ops.lamella.rotary_embedding.default: rotary_embedding,
        torch.ops.lamella.linear_nbits.default: linear_nbits,
        torch.ops.lamella.linear_int8.default: linear_int8,
        torch.ops.lamella.embedding_nbits.default: embedding_nbits,
        torch.ops.lamella.selective_scan.default: selective_scan,
        torch.ops.lamella.head_scan.default: head_scan,
        torch.ops.lamella.grouped_linear.default: grouped_linear,
    }
)
"""Each operator of Lamella -> the same in plain PyTorch."""
