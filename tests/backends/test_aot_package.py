"""Packages of AOTInductor with their weights: a process that imports only torch runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lamella
from lamella.errors import ArtifactError, CheckpointError
from tests.tiny import save_language_model

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

PROGRAM = Path(__file__).with_name("torch_only.py")


@pytest.mark.slow
def test_a_process_with_torch_alone_decodes_a_package(tmp_path):
    source = save_language_model(tmp_path / "source", layers=2)
    graph = lamella.capture(source)
    report = lamella.save_checkpoint(graph, tmp_path / "package", format="aotinductor")
    assert any("on such a machine only" in remark for remark in report.remarks)
    words = [sys.executable, "-I", str(PROGRAM), str(tmp_path / "package"), "8", "1", "5", "9"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.tensor([[1, 5, 9]])
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert [int(token) for token in done.stdout.split()] == expected[0].tolist()


class Tower(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, pixels):
        return {"logits": self.head(self.conv(pixels).relu().mean((2, 3)))}


@pytest.mark.slow
def test_a_package_of_any_model_says_what_it_takes_and_gives(tmp_path):
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 8, 8)
    graph = lamella.capture(Tower().eval(), {"pixels": pixels})
    lamella.save_checkpoint(graph, tmp_path, format="aotinductor")
    told = json.loads((tmp_path / "model.json").read_text())
    assert [spec["name"] for spec in told["inputs"]] == ["pixels"]
    assert told["outputs"] == ["logits"]
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    # Fused kernels order their sums in another way.
    torch.testing.assert_close(run(pixels)[0], graph(pixels)["logits"], rtol=1e-4, atol=1e-5)
    lamella.verify(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(ArtifactError):
            lamella.verify(tmp_path)
        file.write_bytes(whole)


def test_a_model_that_needs_operators_of_this_library_is_refused(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    torch.manual_seed(0)
    graph = lamella.capture(transformers.MambaForCausalLM(config).eval())
    with pytest.raises(CheckpointError, match=r"selective_scan.* \(x1\)"):
        lamella.save_checkpoint(graph, tmp_path / "package", format="aotinductor")
    assert not (tmp_path / "package").exists()
