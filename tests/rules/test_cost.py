"""Cost rules: every operator has one, and the figures are those of independent counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import CANONICAL, aten, facts, lam, op_name
from lamella.ir.packing import pack
from lamella.passes.analyses.cost import CostReport, cost_of
from lamella.rules.cost import COST
from lamella.rules.work import Call, Work

Captured = Callable[[str], Graph]
SampleInputs = Callable[..., dict[str, Tensor]]

# Every operator of these has a formula in PyTorch's counter, or no products at all.
COUNTED = (
    *("llama", "gemma2", "gpt2", "opt", "bert", "deberta-v2", "modernbert", "t5", "bart"),
    *("vit", "swin", "dinov2", "resnet", "convnext", "whisper", "wav2vec2"),
)


def sizes_of(graph: Graph, report: CostReport, inputs: dict[str, Tensor]) -> dict[str, int]:
    """The sizes of `inputs` by the names of the report."""
    batch, sequence = 0, 0
    sizes: dict[str, int] = {}
    for name in graph.signature.inputs:
        shape = inputs[name].shape
        batch = batch or shape[0]
        prefix = "decoder_" if name.startswith("decoder_") else ""
        if len(shape) > 1:
            sequence = shape[1]
            sizes[f"{prefix}sequence"] = sequence
    sizes["batch"] = batch
    return {name: size for name, size in sizes.items() if name in report.symbols}


def test_every_canonical_operator_has_a_rule():
    assert [op_name(target) for target in CANONICAL if target not in COST] == []


def test_there_is_no_rule_for_an_operator_that_is_not_canonical():
    assert [op_name(target) for target in COST if facts(target) is None] == []


@pytest.mark.parametrize("family", COUNTED)
def test_products_are_counted_as_pytorch_counts_them(
    family: str, captured: Captured, sample_inputs: SampleInputs
):
    graph = captured(family)
    inputs = sample_inputs(family)
    report = cost_of(graph)
    # The fused kernel has no formula in the counter; the products it is made of have.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        graph(**inputs)
    total = report.at(**sizes_of(graph, report, inputs)).total
    assert total.contraction_flops == counter.get_total_flops()


def works(module: nn.Module, *inputs: Tensor, dynamic: bool = True) -> dict[str, Work]:
    """Operator -> work, for a module that uses each operator once."""
    graph = capture_module(module, inputs, dynamic=dynamic)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return {op_name(node.target): COST[node.target](Call(node, {})) for node in calls}


def test_a_convolution_with_groups_counts_its_windows():
    conv = nn.Conv2d(8, 12, (3, 5), groups=4, stride=2)
    x = torch.randn(2, 8, 17, 19)
    work = works(conv, x, dynamic=False)["aten.conv2d.default"]
    out = conv(x)
    multiplications = out.numel() * (8 // 4) * 3 * 5
    assert work.contraction_flops == 2 * multiplications
    assert work.flops == 2 * multiplications + out.numel()
    assert work.weight_bytes == 4 * (conv.weight.numel() + 12)
    assert work.read_bytes == 4 * x.numel()
    assert work.written_bytes == 4 * out.numel()


def test_a_transposed_convolution_counts_its_scattered_products():
    conv = nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False)
    x = torch.randn(2, 6, 5, 7)
    work = works(conv, x, dynamic=False)["aten.conv_transpose2d.input"]
    assert work.flops == 2 * x.numel() * 4 * 3 * 3


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        ("i,j->ij", [(3,), (4,)], 2 * 12),
        ("...ij,jk->...ik", [(7, 2, 3, 4), (4, 5)], 2 * 7 * 2 * 3 * 4 * 5),
        ("bi...,i->b...", [(2, 3, 4, 5), (3,)], 2 * 2 * 3 * 4 * 5),
    ],
)
def test_einsum_counts_the_product_of_all_indices(
    equation: str, shapes: list[tuple[int, ...]], flops: int
):
    class Einsum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum(equation, a, b)

    inputs = [torch.randn(shape) for shape in shapes]
    work = works(Einsum(), *inputs, dynamic=False)["aten.einsum.default"]
    assert work.flops == flops


def nbits_linear(bits: int, block: int, zeros: bool) -> tuple[nn.Module, int]:
    """A module with one packed linear layer of 6 x 100, and the bytes of its tensors."""
    out, features = 6, 100
    blocks = -(-features // block)
    codes = torch.zeros(out, blocks, block, dtype=torch.uint8)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", pack(codes, bits))
            self.register_buffer("scales", torch.ones(out, blocks, dtype=torch.float16))
            points = pack(torch.zeros(out, blocks, dtype=torch.uint8), bits)
            self.register_buffer("points", points if zeros else None)

        def forward(self, x: Tensor) -> Tensor:
            stored: Any = (self.packed, self.scales, self.points)
            return torch.ops.lamella.linear_nbits(x, *stored, None, bits, block, False)

    held = [out * blocks * block * bits // 8, 2 * out * blocks]
    held += [out * -(-blocks * bits // 8)] if zeros else []
    return Packed(), sum(held)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_weights_are_counted_to_the_byte(bits: int, block: int, zeros: bool):
    module, nbytes = nbits_linear(bits, block, zeros)
    work = works(module, torch.randn(3, 100), dynamic=False)["lamella.linear_nbits.default"]
    assert work.weight_bytes == nbytes
    assert work.contraction_flops == 2 * 3 * 6 * 100


def test_a_packed_embedding_reads_the_rows_that_are_picked():
    rows, block, blocks = 50, 32, 2

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.zeros(rows, blocks, block, dtype=torch.uint8)
            self.register_buffer("packed", pack(codes, 4))
            self.register_buffer("scales", torch.ones(rows, blocks))

        def forward(self, ids: Tensor) -> Tensor:
            stored: Any = (self.packed, self.scales, None)
            return torch.ops.lamella.embedding_nbits(*stored, ids, 4, block, 60)

    ids = torch.zeros(2, 7, dtype=torch.long)
    work = works(Packed(), ids, dynamic=False)["lamella.embedding_nbits.default"]
    assert work.weight_bytes == 14 * (blocks * block // 2 + blocks * 4)
    assert work.written_bytes == 14 * 60 * 4


def test_views_are_free_and_copies_are_not():
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(1, 2).reshape(2, -1)
            return torch.cat((y, y), 1)

    found = works(Moves(), torch.randn(2, 3, 4), dynamic=False)
    assert found["aten.transpose.int"] == Work()
    assert found["aten.reshape.default"] == Work()
    assert found["aten.cat.default"].written_bytes == 2 * 24 * 4
    assert found["aten.cat.default"].flops == 0


def test_costs_stay_symbolic():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    graph = capture_module(Linear(), {"x": torch.randn(2, 5, 8)}, dynamic={"x": [0, 1]})
    report = cost_of(graph)
    batch, sequence = (sympy.Symbol(n, integer=True, positive=True) for n in report.symbols)
    assert report.total.contraction_flops == 2 * batch * sequence * 8 * 16
    assert report.total.written_bytes == batch * sequence * 16 * 4
    assert report.total.stored_bytes == 4 * (8 * 16 + 16)


def test_operators_of_our_own_are_in_the_table():
    for target in (lam.selective_scan.default, lam.head_scan.default, lam.grouped_linear.default):
        assert target in COST
    assert aten.linear.default in COST
