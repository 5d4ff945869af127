"""The model builder of onnxruntime-genai, whose mixed modes keep some layers at 8 bits by rule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from benchmarks.quantization.judge import Judge
from lamella.ir.graph import Graph
from lamella.passes.sites import Site, find_sites

SETTINGS = (("rtn", 32), ("k_quant", 32), ("k_quant_last", 32), ("k_quant_mixed", 128))
"""``algo_config`` and block: *last* keeps the head at 8 bits, *mixed* some layers by place too."""

NAME = "genai builder"

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def rounded(source: Path, judge: Judge, folder: Path) -> dict[str, tuple[int, Tensor]]:
    """Setting -> bytes, and losses on unseen sequences."""
    found: dict[str, tuple[int, Tensor]] = {}
    for mode, block in SETTINGS:
        path = build(source, folder / f"{mode}-{block}", mode, block)
        size, weights = weights_of(path, judge.case.graph)
        found[f"{mode} {block}"] = size, judge.of_weights(weights)
    return found


def build(source: Path, target: Path, mode: str, block: int) -> Path:
    """A folder of the builder, and the model in it."""
    words = f"-i {source} -o {target} -p int4 -e cpu -c {target}"
    options = (f"algo_config={mode}", f"block_size={block}", "accuracy_level=0")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *words.split()]
    subprocess.run([*command, "--extra_options", *options], check=True, capture_output=True)
    return target / "model.onnx"


def weights_of(path: Path, graph: Graph) -> tuple[int, dict[str, Tensor]]:
    """Bytes of codes, scales (16 bits each) and zeros, and every weight as it is read back.

    An embedding that is tied to the head takes the weight of the head, and no bytes.

    Raises:
        ValueError: A weight of the graph is not stored in few bits.
    """
    model = onnx.load(path)
    stored = {value.name: value for value in model.graph.initializer}
    sites, size = {site.weight: site for site in find_sites(graph)}, 0
    found: dict[str, Tensor] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            parts = list(_parts(node.name, sites))
            dense = _read_back(model, node, stored)
            rows = [site.shape[0] for site in parts]
            pairs = zip(parts, dense.split(rows), strict=True)
            found |= {site.weight: value.contiguous() for site, value in pairs}
            size += _bytes(node, stored)
    if missing := sites.keys() - found.keys():
        raise ValueError(f"{path} holds no codes for {', '.join(sorted(missing))}")
    return size, found


def _parts(name: str, sites: Mapping[str, Site]) -> Iterator[Site]:
    """The weights that a node called ``/model/layers.0/attn/q_proj/MatMul_Q4`` holds."""
    *place, layer, _ = name.strip("/").split("/")
    if layer == "lm_head":
        yield next(site for site in sites.values() if site.role in ("head", "embedding"))
        return
    number = next(word for word in place if word.startswith("layers."))
    for part in _FUSED.get(layer, (layer,)):
        yield next(s for n, s in sites.items() if f".{number}." in n and f".{part}." in n)


def _read_back(model: ModelProto, node: NodeProto, stored: Mapping[str, TensorProto]) -> Tensor:
    """What the kernel makes of the identity, ``[out, in]``."""
    sizes = {one.name: one.i for one in node.attribute}
    alone = helper.make_node(
        "MatMulNBits",
        ["x", *node.input[1:4]],
        ["y"],
        domain="com.microsoft",
        **{name: sizes[name] for name in ("K", "N", "bits", "block_size")},
    )
    kinds = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", sizes[size]])
        for name, size in (("x", "K"), ("y", "N"))
    ]
    values = [stored[name] for name in node.input[1:4] if name]
    graph = helper.make_graph([alone], "product", kinds[:1], kinds[1:], values)
    made = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=min(model.ir_version, 10)
    )
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.eye(sizes["K"], dtype=np.float32)})
    return torch.from_numpy(np.asarray(found)).t()


def _bytes(node: NodeProto, stored: Mapping[str, TensorProto]) -> int:
    codes, scales, *zeros = (stored[name] for name in node.input[1:4] if name)
    entries = int(np.prod(scales.dims))
    return int(np.prod(codes.dims)) + 2 * entries + sum(int(np.prod(z.dims)) for z in zeros)
