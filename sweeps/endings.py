"""How trials end: in which state and why, the line on it, and the best one so far."""

import math
from collections.abc import Mapping, Sequence

from sweeps.spec import OBJECTIVES
from sweeps.study import Record, Trial


class Best:
    """The best trial by the first objective, those of earlier commands too."""

    def __init__(self, objective: str, records: Sequence[Record]) -> None:
        """Begin with the trials that are done."""
        self._objective = objective
        self._found: tuple[float, int] | None = None
        for record in records:
            if record.state == "done":
                self.add(record.number, record.objectives[0])

    def add(self, number: int, value: float) -> None:
        """Count in a trial that is done."""
        sign = 1 if OBJECTIVES[self._objective] == "maximize" else -1
        if self._found is None or sign * value > sign * self._found[0]:
            self._found = value, number

    def __str__(self) -> str:
        if self._found is None:
            return ""
        value, number = self._found
        return f"trial {number}, {as_text(self._objective, value)}"


def as_text(objective: str, value: float) -> str:
    """Return what a trial reached, with its unit."""
    return f"{value / 1e6:.2f} MB" if objective == "bytes" else f"{100 * value:.2f} %"


def outcome(
    problem: str, pruned_at: int | None, objectives: Mapping[str, float]
) -> tuple[str, str]:
    """Return the state in which a trial ends, and the reason if it isn't done."""
    if problem:
        return "failed", problem
    if pruned_at is not None:
        return "pruned", f"poor after {pruned_at} tasks"
    for name, value in objectives.items():
        if not math.isfinite(value):
            return "failed", f"{name} is {value}, must be finite"
    return "done", ""


def line(trial: Trial, state: str, reached: str, reason: str) -> str:
    """Return the line on a trial that ended; ``reached`` is its first objective as text."""
    arm = ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in trial.values.items())
    shown = f" {reached}" if reached else ""
    why = f": {reason}" if reason else ""
    return f"trial {trial.number} ({arm}, seed {trial.seed}) {state}{shown}{why}"
