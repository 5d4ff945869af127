"""Kernels that are compiled on this machine, beside float64 and beside the kernels of PyTorch."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lamella
from lamella.backends.torch import chain_kernels as chain
from lamella.backends.torch import native
from lamella.backends.torch.attention import attention_codes, attention_codes_of_product
from lamella.backends.torch.eager import EagerBackend
from lamella.backends.torch.held import ATTENTION, INTEGERS, NATIVE
from lamella.ir.graph import Graph

needs_kernels = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle() or "none")

STEP, ZERO = 0.02, 117
GRID = (STEP, ZERO)
HALF_A_STEP = 2**-8
"""What rounding to bfloat16 changes of a number, relatively."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.abs().max())


def wrong(codes: Tensor, want: Tensor, grid: chain.Grid) -> float:
    """The share of codes that are not the nearest; none may be off by more than one."""
    nearest = ((want.double() / grid[0]).round() + grid[1]).clamp(0, 255)
    apart = (codes.double() - nearest).abs()
    assert apart.max() <= 1
    return float((apart > 0).float().mean())


# ---- products -------------------------------------------------------------------------------

SHAPES = [(1, 4, 1), (7, 64, 50), (13, 36, 130), (150, 128, 200), (301, 64, 64), (0, 8, 8)]
"""Rows, inputs, outputs: panels and tiles that are not full, few rows and many, and none."""


def layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and bias of a weight."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    return codes, torch.rand(outputs, generator=generator) * 0.01, numbers(outputs, seed=2)


def rows_of(rows: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)


def exact(codes: Tensor, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    wide = (codes.double() - ZERO) * STEP
    return wide @ (weight.double() * scales.double()[:, None]).t() + bias.double()


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [chain.NONE, chain.RELU, chain.GELU, chain.GELU_TANH])
def test_products_are_those_of_float64(shape: tuple[int, int, int], activation: str) -> None:
    rows, inputs, outputs = shape
    weight, codes = layer(inputs, outputs), rows_of(rows, inputs)
    plain = exact(codes, *weight)
    want = {
        chain.NONE: lambda: plain,
        chain.RELU: lambda: plain.relu(),
        chain.GELU: lambda: functional.gelu(plain),
        chain.GELU_TANH: lambda: functional.gelu(plain, approximate="tanh"),
    }[activation]()
    operands = native.packed(*weight, GRID)
    got = {
        kind: native.product(codes, operands, outputs, (kind, 0.05, 100), activation)
        for kind in ("float", "bfloat16", "codes")
    }
    assert [one.dtype for one in got.values()] == [torch.float32, torch.bfloat16, torch.uint8]
    assert all(one.shape == (rows, outputs) for one in got.values())
    if rows:
        # Sums of integers are exact; the polynomial of GELU is off by 1e-5 of its input.
        slack = 1e-5 * float(plain.abs().max()) if activation != chain.NONE else 0
        apart = (got["float"] - want).abs().max()
        assert apart <= 2e-6 * max(float(plain.abs().max()), 1.0) + slack
        assert off(got["bfloat16"], want) < HALF_A_STEP + 1e-4
        assert wrong(got["codes"], want, (0.05, 100)) < 0.01


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("keeps_sum", [False, True])
def test_a_layer_norm_is_that_of_float64(shape: tuple[int, int, int], keeps_sum: bool) -> None:
    rows, inputs, outputs = shape
    weight, codes = layer(inputs, outputs), rows_of(rows, inputs)
    other, gain, shift = numbers(rows, outputs), numbers(outputs, seed=4), numbers(outputs, seed=5)
    operands = native.packed(*weight, GRID)
    grid = (0.03, 90)
    got, rounded = native.product_norm(codes, operands, other, gain, shift, 1e-5, grid, keeps_sum)
    total = exact(codes, *weight) + other.double()
    want = functional.layer_norm(total, (outputs,), gain.double(), shift.double(), 1e-5)
    # Variances of few or of like entries lose digits: rows are divided by them.
    assert off(got, total if keeps_sum else want) < 2e-5
    assert wrong(rounded, want, grid) < 0.01


@needs_kernels
def test_what_is_added_may_be_broadcast() -> None:
    weight, codes = layer(8, 20), rows_of(6, 8)
    operands, ones = native.packed(*weight, GRID), torch.ones(20)
    row = numbers(20)
    got, _ = native.product_norm(codes, operands, row, ones, ones, 1e-5, GRID, keeps_sum=True)
    assert off(got, exact(codes, *weight) + row.double()) < 2e-6


@needs_kernels
def test_numbers_far_outside_of_the_range_of_codes_are_cut() -> None:
    weight = torch.full((2, 4), 127, dtype=torch.int8)
    scales = torch.tensor([1e9, -1e9])
    operands = native.packed(weight, scales, None, (1.0, 0))
    codes = torch.full((1, 4), 255, dtype=torch.uint8)
    assert native.product(codes, operands, 2, ("codes", 1e-3, 10)).tolist() == [[255, 0]]


@needs_kernels
def test_operands_of_another_layer_are_refused() -> None:
    operands = native.packed(*layer(8, 20), GRID)
    with pytest.raises(RuntimeError, match="codes have 12 entries, the weight 8"):
        native.product(rows_of(2, 12), operands, 20)
    with pytest.raises(RuntimeError, match="panels of another weight"):
        native.product(rows_of(2, 8), operands, 200)
    with pytest.raises(RuntimeError, match="whole fours"):
        native.packed(*layer(6, 20), GRID)


# ---- attention ------------------------------------------------------------------------------


def literal_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """``[batch, queries, heads times width]`` in float64; zero where no key counts."""
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale
    weights = scores.masked_fill(~keep[:, None, None], -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhij,bhjd->bihd", weights, v.double()).flatten(2)


@needs_kernels
@pytest.mark.parametrize(
    "sizes", [(3, 2, 5, 9, 16), (2, 3, 70, 70, 32), (1, 1, 1, 300, 48), (2, 2, 8, 1, 64)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_float64(sizes: tuple[int, ...], masked: bool) -> None:
    batch, heads, queries, keys, width = sizes
    q = numbers(batch, queries, heads, width).transpose(1, 2)
    k, v = (numbers(batch, heads, keys, width, seed=one) for one in (1, 2))
    keep = torch.ones(batch, keys, dtype=torch.bool)
    if masked:
        keep[0, keys // 2 :] = False
    mask = keep[:, None, None] if masked else None
    scale, grid = 1 / math.sqrt(width), (0.02, 128)
    got = native.attention((q, k, v), mask, scale, grid)
    want = literal_attention(q, k, v, keep, scale)
    limit = torch.tensor([-128, 127]) * grid[0]
    # Half a step of the codes, and what inputs, scores and probabilities lose in bfloat16.
    apart = ((got.double() - grid[1]) * grid[0] - want.clamp(*limit.tolist())).abs()
    assert apart.max() < grid[0] / 2 + 3 * HALF_A_STEP * float(want.abs().max())


@needs_kernels
def test_a_softmax_of_large_scores_does_not_overflow() -> None:
    q, k, v = (numbers(1, 1, 20, 16, seed=one) for one in range(3))
    got = native.attention((q * 1024, k * 1024, v), None, 1.0, (0.03, 128))
    # One key has all of the weight; in bfloat16 it may be another that is nearly as good.
    best = (q.bfloat16().double() @ k.bfloat16().double().transpose(-1, -2)).argmax(-1)
    want = v[0, 0][best[0, 0]].bfloat16().double()
    # Half a step of the codes; the weight itself is rounded to bfloat16.
    limit = 0.015 + HALF_A_STEP * want.abs().max()
    assert ((got[0].double() - 128) * 0.03 - want).abs().max() < limit


@needs_kernels
@pytest.mark.parametrize("batch", [1, 2, 40])
@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
def test_a_product_and_attention_at_once(batch: int, mask: str) -> None:
    positions, heads, width = 9, 3, 16
    size = heads * width
    weight = layer(32, 3 * size)
    codes = rows_of(batch * positions, 32).unflatten(0, (batch, positions))
    operands = native.packed(*weight, GRID)
    joined = native.product(codes, operands, 3 * size, ("bfloat16", 1.0, 0))
    parts = tuple(
        one.unflatten(-1, (heads, width)).transpose(1, 2) for one in joined.split(size, -1)
    )
    keep = {
        "none": None,
        "keys": (torch.arange(positions) < 7).expand(batch, 1, 1, positions),
        "pairs": torch.ones(positions, positions, dtype=torch.bool).tril(),
    }[mask]
    places = (3 * size, (0, size, 2 * size), heads, width)
    grid, shape = (0.01, 100), (batch, positions)
    got = attention_codes_of_product(codes, operands, places, keep, None, grid, shape)
    want = attention_codes(parts, keep, None, grid, (*shape, size))
    assert torch.equal(got, want)


# ---- chains ---------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of an encoder with its norms behind or before the branches."""

    def __init__(self, *, before: bool = False, width: int = 64) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(width, width, bias=i != 1) for i in range(4)])
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.before = before

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, 16)).transpose(1, 2) for part in self.parts[:3])
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.parts[3](mixed.reshape(x.shape))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attend(self.norms[0](x))
            return x + self.feed(self.norms[1](x))
        x = self.norms[0](self.attend(x) + x)
        return self.norms[1](x + self.feed(x))


PASSES = ["quantize-weights bits=8 min_size=1 min_rows=0 activations=int8-tensor", "fix-ranges"]


def quantized(*layers: nn.Module, width: int = 64) -> tuple[Graph, Tensor]:
    x = numbers(2, 6, width, seed=5)
    graph = lamella.capture(nn.Sequential(*layers).eval(), (x,))
    lamella.transform(graph, PASSES, samples=[{"input": numbers(4, 6, width, seed=6)}])
    return graph, x


def functions(module: torch.fx.GraphModule) -> Counter[str]:
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return Counter(getattr(node.target, "__name__", str(node.target)) for node in calls)


@needs_kernels
@pytest.mark.parametrize("before", [False, True])
def test_layers_of_an_encoder_are_four_calls_each(before: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, x = quantized(*(Layer(before=before) for _ in range(3)))
    executable = EagerBackend(bfloat16=True).lower(graph)
    assert executable.lowered.counts == {NATIVE: 18, ATTENTION: 3}
    found = functions(executable.lowered.module)
    # Behind the last branch there is no norm where norms come before: its sum stays.
    norms = 5 if before else 6
    assert found == {
        "attention_codes_of_product": 3,
        "product_norm": norms,
        "getitem": found["getitem"],
        "product": 9 - norms,
        "codes_of": 1,
        **({"layer_norm.default": 1, "add.Tensor": 1} if before else {}),
        "sym_size.int": found["sym_size.int"],
    }
    # Attention in bfloat16 moves some codes by one.
    assert 0 < off(executable(x), graph(x)) < 0.02
    oneof = EagerBackend(bfloat16=True, native=False).lower(graph)
    assert oneof.lowered.counts == {INTEGERS: 18, ATTENTION: 3}
    assert off(executable(x), oneof(x)) < 0.02
    executable.save(tmp_path / "out")
    assert torch.equal(lamella.load(tmp_path / "out")(x), executable(x))
    oneof.save(tmp_path / "other")
    assert torch.equal(lamella.load(tmp_path / "other")(x), oneof(x))


class Odd(nn.Module):
    """Products that are read in ways that no kernel draws in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm, self.other = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, input: Tensor) -> Tensor:
        total = self.first(input) + input
        wide = self.norm(total) * 2 + self.other(total)
        return self.second(wide) + 2 * total


@needs_kernels
def test_what_others_read_is_not_drawn_in() -> None:
    torch.manual_seed(0)
    graph, x = quantized(Odd())
    executable = EagerBackend(bfloat16=True).lower(graph)
    found = functions(executable.lowered.module)
    assert (found["product"], found["product_norm"], found["layer_norm.default"]) == (2, 0, 2)
    assert off(executable(x), graph(x)) < 1e-2


class Twice(nn.Module):
    """One layer that reads two ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input) + self.linear(input * 3 + 5)


@needs_kernels
def test_layers_with_one_weight_keep_their_ranges() -> None:
    torch.manual_seed(0)
    graph, x = quantized(Twice())
    executable = EagerBackend(bfloat16=True).lower(graph)
    assert executable.lowered.counts == {NATIVE: 2}
    assert off(executable(x), graph(x)) < 1e-5
    held = dict(executable.lowered.module.named_buffers())
    assert sum(name.endswith("_panels") for name in held) == 1
    assert sum(name.endswith("_slopes") for name in held) == 2


@needs_kernels
def test_no_sequences_give_nothing() -> None:
    torch.manual_seed(0)
    graph, _ = quantized(Layer())
    executable = EagerBackend(bfloat16=True).lower(graph)
    assert executable(torch.empty(0, 6, 64)).shape == (0, 6, 64)


@needs_kernels
def test_inputs_that_are_no_whole_fours_go_to_onednn() -> None:
    torch.manual_seed(0)
    graph, x = quantized(nn.Linear(62, 64), nn.ReLU(), nn.Linear(64, 8), width=62)
    executable = EagerBackend(bfloat16=True).lower(graph)
    assert executable.lowered.counts == {INTEGERS: 1, NATIVE: 1}
    assert off(executable(x), graph(x)) < 1e-2


# ---- the library ------------------------------------------------------------------------------


@pytest.fixture
def anew():
    native.obstacle.cache_clear()
    yield
    native.obstacle.cache_clear()


def remark_of(reason: str) -> str:
    graph, _ = quantized(nn.Linear(64, 64))
    compiled = lamella.lower(graph, backend=EagerBackend(bfloat16=True))
    assert compiled.lowered.counts == {INTEGERS: 1}
    (remark,) = [one for one in _remarks(graph) if "oneDNN, which is slower" in one]
    assert reason in remark
    return remark


def _remarks(graph: Graph) -> list[str]:
    from lamella.backends.torch import eager

    state = EagerBackend(bfloat16=True).lower(graph).lowered
    return list(eager._remarks(state))


def test_a_missing_compiler_is_said(
    anew, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_missing_instructions", list)
    monkeypatch.setattr(native, "user_cache", lambda kind: tmp_path / kind)
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "there is no C++ compiler 'no-such-compiler': install g++"
    remark_of(reason)
    graph, _ = quantized(nn.Linear(64, 64))
    lamella.lower(graph, backend=EagerBackend(bfloat16=True)).save(tmp_path / "out")
    lamella.load(tmp_path / "out")
    assert reason in caplog.text


def test_a_compiler_that_fails_is_said(
    anew, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'kernels.cpp:1: fatal error: no headers' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "_missing_instructions", list)
    monkeypatch.setattr(native, "user_cache", lambda kind: tmp_path / kind)
    monkeypatch.setenv("CXX", str(compiler))
    remark_of("can't be compiled (kernels.cpp:1: fatal error: no headers)")
    assert not list((tmp_path / "native").iterdir())


@needs_kernels
def test_compiled_kernels_need_no_compiler(anew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.obstacle() == ""


def test_a_processor_without_the_instructions_is_said(
    anew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_missing_instructions", lambda: ["avx512_vnni"])
    remark_of("the processor has no avx512_vnni")


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("product", "a product is off by"),
        ("product_norm", "a layer norm is off by"),
        ("attention", "attention is off by"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(
    kernel: str, words: str, anew, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(native, kernel)

    def wrong(*given: object) -> object:
        found = right(*given)
        # Codes of attention are off by two steps.
        return (found[0] * 1.001, found[1]) if isinstance(found, tuple) else found * 1.001 + 2

    monkeypatch.setattr(native, kernel, wrong)
    remark_of(words)


def test_a_file_appears_when_it_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = native.library(tmp_path / "native")
    seen: list[bool] = []

    def compiler(command: list[str], **_: object) -> None:
        Path(command[command.index("-o") + 1]).write_bytes(b"code")
        seen.append(path.exists())

    monkeypatch.setattr(subprocess, "run", compiler)
    native.compile_library(path, "g++")
    assert seen == [False]
    assert path.read_bytes() == b"code"
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_file_is_made_anew(anew, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "kernels.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(native, "_missing_instructions", list)
    monkeypatch.setattr(native, "library", lambda: damaged)
    assert "can't be loaded" in native.obstacle()
    assert not damaged.exists()


def test_a_damaged_file_that_must_stay_is_said(
    anew, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged = tmp_path / "kernels.so"
    damaged.write_bytes(b"no library")

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{self} can't be written")

    monkeypatch.setattr(native, "_missing_instructions", list)
    monkeypatch.setattr(native, "library", lambda: damaged)
    monkeypatch.setattr(Path, "unlink", refused)
    assert "can't be loaded" in native.obstacle()
