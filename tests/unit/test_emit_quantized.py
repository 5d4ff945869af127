"""Weights of few bits: the kernels of ONNX Runtime take our layout as it is."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.files import MODEL, Scratch, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, quantize
from tests.unit.onnx_runs import graph_of

aten = torch.ops.aten
lam = torch.ops.lamella

FORMATS = pytest.mark.parametrize("bits", [2, 4, 8])
LAYOUTS = pytest.mark.parametrize(
    ("block", "symmetric", "scales", "width"),
    [
        (32, True, torch.float16, 128),
        (32, False, torch.float16, 200),
        (64, False, torch.float32, 128),
        (128, True, torch.float32, 200),
    ],
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_graph(format: Format, width: int, *, int8: bool) -> Graph:
    """One linear layer of 96 outputs with a bias."""
    stored = quantize(numbers(96, width, seed=1), format)
    parts = [stored.packed, stored.scales, numbers(96, seed=2)]
    if stored.zero_points is not None:
        parts.append(stored.zero_points)

    def layer(packed: Tensor, scales: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        zeros, x = rest[0] if len(rest) == 2 else None, rest[-1]
        bits, block = format.bits, format.block
        return lam.linear_nbits(x, packed, scales, zeros, bias, bits, block, int8)

    return graph_of(layer, numbers(2, 5, width), weights=parts)


def table_graph(format: Format, width: int, *, tied: bool) -> Graph:
    """A table of 96 rows, and a head that reads the same codes."""
    stored = quantize(numbers(96, width, seed=1), format)
    parts = [stored.packed, stored.scales]
    if stored.zero_points is not None:
        parts.append(stored.zero_points)

    def model(packed: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        zeros, ids = rest[0] if len(rest) == 2 else None, rest[-1]
        bits, block = format.bits, format.block
        rows = lam.embedding_nbits(packed, scales, zeros, ids, bits, block, width)
        rows = aten.mul(aten.to(rows, torch.float32), 0.3)
        if not tied:
            return rows
        return lam.linear_nbits(rows, packed, scales, zeros, None, bits, block, False)

    return graph_of(model, torch.arange(10).reshape(2, 5), weights=parts)


def run(graph: Graph, x: Tensor, *, contrib: bool = True) -> tuple[Tensor, Counter[str], int]:
    """The output, the operators of the *optimized* model, and the bytes of the file."""
    scratch = Scratch()
    save_model(write_onnx(graph, contrib=contrib), scratch.path)
    optimized = scratch.path / "optimized.onnx"
    session = Session(scratch.path / MODEL, threads=1, optimized=optimized)
    (got,) = session.run({"x": x}, session.outputs)
    kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    return got, kinds, (scratch.path / MODEL).stat().st_size


@FORMATS
@LAYOUTS
@pytest.mark.parametrize("int8", [True, False])
def test_a_linear_layer_is_one_kernel_with_our_numerics(
    bits: int, block: int, symmetric: bool, scales: torch.dtype, width: int, int8: bool
):
    graph = linear_graph(Format(bits, block, symmetric, scales), width, int8=int8)
    x = numbers(3, 7, width, seed=4)
    got, kinds, _ = run(graph, x)
    # No cast of scales is left: what is stored as float16 costs nothing at run time.
    assert kinds == {"MatMulNBits": 1}
    want = graph(x=x)
    # Sums of up to 200 float32 products in another order; both round activations alike.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_rounding_of_activations_differs_from_the_kernel_only_at_ties():
    """A quotient that is half a step in one rounding may be a bit less in the other."""
    graph, x = linear_graph(Format(4, 32), 128, int8=True), numbers(4000, 1, 128, seed=5)
    got, _, _ = run(graph, x)
    want = graph(x=x)
    off = (got - want).abs().amax(-1) / want.abs().max()
    # 512,000 activations; about one in a million lies on a tie.
    assert int((off > 1e-5).sum()) <= 4
    # One step of 1/127 of the largest of 32 entries, times one weight.
    assert float(off.max()) < 2e-3


@FORMATS
@LAYOUTS
def test_a_table_reads_only_its_rows(
    bits: int, block: int, symmetric: bool, scales: torch.dtype, width: int
):
    graph = table_graph(Format(bits, block, symmetric, scales), width, tied=False)
    ids = torch.tensor([[0, 95, 3], [7, 7, 50]])
    got, kinds, _ = run(graph, ids)
    assert kinds["GatherBlockQuantized"] == 1
    assert "DequantizeLinear" not in kinds
    # The same product of a code and a scale in the dtype of the scale.
    assert torch.equal(got, graph(x=ids))


@FORMATS
def test_a_tied_table_and_head_share_their_codes(bits: int):
    graph = table_graph(Format(bits, 32), 256, tied=True)
    ids = torch.arange(12).reshape(3, 4)
    got, kinds, size = run(graph, ids)
    assert (kinds["GatherBlockQuantized"], kinds["MatMulNBits"]) == (1, 1)
    want = graph(x=ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    once = 96 * 256 * bits // 8 + 96 * 256 // 32 * 2
    assert once < size < once + 2500


@FORMATS
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_standard_form_is_fused_too(bits: int, symmetric: bool):
    graph = linear_graph(Format(bits, 32, symmetric), 128, int8=True)
    x = numbers(3, 7, 128, seed=4)
    got, kinds, _ = run(graph, x, contrib=False)
    assert kinds == {"MatMulNBits": 1}
    want = graph(x=x)
    # As above; ONNX Runtime rounds activations to 8 bits by default.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_standard_form_of_a_table_is_exact(symmetric: bool):
    graph = table_graph(Format(4, 32, symmetric, torch.float32), 200, tied=False)
    ids = torch.tensor([[0, 95, 3], [7, 7, 50]])
    got, kinds, _ = run(graph, ids, contrib=False)
    assert kinds["DequantizeLinear"] == 1
    torch.testing.assert_close(got, graph(x=ids), rtol=1e-6, atol=1e-6)


def int8_graph(*inputs: Tensor, per_row: bool, readers: int = 1, bias: bool = True) -> Graph:
    """Linear layers of integers on one input; their results are added."""
    width = inputs[0].shape[-1]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (readers, 96, width), generator=generator, dtype=torch.int8)
    scales = numbers(readers, 96, seed=1).abs() / 128
    parts = [*codes, *scales, numbers(96, seed=2)]

    def layers(*given: Tensor) -> Tensor:
        weights, shift, x = given[: 2 * readers], given[2 * readers], given[-1]
        pairs = zip(weights[:readers], weights[readers:], strict=True)
        added = shift if bias else None
        return sum(lam.linear_int8(x, w, s, added, per_row) for w, s in pairs)

    return graph_of(layers, *inputs, weights=parts)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_products_of_integers_are_exact(per_row: bool, contrib: bool, bias: bool, rank: int):
    x = numbers(*(6, 7, 200)[-rank:], seed=4)
    graph = int8_graph(x, per_row=per_row, bias=bias)
    if rank > 1:
        x[0] *= 100
        x[1] = 0
    got, kinds, _ = run(graph, x, contrib=contrib)
    fused = kinds["MatMulIntegerToFloat"] + kinds["DynamicQuantizeMatMul"]
    assert (fused, kinds["MatMulInteger"]) == ((0, 1) if per_row and not contrib else (1, 0))
    want = graph(x=x)
    # Integers are summed exactly; two or three roundings of float32 are left.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("per_row", [True, False])
def test_layers_on_one_input_round_it_once(per_row: bool):
    x = numbers(3, 7, 128, seed=4)
    graph = int8_graph(x, per_row=per_row, readers=3)
    got, kinds, _ = run(graph, x)
    rounding = "QuantizeLinear" if per_row else "DynamicQuantizeLinear"
    assert (kinds[rounding], kinds["MatMulIntegerToFloat"]) == (1, 3)
    want = graph(x=x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("per_row", [True, False])
def test_a_matrix_of_integers_is_stored_in_one_byte_each(per_row: bool):
    graph = int8_graph(numbers(3, 7, 128), per_row=per_row)
    _, _, size = run(graph, numbers(3, 7, 128))
    # Codes, scales and bias; names and nodes are less than 3 kB.
    assert size < 96 * 128 + 8 * 96 + 3000
