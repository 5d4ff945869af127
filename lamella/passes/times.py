"""Measured times as data: kernels, the calls they are predicted for, and who knows the figures.

Passes ask a `Times` for what kernels take; who measures, and where figures are kept, is not
their business.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format

Kind = Literal["linear", "nbits", "int8-rows", "int8-tensor", "rounding-rows", "rounding-tensor"]
_KINDS = ("linear", "nbits", "int8-rows", "int8-tensor", "rounding-rows", "rounding-tensor")
_TEXT = re.compile(
    r"(?P<kind>[a-z0-9-]+) (?P<inputs>\d+)x(?P<outputs>\d+) (?P<dtype>\w+)"
    r"(?: (?P<bits>\d+)/(?P<block>\d+)(?P<zeros>z?))? rows=(?P<rows>\d+) (?P<where>cold|warm)"
)


@dataclass(frozen=True, order=True)
class Kernel:
    """One product of a matrix of weights with some rows, or the rounding before such products.

    Attributes:
        kind: ``"linear"``: weights as they are; ``"nbits"``: blocks of few bits, activations
            rounded in the kernel; ``"int8-rows"`` and ``"int8-tensor"``: integers by integers,
            with a scale for each row or one for all; ``"rounding-…"``: making those integers,
            which products on one input share.
        inputs: Columns of the weight.
        outputs: Rows of the weight; 0 for rounding.
        rows: Rows of the activations.
        dtype: Of the activations.
        bits: Of the codes, for ``"nbits"``; 0 otherwise.
        block: Entries that share a scale, for ``"nbits"``; 0 otherwise.
        symmetric: Without zero points.
        cold: Whether the weights come from memory, as in a model that no cache holds.
    """

    kind: Kind
    inputs: int
    outputs: int
    rows: int
    dtype: str = "float32"
    bits: int = 0
    block: int = 0
    symmetric: bool = True
    cold: bool = True

    @property
    def weight_bytes(self) -> int:
        """Bytes that the kernel reads of its weights; scales of blocks are read as 4 bytes."""
        entries = self.inputs * self.outputs
        if self.kind == "nbits":
            blocks = -(-self.inputs // self.block) * self.outputs
            return blocks * (self.block * self.bits // 8 + 4)
        if self.kind == "linear":
            return entries * (2 if self.dtype in ("float16", "bfloat16") else 4)
        return entries

    def __str__(self) -> str:
        grid = f" {self.bits}/{self.block}{'' if self.symmetric else 'z'}" if self.bits else ""
        where = "cold" if self.cold else "warm"
        shape = f"{self.inputs}x{self.outputs} {self.dtype}"
        return f"{self.kind} {shape}{grid} rows={self.rows} {where}"

    @classmethod
    def parse(cls, text: str) -> Kernel:
        """Read what `str` gives.

        Raises:
            ValueError: It is something else.
        """
        found = _TEXT.fullmatch(text)
        if found is None or found["kind"] not in _KINDS:
            raise ValueError(f"no kernel is written {text!r}")
        return cls(
            kind=found["kind"],  # pyright: ignore[reportArgumentType]  (checked above)
            inputs=int(found["inputs"]),
            outputs=int(found["outputs"]),
            rows=int(found["rows"]),
            dtype=found["dtype"],
            bits=int(found["bits"] or 0),
            block=int(found["block"] or 0),
            symmetric=not found["zeros"],
            cold=found["where"] == "cold",
        )


PROMPT = 128
"""Tokens of a call, and tokens in the cache, where nobody says how many."""


@dataclass(frozen=True, order=True)
class Workload:
    """The call whose time counts.

    Attributes:
        batch: Sequences.
        tokens: Tokens of each that the call reads.
        past: Tokens of each in the cache; None for a model without one.
    """

    batch: int = 1
    tokens: int = PROMPT
    past: int | None = None

    @classmethod
    def of(cls, graph: Graph, rows: int | None = None, past: int | None = None) -> Workload:
        """What a graph is called with.

        Args:
            graph: The graph; one that generates is called with a cache.
            rows: Sequences that each read one token, where there is a past; else the tokens of
                one input. None means 1 behind a past, else `PROMPT`.
            past: Tokens in the cache; 0 for a prompt. None means `PROMPT`. A model with fewer
                positions gets half of them, and all of them where there is no past.

        Raises:
            ValueError: There is a past, and no cache to hold it.
        """
        limit = (graph.origin.config or {}).get("max_position_embeddings")
        most = limit if isinstance(limit, int) else 2 * PROMPT
        if not generates(graph):
            if past:
                raise ValueError(f"past={past} needs a model that generates, this one has no cache")
            return cls(tokens=rows or min(PROMPT, most))
        past = min(PROMPT, most // 2) if past is None else past
        return cls(rows or 1, 1, past) if past else cls(1, rows or min(PROMPT, most), 0)

    def __str__(self) -> str:
        past = "" if self.past is None else f" past={self.past}"
        return f"batch={self.batch} tokens={self.tokens}{past}"


def generates(graph: Graph) -> bool:
    """Whether a graph is lowered with a cache that its decoder grows token by token."""
    config = graph.origin.config
    known = graph.origin.generation is not None and config is not None
    return known and not (config or {}).get("is_encoder_decoder", False)


class Times(abc.ABC):
    """Who knows what kernels take on the machine that a model will run on.

    Attributes:
        merges: Whether products of a model with a cache that read one value are one product.
        cache_bytes: Size of the last cache before memory.
    """

    merges: bool
    cache_bytes: int

    @abc.abstractmethod
    def seconds(self, kernels: Iterable[Kernel]) -> Mapping[Kernel, float]:
        """The median time of each kernel.

        Raises:
            PassError: A figure is missing and can't be measured.
        """

    @abc.abstractmethod
    def rest(self, graph: Graph, workload: Workload) -> float:
        """The time of everything but products with weights: attention, norms, the call itself.

        Raises:
            PassError: The figure is missing and can't be measured.
        """

    def take_notes(self) -> tuple[str, ...]:
        """What was done since the last call, for the report."""
        return ()

    def take_problems(self) -> tuple[str, ...]:
        """What could not be used since the last call, each a remark."""
        return ()


@final
@dataclass(frozen=True)
class Table(Times):
    """Times that somebody measured before.

    Attributes:
        kernels: Kernel -> seconds.
        rest_seconds: Of everything else in a call.
        merges: As for `Times`.
        cache_bytes: As for `Times`.
    """

    kernels: Mapping[Kernel, float]
    rest_seconds: float = 0.0
    merges: bool = field(default=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    cache_bytes: int = field(default=0)  # pyright: ignore[reportIncompatibleVariableOverride]

    def seconds(self, kernels: Iterable[Kernel]) -> Mapping[Kernel, float]:
        """Look them up."""
        wanted = list(dict.fromkeys(kernels))
        missing = [str(kernel) for kernel in wanted if kernel not in self.kernels]
        if missing:
            raise PassError(f"the table has no time for {'; '.join(missing)}")
        return {kernel: self.kernels[kernel] for kernel in wanted}

    def rest(self, graph: Graph, workload: Workload) -> float:
        """The same for every call."""
        return self.rest_seconds


def needed(times: Times | None, who: str) -> Times:
    """The times, where a pass can't do without.

    Raises:
        PassError: There are none.
    """
    if times is None:
        raise PassError(
            f"{who} needs measured times; call it through lamella.transform or lamella.compile, "
            f"which measure, or set Analyses.times to a lamella.passes.times.Table"
        )
    return times


def stored(kernel: Kernel, format: Format) -> Kernel:
    """The kernel of a linear layer whose weight is stored in `format` instead of as it is."""
    if format.bits == 32:
        return kernel
    return Kernel(
        "nbits",
        kernel.inputs,
        kernel.outputs,
        kernel.rows,
        kernel.dtype,
        format.kernel_bits,
        format.block,
        format.symmetric,
        kernel.cold,
    )
