"""Progress of a long job: bars on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 5.0


class Reporter(Protocol):
    """Where a job tells how far it is."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin to count something, such as tasks trained."""

    def advance(self, what: str, by: int) -> None:
        """Count on."""

    def note(self, text: str) -> None:
        """Say something that should stay visible."""


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._ids: dict[str, TaskID] = {}

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._ids[what] = self._progress.add_task(what, total=total, completed=done)

    def advance(self, what: str, by: int) -> None:
        self._progress.advance(self._ids[what], by)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._counts: dict[str, tuple[int, int, int, float]] = {}
        self._last = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._counts[what] = done, total, done, time.monotonic()

    def advance(self, what: str, by: int) -> None:
        done, total, first, started = self._counts[what]
        done += by
        self._counts[what] = done, total, first, started
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS and done < total:
            return
        self._last = now
        rate = (done - first) / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total else ""
        self.note(f"{what}: {done}/{total} ({rate:.2f}/s{left})")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def reporter() -> Iterator[Reporter]:
    """Give a reporter that writes to the error stream, bars if that is a terminal."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress)
