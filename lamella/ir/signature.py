"""How the user calls a model, and how a flat graph is called for it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamella.errors import SamplesError, closest
from lamella.ir.torch_private import (
    TreeSpec,
    tree_flatten,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, as the user sees them.

    A graph is flat: placeholders in, a tuple out. The signature turns a call of the model
    into the flat inputs and the flat outputs into the type that the model returns.

    Attributes:
        inputs: Name of each placeholder, in order; for a model called with keywords these
            are the keywords, nested values have dotted names.
        outputs: Name of each flat output, in order.
        in_spec: Tree of ``(args, kwargs)``.
        out_spec: Tree of what the model returns.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of a call, in the order of the placeholders.

        Keywords may come in any order, and arguments by position take the names of the
        inputs in order, as in a call of the model.

        Raises:
            SamplesError: An input is missing, unknown, or not of the captured structure.
        """
        by_name = len(args) == 0
        if by_name and set(kwargs) == set(self.inputs):
            return [kwargs[name] for name in self.inputs]
        if not by_name and not kwargs and len(args) == len(self.inputs):
            values, spec = tree_flatten((tuple(args), {}))
            if spec == self.in_spec or all(not isinstance(a, list | tuple | dict) for a in args):
                return values
        ordered = self._by_root(args, kwargs)
        values, _ = tree_flatten([ordered[name] for name in self._roots()])
        if len(values) != len(self.inputs):
            raise SamplesError(
                f"the inputs hold {len(values)} tensors, the model was captured with "
                f"{len(self.inputs)}: {', '.join(self.inputs)}"
            )
        return values

    def _by_root(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; raises unless each is given exactly once."""
        roots = self._roots()
        captured = f"the model was captured with {', '.join(roots)}"
        if len(args) > len(roots):
            raise SamplesError(f"{len(args)} inputs by position are too many: {captured}")
        unknown = [name for name in kwargs if name not in roots]
        if unknown:
            hint = closest(unknown[0], roots)
            names = ", ".join(map(repr, unknown))
            raise SamplesError(f"unknown input {names}{hint} ({captured})")
        doubled = [name for name in roots[: len(args)] if name in kwargs]
        if doubled:
            names = ", ".join(map(repr, doubled))
            raise SamplesError(f"input {names} is given by position and by name ({captured})")
        missing = [name for name in roots[len(args) :] if name not in kwargs]
        if missing:
            names = ", ".join(map(repr, missing))
            raise SamplesError(f"missing input {names}: pass every input that {captured}")
        return dict(zip(roots, args, strict=False)) | dict(kwargs)

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The flat outputs in the type that the model returns."""
        return tree_unflatten(list(outputs), self.out_spec)

    def _roots(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.split(".")[0] for name in self.inputs))

    def to_json(self) -> dict[str, Any]:
        """As data for a manifest; `from_json` reads it back."""
        return {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "in_spec": json.loads(treespec_dumps(self.in_spec)),
            "out_spec": json.loads(treespec_dumps(self.out_spec)),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Read what `to_json` wrote; imports the modules of known output types.

        Raises:
            ValueError: A tree holds a type that is not known here.
        """
        for spec in (data["in_spec"], data["out_spec"]):
            _import_output_types(spec)
        return cls(
            tuple(data["inputs"]),
            tuple(data["outputs"]),
            _tree(data["in_spec"]),
            _tree(data["out_spec"]),
        )


def _tree(data: Any) -> TreeSpec:
    try:
        return treespec_loads(json.dumps(data))
    except RuntimeError as error:  # of PyTorch, for a type that no one registered
        raise ValueError(f"the tree of inputs or outputs can't be read: {error}") from error


def _import_output_types(spec: Any) -> None:
    """Import ``transformers`` modules named in a tree, so that their types are registered."""
    if isinstance(spec, Mapping):
        for value in spec.values():
            _import_output_types(value)
    elif isinstance(spec, list):
        for value in spec:
            _import_output_types(value)
    # Only modules of transformers are imported: a manifest must not choose code to run.
    elif isinstance(spec, str) and spec.startswith("transformers.") and spec.count(".") >= 2:
        importlib.import_module(spec.rpartition(".")[0])
