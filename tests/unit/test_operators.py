"""The operators of Lamella against loops that follow their definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lamella.ir.operators import REFERENCE, round_to_int8
from lamella.ir.packing import dequantize, pack

lam = torch.ops.lamella


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quantized(out: int, features: int, bits: int, block: int, *, zeros: bool) -> tuple:
    """Random codes, scales and zero points of a weight."""
    generator = torch.Generator().manual_seed(bits)
    blocks = -(-features // block)
    codes = torch.randint(0, 2**bits, (out, blocks, block), generator=generator)
    zero = torch.randint(0, 2**bits, (out, blocks), generator=generator)
    scales = torch.rand(out, blocks, generator=generator) + 0.5
    return pack(codes, bits), scales, pack(zero, bits) if zeros else None


CASES = {
    "rotary_embedding": (drawn(2, 3, 5, 4), drawn(1, 1, 5, 4, seed=1), drawn(1, 1, 5, 4, seed=2)),
    "linear_nbits": (
        drawn(2, 20).float(),
        *quantized(6, 20, 4, 16, zeros=True),
        drawn(6).float(),
        4,
        16,
        False,
    ),
    "linear_int8": (
        drawn(2, 3, 20).float(),
        torch.arange(-60, 60, dtype=torch.int8).reshape(6, 20),
        drawn(6, seed=1).float().abs(),
        drawn(6, seed=2).float(),
        True,
    ),
    "embedding_nbits": (*quantized(9, 20, 4, 16, zeros=True), torch.tensor([[1, 8]]), 4, 16, 20),
    "selective_scan": (
        drawn(2, 3, 5),
        drawn(2, 3, 5, seed=1).abs(),
        -drawn(3, 4, seed=2).abs(),
        drawn(2, 4, 5, seed=3),
        drawn(2, 4, 5, seed=4),
    ),
    "head_scan": (
        drawn(2, 5, 4, 3),
        drawn(2, 5, 4, seed=1).abs(),
        -drawn(4, seed=2).abs(),
        drawn(2, 5, 2, 6, seed=3),
        drawn(2, 5, 2, 6, seed=4),
    ),
    "grouped_linear": (drawn(7, 4), drawn(3, 5, 4, seed=1), torch.tensor([2, 2, 6])),
}


def test_every_operator_has_a_case() -> None:
    assert {str(op).split(".")[1] for op in REFERENCE} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_schema_fake_kernel_and_kernel_agree(name: str) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(lam, name).default, CASES[name], test_utils=checks)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_computes_its_reference(name: str) -> None:
    op = getattr(lam, name).default
    assert torch.equal(op(*CASES[name]), REFERENCE[op](*CASES[name]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_turns_pairs_by_their_angle(interleaved: bool) -> None:
    batch, heads, length, width = 2, 3, 5, 8
    x, angles = drawn(batch, heads, length, width), drawn(length, width // 2, seed=1)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + width // 2) for i in range(width // 2)]
    cos, sin = torch.zeros(length, width).double(), torch.zeros(length, width).double()
    expected = torch.zeros_like(x)
    for i, (one, two) in enumerate(pairs):
        for place in (one, two):
            cos[:, place], sin[:, place] = angles[:, i].cos(), angles[:, i].sin()
        for t in range(length):
            c, s = math.cos(angles[t, i]), math.sin(angles[t, i])
            expected[:, :, t, one] = c * x[:, :, t, one] - s * x[:, :, t, two]
            expected[:, :, t, two] = s * x[:, :, t, one] + c * x[:, :, t, two]
    got = lam.rotary_embedding(x, cos, sin, interleaved)
    # Two products and a sum of float64.
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    # Turning keeps lengths.
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_linear_nbits_multiplies_by_the_weight_it_stores(bits: int, zeros: bool) -> None:
    packed, scales, zero_points = quantized(6, 20, bits, 16, zeros=zeros)
    weight = dequantize(packed, scales, zero_points, bits, 16, 20)
    x, bias = drawn(2, 3, 20).float(), drawn(6).float()
    got = lam.linear_nbits(x, packed, scales, zero_points, bias, bits, 16, False)
    # One matrix product of float32, in another order.
    torch.testing.assert_close(got, x @ weight.T + bias, rtol=1e-5, atol=1e-4 * 2**bits)


def test_activations_are_rounded_block_by_block() -> None:
    x = drawn(3, 37)
    expected = torch.zeros_like(x)
    for row in range(3):
        for start in range(0, 37, 16):
            block = x[row, start : start + 16]
            scale = float(block.abs().max()) / 127
            for i, value in enumerate(block.tolist()):
                # Python rounds half to even, as the kernels do.
                expected[row, start + i] = round(value / scale) * scale
    torch.testing.assert_close(round_to_int8(x, 16), expected, rtol=1e-14, atol=0.0)


def test_a_block_of_zeros_stays_zero() -> None:
    assert torch.equal(round_to_int8(torch.zeros(2, 20), 16), torch.zeros(2, 20))


def int8_codes(row: list[float], low: float, high: float) -> tuple[list[int], float]:
    """Codes and scale of some numbers on the grid of ``DynamicQuantizeLinear``, in float64."""
    step = (max(high, 0.0) - min(low, 0.0)) / 255
    zero = round(-min(low, 0.0) / step)
    return [min(max(round(value / step) + zero, 0), 255) - zero for value in row], step


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_int8_multiplies_integers(per_row: bool, with_bias: bool) -> None:
    x, weight, scales, bias, _ = CASES["linear_int8"]
    got = lam.linear_int8(x, weight, scales, bias if with_bias else None, per_row)
    for place, row in enumerate(x.flatten(0, 1).tolist()):
        largest = max(map(abs, row))
        if per_row:
            codes, step = [round(value * 127 / largest) for value in row], largest / 127
        else:
            codes, step = int8_codes(row, float(x.min()), float(x.max()))
        for out in range(6):
            total = sum(c * w for c, w in zip(codes, weight[out].tolist(), strict=True))
            want = total * step * float(scales[out]) + (float(bias[out]) if with_bias else 0.0)
            # Three roundings of float32.
            assert float(got.flatten(0, 1)[place, out]) == pytest.approx(want, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("per_row", [True, False])
def test_linear_int8_of_zeros_is_the_bias(per_row: bool) -> None:
    _, weight, scales, bias, _ = CASES["linear_int8"]
    got = lam.linear_int8(torch.zeros(2, 20), weight, scales, bias, per_row)
    assert torch.equal(got, bias.expand(2, 6))
    assert lam.linear_int8(torch.zeros(0, 20), weight, scales, bias, per_row).shape == (0, 6)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, weight, scales, bias, _ = CASES["linear_int8"]
    beside = torch.cat((x, 100 * x), 1)
    alone = lam.linear_int8(x, weight, scales, bias, True)
    assert torch.equal(lam.linear_int8(beside, weight, scales, bias, True)[:, :3], alone)


def test_embedding_nbits_reads_rows_of_the_table() -> None:
    packed, scales, zero_points = quantized(9, 20, 4, 16, zeros=True)
    table = dequantize(packed, scales, zero_points, 4, 16, 20)
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    got = lam.embedding_nbits(packed, scales, zero_points, ids, 4, 16, 20)
    assert torch.equal(got, table[ids])


def test_selective_scan_is_its_recurrence() -> None:
    x, delta, a, b, c = CASES["selective_scan"]
    expected = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for channel in range(x.shape[1]):
            state = [0.0] * a.shape[1]
            for t in range(x.shape[2]):
                step = float(delta[n, channel, t])
                for s in range(a.shape[1]):
                    kept = math.exp(step * float(a[channel, s])) * state[s]
                    state[s] = kept + step * float(b[n, s, t]) * float(x[n, channel, t])
                expected[n, channel, t] = sum(
                    state[s] * float(c[n, s, t]) for s in range(len(state))
                )
    # Sums of a few float64.
    torch.testing.assert_close(
        lam.selective_scan(x, delta, a, b, c), expected, rtol=1e-12, atol=1e-12
    )


def test_head_scan_is_its_recurrence() -> None:
    x, delta, a, b, c = CASES["head_scan"]
    batch, sequence, heads, width = x.shape
    expected = torch.zeros_like(x)
    for n, head, row in itertools.product(range(batch), range(heads), range(width)):
        state, group = [0.0] * b.shape[3], head // (heads // b.shape[2])
        for t in range(sequence):
            step = float(delta[n, t, head])
            for s in range(len(state)):
                kept = math.exp(step * float(a[head])) * state[s]
                state[s] = kept + step * float(b[n, t, group, s]) * float(x[n, t, head, row])
            read = (state[s] * float(c[n, t, group, s]) for s in range(len(state)))
            expected[n, t, head, row] = sum(read)
    # Sums of a few float64.
    torch.testing.assert_close(lam.head_scan(x, delta, a, b, c), expected, rtol=1e-12, atol=1e-12)


def test_grouped_linear_gives_every_row_to_its_expert() -> None:
    x, weight, offsets = CASES["grouped_linear"]
    experts = [0, 0, 2, 2, 2, 2, None]
    expected = torch.zeros(7, 5, dtype=torch.float64)
    for row, expert in enumerate(experts):
        if expert is not None:
            expected[row] = weight[expert] @ x[row]
    got = lam.grouped_linear(x, weight, offsets)
    # One product of float64 of four terms.
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
