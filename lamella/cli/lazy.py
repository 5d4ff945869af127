"""Modules that are imported when a command uses them: PyTorch alone takes seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

    from lamella import api, plugins, recipe, sample_files
    from lamella.backends import artifact, inputs
    from lamella.checkpoints import save
    from lamella.explanation import explaining
    from lamella.explanation import files as explanation_files
    from lamella.explanation import reading as explanation_reading
    from lamella.ir import ops
    from lamella.ir import plan as plans
    from lamella.passes import bisect, instruments, options
    from lamella.passes.analyses import cost
    from lamella.tuning import machine, probes, survey, tuner
else:

    class _Lazy:
        """Stands in for a module until an attribute of it is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    api = _Lazy("lamella.api")
    artifact = _Lazy("lamella.backends.artifact")
    bisect = _Lazy("lamella.passes.bisect")
    cost = _Lazy("lamella.passes.analyses.cost")
    explaining = _Lazy("lamella.explanation.explaining")
    explanation_files = _Lazy("lamella.explanation.files")
    explanation_reading = _Lazy("lamella.explanation.reading")
    inputs = _Lazy("lamella.backends.inputs")
    instruments = _Lazy("lamella.passes.instruments")
    ops = _Lazy("lamella.ir.ops")
    machine = _Lazy("lamella.tuning.machine")
    options = _Lazy("lamella.passes.options")
    probes = _Lazy("lamella.tuning.probes")
    plans = _Lazy("lamella.ir.plan")
    plugins = _Lazy("lamella.plugins")
    recipe = _Lazy("lamella.recipe")
    sample_files = _Lazy("lamella.sample_files")
    save = _Lazy("lamella.checkpoints.save")
    survey = _Lazy("lamella.tuning.survey")
    transformers = _Lazy("transformers")
    tuner = _Lazy("lamella.tuning.tuner")

__all__ = [
    "api",
    "artifact",
    "bisect",
    "cost",
    "explaining",
    "explanation_files",
    "explanation_reading",
    "inputs",
    "instruments",
    "machine",
    "ops",
    "options",
    "plans",
    "plugins",
    "probes",
    "recipe",
    "sample_files",
    "save",
    "survey",
    "transformers",
    "tuner",
]
