"""The eager backend: same values, packed weights, saving without pickles, checks of inputs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lamella
from lamella.backends.inputs import InputSpec, check_inputs, example_inputs
from lamella.backends.torch.eager import EagerBackend
from lamella.backends.torch.graph_json import graph_to_json, module_from_json
from lamella.backends.torch.portable import Portable
from lamella.errors import ArtifactError, BackendError, SamplesError, UnsupportedError
from lamella.ir.capture import capture_module

FAMILIES = ("llama", "mixtral", "mamba", "bert", "t5", "vit", "convnext", "whisper")


class Tied(nn.Module):
    """A table that is also the head, with a width that blocks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 48)
        self.inner = nn.Linear(48, 72)
        self.back = nn.Linear(72, 48)

    def forward(self, ids):
        x = self.back(torch.tanh(self.inner(self.table(ids))))
        return x @ self.table.weight.T


IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return lamella.capture(Tied().eval(), {"ids": IDS})


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_families_run_as_their_graphs(family, captured, sample_inputs, tmp_path):
    graph = captured(family)
    values = sample_inputs(family)
    expected = graph(**values)
    compiled = EagerBackend().lower(graph)
    compiled.save(tmp_path / "out")
    got = lamella.load(tmp_path / "out")(**values)
    assert type(got) is type(expected)
    for a, b in zip(flat(got), flat(expected), strict=True):
        # The same operators in the same order.
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def flat(output):
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_packed_weights_compute_what_the_operators_define(tied, bits, symmetric):
    lamella.transform(tied, [f"quantize-weights bits={bits} symmetric={symmetric} min_size=1"])
    compiled = EagerBackend().lower(tied)
    assert compiled.unpacked == 4
    # Unpacked beforehand and in the call are the same products; the sum may be ordered anew.
    torch.testing.assert_close(compiled(IDS), tied(IDS), rtol=1e-5, atol=1e-5)
    assert compiled.weight_bytes == tied.weight_bytes()


def test_the_report_says_that_weights_were_unpacked(tied):
    report = lamella.transform(tied, ["quantize-weights bits=4 min_size=1"])
    compiled = EagerBackend().lower(tied, report)
    assert any("packed weights were unpacked" in remark for remark in compiled.report.remarks)


def test_sizes_are_those_of_the_files(tied, tmp_path):
    compiled = EagerBackend().lower(tied)
    compiled.save(tmp_path / "out")
    files = [p for p in (tmp_path / "out").iterdir() if p.name != "manifest.json"]
    written = sum(path.stat().st_size for path in files)
    assert compiled.weight_bytes <= written
    # The estimate is checked against the free space before anything is written.
    assert abs(compiled.file_bytes - written) < 1000


def test_a_graph_with_other_operators_is_refused_with_all_of_them():
    graph = capture_module(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), (torch.ones(2, 3, 4),))
    with pytest.raises(UnsupportedError, match=r"aten\.flatten\.using_ints \(x1\)"):
        EagerBackend().lower(graph)
    with pytest.raises(BackendError, match="canonical"):
        graph_to_json(graph)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "x", "op": "call_function", "target": "os.system"}, "not a canonical operator"),
        ({"name": "x", "op": "call_method", "target": "numpy"}, "of kind 'call_method'"),
        ({"name": "x", "op": "get_attr", "target": "w"}, "reads a weight 'w'"),
        ({"name": "x"}, "malformed"),
        (
            {"name": "x", "op": "output", "target": "output", "args": [{"node": "y"}]},
            "malformed",
        ),
        (
            {"name": "x", "op": "output", "target": "output", "args": [{"torch": "load"}]},
            "malformed",
        ),
    ],
)
def test_text_of_a_graph_can_not_name_code(record, message):
    with pytest.raises(ArtifactError, match=message):
        module_from_json({"format": 1, "nodes": [record]}, {})


def test_text_of_another_version_is_refused():
    with pytest.raises(ArtifactError, match="format 99"):
        module_from_json({"format": 99, "nodes": []}, {})


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors"])
def test_corrupt_files_are_refused(tied, tmp_path, name):
    portable = Portable.of(tied)
    portable.write(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ArtifactError):
        Portable.read(tmp_path).module()


def test_arguments_survive_as_text(tied):
    text = json.dumps(graph_to_json(tied))
    module = module_from_json(json.loads(text), Portable.of(tied).weights)
    assert [str(n.target) for n in module.graph.nodes] == [str(n.target) for n in tied.nodes]
    assert [n.args.__repr__() for n in module.graph.nodes] == [repr(n.args) for n in tied.nodes]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3, torch.ones(2)], "'a' is a int, not a tensor"),
        ([torch.ones(2, 4), torch.ones(2)], "'a' is float32, .* with int64"),
        ([torch.ones(2, dtype=torch.int64), torch.ones(2)], r"shape \[2\], .* \[batch, 4\]"),
        ([torch.ones(2, 5, dtype=torch.int64), torch.ones(2)], r"shape \[2, 5\]"),
        ([torch.ones(2, 4, dtype=torch.int64), torch.ones(3)], "'b' has size 3 where 'a' has 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(values, message):
    specs = (InputSpec("a", "int64", ("batch", 4)), InputSpec("b", "float32", ("batch",)))
    with pytest.raises(SamplesError, match=message):
        check_inputs(specs, values)


def test_example_inputs_have_the_sizes_and_are_valid_tokens():
    specs = (
        InputSpec("ids", "int64", ("s0", "s1")),
        InputSpec("pixels", "float32", ("s2", 3, 8, 8)),
        InputSpec("flag", "", ()),
    )
    ids, pixels, flag = example_inputs(specs, batch=2, sequence=7)
    assert ids.shape == (2, 7)
    assert pixels.shape == (2, 3, 8, 8)
    assert flag is None
    assert ids.dtype == torch.int64
    again = example_inputs(specs, batch=2, sequence=7)
    assert torch.equal(pixels, again[1])
