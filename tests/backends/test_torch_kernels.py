"""Kernels of PyTorch for few bits, beside the operators that they stand for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lamella
from lamella.backends.torch import kernels, lowered
from lamella.backends.torch.eager import EagerBackend
from lamella.backends.torch.narrow import from_text
from lamella.backends.torch.portable import WEIGHTS
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import linear_int8_static
from lamella.ir.operators import linear_int8, linear_nbits
from lamella.ir.packing import pack, unpack

SHAPES = [(1, 64, 64), (5, 70, 33), (3, 160, 48)]
"""Rows, inputs and outputs; also what is no multiple of anything."""


def case(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scales = torch.rand(outputs, generator=generator) * 0.01 + 0.001
    bias = torch.randn(outputs, generator=generator)
    return torch.randn(2, rows, inputs, generator=generator), codes, scales, bias


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_integers_are_exact(shape: tuple[int, int, int]) -> None:
    x, codes, scales, bias = case(*shape)
    packed = kernels.packed_integers(codes)
    # Sums of integers are exact; the order of two products of float32 is left.
    columns = kernels.packed_columns(codes)
    pairs = [
        (kernels.traced_rows(x, *columns, scales, bias), linear_int8(x, codes, scales, bias, True)),
        (
            kernels.traced_tensor(x, *columns, scales, bias),
            linear_int8(x, codes, scales, bias, False),
        ),
        (
            kernels.traced_static(x, *columns, scales, bias, 0.02, 117),
            linear_int8_static(x, codes, scales, bias, 0.02, 117),
        ),
        (kernels.linear_rows(x, packed, scales, bias), linear_int8(x, codes, scales, bias, True)),
        (
            kernels.linear_tensor(x, packed, scales, bias),
            linear_int8(x, codes, scales, bias, False),
        ),
        (
            kernels.linear_static(x, packed, scales, bias, 0.02, 117),
            linear_int8_static(x, codes, scales, bias, 0.02, 117),
        ),
        (
            linear_int8_static(x, codes.float(), scales, bias, 0.02, 117),
            linear_int8_static(x, codes, scales, bias, 0.02, 117),
        ),
    ]
    for got, want in pairs:
        assert got.shape == want.shape
        assert off(got, want) < 1e-6
    empty = kernels.linear_rows(x[:0], packed, scales, bias)
    assert empty.shape == (0, shape[0], shape[2])


@pytest.mark.parametrize("block", kernels.INT4_BLOCKS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [128, 70])
def test_four_bits_in_bfloat16(block: int, symmetric: bool, inputs: int) -> None:
    generator = torch.Generator().manual_seed(block)
    blocks = -(-inputs // block)
    codes = torch.randint(0, 16, (32, blocks, block), generator=generator)
    zeros = None if symmetric else torch.randint(0, 16, (32, blocks), generator=generator)
    middle = torch.full((32, blocks), 8) if zeros is None else zeros
    # What lies behind the end of a row stands for zero.
    codes.flatten(1)[:, inputs:] = middle[:, -1:]
    # Scales that bfloat16 holds exactly, so that the weights are bit for bit the same.
    scales = 2.0 ** torch.randint(-6, -2, (32, blocks), generator=generator)
    x = torch.randn(3, inputs, generator=generator).bfloat16().float()
    packed = kernels.packed_int4(codes.flatten(1))
    got = kernels.linear_int4(x, packed, kernels.slopes_and_offsets(scales, zeros), None, block)
    stored = (pack(codes, 4), scales, None if zeros is None else pack(zeros, 4))
    want = linear_nbits(x, *stored, None, 4, block, False)
    # The result is rounded to 8 bits of precision, and so are partial sums.
    assert off(got, want) < 2**-7
    assert torch.equal(unpack(stored[0], 4, block).flatten(1), codes.flatten(1).to(torch.uint8))


def test_eight_bit_weights_in_bfloat16() -> None:
    x, codes, scales, bias = case(4, 128, 48)
    got = kernels.linear_int8_weights(x, codes, scales, bias)
    want = torch.nn.functional.linear(x, codes.float() * scales[:, None], bias)
    # Inputs, scales and results have 8 bits of precision each.
    assert off(got, want) < 3 * 2**-8
    assert "no multiple of 64" in kernels.int8_obstacle(48, 70)


def graph_of(passes: list[str]) -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 33)).eval()
    x = torch.randn(4, 64)
    graph = lamella.capture(model, (x,))
    lamella.transform(graph, passes)
    return graph, x


@pytest.mark.parametrize("activations", ["int8-rows", "int8-tensor"])
def test_the_eager_backend_multiplies_integers(
    activations: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    # How fast the kernel is here does not matter.
    monkeypatch.setattr("lamella.backends.torch.eager.no_integer_products", lambda: "")
    graph, x = graph_of(
        [f"quantize-weights bits=8 min_size=1 min_rows=0 activations={activations}"]
    )
    executable = EagerBackend().lower(graph)
    assert executable.lowered.counts == {lowered.INTEGERS: 2}
    assert executable.unpacked == 0
    assert off(executable(x), graph(x)) < 1e-5
    executable.save(tmp_path / "out")
    assert torch.equal(lamella.load(tmp_path / "out")(x), executable(x))


def test_where_the_kernel_is_of_no_use_codes_are_held_as_floats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lamella.backends.torch.eager.no_integer_products", lambda: "slow")
    graph, x = graph_of(["quantize-weights bits=8 min_size=1 min_rows=0 activations=int8-rows"])
    executable = EagerBackend().lower(graph)
    assert executable.unpacked == 2
    assert off(executable(x), graph(x)) < 1e-5


def test_bfloat16_is_for_who_asks_and_said(tmp_path) -> None:
    report = None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 33)).eval()
    x = torch.randn(4, 64)
    graph = lamella.capture(model, (x,))
    report = lamella.transform(graph, ["quantize-weights bits=4 min_size=2000"])
    executable = EagerBackend(bfloat16=True).lower(graph, report)
    assert executable.lowered.counts == {lowered.INT4: 1, lowered.BFLOAT16: 1}
    assert executable.report is not None
    assert any("products in bfloat16 are approximations" in r for r in executable.report.remarks)
    # Two layers in bfloat16, one of them without the rounding of its input to 8 bits.
    assert 0 < off(executable(x), graph(x)) < 0.03
    executable.save(tmp_path / "out")
    assert torch.equal(lamella.load(tmp_path / "out")(x), executable(x))
    assert lamella.lower(graph, "eager-bfloat16")(x).equal(executable(x))


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_files_hold_narrow_codes_in_their_own_width(bits: int, symmetric: bool, tmp_path) -> None:
    options = f"bits={bits} min_size=1 symmetric={symmetric}"
    graph, x = graph_of([f"quantize-weights {options}"])
    executable = EagerBackend().lower(graph)
    executable.save(tmp_path / "out")
    held = load_file(tmp_path / "out" / WEIGHTS)
    # 48 rows of 2 blocks of 32.
    assert held["0.weight_packed"].numel() == 48 * 2 * 32 * bits // 8
    loaded = lamella.load(tmp_path / "out")
    assert torch.equal(loaded(x), executable(x))
    assert loaded.weight_bytes == executable.weight_bytes == graph.weight_bytes()
    written = sum(one.stat().st_size for one in (tmp_path / "out").iterdir())
    manifest = (tmp_path / "out" / "manifest.json").stat().st_size
    # To within the header of the weights.
    assert abs(written - manifest - executable.file_bytes) < 600


def test_metadata_that_says_something_else_is_refused() -> None:
    assert from_text("{}") == {}
    with pytest.raises(ValueError, match="does not say how codes are stored"):
        from_text('{"a": 3}')
