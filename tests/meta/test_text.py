"""What is written in code and documents: references that exist, no paths of a machine."""

from __future__ import annotations

import ast
import re

import pytest

from tests.meta.source import ROOT, modules, tracked_files, tree_of

_KEY = re.compile(r"\[([A-Z][A-Za-z]+\d{4}[a-z]?)\]")
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/[\w.-]+")
# Put together here, so that this file does not hold what it looks for.
_UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b|raise NotImplemented" r"Error")
_TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".bib", ".cfg", ".json", ""}


def documented(tree: ast.Module) -> list[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


@pytest.mark.parametrize("name", modules())
def test_references_are_in_the_bibliography(name):
    known = set(re.findall(r"@\w+\{(\w+),", (ROOT / "docs/references.bib").read_text("utf-8")))
    cited = {key for text in documented(tree_of(modules()[name])) for key in _KEY.findall(text)}
    assert cited <= known


@pytest.mark.parametrize(
    "path",
    [p for p in tracked_files() if p.suffix in _TEXT],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_hold_no_path_of_a_machine_and_nothing_unfinished(path):
    text = path.read_text(encoding="utf-8")
    assert not _MACHINE_PATH.findall(text)
    assert not _UNFINISHED.findall(text)


@pytest.mark.parametrize("name", modules())
def test_the_library_never_prints(name):
    calls = [
        node.lineno
        for node in ast.walk(tree_of(modules()[name]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "pprint")
    ]
    assert not calls
