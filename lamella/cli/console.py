"""What every command shares: where text goes, how errors end, how progress shows."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from lamella.errors import GIVE_SAMPLES, LamellaError

BAD_INPUT = 2
"""Exit status for everything that the user can mend."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_GIVE_SAMPLES = "pass --samples with a file of texts or a folder of inputs (samples= in Python)"

_PIPED = 120
"""Columns where the output is read by something else than a terminal."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass
class Settings:
    """What the options before the command say."""

    debug: bool = False


settings = Settings()


def show_json(value: Any) -> None:
    """Print data for other programs, on a line per entry."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def table_of(title: str, *columns: str, numbers: Collection[str] = ()) -> Table:
    """A table without rows, with the columns of `numbers` to the right; nothing is cut off."""
    table = Table(box=None, title=title, title_justify="left")
    for column in columns:
        justify = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold")
    return table


@contextlib.contextmanager
def errors_in_one_line() -> Generator[None]:
    """End the process with one line and a status instead of a traceback.

    Raises:
        SystemExit: With 2 for an error of ours or of the system, 130 after Ctrl-C, 1 for a bug.
    """
    _terminate_politely()
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; nothing was left half-written")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except (LamellaError, OSError, ValueError, MemoryError) as error:
        _complain(_text_of(error), error)
        raise SystemExit(BAD_INPUT) from None
    except Exception as error:
        _complain(f"internal error: {_text_of(error)}", error)
        if not settings.debug:
            err.print("this is a bug in lamella; `lamella --debug …` shows where", style="dim")
        raise SystemExit(1) from None


class Stages:
    """A spinner on stderr with what goes on; silent on anything but a terminal."""

    def __init__(self) -> None:
        self._status: Status | None = None

    def __call__(self, text: str) -> None:
        """Show `text`; an empty one shows nothing."""
        if self._status is not None:
            self._status.stop()
        self._status = err.status(text) if text and err.is_terminal else None
        if self._status is not None:
            self._status.start()

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self("")


def show_warnings() -> None:
    """Warnings of Lamella go to stderr, one line each; third parties stay quiet."""
    package = str(Path(__file__).parents[1])

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if filename.startswith(package) or settings.debug:
            err.print(f"warning: {message}", style="yellow", markup=False)

    warnings.showwarning = show
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("lamella")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if settings.debug else logging.WARNING)


def _complain(text: str, error: BaseException) -> None:
    if settings.debug:
        traceback.print_exception(error)
    err.print(f"error: {text}", style="red", markup=False)


def _text_of(error: BaseException) -> str:
    """The message in one line, with the notes that were added on the way."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for this model"
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOENT and error.filename:
        text = f"there is no file {str(error.filename)!r}"
    elif isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror}{where}"
    text = text.replace(GIVE_SAMPLES, _GIVE_SAMPLES)
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return " ".join(f"{text or type(error).__name__}{notes}".split())


def _terminate_politely() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that what lies aside is removed."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, stop)
