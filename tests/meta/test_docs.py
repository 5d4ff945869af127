"""The code blocks of README and docs run as they are written.

Each file runs in a folder that holds two tiny models with tokenizers (`my-encoder`,
`my-language-model`, and a tuned copy of the latter) and `texts.txt`. Blocks of a file share
their names; a comment ``<!-- file: NAME -->`` writes the next block to a file, and
``<!-- not run: REASON -->`` leaves it out.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from lamella.cli import console, main
from tests.meta.source import ROOT
from tests.tiny import TEXTS, save_encoder, save_language_model

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- (?P<comment>file|not run): (?P<about>.*?) -->\n)?"
    r"```(?P<language>\w+)\n(?P<code>.*?)```",
    re.DOTALL,
)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@dataclass(frozen=True)
class Block:
    comment: str | None
    about: str | None
    language: str
    code: str


def blocks_of(path: Path) -> list[Block]:
    return [Block(**m.groupdict()) for m in _BLOCK.finditer(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    save_encoder(folder / "my-encoder")
    save_language_model(folder / "my-language-model")
    save_language_model(folder / "my-language-model-tuned", seed=1)
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return folder


def run_command(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run(path, models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(console, "show_warnings", lambda: None)
    monkeypatch.setattr("lamella.cli.app.show_warnings", lambda: None)
    # Dataclasses look their module up.
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for block in blocks_of(path):
        if block.comment == "not run":
            continue
        if block.comment == "file":
            (models / str(block.about)).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, str(path), "exec"), vars(page))
        elif block.language == "bash":
            for line in block.code.splitlines():
                if line.startswith("lamella "):
                    run_command(line, monkeypatch)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in _LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert path.name in navigation
