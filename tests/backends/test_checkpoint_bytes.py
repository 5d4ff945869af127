"""Bytes of weights, predicted before anything is rounded, against tensors in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from lamella.backends.onnxruntime.files import weight_bytes as onnx_weight_bytes
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.portable import WEIGHTS, Portable
from lamella.checkpoints.bytes import FORMULAS
from lamella.checkpoints.save import save_checkpoint
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.sites import find_sites
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from tests.backends.test_checkpoint_formats import _captured

FORMATS = (
    Format(3),
    Format(4, 32, False),
    Format(6),
    Format(2, 32, True, torch.float32),
    Format(5, 32, False),
    Format(8),
)


def planned(seed: int) -> tuple[Graph, Mapping[str, Format]]:
    """A tiny Llama with a format for every weight, and its plan."""
    graph = _captured("llama").copy()
    sites = find_sites(graph)
    plan = {site.weight: FORMATS[(seed + i) % len(FORMATS)] for i, site in enumerate(sites)}
    graph.plan = plan
    QuantizeWeights(int8_activations=False).run(graph, Analyses(graph))
    graph.finish()
    return graph, plan


def formula(target: str, plan: Mapping[str, Format]) -> int:
    total = 0
    for site in find_sites(_captured("llama")):
        is_table = any(reader.target is aten.embedding.default for reader in site.readers)
        total += FORMULAS[target](site.shape, plan[site.weight], site.dtype, is_table)
    return total


def rest() -> int:
    """Bytes of the weights without a format: scales of norms, tables of positions."""
    graph = _captured("llama")
    return graph.weight_bytes() - sum(4 * site.size for site in find_sites(graph))


def norms() -> int:
    graph = _captured("llama")
    names = {site.weight for site in find_sites(graph)}
    values = [n for n in graph.weight_nodes() if str(n.target) not in names]
    kept = [n.meta["val"] for n in values if str(n.target).endswith(".weight")]
    return sum(4 * value.numel() for value in kept)


@pytest.mark.parametrize("seed", [0, 3])
def test_formulas_are_the_bytes_of_the_tensors(seed: int, tmp_path: Path) -> None:
    graph, plan = planned(seed)
    # Constants that the writer adds take a few bytes each.
    assert 0 <= onnx_weight_bytes(write_onnx(graph)) - formula("onnxruntime", plan) - rest() < 600
    Portable.of(graph).write(tmp_path)
    held = sum(one.nbytes for one in load_file(tmp_path / WEIGHTS).values())
    assert held == formula("eager", plan) + rest()
    save_checkpoint(graph, tmp_path / "packed", format="compressed-tensors")
    held = sum(one.nbytes for one in load_file(tmp_path / "packed/model.safetensors").values())
    assert held == formula("compressed-tensors", plan) + norms()
    save_checkpoint(graph, tmp_path / "gguf", format="gguf")
    tensors = gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors
    assert sum(int(one.n_bytes) for one in tensors) == formula("gguf", plan) + norms()


@pytest.mark.parametrize("target", FORMULAS)
@pytest.mark.parametrize("columns", [48, 256])
def test_weights_that_stay_are_counted_as_they_are(target: str, columns: int) -> None:
    shape = (10, columns)
    assert FORMULAS[target](shape, Format(32), torch.bfloat16, False) == 20 * columns
    # A row of 48 is no whole number of blocks.
    ragged = FORMULAS["compressed-tensors"]((10, 48), Format(4), torch.float32, False)
    assert ragged == FORMULAS["gguf"]((10, 48), Format(4), torch.float32, False) == 4 * 480
    assert FORMULAS["compressed-tensors"]((10, 64), Format(4), torch.float32, True) == 4 * 640


def test_zero_points_are_packed_along_the_rows() -> None:
    # 33 rows of 6 words and of 2 scales, 4 words of zero points for each of 2 blocks, the shape.
    found = FORMULAS["compressed-tensors"]((33, 64), Format(3, 32, False), torch.float32, False)
    assert found == 33 * 6 * 4 + 33 * 2 * 4 + 4 * 2 * 4 + 16
