"""What tests of commands share."""

from __future__ import annotations

import sys

import pytest

from lamella.cli import console, main


@pytest.fixture
def lamella_cli(monkeypatch, capsys):
    """``status, out, err = lamella_cli("compile", …)``, without a new process."""
    # The settings and the handler for warnings are those of a process.
    monkeypatch.setattr(console, "show_warnings", lambda: None)
    monkeypatch.setattr("lamella.cli.app.show_warnings", lambda: None)
    monkeypatch.setattr(console.out, "_width", 200)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lamella", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        text = capsys.readouterr()
        return int(ended.value.code or 0), text.out, text.err

    return run
