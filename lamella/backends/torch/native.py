"""Kernels of our own for chains of 8-bit integers, compiled when they are first wanted.

PyTorch multiplies 8-bit integers as fast, with oneDNN; but what lies between two products, it runs
operator by operator. Here a product also does what its rows need next, while they are in the
cache: an activation, or a residual and a layer norm, and the codes of the next layer. Attention
reads heads where the product wrote them, and gives codes.

The sources are C++ for processors with AVX-512, VNNI and BF16. They are compiled with ``$CXX`` or
``g++`` once for a user and a version of PyTorch, which takes ten seconds; where the compiled file
is, no compiler is needed. Where that does not work, nothing is lost but time: `obstacle` says why,
and oneDNN multiplies.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lamella.backends.torch import chain_kernels as chain
from lamella.caches import user_cache

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpp"

_NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "avx512_bf16")
_FLAGS = (
    "-O3 -std=c++20 -fPIC -shared -fopenmp -mtune=native -mfma -mf16c "
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16"
).split()

FOUR = 4
"""Inputs of a product come in fours."""
LANES = 16
"""Heads are whole multiples of it wide."""
_PANEL = 64
_KINDS = {"float": 0, "bfloat16": 1, "codes": 2}
_ACTIVATIONS = {chain.NONE: 0, chain.GELU: 1, chain.GELU_TANH: 2, chain.RELU: 3}

Heads = tuple[int, tuple[int, int, int], int, int]
"""Outputs of a product, where queries, keys and values begin, the count of heads, their width."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""A weight as products read it: panels of codes, int32 sums to start with, slopes and bias."""


# ---- operators --------------------------------------------------------------------------------


def packed(codes: Tensor, scales: Tensor, bias: Tensor | None, grid: chain.Grid) -> Operands:
    """A weight for products with codes of a grid.

    Args:
        codes: int8, ``[out, in]``, with `in` a multiple of 4.
        scales: float32, ``[out]``.
        bias: ``[out]`` or None.
        grid: Step and zero of the codes that are multiplied.
    """
    step, zero = grid
    missing = -len(codes) % _PANEL
    start = codes.sum(1, dtype=torch.int32) * -zero
    known = torch.zeros(scales.shape) if bias is None else bias.float()
    return (
        torch.ops.lamella_native.pack.default(codes),
        functional.pad(start, (0, missing)),
        functional.pad(scales * step, (0, missing)),
        functional.pad(known, (0, missing)),
    )


def product(
    codes: Tensor,
    operands: Operands,
    outputs: int,
    output: chain.Output = chain.FLOAT,
    activation: str = chain.NONE,
) -> Tensor:
    """``activation(codes @ weight + bias)``, as `chain_kernels.product` gives it.

    Args:
        codes: uint8, ``[..., in]``.
        operands: The weight and the grid of `codes`, see `packed`.
        outputs: How many.
        output: What is wanted.
        activation: One of those of `chain_kernels`; GELU is off by 1e-5 of its input.
    """
    kind, step, zero = output
    numbers = (outputs, _KINDS[kind], _ACTIVATIONS[activation], step, zero)
    return torch.ops.lamella_native.product.default(codes, *operands, *numbers)


def product_norm(  # noqa: PLR0913  (the arguments of two operators)
    codes: Tensor,
    operands: Operands,
    other: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
    grid: chain.Grid,
    keeps_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """``layer_norm(codes @ weight + bias + other)`` and its codes.

    Args:
        codes: uint8, ``[..., in]``.
        operands: The weight and the grid of `codes`, see `packed`.
        other: The residual, ``[..., out]``.
        gain: ``[out]``.
        shift: ``[out]``.
        epsilon: Is added to variances.
        grid: Of the codes that are wanted.
        keeps_sum: Give the sum itself instead of its layer norm, and the codes of the latter.
    """
    return torch.ops.lamella_native.product_norm.default(
        codes, *operands, other, gain, shift, epsilon, *grid, keeps_sum
    )


def takes_heads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` has a kernel for heads of this width."""
    return query.shape[-1] % LANES == 0 and query.shape[-1] == key.shape[-1] == value.shape[-1]


def attention(
    heads: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, scale: float, grid: chain.Grid
) -> Tensor:
    """Codes of attention, ``[batch, queries, heads times width]``.

    Products are in bfloat16, as are exponentials; sums and results are in float32.

    Args:
        heads: Queries, keys and values, ``[batch, heads, positions, width]``.
        mask: Which keys count, bool ``[batch or 1, 1, 1, keys]``.
        scale: Of the scores.
        grid: Of the codes.
    """
    return torch.ops.lamella_native.attention.default(*heads, mask, scale, *grid)


def product_attention(  # noqa: PLR0913  (the arguments of two operators)
    codes: Tensor,
    operands: Operands,
    heads: Heads,
    mask: Tensor | None,
    scale: float,
    grid: chain.Grid,
    shape: tuple[int, int],
) -> Tensor:
    """As `attention`, for queries, keys and values that one product gives.

    Args:
        codes: uint8, ``[..., in]``, of `shape` but for the last axis.
        operands: The weight and the grid of `codes`, see `packed`.
        heads: Where they are in the outputs.
        mask: Which keys count, bool ``[batch or 1, 1, 1, positions]``.
        scale: Of the scores.
        grid: Of the codes.
        shape: Batch and positions.
    """
    outputs, *places = heads
    return torch.ops.lamella_native.product_attention.default(
        codes, *operands, outputs, shape, *places, mask, scale, *grid
    )


# ---- the library ------------------------------------------------------------------------------


@functools.cache
def obstacle() -> str:
    """Why the kernels can't be used here, or nothing; they are compiled and tried once."""
    missing = _missing_instructions()
    if missing:
        return f"the processor has no {', '.join(missing)}"
    path = library()
    if not path.is_file():
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler {compiler!r}: install g++, or set CXX to another one"
        try:
            compile_library(path, compiler)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"the kernels can't be compiled ({_reason(error)})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # The next process makes it anew, where it can.
        with contextlib.suppress(OSError):
            path.unlink()
        return f"the compiled kernels can't be loaded ({_reason(error)})"
    return _mistake()


def library(folder: Path | None = None) -> Path:
    """Where the compiled kernels are or go, by default in the cache of this user."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    version = f"{torch.__version__} {' '.join(_FLAGS)}".encode()
    name = hashlib.sha256(b"\0".join((version, *sources))).hexdigest()[:16]
    return (folder or user_cache("native")) / f"{name}.so"


def compile_library(path: Path, compiler: str) -> None:
    """Compile the kernels into a file.

    Raises:
        OSError: The folder can't be written.
        subprocess.CalledProcessError: The compiler fails.
    """
    logger.info("compiling kernels for this processor into %s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_FLAGS, str(SOURCES / "operators.cpp"), "-o", str(made), *_links()]
        subprocess.run(command, check=True, capture_output=True, text=True)
        # Another process may have been faster; both files are the same.
        made.replace(path)


def _links() -> list[str]:
    """Where the headers and libraries of PyTorch are."""
    home = Path(torch.__file__).parent
    headers = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    found = [f"-isystem{path}" for path in headers]
    return [abi, *found, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]


def _missing_instructions() -> list[str]:
    """The vector instructions that the kernels need and that are not there."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    known = {} if ask is None else ask()
    return [name for name in _NEEDED if not known.get(name)]


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if "error" in line]
        return lines[0].strip() if lines else f"the compiler ended with {error.returncode}"
    return str(error).splitlines()[0]


def _mistake() -> str:
    """What a kernel gets wrong, or nothing: each once, beside plain operators."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (7, 64), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (70, 64), generator=generator, dtype=torch.int8)
    scales = torch.rand(70, generator=generator) / 1000
    heads = torch.randn(3, 1, 2, 9, 16, generator=generator)
    operands, grid = packed(weight, scales, None, (0.5, 100)), (0.04, 128)
    want = ((codes.double() - 100) * 0.5) @ (weight.double() * scales.double()[:, None]).t()
    one, zero = torch.ones(70), torch.zeros(70)
    normed, rounded = product_norm(codes, operands, zero, one, zero, 1e-5, grid)
    attended = attention((heads[0], heads[1], heads[2]), None, 0.25, grid)
    mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
    found = {
        # Sums of integers are exact; what is left is the rounding of float32, of numbers up to 54.
        "a product": (product(codes, operands, 70), want, 2e-5),
        "a layer norm": (normed, functional.layer_norm(want, [70]), 1e-5),
        # Half a step of the grid, and for attention what bfloat16 rounds.
        "codes": (_decoded(rounded, grid), normed, 0.021),
        "attention": (_decoded(attended, grid), mixed.transpose(1, 2).flatten(2), 0.05),
    }
    off = {name: float((got - true).abs().max()) for name, (got, true, _) in found.items()}
    wrong = [name for name, (_, _, allowed) in found.items() if not off[name] <= allowed]
    return "; ".join(f"{name} is off by {off[name]:.2g}" for name in wrong)


def _decoded(codes: Tensor, grid: chain.Grid) -> Tensor:
    step, zero = grid
    return (codes.float() - zero) * step
