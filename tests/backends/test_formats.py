"""Every format of every backend: the kernel computes what the emulator does, from the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
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
from lamella.backends.torch.aot import AotBackend
from lamella.backends.torch.eager import EagerBackend
from lamella.ir.graph import Graph
from lamella.ir.packing import unpack
from lamella.tuning.layers import layer, sample

BACKENDS: dict[str, Backend] = {
    "onnxruntime": OnnxRuntimeBackend(threads=1),
    "standard": OnnxRuntimeBackend(threads=1, contrib=False),
    "eager": EagerBackend(),
    "bfloat16": EagerBackend(bfloat16=True),
    # The kernels of the aot backend, without a compiler around them.
    "aot": AotBackend().trial(),
}
RAGGED = ((48, 70), (33, 200), (80, 130))
"""Outputs and inputs; the inputs are no whole blocks of any size."""

REAL = (384, 1536)
"""The second projection of a block of MiniLM."""


def cases() -> Iterator[tuple[str, QuantFormat, tuple[int, int]]]:
    """Every format of every backend, with inputs that are no whole blocks and of a real model."""
    for name, backend in BACKENDS.items():
        for place, format in enumerate(backend.formats()):
            ragged = RAGGED[place % len(RAGGED)]
            # The kernel of 4 bits of PyTorch takes multiples of 16 outputs.
            yield name, format, RAGGED[0] if format.obstacle(ragged) else ragged
            yield name, format, (64, 32) if format.role == "convolution" else REAL


def only(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else next(iter(value))  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "format", "shape"), [pytest.param(*c, id=f"{c[0]} {c[1]} {c[2]}") for c in cases()]
)
def test_the_kernel_computes_what_the_emulator_does(
    name: str, format: QuantFormat, shape: tuple[int, int]
) -> None:
    graph = layer(format, shape)
    value = sample(format.role, shape, 5)
    # The operators of the graph are the reference implementations.
    want = only(graph(value))
    got = only(BACKENDS[name].lower(graph)(value))
    # What the format says: the order of sums, a tie of a code, or the precision of bfloat16.
    assert float((got - want).abs().max() / want.abs().max()) <= format.tolerance


def exact_cases() -> Iterator[tuple[str, QuantFormat]]:
    for name in ("onnxruntime", "standard"):
        for format in BACKENDS[name].formats():
            if format.role == "linear" and format.block:
                yield name, format


@pytest.mark.parametrize(
    ("name", "format"), [pytest.param(*c, id=f"{c[0]} {c[1]}") for c in exact_cases()]
)
def test_the_kernel_holds_every_code(name: str, format: QuantFormat) -> None:
    # 15 outputs are what ONNX Runtime can't fuse with codes of 2 bits.
    outputs, inputs = 16 - (format.block == 64), 150
    graph = layer(format, (outputs, inputs))
    got = only(BACKENDS[name].lower(graph)(torch.eye(inputs))).T
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


@pytest.mark.parametrize("kind", ["onnxruntime", "standard"])
@pytest.mark.parametrize("format", BACKENDS["onnxruntime"].formats(), ids=str)
def test_bytes_are_those_of_the_file(kind: str, format: QuantFormat) -> None:
    # In standard operators codes of 2 bits take 4 where outputs are no multiple of 4.
    shape = (47, 70)
    (format,) = [one for one in BACKENDS[kind].formats() if str(one) == str(format)]
    model = write_onnx(layer(format, shape), contrib=kind == "onnxruntime")
    names = {"weight", "codes", "packed", "scales", "zeros"}
    held = sum(
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if name.partition(".")[0] in names and value.const_value is not None
    )
    whole = (*shape, 3, 3) if format.role == "convolution" else shape
    assert format.weight_bytes(whole) == held


def test_two_bits_are_two_bits_in_standard_operators() -> None:
    (format,) = [one for one in BACKENDS["standard"].formats() if str(one) == "2/32"]
    assert format.weight_bytes((48, 64)) == 48 * 64 * 2 // 8 + 48 * 2 * 2
    assert format.weight_bytes((47, 64)) == 47 * 64 * 4 // 8 + 47 * 2 * 2


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
    assert kinds["MatMulNBits"] == 3
    assert kinds["DequantizeLinear"] == kinds["MatMul"] == 0
    written = onnx.load(tmp_path / MODEL)
    # Types of 2 bits came with opset 25; nothing else needs it.
    assert written.opset_import[0].version == (25 if bits == 2 else 23)


def test_static_ranges_are_fused_from_standard_operators(tmp_path: Path) -> None:
    (format,) = [f for f in BACKENDS["onnxruntime"].formats() if f.name == "int8-static"]
    kinds = optimized(layer(format, (64, 128)), tmp_path, contrib=False)
    assert kinds["MatMulIntegerToFloat"] == 1
    assert kinds["DequantizeLinear"] == 0


def optimized(graph: Graph, folder: Path, *, contrib: bool) -> Counter[str]:
    folder.mkdir(exist_ok=True)
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


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_a_whole_model_runs_with_the_types_of_opset_25(
    family: str,
    tmp_path: Path,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    kinds: dict[int, Counter[str]] = {}
    for bits in (2, 4):
        graph, inputs = captured(family), sample_inputs(family)
        lamella.transform(graph, [f"quantize-weights bits={bits} min_size=1"])
        want = next(iter(dict(graph(**inputs)).values()))
        got = next(iter(dict(BACKENDS["standard"].lower(graph)(**inputs)).values()))
        # A code of an activation at a tie may fall to the other side.
        assert float((got - want).norm() / want.norm()) < 5e-3
        kinds[bits] = optimized(graph, tmp_path / str(bits), contrib=False)
    # The same fusions as with the operators of opset 23.
    assert kinds[2] == kinds[4]
    assert kinds[2]["MatMulNBits"] > 5
