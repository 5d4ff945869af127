"""The aot backend: compiled code computes the same at other sizes, also after a move."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
import torch
from torch import nn

import lamella
from lamella.backends.torch import aot
from lamella.backends.torch.portable import Portable
from lamella.errors import BackendError, SamplesError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

lam = torch.ops.lamella

IDS = torch.arange(12).reshape(2, 6)


class Small(nn.Module):
    """An embedding, attention with rotary embedding, and a linear layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.inner = nn.Linear(32, 32)

    def forward(self, ids):
        x = self.table(ids)
        angle = torch.arange(ids.shape[1])[:, None] * torch.ones(32)
        q = torch.ops.lamella.rotary_embedding(x, angle.cos(), angle.sin())
        x = x + nn.functional.scaled_dot_product_attention(q[:, None], q[:, None], x[:, None])[:, 0]
        return {"hidden": x, "y": self.inner(x)}


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    graph = lamella.capture(Small().eval(), {"ids": IDS})
    lamella.transform(graph, ["quantize-weights bits=8 min_size=1"])
    return graph, lamella.lower(graph, "aot")


@pytest.mark.slow
def test_compiled_code_computes_the_same_at_other_sizes(compiled):
    graph, executable = compiled
    for shape in ((2, 6), (3, 17), (5, 2)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 40
        got, expected = executable(ids=ids), graph(ids=ids)
        assert list(got) == ["hidden", "y"]
        for name in got:
            # Fused kernels order their sums in another way.
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_code_refuses_what_it_was_not_compiled_for(compiled):
    with pytest.raises(SamplesError, match="shape"):
        compiled[1](ids=torch.ones(3, dtype=torch.int64))


@pytest.mark.slow
def test_an_artifact_is_loaded_and_compiled_again_elsewhere(
    compiled, tmp_path, monkeypatch, caplog
):
    _, executable = compiled
    executable.save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    torch.testing.assert_close(loaded(ids=IDS), executable(ids=IDS), rtol=0, atol=0)
    again: list[str] = []

    def compile_again(program, package, *, with_weights):
        assert not with_weights
        again.append(str(package))
        return shutil.copyfile(tmp_path / "out" / aot.PACKAGE, package)

    monkeypatch.setattr(aot, "compile_package", compile_again)
    monkeypatch.setattr(aot, "machine", lambda: "another machine")
    moved = lamella.load(tmp_path / "out")
    assert again
    assert "compiling it again" in caplog.text
    torch.testing.assert_close(moved(ids=IDS), executable(ids=IDS), rtol=0, atol=0)


@pytest.mark.slow
def test_weights_are_not_stored_twice(compiled, tmp_path):
    _, executable = compiled
    executable.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["details"]["machine"] == aot.machine()
    assert executable.weight_bytes < 40 * 64 * 4


def test_a_missing_compiler_is_said_before_any_work(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"no-such-compiler.*install g\+\+"):
        lamella.compile("nowhere", passes=[], backend="aot")


def integer_graph():
    """Three layers in 8-bit integers, whose inputs are rounded in three ways."""
    torch.manual_seed(0)
    sizes = (70, 48, 33, 16)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    graph = lamella.capture(model.eval(), (torch.randn(4, 70),))
    options = "bits=8 min_size=1 min_rows=0 activations=int8-tensor"
    lamella.transform(graph, [f"quantize-weights {options}"])
    first, _, last = graph.find(lam.linear_int8.default)
    graph.set_operand(first, "per_row", True)
    operands = [graph.operand(last, name) for name in ("input", "weight", "scales", "bias")]
    static = graph.call(lam.linear_int8_static.default, *operands, 0.01, 3, before=last)
    graph.replace(last, static)
    graph.finish()
    return graph


@pytest.mark.slow
def test_products_of_integers_are_compiled(tmp_path):
    graph = integer_graph()
    executable = lamella.lower(graph, "aot")
    executable.save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    held = {tensor.dtype for tensor in executable._weights.values()}
    assert torch.int8 in held
    for rows in (1, 4, 9):
        x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(rows))
        # Sums of integers are exact; a code at a tie may fall to the other side.
        torch.testing.assert_close(executable(x), graph(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(loaded(x), executable(x), rtol=0, atol=0)


def test_integers_are_held_as_floats_where_their_kernel_is_not_to_be_used():
    graph = integer_graph()
    without = aot.AotBackend().without(aot.AotBackend().formats()[0])
    assert without == aot.AotBackend(integers="floats")
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    for integers, held in (("traced", True), ("floats", False)):
        # What is compiled, before it is.
        module = aot._traceable(Portable.of(graph), integers)
        assert (torch.int8 in {tensor.dtype for tensor in module.buffers()}) is held
        # Sums of integers are exact; a code at a tie may fall to the other side.
        torch.testing.assert_close(module(x)[0], graph(x), rtol=1e-3, atol=1e-3)


def test_weights_in_the_layout_of_onednn_are_refused():
    with pytest.raises(ValueError, match="can't be traced"):
        aot.AotBackend(integers="onednn")
