"""Formats, byte formula, and rounding against loops that follow the definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.ir.operators import linear_nbits
from lamella.ir.packing import grid_bits, pack_dense, unpack, unpack_dense
from lamella.ir.quantize import (
    SHRINK,
    Format,
    Quantized,
    dense_bytes,
    dequantized,
    quantize,
    weight_bytes,
    wider_kernels,
)

FORMATS = [
    Format(bits, block, symmetric, dtype)
    for bits, block, symmetric, dtype in itertools.product(
        (2, 3, 4, 5, 6, 8), (32, 64), (True, False), (torch.float16, torch.float32)
    )
]


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def _slow_block(block: list[float], format: Format, importance: list[float]) -> list[float]:
    """One block on its best grid, number by number, as the definition says."""
    top = 2**format.bits - 1
    store = np.float16 if format.scale_dtype == torch.float16 else np.float32
    best, least = [0.0] * len(block), float("inf")
    for shrink in SHRINK[format.bits]:
        if format.symmetric:
            extreme = max(block, key=abs)
            scale = float(store(-extreme * shrink / 2 ** (format.bits - 1)))
            zero = 2 ** (format.bits - 1)
        else:
            low, high = shrink * min(*block, 0.0), shrink * max(*block, 0.0)
            scale = float(store((high - low) / top))
            zero = min(max(round(-low / (scale or 1.0)), 0), top)
        scale = scale or 1.0
        codes = [min(max(round(w / scale) + zero, 0), top) for w in block]
        values = [scale * (code - zero) for code in codes]
        pairs = zip(importance, values, block, strict=True)
        error = sum(h * (v - w) ** 2 for h, v, w in pairs)
        if error < least:
            best, least = values, error
    return best


def _slow(weight: Tensor, format: Format, importance: Tensor | None = None) -> Tensor:
    h = torch.ones(weight.shape[-1]) if importance is None else importance
    rows: list[list[float]] = []
    for row in weight.tolist():
        cut = range(0, len(row), format.block)
        blocks = [
            _slow_block(row[i : i + format.block], format, h.tolist()[i : i + format.block])
            for i in cut
        ]
        rows.append([value for block in blocks for value in block])
    return torch.tensor(rows)


def _loss(weight: Tensor, approximation: Tensor, importance: Tensor | None = None) -> float:
    error = (weight.double() - approximation.double()).square()
    return float((error if importance is None else error * importance).sum())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_rounding_agrees_with_a_loop_over_numbers(format: Format, weighted: bool) -> None:
    weight = _weight(3, 96 if format.block == 32 else 150)
    importance = torch.linspace(0.1, 4.0, weight.shape[1]) if weighted else None
    fast = dequantized(weight, format, importance)
    slow = _slow(weight, format, importance)
    # Two grids of nearly equal error may be ranked differently in float32 and float64, and
    # a quotient may fall on the other side of a half: the errors agree, and most entries.
    assert _loss(weight, fast, importance) == pytest.approx(
        _loss(weight, slow, importance), rel=2e-3
    )
    assert (torch.isclose(fast, slow, rtol=1e-6, atol=1e-9)).float().mean() > 0.9


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [32, 70, 128])
def test_codes_stand_for_the_same_values_and_bytes(format: Format, columns: int) -> None:
    weight = _weight(5, columns, seed=1)
    stored = quantize(weight, format)
    # The same arithmetic in another order of axes: bit for bit.
    assert torch.equal(stored.dequantized(), dequantized(weight, format))
    assert stored.nbytes == weight_bytes(weight.shape, format)
    assert stored.scales.dtype == format.scale_dtype


NARROW = [f for f in FORMATS if f.is_storage_only]


@pytest.mark.parametrize("format", NARROW, ids=str)
def test_narrow_codes_are_held_in_the_next_kernel_width(format: Format) -> None:
    weight = _weight(40, 96, seed=4)
    stored = quantize(weight, format)
    assert format.kernel_bits == {3: 4, 5: 8, 6: 8}[format.bits]
    assert stored.nbytes == weight_bytes(weight.shape, format)
    codes = unpack(stored.packed, format.kernel_bits, format.block)
    zeros = None
    if stored.zero_points is not None:
        zeros = unpack(stored.zero_points, format.kernel_bits, stored.scales.shape[-1])
    assert grid_bits(codes, format.kernel_bits, zeros) == format.bits
    assert len(codes.unique()) == 2**format.bits


@pytest.mark.parametrize("format", NARROW, ids=str)
def test_linear_operator_reads_narrow_codes_exactly(format: Format) -> None:
    weight = _weight(7, 70, seed=5)
    stored = quantize(weight, format)
    codes = (stored.packed, stored.scales, stored.zero_points)
    rest = (None, format.kernel_bits, format.block, False)
    # Rows of the identity pick the columns of the weight, without any rounding.
    got = linear_nbits(torch.eye(70), *codes, *rest).T
    assert torch.equal(got, dequantized(weight, format))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_packed_apart_are_those_of_quantize(format: Format) -> None:
    weight = _weight(6, 128, seed=6)
    stored = quantize(weight, format)
    codes = unpack(stored.packed, format.kernel_bits, format.block) - format.shift
    zeros = None
    if stored.zero_points is not None:
        zeros = unpack(stored.zero_points, format.kernel_bits, stored.scales.shape[-1])
    again = Quantized.of(codes, stored.scales, zeros, format, 128)
    assert torch.equal(again.packed, stored.packed)
    assert torch.equal(again.dequantized(), stored.dequantized())
    with pytest.raises(ValueError, match="codes of"):
        Quantized.of(codes.int() + 2**format.kernel_bits, stored.scales, zeros, format, 128)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dense_bytes_are_those_of_the_stream(format: Format) -> None:
    shape = (5, 70)
    blocks = -(-70 // format.block)
    codes = pack_dense(torch.zeros(5, blocks * format.block, dtype=torch.uint8), format.bits)
    zeros = pack_dense(torch.zeros(5, blocks, dtype=torch.uint8), format.bits)
    scales = 5 * blocks * format.scale_dtype.itemsize
    expected = codes.numel() + scales + (0 if format.symmetric else zeros.numel())
    assert dense_bytes(shape, format) == expected
    assert dense_bytes(shape, Format(32)) == weight_bytes(shape, Format(32)) == 4 * 350


def test_what_is_said_of_formats_without_a_kernel() -> None:
    said = wider_kernels([Format(3), Format(4), Format(6), Format(3, 64)])
    assert said.startswith("3 bits are held in 4, 6 bits are held in 8: there is no kernel")
    assert wider_kernels([Format(4), Format(32)]) == ""


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_dense_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (4, 37), generator=torch.Generator().manual_seed(bits))
    packed = pack_dense(codes, bits)
    assert packed.shape == (4, -(-37 * bits // 8))
    assert torch.equal(unpack_dense(packed, bits, 37).long(), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_operator_reads_the_codes(bits: int) -> None:
    weight, format = _weight(7, 70), Format(bits, 32, symmetric=False)
    stored = quantize(weight, format)
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(2))
    codes = (stored.packed, stored.scales, stored.zero_points)
    got = linear_nbits(x, *codes, None, bits, 32, False)
    want = x @ dequantized(weight, format).T
    # Rounding of float32 sums of 70 products.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bytes_of_a_known_case() -> None:
    # 10 rows of 3 blocks: 16 bytes of codes and 2 of scale per block, 2 of zeros per row.
    assert weight_bytes((10, 70), Format(4, 32, symmetric=False)) == 10 * (3 * 18 + 2)
    assert weight_bytes((10, 70), Format(4, 32)) == 10 * 3 * 18
    assert weight_bytes((10, 70), Format(8, 64, True, torch.float32)) == 10 * 2 * 68
    assert weight_bytes((3, 10, 64), Format(2, 64)) == 30 * 18
    assert weight_bytes((10, 70), Format(32), torch.bfloat16) == 1400


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(symmetric: bool) -> None:
    weight = _weight(2, 64)
    weight[0] = 0.0
    stored = quantize(weight, Format(4, 32, symmetric))
    assert torch.equal(stored.dequantized()[0], torch.zeros(64))
    assert bool((stored.scales[0] == 1).all())


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1.0, 1e4])
def test_scales_are_never_zero_or_infinite(scale: float) -> None:
    weight = _weight(4, 64) * scale
    stored = quantize(weight, Format(8, 32))
    assert torch.isfinite(stored.scales).all()
    assert bool((stored.scales != 0).all())
    assert _loss(weight, stored.dequantized()) <= _loss(weight, torch.zeros_like(weight))


def test_a_grid_weight_is_kept_exactly() -> None:
    codes = torch.randint(0, 16, (6, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = 0
    weight = (codes - 8) * 0.125
    assert torch.equal(dequantized(weight, Format(4, 32)), weight)


def test_error_falls_with_bits_and_grows_with_block() -> None:
    weight = _weight(32, 256)
    by_bits = [_loss(weight, dequantized(weight, Format(bits, 32))) for bits in (2, 3, 4, 5, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_block = [
        _loss(weight, dequantized(weight, Format(4, block))) for block in (32, 64, 128, 256)
    ]
    assert by_block == sorted(by_block)


def test_importance_moves_error_away_from_important_columns() -> None:
    weight = _weight(64, 64)
    importance = torch.ones(64)
    importance[:8] = 100.0
    format = Format(2, 32)
    plain, weighted = dequantized(weight, format), dequantized(weight, format, importance)
    assert _loss(weight, weighted, importance) < _loss(weight, plain, importance)


def test_leading_axes_and_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = _weight(12, 64), Format(4, 32, symmetric=False)
    whole = quantize(weight, format)
    folded = quantize(weight.view(3, 4, 64), format)
    assert torch.equal(folded.packed.flatten(0, 1), whole.packed)
    monkeypatch.setattr("lamella.ir.quantize._CHUNK", 64)
    assert torch.equal(quantize(weight, format).packed, whole.packed)


def test_dtype_of_the_result_is_that_of_the_weight() -> None:
    assert dequantized(_weight(2, 32).bfloat16(), Format(4)).dtype == torch.bfloat16
    weight = _weight(2, 32)
    assert dequantized(weight, Format(32)) is weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_errors(bad: float) -> None:
    weight = _weight(4, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="1 entries are NaN, infinite"):
        quantize(weight, Format(4))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 5, 6, 8, 32, got 7"):
        Format(7)
    with pytest.raises(ValueError, match="block must be one of"):
        Format(4, 48)
    with pytest.raises(ValueError, match="scale_dtype"):
        Format(4, 32, True, torch.int8)
    with pytest.raises(ValueError, match="32 bits"):
        quantize(_weight(2, 32), Format(32))
    with pytest.raises(ValueError, match="at least two axes"):
        quantize(torch.ones(32), Format(4))
    with pytest.raises(ValueError, match="64 columns"):
        quantize(_weight(2, 64), Format(4), torch.ones(2))
    with pytest.raises(ValueError, match="negative"):
        quantize(_weight(2, 64), Format(4), -torch.ones(64))
