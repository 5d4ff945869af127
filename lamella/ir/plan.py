"""Bit plans as data: which weight is stored in which format, and why; one JSON file.

A plan is made by `allocate-bits`, followed by `quantize-weights`, and read back from the graph
that came out of it, so that what a folder holds can be said, and repeated on the same model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lamella.errors import PlanError
from lamella.ir.quantize import SCALE_DTYPES, Format

PLAN_FILE = "plan.json"
"""Name of the plan in a folder."""

VERSION = 1
"""The version of the plans that are written, and the only one that is read."""

_MOST_BYTES = 64_000_000
_PROBES = 4096


@dataclass(frozen=True)
class PlanOrigin:
    """Where a plan comes from.

    Attributes:
        score: Name of the score that the losses are of; empty where nothing was scored.
        unit: Of the losses.
        budget: In words.
        predicted: Sum of the losses, or None.
        measured: Loss of the whole plan on the samples, or None.
        fingerprint: Of the weights it was made for, see `fingerprint`.
    """

    score: str = ""
    unit: str = ""
    budget: str = ""
    predicted: float | None = None
    measured: float | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class PlanEntry:
    """How one weight is stored.

    Attributes:
        format: Of its codes.
        shape: ``(out, in)``.
        bytes: Of codes, scales and zeros in memory.
        group: Weights with one number share a format because backends merge them; None where
            nobody said.
        loss: What the score predicts for the group, or None.
        quantizer: How it is rounded.
    """

    format: Format
    shape: tuple[int, ...]
    bytes: int
    group: int | None = None
    loss: float | None = None
    quantizer: str = "rtn"


@dataclass(frozen=True)
class Plan:
    """How the weights of a model are stored.

    Attributes:
        entries: Name of the weight -> how it is stored, in the order of first use.
        origin: Where the plan comes from.
    """

    entries: Mapping[str, PlanEntry]
    origin: PlanOrigin = field(default_factory=PlanOrigin)

    @property
    def formats(self) -> dict[str, Format]:
        """Name of the weight -> format."""
        return {name: entry.format for name, entry in self.entries.items()}

    @property
    def bytes(self) -> int:
        """Of all weights of the plan."""
        return sum(entry.bytes for entry in self.entries.values())

    def told(self, *, budget: str, measured: float | None) -> Plan:
        """The plan with another word for its budget, and its measured loss."""
        return replace(self, origin=replace(self.origin, budget=budget, measured=measured))

    def to_json(self) -> dict[str, Any]:
        """As data for `json.dumps`; `from_json` reads back an equal plan."""
        origin = {k: v for k, v in vars(self.origin).items() if v not in ("", None)}
        weights = {name: _plain(entry) for name, entry in self.entries.items()}
        return {"lamella_plan": VERSION, "origin": origin, "weights": weights}

    @classmethod
    def from_json(cls, data: Any, where: str = "the plan") -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: It is of another version, or something is missing or malformed.
        """
        version = data.get("lamella_plan") if isinstance(data, dict) else None
        if version != VERSION:
            raise PlanError(f"{where} is no bit plan of version {VERSION}, it says {version!r}")
        try:
            entries = {str(name): _entry(one) for name, one in data["weights"].items()}
            origin = _origin(data.get("origin", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"{where} is malformed ({type(error).__name__}: {error}); write it again"
            ) from error
        return cls(entries, origin)

    def write(self, path: Path) -> None:
        """Write a file as a whole, or not at all.

        Raises:
            OSError: The place can't be written.
        """
        aside = path.with_name(f".{path.name}.part")
        try:
            aside.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan of a file, or of a folder that was saved with one.

        Raises:
            PlanError: There is none, or it is malformed.
        """
        file = path / PLAN_FILE if path.is_dir() else path
        try:
            if file.stat().st_size > _MOST_BYTES:
                raise PlanError(f"{str(file)!r} is too large for a bit plan")
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(_missing(path)) from None
        except (OSError, ValueError) as error:
            raise PlanError(f"the bit plan {str(file)!r} can't be read ({error})") from error
        return cls.from_json(data, repr(str(file)))


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, shapes and evenly spaced entries of weights; reads each only once.

    Two models of one architecture that were trained apart have different fingerprints; a single
    changed entry may go unseen.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _PROBES)
        probes = flat[::step].to(torch.float32).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(probes.numpy().tobytes())
    return digest.hexdigest()


def _plain(entry: PlanEntry) -> dict[str, Any]:
    names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
    kept: dict[str, Any] = {"shape": list(entry.shape), "bits": entry.format.bits}
    if entry.format.bits != 32:
        kept |= {"block": entry.format.block, "symmetric": entry.format.symmetric}
        kept |= {"scales": names[entry.format.scale_dtype], "quantizer": entry.quantizer}
    kept["bytes"] = entry.bytes
    others = {"group": entry.group, "loss": entry.loss}
    return kept | {name: value for name, value in others.items() if value is not None}


def _entry(data: Mapping[str, Any]) -> PlanEntry:
    format = Format(bits=32)
    if data["bits"] != 32:
        scales = SCALE_DTYPES[data["scales"]]
        format = Format(data["bits"], data["block"], data["symmetric"], scales)
    shape = tuple(int(size) for size in data["shape"])
    group, loss = data.get("group"), data.get("loss")
    if loss is not None and not math.isfinite(loss):
        raise ValueError(f"a loss is {loss}")
    quantizer = str(data.get("quantizer", "rtn"))
    return PlanEntry(format, shape, int(data["bytes"]), group, loss, quantizer)


def _origin(data: Any) -> PlanOrigin:
    return PlanOrigin(**cast(dict[str, Any], data))


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"the folder {str(path)!r} has no {PLAN_FILE}; it was saved without few-bit weights"
    return f"there is no bit plan {str(path)!r}; write one with allocate-bits write=FILE"
