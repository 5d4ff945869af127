"""Imports go leftwards, and never in circles."""

from __future__ import annotations

import re

import pytest

from tests.meta.source import imports_of, modules, resolve

# What each layer may import, beside itself.
_BASE = {"errors", "timing", "memory", "caches"}
_DATA = _BASE | {"data", "sample_files", "report", "rendering"}
_IR = _DATA | {"ir"}
ALLOWED = {
    "errors": set(),
    "timing": set(),
    "memory": set(),
    "caches": set(),
    "data": _BASE,
    "sample_files": _BASE,
    "plain": _BASE,
    "rendering": _BASE,
    "report": _BASE | {"plain", "rendering"},
    "ir": _DATA,
    "rewrite": _IR,
    "rules": _IR | {"rewrite"},
    "passes": _IR | {"rewrite", "rules"},
    "backends": _IR,
    "checkpoints": _IR | {"rewrite", "backends"},
    "generation": _IR | {"rewrite", "backends"},
    "faithfulness": _IR | {"rules", "passes"},
    "plugins": _IR | {"rewrite", "rules", "passes", "backends"},
    "latency": _IR | {"passes", "backends"},
    "tuning": _IR | {"rewrite", "passes", "backends", "generation"},
    "recipe": _IR | {"rewrite", "rules", "passes", "plugins"},
    "api": _IR
    | {"rewrite", "rules", "passes", "backends", "checkpoints", "generation", "plugins"}
    | {"recipe", "latency", "tuning"},
    "explanation": _IR | {"rules", "passes", "backends", "api"},
    "cli": _IR
    | {"rules", "passes", "backends", "checkpoints", "plugins", "recipe", "tuning", "api"}
    | {"explanation", "__init__"},
}

# Packages that are optional, or that take seconds to import where few users need them.
OPTIONAL = {"onnxruntime", "huggingface_hub", "matplotlib", "ray"}

PRIVATE_NAMES_OF_TORCH = {
    "lamella.ir.ops",
    "lamella.ir.torch_private",
    "lamella.backends.torch.inductor",
}
_PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]\w*")


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_a_module_imports_only_from_layers_to_its_left(module):
    mine = layer(module)
    if mine == "__init__":
        return
    wrong = [
        f"line {found.line}: {target}"
        for found in imports_of(modules()[module])
        if not found.only_types
        and (target := resolve(found.target)) is not None
        and layer(target) not in ALLOWED[mine] | {mine}
    ]
    assert not wrong


def test_no_module_imports_itself_through_others():
    graph = {
        name: {
            target
            for found in imports_of(path)
            if not found.only_types
            and (target := resolve(found.target)) is not None
            and target != name
        }
        for name, path in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", modules(), ids=str)
def test_only_optional_packages_are_imported_inside_functions(module):
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports_of(modules()[module])
        if found.in_function and found.target.split(".")[0] not in OPTIONAL
    ]
    assert not wrong


@pytest.mark.parametrize("module", modules(), ids=str)
def test_private_names_of_torch_stand_in_one_place(module):
    if module in PRIVATE_NAMES_OF_TORCH:
        return
    lines = modules()[module].read_text(encoding="utf-8").splitlines()
    wrong = [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(lines, start=1)
        if _PRIVATE.search(line) and not line.strip().startswith(("#", "``", "*"))
    ]
    assert not wrong


def test_no_module_has_a_name_without_an_idea():
    empty = {"utils", "helpers", "common", "misc", "util"}
    assert not [name for name in modules() if name.rpartition(".")[2] in empty]
