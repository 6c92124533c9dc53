"""What a trial tells while it works: who hears it, and what is kept of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from orchestrator.results import label
from supsup.config import RunConfig
from sweeps.study import Curve, Trial


class Tracks(Protocol):
    """What a trial's tracker does here."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics."""

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Record the end."""

    def leave(self) -> None:
        """Record that the end is another driver's."""


class Progress(Protocol):
    """Where a sweep tells how far it is."""

    def began(self) -> None:
        """Count a trial that is running now."""

    def ended(self, state: str, text: str, best: str) -> None:
        """Count a trial that ended, and say how."""

    def trained(self, tasks: int) -> None:
        """Count tasks trained."""

    def note(self, text: str) -> None:
        """Say something that should stay visible."""


@dataclass(frozen=True)
class Ready:
    """A trial whose configuration is known and checked."""

    trial: Trial
    config: RunConfig
    fingerprint: str


class Ears:
    """Hears what a trial's ``TrialJobs`` tell: metrics of a checkpoint, progress, notes."""

    def __init__(
        self,
        ready: Ready,
        tracker: Tracks,
        progress: Progress,
        prune: Callable[[int, float], bool],
    ) -> None:
        """Pass on metrics to the tracker, notes to the progress.

        Args:
            ready: the trial.
            tracker: where its metrics go.
            progress: where the sweep's progress goes.
            prune: told of accuracies at numbers of tasks learned; says whether that is poor.
        """
        self._ready, self._tracker, self._progress = ready, tracker, progress
        self._prune = prune
        self._summary_follows = False
        self.curve: Curve = {}
        self.pruned_at: int | None = None

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Keep the accuracies at a checkpoint."""
        self._tracker.metrics(values, step)
        self._summary_follows = True
        point = measured(self._ready.config, values)
        if "accuracy" not in point:
            # A stream that went on was evaluated otherwise there: its masks are others now.
            return
        self.curve[step] = point
        poor = self._prune(step, point["accuracy"])
        if poor and step < self._ready.config.tasks and self.pruned_at is None:
            self.pruned_at = step

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin to count something."""

    def advance(self, what: str, by: int) -> None:
        """Count on: the driver counts the tasks of all trials itself."""

    def note(self, text: str) -> None:
        """Pass on what should stay visible: not a checkpoint's summary, there are too many."""
        if not self._summary_follows:
            self._progress.note(f"trial {self._ready.trial.number}: {text}")
        self._summary_follows = False


def measured(config: RunConfig, values: Mapping[str, float]) -> dict[str, float]:
    """Return the measures of a checkpoint by names that all scenarios share.

    Those of an open set are named as in the table of its run.
    """
    scenario, first = config.scenario, label(config.eval.methods[0], config.eval)
    point = {
        "accuracy": values.get(f"{scenario}/accuracy", math.nan),
        "task_accuracy": values.get(f"{scenario}/task_accuracy/{first}", math.nan),
        "gg_accuracy": values.get("gg/accuracy", math.nan),
        "bytes": values.get("bank/bytes", math.nan),
    }
    if scenario == "nns":
        point |= {name: values[f"nns/{name}"] for name in ("masks", "missed", "false_new", "mixed")}
        point["wrong"] = values["nns/wrong"] + values["nns/late"]
    return {name: value for name, value in point.items() if not math.isnan(value)}
