"""The budgets of the style guide: lines of a file, of a function, parameters, names."""

from __future__ import annotations

import ast

import pytest

import lamella
from tests.meta.source import PACKAGE, ROOT, modules, tree_of

FILE_LINES = 500
FUNCTION_LINES = 50
PARAMETERS = 6
NAMES = 20
DEPTH = 2

CHECKED = {
    **modules(),
    **{str(p.relative_to(ROOT)): p for p in sorted((ROOT / "benchmarks").rglob("*.py"))},
}


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", CHECKED)
def test_files_are_short(name):
    lines = len(CHECKED[name].read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES


@pytest.mark.parametrize("name", CHECKED)
def test_functions_are_short(name):
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions(tree_of(CHECKED[name]))
        if _code_lines(f) > FUNCTION_LINES
    }
    assert not long


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno - first.lineno + 1) if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("name", modules())
def test_functions_have_few_parameters(name):
    source = modules()[name].read_text(encoding="utf-8").splitlines()
    many = []
    for f in functions(tree_of(modules()[name])):
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        count = len([a for a in arguments if a.arg not in ("self", "cls")])
        # A signature that somebody else fixed (an operator, the public table) says so.
        said = any("PLR0913" in line for line in source[f.lineno - 1 : f.body[0].lineno])
        if count > PARAMETERS and not said:
            many.append(f"{f.name} has {count}")
    assert not many


def test_lamella_exports_few_names_and_all_of_them_exist():
    assert len(lamella.__all__) <= NAMES
    assert lamella.__all__ == sorted(lamella.__all__)
    for name in lamella.__all__:
        assert getattr(lamella, name) is not None
    assert set(dir(lamella)) >= set(lamella.__all__)


def test_inheritance_is_shallow():
    bases: dict[str, list[str]] = {}
    for name, path in modules().items():
        if name == "lamella.errors":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0] for base in node.bases]

    def depth(cls: str) -> int:
        ours = [base for base in bases.get(cls, ()) if base in bases]
        return max((1 + depth(base) for base in ours), default=0)

    assert not {cls: depth(cls) for cls in bases if depth(cls) > DEPTH}


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
