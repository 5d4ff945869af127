"""Codes in bytes: the layout of ONNX Runtime, byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamella.ir.packing import WIDTHS, dequantize, grid_bits, pack, pack_dense, unpack, unpack_dense


def bytes_by_hand(codes: list[int], bits: int) -> list[int]:
    """One long binary number, low codes in low bits, cut into bytes."""
    number = sum(code << (place * bits) for place, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.sampled_from(WIDTHS))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=21))


@given(rows())
def test_packed_bytes_are_one_long_number(row) -> None:
    bits, codes = row
    assert pack(torch.tensor(codes), bits).tolist() == bytes_by_hand(codes, bits)


@given(rows())
def test_unpack_is_the_inverse_of_pack(row) -> None:
    bits, codes = row
    packed = pack(torch.tensor([codes, codes[::-1]]), bits)
    assert packed.dtype == torch.uint8
    assert unpack(packed, bits, len(codes)).tolist() == [codes, codes[::-1]]


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=21))


@given(any_rows())
def test_a_dense_stream_is_one_long_number(row) -> None:
    bits, codes = row
    packed = pack_dense(torch.tensor(codes), bits)
    assert packed.tolist() == bytes_by_hand(codes, bits)
    assert unpack_dense(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize(
    ("codes", "zeros", "held", "found"),
    [
        ([4, 11], None, 4, 3),
        ([3, 11], None, 4, 4),
        ([4, 12], None, 4, 4),
        ([0, 7], [3], 4, 3),
        ([0, 7], [8], 4, 4),
        ([112, 143], None, 8, 5),
        ([96, 143], None, 8, 6),
        ([95, 143], None, 8, 8),
        ([0, 31], [31], 8, 5),
        ([0, 3], [0], 2, 2),
        ([], None, 8, 8),
    ],
)
def test_a_narrow_grid_is_found_by_its_codes(
    codes: list[int], zeros: list[int] | None, held: int, found: int
) -> None:
    given_zeros = None if zeros is None else torch.tensor(zeros, dtype=torch.uint8)
    assert grid_bits(torch.tensor(codes, dtype=torch.uint8), held, given_zeros) == found


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
def test_other_widths_do_not_pack(bits: int) -> None:
    with pytest.raises(ValueError, match=f"codes of {bits} bits don't pack into bytes"):
        pack(torch.zeros(4), bits)
    with pytest.raises(ValueError, match=f"codes of {bits} bits don't pack into bytes"):
        unpack(torch.zeros(4, dtype=torch.uint8), bits, 4)


@pytest.mark.parametrize(("bits", "wrong"), [(2, 4), (4, 16), (8, 256), (4, -1)])
def test_a_code_that_does_not_fit_is_refused(bits: int, wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"codes of {bits} bits lie in \[0, {2**bits}\)"):
        pack(torch.tensor([0, wrong, 1]), bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_is_scale_times_code_minus_zero(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    out, blocks, block, features = 3, 5, 16, 5 * 16 - 7
    codes = torch.randint(0, 2**bits, (out, blocks, block), generator=generator)
    scales = torch.rand(out, blocks, generator=generator, dtype=torch.float64)
    zeros = torch.randint(0, 2**bits, (out, blocks), generator=generator)
    expected = torch.zeros(out, features, dtype=torch.float64)
    for row in range(out):
        for column in range(features):
            place = column // block
            zero = 2 ** (bits - 1) if symmetric else int(zeros[row, place])
            code = int(codes[row, place, column % block])
            expected[row, column] = (code - zero) * float(scales[row, place])
    packed_zeros = None if symmetric else pack(zeros, bits)
    got = dequantize(pack(codes, bits), scales, packed_zeros, bits, block, features)
    # One subtraction of small integers and one product in float64: exact.
    assert torch.equal(got, expected)
