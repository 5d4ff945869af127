"""Kernels of PyTorch for weights of 4 and 8 bits on the processor.

Products of 8-bit integers (oneDNN) are exact, and are used wherever they are right. Those
that multiply in bfloat16 are approximations, for who asks for them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from lamella.ir import torch_private
from lamella.ir.integer_operators import TOP, static_codes
from lamella.ir.operators import linear_int8, rounded_rows, rounded_tensor

INT4_BLOCKS = (32, 64, 128, 256)
"""Blocks that the kernel of 4 bits takes."""

_INT4_ROWS = 16
_INT8_COLUMNS = 64
_MIDDLE = 128
_TRIED = (128, 4)


def int4_obstacle(outputs: int) -> str:
    """Why the kernel of 4 bits can't take a weight, or nothing."""
    return f"{outputs} outputs are no multiple of {_INT4_ROWS}" if outputs % _INT4_ROWS else ""


def int8_obstacle(outputs: int, inputs: int) -> str:
    """Why the kernel of 8-bit weights and bfloat16 can't take a weight, or nothing."""
    return f"{inputs} inputs are no multiple of {_INT8_COLUMNS}" if inputs % _INT8_COLUMNS else ""


# ---- products of integers -------------------------------------------------------------------


def packed_integers(codes: Tensor) -> Tensor:
    """Codes ``[out, in]`` as oneDNN wants them; of a layout of its own."""
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


def linear_rows(input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`lamella::linear_int8` with a scale for each row."""
    codes, step = rounded_rows(input)
    result = _product((codes + _MIDDLE).to(torch.uint8), (1.0, _MIDDLE), packed, scales) * step
    return (result if bias is None else result + bias).to(input.dtype)


def linear_tensor(input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`lamella::linear_int8` with one scale for all rows."""
    wide = input.float()
    low, high = functional.pad(wide.flatten(), (0, 1)).aminmax()
    step = (high - low) / TOP
    step = torch.where(step == 0, torch.ones_like(step), step)
    zero = (-low / step).round_().clamp_(0, TOP)
    codes = (wide / step).round_().add_(zero).clamp_(0, TOP).to(torch.uint8)
    result = _product(codes, (float(step), int(zero)), packed, scales)
    return (result if bias is None else result + bias).to(input.dtype)


def linear_static(
    input: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, step: float, zero: int
) -> Tensor:
    """`lamella::linear_int8_static`."""
    codes = (static_codes(input, step, zero) + zero).to(torch.uint8)
    result = _product(codes, (step, zero), packed, scales)
    return (result if bias is None else result + bias).to(input.dtype)


def traced_rows(
    input: Tensor, columns: Tensor, sums: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """As `linear_rows`, of ATen operators alone, which compilers trace.

    Args:
        input: ``[..., in]``.
        columns: Codes as int8, ``[in, out]``.
        sums: Of the columns, int32 ``[out]``; where zero is the middle they are of no use.
        scales: float32, ``[out]``.
        bias: ``[out]`` or None.
    """
    codes, step = rounded_rows(input)
    result = _traced_product(codes, columns).float() * scales * step
    return (result if bias is None else result + bias).to(input.dtype)


def traced_tensor(
    input: Tensor, columns: Tensor, sums: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """As `linear_tensor`, of ATen operators alone."""
    codes, step = rounded_tensor(input)
    low, high = functional.pad(codes.flatten(), (0, 1)).aminmax()
    result = _traced_around(codes, ((low + high) / 2).ceil(), columns, sums) * (step * scales)
    return (result if bias is None else result + bias).to(input.dtype)


def traced_static(  # noqa: PLR0913  (the arguments of the operator)
    input: Tensor,
    columns: Tensor,
    sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    step: float,
    zero: int,
) -> Tensor:
    """As `linear_static`, of ATen operators alone."""
    codes, middle = static_codes(input, step, zero), torch.tensor(_MIDDLE - zero)
    result = _traced_around(codes, middle, columns, sums) * (scales * step)
    return (result if bias is None else result + bias).to(input.dtype)


def _traced_around(codes: Tensor, middle: Tensor, columns: Tensor, sums: Tensor) -> Tensor:
    """Codes in ``[middle - 128, middle + 127]`` by int8 ones, exactly; float32."""
    total = _traced_product(codes - middle, columns)
    return (total + sums * middle.to(torch.int32)).float()


def _traced_product(codes: Tensor, columns: Tensor) -> Tensor:
    """Codes in [-128, 127] by int8 ones, int32."""
    flat = codes.to(torch.int8).reshape(-1, columns.shape[0])
    found = torch_private.int8_product(flat, columns)
    return found.reshape(*codes.shape[:-1], columns.shape[1])


def _product(codes: Tensor, grid: tuple[float, int], packed: Tensor, scales: Tensor) -> Tensor:
    """Codes of a grid by packed ones, float32."""
    flat = codes.flatten(0, -2) if codes.ndim != 2 else codes
    zeros = torch.zeros(scales.shape, dtype=torch.int32)
    none = (1.0, 0, torch.float32, "none", [], "")
    result = torch.ops.onednn.qlinear_pointwise(flat, *grid, packed, scales, zeros, None, *none)
    return result.reshape(*codes.shape[:-1], scales.shape[0])


def packed_columns(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` as `traced_rows` wants them, and the sums of columns."""
    return codes.t().contiguous(), codes.sum(1, dtype=torch.int32)


@functools.cache
def no_integer_products() -> str:
    """Why the kernel of integers can't be used here, or nothing; tried once a process.

    How fast it is, is for `lamella.tuning.probes` to say.
    """
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this PyTorch has no oneDNN"
    width, rows = _TRIED
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (width, width), generator=generator, dtype=torch.int8)
    scales = torch.rand(width, generator=generator)
    input = torch.randn(rows, width, generator=generator)
    got = linear_rows(input, packed_integers(codes), scales, None)
    want = linear_int8(input, codes, scales, None, True)
    off = float((got - want).abs().max() / want.abs().max())
    # Sums of integers are exact; what is left is the order of two products.
    return "" if off < 1e-6 else f"the kernel of oneDNN is off by {off:.2g} of the largest result"


# ---- bfloat16 ---------------------------------------------------------------------------------


def packed_int4(codes: Tensor) -> Tensor:
    """Codes in [0, 15], ``[out, in]``, as the kernel of 4 bits wants them."""
    return torch_private.int4_packed(codes.to(torch.int32).contiguous())


def slopes_and_offsets(scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Scales and what is added, bfloat16 ``[blocks, out, 2]``, of ``s (q - 8) + a``."""
    wide = scales.float()
    added = torch.zeros_like(wide) if zeros is None else wide * (8.0 - zeros.float())
    return torch.stack([wide, added], dim=-1).bfloat16().transpose(0, 1).contiguous()


def linear_int4(
    input: Tensor, packed: Tensor, slopes: Tensor, bias: Tensor | None, block: int
) -> Tensor:
    """`lamella::linear_nbits` of 4 bits, with inputs, scales and results in bfloat16.

    The inputs are not rounded to 8 bits. Rows are filled up to whole blocks.
    """
    flat = input.reshape(-1, input.shape[-1]).bfloat16()
    flat = functional.pad(flat, (0, 2 * packed.shape[1] - flat.shape[1]))
    result = torch_private.int4_linear(flat, packed, block, slopes)
    return _finished(result, input, bias)


def linear_int8_weights(
    input: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`lamella::linear_int8`, with inputs, scales and results in bfloat16 and not rounded."""
    flat = input.reshape(-1, input.shape[-1]).bfloat16()
    result = torch_private.int8_linear(flat, codes, scales.bfloat16())
    return _finished(result, input, bias)


def linear_bfloat16(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer that multiplies in bfloat16."""
    flat = input.reshape(-1, input.shape[-1]).bfloat16()
    return _finished(functional.linear(flat, weight[:, : input.shape[-1]]), input, bias)


def _finished(result: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    result = result.reshape(*input.shape[:-1], result.shape[-1]).to(input.dtype)
    return result if bias is None else result + bias
