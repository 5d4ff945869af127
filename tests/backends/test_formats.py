"""Every format of every backend: the kernel computes what the emulator does, from the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import lamella
from lamella.backends.base import Backend
from lamella.backends.formats import QuantFormat, of_node
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.eager import EagerBackend
from lamella.ir.graph import Graph
from lamella.ir.packing import unpack
from lamella.tuning.layers import layer, sample

BACKENDS: dict[str, Backend] = {
    "onnxruntime": OnnxRuntimeBackend(threads=1),
    "standard": OnnxRuntimeBackend(threads=1, contrib=False),
    "eager": EagerBackend(),
    "bfloat16": EagerBackend(bfloat16=True),
}
SHAPES = ((48, 70), (64, 128), (33, 200), (192, 576))
"""Outputs and inputs; inputs that are no whole blocks, and the layer of a real model."""


def cases() -> Iterator[tuple[str, QuantFormat, tuple[int, int]]]:
    for name, backend in BACKENDS.items():
        for place, format in enumerate(backend.formats()):
            # In standard operators blocks of one size tell about the others.
            if name != "standard" or format.block in (0, 32):
                yield name, format, SHAPES[place % len(SHAPES)]


def only(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else next(iter(value))  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "format", "shape"), [pytest.param(*c, id=f"{c[0]} {c[1]}") for c in cases()]
)
def test_the_kernel_computes_what_the_emulator_does(
    name: str, format: QuantFormat, shape: tuple[int, int]
) -> None:
    if format.obstacle(shape):
        shape = (64, 128)
    graph = layer(format, shape)
    value = sample(format.role, shape, 5)
    # The operators of the graph are the reference implementations.
    want = only(graph(value))
    got = only(BACKENDS[name].lower(graph)(value))
    # What the format says: the order of sums, a tie of a code, or the precision of bfloat16.
    assert float((got - want).abs().max() / want.abs().max()) <= format.tolerance


def exact_cases() -> list[QuantFormat]:
    linear = (one for one in BACKENDS["onnxruntime"].formats() if one.role == "linear")
    return [one for one in linear if one.block]


@pytest.mark.parametrize("format", exact_cases(), ids=str)
def test_the_kernel_holds_every_code(format: QuantFormat) -> None:
    outputs, inputs = 16, 150
    graph = layer(format, (outputs, inputs))
    got = only(OnnxRuntimeBackend(threads=1).lower(graph)(torch.eye(inputs))).T
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    packed, scales = (graph.weight(graph.operand(node, k)) for k in ("packed", "scales"))
    blocks = scales.shape[1]
    codes = unpack(packed, format.bits, format.block)
    zeros = torch.full((outputs, blocks), 1 << (format.bits - 1))
    if not format.symmetric:
        zeros = unpack(graph.weight(graph.operand(node, "zero_points")), format.bits, blocks)
    found = torch.nn.functional.pad(got, (0, blocks * format.block - inputs))
    found = found.unflatten(1, (blocks, format.block)) / scales.float().unsqueeze(-1)
    back = found + zeros.unsqueeze(-1)
    # A row of the identity has one entry: one product, from which the code follows exactly.
    whole = back.flatten(1)[:, :inputs]
    assert torch.equal(whole.round(), codes.flatten(1)[:, :inputs].float())
    assert float((whole - whole.round()).abs().max()) < 1e-4


@pytest.mark.parametrize("format", BACKENDS["onnxruntime"].formats(), ids=str)
def test_bytes_are_those_of_the_file(format: QuantFormat, tmp_path: Path) -> None:
    shape = (48, 70)
    model = write_onnx(layer(format, shape))
    names = {"weight", "codes", "packed", "scales", "zeros"}
    held = sum(
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if name in names and value.const_value is not None
    )
    whole = (*shape, 3, 3) if format.role == "convolution" else shape
    assert format.weight_bytes(whole) == held


@pytest.mark.parametrize(
    ("bits", "block", "symmetric"), [(4, 32, True), (4, 64, False), (8, 32, True), (2, 32, True)]
)
def test_standard_operators_are_fused(
    bits: int, block: int, symmetric: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 96), nn.Linear(96, 32))
    graph = lamella.capture(model.eval(), (torch.randn(3, 128),))
    options = f"bits={bits} block={block} symmetric={symmetric} min_size=1"
    lamella.transform(graph, [f"quantize-weights {options}"])
    kinds = optimized(graph, tmp_path, contrib=False)
    # Codes of 2 bits are stored in 4: there is no such type before opset 25.
    assert kinds["MatMulNBits"] == 3
    assert kinds["DequantizeLinear"] == kinds["MatMul"] == 0


def test_static_ranges_are_fused_from_standard_operators(tmp_path: Path) -> None:
    (format,) = [f for f in BACKENDS["onnxruntime"].formats() if f.name == "int8-static"]
    kinds = optimized(layer(format, (64, 128)), tmp_path, contrib=False)
    assert kinds["MatMulIntegerToFloat"] == 1
    assert kinds["DequantizeLinear"] == 0


def optimized(graph: Graph, folder: Path, *, contrib: bool) -> Counter[str]:
    save_model(write_onnx(graph, contrib=contrib), folder)
    Session(folder / MODEL, threads=1, optimized=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_layers_are_found_in_their_formats() -> None:
    backend = BACKENDS["onnxruntime"]
    formats = backend.formats()
    for format in formats:
        if format.bits < 16:
            graph = layer(format, (64, 128))
            found = [of_node(node, formats) for node in graph.nodes if node.op == "call_function"]
            assert format in found
