"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lamella
from lamella.cli import console
from tests.tiny import TEXTS, save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


def test_help_is_there_without_importing_torch():
    code = (
        "import sys; sys.argv = ['lamella', '--help']\n"
        "from lamella.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("compile", "generate", "inspect", "passes", "bench", "bisect"):
        assert command in done.stdout


def test_version(lamella_cli):
    assert lamella_cli("--version") == (0, f"lamella {lamella.__version__}\n", "")


def test_unknown_commands_and_options_get_the_closest_name(lamella_cli):
    status, _, err = lamella_cli("compil")
    assert status == 2
    assert "compile" in err
    status, _, err = lamella_cli("inspect", "x", "--grap")
    assert status == 2
    assert "--graph" in err


def test_compile_writes_an_artifact_and_prints_the_report(lamella_cli, encoder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses:\n  - quantize-weights: {bits: 8, min_size: 1}\n")
    options = ("--recipe", recipe, "--samples", texts, "--backend", "eager")
    status, out, err = lamella_cli("compile", encoder, *options, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "quantize-weights" in out
    assert lamella.load(tmp_path / "out").report.samples > 0

    again = ("-o", tmp_path / "out", "--json", "--latency", "1x8", "--backend", "onnxruntime")
    status, out, _ = lamella_cli("compile", encoder, *options, *again)
    assert status == 0
    data = json.loads(out)
    assert data["files"]["model.onnx"] > 0
    assert [entry["subject"] for entry in data["latency"]] == [
        "original",
        "after 1. quantize-weights",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pass", "quantise-weights"], "did you mean 'quantize-weights'"),
        (["--pass", "quantize-weights bit=4"], "did you mean 'bits'"),
        (["--backend", "egaer"], "did you mean 'eager'"),
        (["--samples", "nowhere.txt"], "there is no file or folder of samples"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["--latency", "fast"], "1x128"),
        (["--pass", "quantize-weights bits=4 method=gptq"], "pass --samples"),
        (["--pass", "allocate-bits", "--pass", "quantize-weights"], "pass --samples"),
    ],
)
def test_bad_input_is_one_red_line_and_status_2(lamella_cli, encoder, tmp_path, arguments, message):
    out = tmp_path / "out"
    status, stdout, err = lamella_cli("compile", encoder, "--out", out, *arguments)
    assert (status, stdout) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_one_line(lamella_cli, tmp_path):
    status, _, err = lamella_cli("compile", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert status == 2
    assert "there is no file or folder" in err
    status, _, err = lamella_cli("bench", tmp_path / "nowhere")
    assert status == 2
    assert "no saved executable" in err


def test_a_plan_that_is_not_there_is_told_before_the_model_is_read(lamella_cli, tmp_path):
    target = tmp_path / "out"
    status, _, err = lamella_cli("compile", "nowhere", "--plan", "absent.json", "--out", target)
    assert (status, "absent.json" in err, "nowhere" in err) == (2, True, False)
    (tmp_path / "broken.json").write_text("{")
    broken = tmp_path / "broken.json"
    status, _, err = lamella_cli("compile", "nowhere", "--plan", broken, "--out", target)
    assert (status, "broken.json" in err) == (2, True)


def test_a_place_that_can_not_be_written_is_refused_before_any_work(lamella_cli, tmp_path):
    (tmp_path / "file").write_text("text")
    for place in (tmp_path / "file", tmp_path / "file" / "out", tmp_path):
        status, _, err = lamella_cli("compile", "nowhere", "--out", place)
        assert status == 2
        assert "nowhere" not in err
        assert str(place) in err


def test_debug_shows_the_traceback(lamella_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(console.settings, "debug", False)
    status, _, err = lamella_cli("--debug", "bench", tmp_path / "nowhere")
    assert status == 2
    assert "Traceback" in err


def test_ctrl_c_ends_with_130_and_leaves_nothing(lamella_cli, encoder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lamella.backends.torch.portable.Portable.write", interrupted)
    out = tmp_path / "out"
    status, _, err = lamella_cli("compile", encoder, "--out", out, "--backend", "eager")
    assert status == 130
    assert "interrupted" in err
    assert not list(tmp_path.iterdir())


def test_a_bug_is_said_to_be_one(lamella_cli, encoder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("lamella.api.run_passes", broken)
    status, _, err = lamella_cli("compile", encoder, "--out", tmp_path / "out", "-b", "eager")
    assert status == 1
    assert "internal error: oops" in err


def test_inspect_shows_blocks_operators_and_cost(lamella_cli, encoder):
    status, out, err = lamella_cli("inspect", encoder)
    assert (status, err) == (0, "")
    assert "encoder.layer.1" in out
    assert "attention + mlp" in out
    assert "aten.linear.default" in out

    _, out, _ = lamella_cli("inspect", encoder, "--json", "--batch", "2", "--sequence", "16")
    data = json.loads(out)
    assert len(data["blocks"]) == 2
    assert data["total"]["flops"] > 0

    _, out, _ = lamella_cli("inspect", encoder, "--graph")
    assert "layer_norm" in out


def test_passes_are_listed_with_options(lamella_cli):
    _, out, _ = lamella_cli("passes")
    assert "quantize-weights" in out
    assert "bits=" in out
    _, out, _ = lamella_cli("passes", "--json")
    names = {entry["name"] for entry in json.loads(out)["passes"]}
    assert {"fold-norms", "drop-blocks", "allocate-bits", "cost"} <= names


def test_bench_compares_artifacts_with_the_original(lamella_cli, encoder, tmp_path):
    lamella.compile(encoder, passes=[], backend="eager").save(tmp_path / "out")
    arguments = ("bench", tmp_path / "out", "--model", encoder, "--rounds", "2", "--sequence", "8")
    status, out, err = lamella_cli(*arguments)
    assert (status, err) == (0, "")
    assert "(original)" in out
    _, out, _ = lamella_cli(*arguments, "--json")
    entries = json.loads(out)
    assert len(entries) == 2
    # Memory that was free before may serve; where the system does not say there is no figure.
    assert entries[0]["memory_bytes"] is None or entries[0]["memory_bytes"] >= 0


def test_verify_says_which_file_changed(lamella_cli, encoder, tmp_path):
    lamella.compile(encoder, passes=[], backend="eager").save(tmp_path / "out")
    status, out, err = lamella_cli("verify", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "every file is as it was written" in out
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    status, _, err = lamella_cli("verify", tmp_path / "out")
    assert status
    assert "model.safetensors" in err


def test_bisect_names_the_pass(lamella_cli, encoder):
    passes = ("--pass", "quantize-weights bits=2 min_size=1")
    status, out, _ = lamella_cli("bisect", encoder, *passes, "--max-loss", "1e-9")
    assert status == 0
    assert "quantize-weights bits=2" in out
    status, out, _ = lamella_cli("bisect", encoder, *passes, "--max-loss", "10", "--json")
    assert json.loads(out)["spelling"] is None


def test_tune_measures_keeps_and_shows(lamella_cli, encoder, tmp_path):
    options = ("--rows", "1,4", "--formats", "fp32,4/32", "--store", tmp_path / "store")
    status, out, err = lamella_cli("tune", encoder, *options)
    assert (status, err) == (0, "")
    assert "ms, 4 rows" in out
    assert "128 x 256" in out
    assert "measured 12 kernels" in " ".join(out.split())
    status, out, _ = lamella_cli("tune", encoder, *options, "--json")
    assert status == 0
    data = json.loads(out)
    assert {line["format"] for line in data["kernels"]} == {"fp32", "4/32"}
    assert all(line["seconds"]["4"] > 0 for line in data["kernels"])
    status, out, _ = lamella_cli("tune", encoder, *options)
    assert "measured" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "1,x"], "rows are numbers"),
        (["--formats", "3/32"], "no format '3/32'"),
        (["--backend", "egaer"], "did you mean 'eager'"),
    ],
)
def test_tune_refuses_what_it_does_not_know(lamella_cli, encoder, tmp_path, arguments, message):
    status, out, err = lamella_cli("tune", encoder, "--store", tmp_path / "store", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_formats_are_listed_with_what_was_found(lamella_cli, tmp_path):
    given = ("formats", "-b", "eager", "--store", str(tmp_path))
    code, out, _ = lamella_cli(*given, "--json")
    assert code == 0
    found = {one["format"]: one for one in json.loads(out)["formats"]}
    assert found["int8-rows"]["off"] <= found["int8-rows"]["tolerance"]
    assert found["int8-rows"]["bits_per_weight"] == pytest.approx(8 + 32 / 1024)
    code, out, _ = lamella_cli(*given, "--all")
    assert code == 0
    assert "int8-rows" in out
    assert "3, 5 and 6 bits have no kernel" in out.replace("\n", " ")
