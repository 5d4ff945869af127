"""Which ONNX operators the writer emits, and what they race against.

    python -m benchmarks.onnx_kernels [--rounds 40]

Every case is written in several ways that compute the same; ONNX Runtime runs them in turns, and
the fastest and the median call of each are shown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.record import Result
from lamella.backends.onnxruntime.session import Session

Nodes = list[onnx.NodeProto]
Row = tuple[Any, ...]
HEADS, WIDTH, HIDDEN = 12, 64, 768
SIZES = ((1, 16), (1, 128), (4, 128))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds: int = parser.parse_args(arguments).rounds
    rows = [row for batch, length in SIZES for row in measure(batch, length, rounds)]
    Result(
        name="onnx_kernels",
        title="Forms of one computation in ONNX Runtime on the CPU, in milliseconds",
        columns=("what", "batch", "tokens", "form", "fastest", "median", "difference"),
        rows=rows,
        notes=("Forms that the writer emits are marked with *; differences are to the first form",),
    ).publish()


def measure(batch: int, length: int, rounds: int) -> list[Row]:
    """All cases at one size."""
    cases: tuple[tuple[str, Mapping[str, Any], Sequence[str], int], ...] = (
        ("attention", attention_forms(), ("q", "k", "v", "m"), HIDDEN),
        ("add and RMS norm", norm_forms(), ("x", "r"), HIDDEN),
        ("SiLU", silu_forms(), ("x",), 2048),
        ("linear 768 to 3072", linear_forms(), ("x",), HIDDEN),
    )
    rows: list[Row] = []
    for what, forms, names, width in cases:
        feeds = inputs_of(names, batch, length, width)
        for form, fastest, median, difference in race(forms, feeds, rounds):
            rows.append((what, batch, length, form, fastest, median, difference))
    return rows


def race(
    forms: Mapping[str, Any], feeds: Mapping[str, Tensor], rounds: int
) -> list[tuple[str, float, float, str]]:
    """Fastest and median milliseconds of each form, and its difference to the first."""
    with tempfile.TemporaryDirectory() as folder:
        sessions: dict[str, Session] = {}
        for number, (form, (nodes, constants)) in enumerate(forms.items()):
            path = Path(folder) / f"{number}.onnx"
            onnx.save(model_of(nodes, constants, feeds), path)
            sessions[form] = Session(path)
        times: dict[str, list[float]] = {form: [] for form in forms}
        outputs: dict[str, Tensor] = {}
        for _ in range(rounds):
            for form, session in sessions.items():
                start = time.perf_counter()
                (outputs[form],) = session.run(feeds, ["y"])
                times[form].append((time.perf_counter() - start) * 1e3)
    first = next(iter(outputs.values()))
    return [
        (form, min(t), statistics.median(t), f"{float((outputs[form] - first).abs().max()):.0e}")
        for form, t in times.items()
    ]


def inputs_of(names: Sequence[str], batch: int, length: int, width: int) -> dict[str, Tensor]:
    """Random tensors; ``m`` is a causal mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.full((batch, 1, length, length), float("-inf")).triu(1)
    return {
        name: mask if name == "m" else torch.randn(batch, length, width, generator=generator)
        for name in names
    }


def model_of(
    nodes: Nodes, constants: Mapping[str, np.ndarray], feeds: Mapping[str, Tensor]
) -> onnx.ModelProto:
    """A model with one output ``y``."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * value.ndim)
        for name, value in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "race", inputs, [output], stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


node: Callable[..., onnx.NodeProto] = helper.make_node
CONTRIB = {"domain": "com.microsoft"}


def attention_forms() -> dict[str, tuple[Nodes, dict[str, np.ndarray]]]:
    """Products and a softmax, the contrib operator, the standard operator."""
    cut = np.array([0, 0, HEADS, WIDTH])
    written = [node("Reshape", [name, "cut"], [f"{name}4"]) for name in "qkv"]
    orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    written += [node("Transpose", [f"{x}4"], [f"{x}t"], perm=p) for x, p in orders.items()]
    written += [
        node("Mul", ["qt", "scale"], ["qs"]),
        node("MatMul", ["qs", "kt"], ["s"]),
        node("Add", ["s", "m"], ["sm"]),
        node("Softmax", ["sm"], ["p"], axis=-1),
        node("MatMul", ["p", "vt"], ["o"]),
        node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        node("Reshape", ["ot", "join"], ["y"]),
    ]
    constants = {"cut": cut, "join": np.array([0, 0, -1]), "scale": np.float32(WIDTH**-0.5)}
    multi = node(
        "MultiHeadAttention", ["q", "k", "v", "", "", "m"], ["y"], num_heads=HEADS, **CONTRIB
    )
    standard = node("Attention", [*"qkvm"], ["y"], q_num_heads=HEADS, kv_num_heads=HEADS)
    return {
        "products, softmax": (written, {k: np.asarray(v) for k, v in constants.items()}),
        "MultiHeadAttention": ([multi], {}),
        "Attention *": ([standard], {}),
    }


def norm_forms() -> dict[str, tuple[Nodes, dict[str, np.ndarray]]]:
    """An add and a norm, or both in one."""
    scale = {"w": np.ones(HIDDEN, np.float32)}
    norm = node("RMSNormalization", ["a", "w"], ["y"], epsilon=1e-6)
    skip = node(
        "SkipSimplifiedLayerNormalization",
        ["x", "r", "w"],
        ["y", "", "", "a"],
        epsilon=1e-6,
        **CONTRIB,
    )
    return {
        "Add, RMSNormalization *": ([node("Add", ["x", "r"], ["a"]), norm], scale),
        "SkipSimplifiedLayerNormalization": ([skip], scale),
    }


def silu_forms() -> dict[str, tuple[Nodes, dict[str, np.ndarray]]]:
    """The product with a sigmoid, or one operator."""
    product = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    quick = [node("QuickGelu", ["x"], ["y"], alpha=1.0, **CONTRIB)]
    return {"Sigmoid, Mul *": (product, {}), "QuickGelu": (quick, {})}


def linear_forms() -> dict[str, tuple[Nodes, dict[str, np.ndarray]]]:
    """The matrix as it is, or transposed."""
    weight = np.random.default_rng(0).standard_normal((3072, HIDDEN), np.float32) * 0.03
    turned = {"w": np.ascontiguousarray(weight.T)}
    fused = node("FusedMatMul", ["x", "w"], ["y"], transB=1, **CONTRIB)
    return {
        "MatMul, transposed when written *": ([node("MatMul", ["x", "w"], ["y"])], turned),
        "FusedMatMul (tied weights *)": ([fused], {"w": weight}),
    }


if __name__ == "__main__":
    main()
