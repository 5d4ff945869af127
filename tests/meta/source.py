"""The source of the package as syntax trees, for the tests of its structure."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lamella"


@dataclass(frozen=True)
class Import:
    """One imported module (or name of one).

    Attributes:
        target: Dotted name; for ``from a import b`` both ``a`` and ``a.b`` are tried.
        line: Where it is.
        only_types: It stands below ``if TYPE_CHECKING``.
        in_function: It stands inside a function.
    """

    target: str
    line: int
    only_types: bool
    in_function: bool


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file."""
    yield from _imports(tree_of(path), only_types=False, in_function=False)


def _imports(node: ast.AST, *, only_types: bool, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, only_types, in_function)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                target = f"{child.module}.{alias.name}"
                yield Import(target, child.lineno, only_types, in_function)
        else:
            types = only_types or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            inside = in_function or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            yield from _imports(child, only_types=types, in_function=inside)


def resolve(target: str) -> str | None:
    """The module of the package that an import target names, if any."""
    known = modules()
    while target.startswith("lamella"):
        if target in known:
            return target
        target = target.rpartition(".")[0]
    return None


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file under version control, or every file when there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return tuple(
            path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
        )
    return tuple(ROOT / name for name in listed if name and (ROOT / name).is_file())
