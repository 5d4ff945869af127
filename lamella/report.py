"""What a compilation did, as data: per pass, what it changed and what it cost.

A report is a value: frozen, equal to another by content, and exactly what `Report.from_json`
reads back from `Report.to_json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rich.console import Group

from lamella import rendering
from lamella.plain import as_plain, from_plain
from lamella.rendering import Sheet, bytes_text, seconds_text

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

    def __str__(self) -> str:
        """``"kl 0.012, top-1 98.5 %"``: the output that lost most."""
        if self.worst is None:
            return "nothing to compare"
        text = f"{self.worst.measure} {self.worst.value:.3g}"
        return text if self.agreement is None else f"{text}, top-1 {100 * self.agreement:.1f} %"


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
        return {"format": FORMAT, **cast(dict[str, Any], as_plain(self))}

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
        return from_plain(cls, rest, "report")

    def __str__(self) -> str:
        return rendering.text_of(self.table())

    def table(self) -> Group:
        """For a terminal: a table of the passes and what else is known."""
        return rendering.terminal(_sheet(self))

    def html(self) -> str:
        """One page without scripts and without references to anything outside of it."""
        return rendering.page(_sheet(self))


# ---- words ----------------------------------------------------------------------------


_HEADERS = ("pass", "effect", "nodes", "weights", "loss", "pass time", "checks")


def _row(record: PassRecord) -> tuple[str, ...]:
    quality = "" if record.deviation is None else f"error {record.deviation:.1g}"
    return (
        record.spelling or record.name,
        record.effect if record.edits else f"{record.effect}, no edit",
        _change(str(record.nodes_before), str(record.nodes_after)),
        _change(bytes_text(record.weight_bytes_before), bytes_text(record.weight_bytes_after)),
        quality if record.loss is None else str(record.loss),
        seconds_text(record.seconds),
        seconds_text(record.verify_seconds + record.check_seconds),
    )


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _lines(report: Report) -> list[str]:
    """Everything that is not a table of passes."""
    lines: list[str] = []
    for record in report.passes:
        lines += [_shortened(f"{record.name}: {remark}") for remark in record.remarks]
    lines += map(_shortened, report.remarks)
    for entry in report.latency:
        predicted, measured = entry.predicted_seconds, entry.measured_seconds
        told = [] if measured is None else [f"measured {seconds_text(measured)}"]
        told += [] if predicted is None else [f"predicted {seconds_text(predicted)}"]
        lines.append(f"{entry.backend}, {entry.subject}, {entry.inputs}: {', '.join(told)}")
    if report.memory is not None:
        before, peak = report.memory.before, report.memory.peak
        begun = "" if before is None else f" (at the start {bytes_text(before)})"
        lines.append(f"memory: at most {bytes_text(peak)}{begun}")
    if report.files:
        lines.append(f"files: {bytes_text(report.file_bytes)}")
    return lines


def _shortened(remark: str) -> str:
    """The first line; the rest is in the data and on the page."""
    first, *rest = remark.splitlines() or [""]
    return f"{first} (and {len(rest)} more lines)" if rest else first


def _details(report: Report) -> list[tuple[str, str]]:
    """Remarks of several lines, each with what it says in short."""
    named = [(r.name, remark) for r in report.passes for remark in r.remarks]
    return [(_shortened(f"{n}: {remark}"), remark) for n, remark in named if "\n" in remark]


def _title(report: Report) -> str:
    before = report.model.weight_bytes
    size = _change(bytes_text(before), bytes_text(report.weight_bytes))
    share = f" ({100 * report.weight_bytes / before:.0f} %)" if before else ""
    return f"{report.model.name or 'model'}: weights {size}{share}"


def _sheet(report: Report) -> Sheet:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = tuple(map(_row, report.passes))
    return Sheet(_title(report), _HEADERS, rows, _lines(report), _details(report), versions)
