"""What a compilation did, as data: per pass, what it changed and what it cost.

A report is a value: frozen, equal to another by content, and exactly what `Report.from_json`
reads back from `Report.to_json`. Rendering is in `lamella.rendering`; the methods here are the
short way to it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from rich.console import Group

from lamella import rendering

T = TypeVar("T")
Plain = str | int | float | bool | None | list[Any] | dict[str, Any]

FORMAT = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class OutputLoss:
    """How far one output is from that of the original model.

    Attributes:
        output: Name of the output.
        measure: ``"kl"``: mean KL divergence per position in nats, of the original's
            distribution to the new one. ``"cosine"``: mean of one minus the cosine of the
            vectors along the last axis, in [0, 2]. ``"relative"``: mean absolute error over
            mean absolute value, for an output that is neither.
        value: Mean over all positions of all probes.
        maximum: The worst position.
        agreement: Share of positions with the same most likely entry (``"kl"`` only).
    """

    output: str
    measure: Literal["kl", "cosine", "relative"]
    value: float
    maximum: float
    agreement: float | None = None


@dataclass(frozen=True)
class Loss:
    """How far the outputs are from those of the original model.

    Attributes:
        outputs: Every output that was compared.
        probes: Input batches the comparison ran on.
        source: Whether those were samples or made-up probe inputs.
    """

    outputs: tuple[OutputLoss, ...]
    probes: int
    source: Literal["samples", "probes"]

    @property
    def worst(self) -> OutputLoss | None:
        """The output that lost most: among the distributions if there are any, else among all.

        The measures have different units, so only equal ones are compared where possible.
        """
        distributions = [output for output in self.outputs if output.measure == "kl"]
        candidates = distributions or self.outputs
        broken = [output for output in candidates if math.isnan(output.value)]
        return max(broken or candidates, key=lambda output: output.value, default=None)

    @property
    def value(self) -> float:
        """The loss of the worst output; what `max_loss` is compared with."""
        return 0.0 if self.worst is None else self.worst.value

    @property
    def agreement(self) -> float | None:
        """The smallest top-1 agreement, or None without logits."""
        found = [o.agreement for o in self.outputs if o.agreement is not None]
        return min(found, default=None)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: Name of the pass.
        options: All its options, as plain data.
        effect: ``"exact"``, ``"rounding"`` or ``"lossy"``.
        seconds: Time of the pass itself.
        verify_seconds: Time of dead code removal, verification and bookkeeping.
        check_seconds: Time of running the model to compare outputs.
        nodes_before: Nodes of the graph before the pass.
        nodes_after: Nodes of the graph after the pass.
        weight_bytes_before: Bytes of the weights before the pass.
        weight_bytes_after: Bytes of the weights after the pass.
        operators_removed: Operators that became fewer, and by how many.
        operators_added: Operators that became more, and by how many.
        edits: Edits of the graph that the pass made; 0 means it changed nothing.
        deviation: Largest error of an output relative to the scale of that output, for a pass
            that promises to keep them; None where it was not compared.
        loss: Distance to the original model after this pass, for a lossy pass.
        remarks: What the pass skipped, did another way than asked for, or chose; the first line
            of each says it in short.
        spelling: The pass as text, with the options that differ from the defaults.
    """

    name: str
    options: Mapping[str, Any]
    effect: Literal["exact", "rounding", "lossy"]
    seconds: float
    verify_seconds: float = 0.0
    check_seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    operators_removed: Mapping[str, int] = field(default_factory=dict)
    operators_added: Mapping[str, int] = field(default_factory=dict)
    edits: int = 0
    deviation: float | None = None
    loss: Loss | None = None
    remarks: tuple[str, ...] = ()
    spelling: str = ""


@dataclass(frozen=True)
class Latency:
    """The time of one call.

    Attributes:
        backend: Name of the backend.
        subject: What ran: ``"compiled"``, ``"original"``, ``"after drop-blocks"``.
        inputs: The shapes it ran on, ``"batch=1 sequence=128"``.
        predicted_seconds: What the cost model says, or None.
        measured_seconds: Median of the measured calls, or None.
    """

    backend: str
    subject: str
    inputs: str
    predicted_seconds: float | None = None
    measured_seconds: float | None = None


@dataclass(frozen=True)
class Memory:
    """Resident memory of the process, mapped files included, in bytes.

    Attributes:
        before: When the compilation began; None where the system doesn't say.
        peak: The most until it ended; the process may have held it before.
    """

    before: int | None
    peak: int


@dataclass(frozen=True)
class ModelSummary:
    """The model before the first pass.

    Attributes:
        name: Architecture or file.
        nodes: Nodes of its graph.
        weight_bytes: Bytes of its weights.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
    """

    name: str = ""
    nodes: int = 0
    weight_bytes: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a compilation did.

    Attributes:
        model: The model before the first pass.
        passes: One record per pass, in order.
        latency: Predicted and measured times.
        files: Bytes of every file that was written, by name.
        remarks: Remarks outside of any pass (capture, canonicalization, lowering).
        versions: Versions of lamella, torch and the backend.
        samples_digest: Digest of the samples, or None without samples.
        samples: How many batches there were.
        seed: Seed of the probe inputs.
        memory: What the compilation took; None when nobody looked.
    """

    model: ModelSummary = field(default_factory=ModelSummary)
    passes: tuple[PassRecord, ...] = ()
    latency: tuple[Latency, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    samples_digest: str | None = None
    samples: int = 0
    seed: int = 0
    memory: Memory | None = None

    @property
    def loss(self) -> Loss | None:
        """The distance to the original model after the last lossy pass, or None."""
        measured = [record.loss for record in self.passes if record.loss is not None]
        return measured[-1] if measured else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights after the last pass."""
        return self.passes[-1].weight_bytes_after if self.passes else self.model.weight_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of all files that were written."""
        return sum(self.files.values())

    @property
    def seconds(self) -> float:
        """Time of all passes with their checks."""
        return sum(r.seconds + r.verify_seconds + r.check_seconds for r in self.passes)

    def extended(
        self,
        *,
        passes: tuple[PassRecord, ...] = (),
        latency: tuple[Latency, ...] = (),
        files: Mapping[str, int] | None = None,
        remarks: tuple[str, ...] = (),
        versions: Mapping[str, str] | None = None,
    ) -> Report:
        """A report with more entries at the end; mappings are merged."""
        return dataclasses.replace(
            self,
            passes=self.passes + passes,
            latency=self.latency + latency,
            files={**self.files, **(files or {})},
            remarks=self.remarks + remarks,
            versions={**self.versions, **(versions or {})},
        )

    def to_json(self) -> dict[str, Any]:
        """As data for `json.dumps`; `from_json` reads back an equal report."""
        return {"format": FORMAT, **cast(dict[str, Any], _plain(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The data is of another format, or a field is missing, unknown or of the
                wrong type.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"a report of format {FORMAT} was expected, got {data.get('format')}")
        rest = {name: value for name, value in data.items() if name != "format"}
        return _read(cls, rest, "report")

    def __str__(self) -> str:
        return rendering.text_of(self.table())

    def table(self) -> Group:
        """For a terminal: a table of the passes and what else is known."""
        return rendering.terminal(self)

    def html(self) -> str:
        """One page without scripts and without references to anything outside of it."""
        return rendering.page(self)


def _plain(value: Any) -> Plain:
    """Dataclasses as mappings; a float that JSON has no number for as its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast(list[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return cast(Plain, value)


def _read(kind: Any, data: Any, where: str) -> Any:
    """`data` as a value of type `kind`."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        inner = next(a for a in arguments if a is not type(None))
        return None if data is None else _read(inner, data, where)
    if origin is tuple:
        items = _expect(list, data, where)
        return tuple(_read(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin is Mapping:
        items = _expect(dict, data, where)
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in items.items()}
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(arguments)}, got {data!r}")
        return data
    return _read_leaf(kind, data, where)


def _read_leaf(kind: Any, data: Any, where: str) -> Any:
    if isinstance(data, dict) and set(data) == {"float"} and kind in (float, Any):
        return float(data["float"])
    if kind is float:
        return float(_expect((int, float), data, where))
    return data if kind is Any else _expect(kind, data, where)


def _read_dataclass(kind: type[T], data: Any, where: str) -> T:
    items = _expect(dict, data, where)
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(cast(Any, kind))}
    if known != set(items):
        wrong = ", ".join(sorted(known ^ set(items)))
        raise ValueError(f"{where} has missing or unknown fields: {wrong}")
    return kind(**{name: _read(hints[name], v, f"{where}.{name}") for name, v in items.items()})


def _expect(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, kind):
        raise ValueError(f"{where} has the wrong type {type(data).__name__}")
    return data
