"""What a run shows: a table, a per-task table and a picture, from stored results alone."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from supsup.config import EvalConfig
from supsup.evaluate import COUNTS, Evaluation
from supsup.files import write_atomically

_OBJECTIVE_NAMES = {"h": "H", "g": "G"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Accuracies after some number of tasks learned."""

    learned: int
    gg_accuracy: float
    evaluation: Evaluation | None
    """None in scenario GG."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a run has to show."""

    name: str
    dataset: str
    scenario: str
    settings: EvalConfig
    checkpoints: tuple[Checkpoint, ...]
    gg_correct: npt.NDArray[np.int64]
    test_images: int


def label(method: str, settings: EvalConfig) -> str:
    """Return a method's name with what was asked of it: ``h-one-shot-b128``, ``-g128``."""
    name = method
    if settings.batch > 1:
        name += f"-b{settings.batch}"
    if settings.group_size != settings.batch:
        name += f"-g{settings.group_size}"
    return name


def metrics(checkpoint: Checkpoint, scenario: str, settings: EvalConfig) -> dict[str, float]:
    """Return the metrics of a checkpoint by their MLflow keys."""
    values = {"gg/accuracy": checkpoint.gg_accuracy}
    evaluation = checkpoint.evaluation
    if evaluation is None:
        return values
    values[f"{scenario}/accuracy"] = evaluation.accuracy(evaluation.methods[0], scenario)
    for method in evaluation.methods:
        key = label(method, settings)
        values[f"{scenario}/accuracy/{key}"] = evaluation.accuracy(method, scenario)
        values[f"{scenario}/task_accuracy/{key}"] = evaluation.task_accuracy(method)
    return values


def table(results: Results) -> Table:
    """Return the table of accuracies (in %) against tasks learned."""
    upper = {"gns": "GNs", "gnu": "GNu"}.get(results.scenario, "")
    shown = Table(title=f"{results.name}: accuracy in % on {results.dataset}")
    shown.add_column("tasks learned", justify="right")
    shown.add_column("GG", justify="right")
    methods = results.settings.methods if upper else ()
    for method in methods:
        name = method_name(method, results.settings)
        shown.add_column(f"{name}\n{upper} (task found)", justify="right")
    for checkpoint in results.checkpoints:
        row = [str(checkpoint.learned), f"{100 * checkpoint.gg_accuracy:.2f}"]
        if checkpoint.evaluation is not None:
            for method in methods:
                accuracy = checkpoint.evaluation.accuracy(method, results.scenario)
                found = checkpoint.evaluation.task_accuracy(method)
                row.append(f"{100 * accuracy:.2f} ({100 * found:.2f})")
        shown.add_row(*row)
    return shown


def method_name(method: str, settings: EvalConfig) -> str:
    """Return a method as people read it, such as ``H one-shot``."""
    objective, algorithm = method.split("-", 1)
    name = f"{_OBJECTIVE_NAMES[objective]} {algorithm}"
    if settings.batch > 1:
        name += f", {settings.batch} images"
    return name


def write(results: Results, folder: Path) -> list[Path]:
    """Write the per-task table, the table of checkpoints and the picture; return their paths."""
    folder.mkdir(exist_ok=True)
    written = []
    for name, content in (
        ("per_task.csv", _per_task(results)),
        ("accuracy.csv", _per_checkpoint(results)),
        ("accuracy.png", _picture(results)),
    ):
        path = folder / name
        write_atomically(path, content)
        written.append(path)
    return written


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _per_task(results: Results) -> bytes:
    """One row per task: GG accuracy, and by each method how often it was found, after all."""
    evaluation = results.checkpoints[-1].evaluation
    methods = evaluation.methods if evaluation else ()
    header = ["task", "gg_accuracy"]
    for method in methods:
        key = label(method, results.settings)
        header += [f"{results.scenario}_accuracy {key}", f"task_accuracy {key}"]
    rows: list[list[object]] = [list(header)]
    hits = COUNTS.index(f"{results.scenario}_hits") if evaluation else 0
    for task, correct in enumerate(results.gg_correct):
        row: list[object] = [task, f"{correct / results.test_images:.4f}"]
        if evaluation:
            for counts in evaluation.counts[:, task]:
                row += [f"{counts[hits] / counts[2]:.4f}", f"{counts[1] / counts[0]:.4f}"]
        rows.append(row)
    return _csv(rows)


def _per_checkpoint(results: Results) -> bytes:
    keys = list(metrics(results.checkpoints[-1], results.scenario, results.settings))
    rows: list[list[object]] = [["tasks_learned", *keys]]
    for checkpoint in results.checkpoints:
        values = metrics(checkpoint, results.scenario, results.settings)
        rows.append([checkpoint.learned, *(f"{values[key]:.6f}" for key in keys)])
    return _csv(rows)


def _picture(results: Results) -> bytes:
    """Accuracy against tasks learned, as in the paper's Figures 3 and 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    learned = [checkpoint.learned for checkpoint in results.checkpoints]
    gg = [100 * checkpoint.gg_accuracy for checkpoint in results.checkpoints]
    axes.plot(learned, gg, "k--", marker="o", label="GG: task given (upper bound)")
    scenario = {"gns": "GNs", "gnu": "GNu"}.get(results.scenario, "")
    lowest = min(gg)
    for method in results.settings.methods if scenario else ():
        values = [
            100 * checkpoint.evaluation.accuracy(method, results.scenario)
            for checkpoint in results.checkpoints
            if checkpoint.evaluation
        ]
        name = method_name(method, results.settings)
        axes.plot(learned, values, marker="o", label=f"{scenario}: task inferred by {name}")
        lowest = min(lowest, *values)
    if max(learned) > 20 * min(learned):
        axes.set_xscale("log")
    axes.set_xticks(learned, [str(k) for k in learned])
    axes.minorticks_off()
    axes.set_ylim(max(0, lowest - 2), 100)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{results.name} ({results.dataset})")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
