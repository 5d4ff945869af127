"""Scans: only the recurrence of a selective state-space layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from lamella.errors import CaptureError
from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.values import Value


def build_scan(
    g: Builder, label: str, inputs: tuple[Value | None, ...], attributes: Mapping[str, ir.Attr]
) -> Any:
    raise CaptureError(f"{label}: this scan is not supported")
