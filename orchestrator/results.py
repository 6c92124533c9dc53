"""What a run found: its results as data, and what of them MLflow is told.

SupSup and the baselines fill in the same ``Results``, so that all of them are shown alike.

Shapes: T tasks.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.field_report import MAP_TASKS
from supsup import measures
from supsup.config import EvalConfig, RunConfig, method_parts
from supsup.evaluate import Evaluation, Sizes
from supsup.measures import AccuracyMatrix
from supsup.storage import Storage

_OBJECTIVE_NAMES = {"h": "H ", "g": "G ", "": ""}
SCENARIO_NAMES = {"gg": "GG", "gns": "GNs", "gnu": "GNu"}
#: Methods that a table has columns for, and the name of a folder.
FEW_METHODS = 3


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Accuracies after some number of tasks learned."""

    learned: int
    gg_accuracy: float
    """The mean over the tasks learned, each given."""
    evaluation: Evaluation | None
    """With the task inferred; None in scenario GG."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a run has to show."""

    name: str
    dataset: str
    """What was learned, as people read it: see ``subject``."""
    scenario: str
    settings: EvalConfig
    checkpoints: tuple[Checkpoint, ...]
    """At least one, by ascending number of tasks learned."""
    gg_correct: npt.NDArray[np.int64]
    """Test images that are right after all tasks, task given, int64 [T]."""
    sizes: npt.NDArray[np.int64]
    """Test images of every task, int64 [T]."""
    storage: Storage | None = None
    """What the tasks take; None leaves it out."""
    given: AccuracyMatrix | None = None
    """Accuracies with the task given of a learner that may forget; None: those of a task stay."""
    forward_transfer: float | None = None
    """After all tasks: see orchestrator.reference; None if it is not known."""

    def until(self, learned: int) -> "Results":
        """Return what there was to show after so many tasks."""
        checkpoints = tuple(c for c in self.checkpoints if c.learned <= learned)
        given = self.given
        if given is not None:
            rows = [(k, row_T) for k, row_T in given.rows() if k <= learned]
            given = AccuracyMatrix.of_rows(rows) if rows else None
        return dataclasses.replace(
            self,
            checkpoints=checkpoints,
            gg_correct=self.gg_correct[:learned],
            sizes=self.sizes[:learned],
            given=given,
            forward_transfer=None if learned < len(self.gg_correct) else self.forward_transfer,
        )

    def matrix(self) -> AccuracyMatrix:
        """Return the accuracy matrix of the run's scenario, with the task inferred if it is."""
        inferred = [c.evaluation for c in self.checkpoints if c.evaluation is not None]
        if inferred:
            return AccuracyMatrix.of_rows([(e.learned, self._inferred(e)) for e in inferred])
        return self.given or self._unchanging()

    def _unchanging(self) -> AccuracyMatrix:
        tasks = len(self.gg_correct)
        every = range(1, tasks + 1) if tasks <= MAP_TASKS else [c.learned for c in self.checkpoints]
        return AccuracyMatrix.unchanging(list(every), self.gg_correct / self.sizes)

    def _inferred(self, evaluation: Evaluation) -> measures.Rates:
        rates_T = np.full(evaluation.learned, math.nan)
        method, hits = evaluation.methods[0], f"{self.scenario}_hits"
        rates_T[list(evaluation.tasks)] = evaluation.rates(method, hits, "images")
        return rates_T


def subject(config: RunConfig) -> str:
    """Return what a run learns as people read it, such as ``rotated mnist``."""
    dataset = config.dataset
    if dataset.startswith("images:"):
        dataset = Path(dataset).name or "images"
    return dataset if config.family == "permuted" else f"{config.family} {dataset}"


def label(method: str, settings: EvalConfig) -> str:
    """Return a method's name with what was asked of it: ``h-one-shot-b128``, ``-g128``."""
    name = method
    if settings.batch > 1:
        name += f"-b{settings.batch}"
    if settings.group_size != settings.batch:
        name += f"-g{settings.group_size}"
    return name


def method_name(method: str, settings: EvalConfig) -> str:
    """Return a method as people read it, such as ``H one-shot``."""
    objective, algorithm = method_parts(method)
    name = f"{_OBJECTIVE_NAMES[objective]}{algorithm}"
    if settings.batch > 1:
        name += f", {settings.batch} images"
    return name


def folder_name(settings: EvalConfig) -> str:
    """Return the name of a folder for what an evaluation shows: its methods, or the first.

    Then what else was asked otherwise than by the defaults: ``h-one-shot-images9-depth1``.
    """
    labels = [label(method, settings) for method in settings.methods]
    name = "+".join(labels)
    if len(labels) > FEW_METHODS:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{labels[0]}+{len(labels) - 1}-more-{digest}"
    usual = EvalConfig()
    asked = {x: getattr(settings, x) for x in ("images", "tasks", "depth", "shortlist", "sketch")}
    return name + "".join(f"-{x}{v}" for x, v in asked.items() if v != getattr(usual, x))


def metrics(
    checkpoint: Checkpoint, scenario: str, settings: EvalConfig, sizes: Sizes
) -> dict[str, float]:
    """Return the metrics of a checkpoint by their MLflow keys."""
    values = {"gg/accuracy": checkpoint.gg_accuracy}
    evaluation = checkpoint.evaluation
    if evaluation is None:
        return values
    headline = evaluation.methods[0]
    values[f"{scenario}/accuracy"] = evaluation.accuracy(headline, scenario)
    half_width = evaluation.accuracy_half_width(headline, scenario, sizes)
    if math.isfinite(half_width) and evaluation.is_sample(sizes):
        values[f"{scenario}/accuracy_ci95"] = half_width
    values[f"{scenario}/top5_task_accuracy"] = evaluation.top5_accuracy(headline)
    for method in evaluation.methods:
        key = label(method, settings)
        values[f"{scenario}/accuracy/{key}"] = evaluation.accuracy(method, scenario)
        values[f"{scenario}/task_accuracy/{key}"] = evaluation.task_accuracy(method)
    return values


def field_metrics(results: Results) -> dict[str, float]:
    """Return the measures of continual learning (supsup.measures) after the last checkpoint.

    They are those of the run's scenario: with the task inferred, if it is. What needs a task that
    was asked about twice is left out if there is none.
    """
    matrix = results.matrix()
    values = {
        "average_accuracy": measures.average_accuracy(matrix),
        "forgetting": measures.forgetting(matrix),
        "backward_transfer": measures.backward_transfer(matrix),
    }
    if results.forward_transfer is not None:
        values["forward_transfer"] = results.forward_transfer
    if results.storage is not None:
        values["bytes_per_task"] = float(results.storage.per_task)
    return {name: value for name, value in values.items() if not math.isnan(value)}
