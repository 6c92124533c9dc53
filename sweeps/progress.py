"""Progress of a sweep: a live table on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

_LINE_SECONDS = 5.0


class SweepProgress:
    """Counts trials by state, and tasks trained."""

    def __init__(self, console: Console) -> None:
        """Show nothing yet."""
        self._console = console
        self._total = 0
        self._states: Counter[str] = Counter()
        self._trained = 0
        self._to_train: int | None = None
        self._best = ""
        self._began = self._shown = time.monotonic()
        self._done_before = 0
        self.live: Live | None = None

    def expect(self, tasks: int) -> None:
        """Note how many tasks are to be trained in all."""
        self._to_train = tasks

    def start(self, total: int, states: Counter[str], best: str = "") -> None:
        """Begin with the trials that there are, and the best of them."""
        self._total, self._states, self._best = total, states, best
        self._done_before = self._ended
        self._show(now=True)

    def began(self) -> None:
        """Count a trial that is running now."""
        self._states["running"] += 1
        self._show()

    def ended(self, state: str, text: str, best: str) -> None:
        """Count a trial that ended, and say how."""
        self._states["running"] -= 1
        self._states[state] += 1
        self._best = best
        self.note(text)
        self._show()

    def trained(self, tasks: int) -> None:
        """Count tasks trained."""
        self._trained += tasks
        self._show()

    def note(self, text: str) -> None:
        """Say something that should stay visible."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def _ended(self) -> int:
        return sum(self._states[state] for state in ("done", "pruned", "failed"))

    def _left(self) -> str:
        """Estimate the time left, by tasks as long as some are to be trained, else by trials."""
        done, left = self._ended - self._done_before, self._total - self._ended
        if self._to_train is not None and self._trained < self._to_train:
            done, left = self._trained, self._to_train - self._trained
        if not done:
            return "?"
        seconds = (time.monotonic() - self._began) / done * left
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"

    def _of_all(self) -> str:
        """Return the tasks trained, of how many if that is known."""
        return f"{self._trained}/{self._to_train}" if self._to_train else str(self._trained)

    def _show(self, now: bool = False) -> None:
        if self.live is not None:
            self.live.update(self._table())
        elif now or time.monotonic() - self._shown > _LINE_SECONDS:
            self._shown = time.monotonic()
            states = ", ".join(f"{n} {state}" for state, n in self._states.items() if n)
            self.note(
                f"trials: {self._ended}/{self._total} ({states or 'none begun'}), "
                f"{self._of_all()} tasks trained, {self._left()} left"
            )

    def _table(self) -> Table:
        table = Table("trials", "done", "running", "pruned", "failed", "tasks trained", "time left")
        counts = [self._states[state] for state in ("done", "running", "pruned", "failed")]
        table.add_row(str(self._total), *map(str, counts), self._of_all(), self._left())
        table.caption = f"best so far: {self._best or 'none'}"
        return table


@contextlib.contextmanager
def progress() -> Iterator[SweepProgress]:
    """Give a progress that writes to the error stream."""
    console = Console(file=sys.stderr)
    shown = SweepProgress(console)
    if not console.is_terminal:
        yield shown
        return
    with Live(console=console, refresh_per_second=4, transient=True) as shown.live:
        yield shown
