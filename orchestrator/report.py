"""What a run shows: a table, a per-task table and a picture, from stored results alone."""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rich.table import Table

from supsup.config import EvalConfig
from supsup.evaluate import COUNTS, Evaluation
from supsup.files import write_atomically

_OBJECTIVE_NAMES = {"h": "H", "g": "G"}
_SCENARIO_NAMES = {"gns": "GNs", "gnu": "GNu"}
#: The part of an axis that a tick's label needs, and the percents that an axis spans at least.
_LABEL_ROOM, _LEAST_SPAN = 0.08, 3
Curve = npt.NDArray[np.float64]


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


def metrics(
    checkpoint: Checkpoint, scenario: str, settings: EvalConfig, test_images: int
) -> dict[str, float]:
    """Return the metrics of a checkpoint by their MLflow keys."""
    values = {"gg/accuracy": checkpoint.gg_accuracy}
    evaluation = checkpoint.evaluation
    if evaluation is None:
        return values
    headline = evaluation.methods[0]
    values[f"{scenario}/accuracy"] = evaluation.accuracy(headline, scenario)
    half_width = evaluation.accuracy_half_width(headline, scenario, test_images)
    if math.isfinite(half_width) and evaluation.is_sample(test_images):
        values[f"{scenario}/accuracy_ci95"] = half_width
    for method in evaluation.methods:
        key = label(method, settings)
        values[f"{scenario}/accuracy/{key}"] = evaluation.accuracy(method, scenario)
        values[f"{scenario}/task_accuracy/{key}"] = evaluation.task_accuracy(method)
    return values


def table(results: Results) -> Table:
    """Return the table of accuracies (in %) against tasks learned."""
    upper = _SCENARIO_NAMES.get(results.scenario, "")
    shown = Table(
        title=f"{results.name}: accuracy in % on {results.dataset}",
        caption=sample_note(results),
        caption_justify="left",
    )
    shown.add_column("tasks\nlearned", justify="right")
    shown.add_column("GG", justify="right")
    methods = results.settings.methods if upper else ()
    for method in methods:
        name = method_name(method, results.settings)
        shown.add_column(f"{name}\n{upper} (task found)", justify="right")
    for checkpoint in results.checkpoints:
        row = [str(checkpoint.learned), f"{100 * checkpoint.gg_accuracy:.2f}"]
        if checkpoint.evaluation is not None:
            for method in methods:
                row.append(_cell(checkpoint.evaluation, method, results))
        shown.add_row(*row)
    return shown


def _cell(evaluation: Evaluation, method: str, results: Results) -> str:
    """Return ``accuracy (task found)`` in %, with the 95 % interval if it is an estimate."""
    text = f"{100 * evaluation.accuracy(method, results.scenario):.2f}"
    if evaluation.is_sample(results.test_images):
        width = evaluation.accuracy_half_width(method, results.scenario, results.test_images)
        text += " ± ?" if math.isnan(width) else f" ± {100 * width:.2f}"
    return f"{text} ({100 * evaluation.task_accuracy(method):.2f})"


def sample_note(results: Results) -> str | None:
    """Say what the estimates rest on; None if every task and image was asked about."""
    evaluation = results.checkpoints[-1].evaluation
    if evaluation is None or not evaluation.is_sample(results.test_images):
        return None
    tasks, images = len(evaluation.tasks), evaluation.images_per_task
    return (
        f"{_SCENARIO_NAMES[results.scenario]} at {evaluation.learned} tasks: estimate from "
        f"{_part(tasks, evaluation.learned)} tasks, {_part(images, results.test_images)} test "
        "images of each; ± is the 95 % interval"
    )


def _part(some: int, total: int) -> str:
    return f"all {total}" if some == total else f"{some} of {total}"


def method_name(method: str, settings: EvalConfig) -> str:
    """Return a method as people read it, such as ``H one-shot``."""
    objective, algorithm = method.split("-", 1)
    name = f"{_OBJECTIVE_NAMES[objective]} {algorithm}"
    if settings.batch > 1:
        name += f", {settings.batch} images"
    return name


def write(results: Results, folder: Path) -> list[Path]:
    """Write the per-task table, the table of checkpoints and the picture; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
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


def as_csv(rows: Sequence[Sequence[object]]) -> bytes:
    """Return rows as the bytes of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _per_task(results: Results) -> bytes:
    """One row per task: GG accuracy, and by each method how often it was found, after all.

    A task that the evaluation didn't ask about has GG alone.
    """
    evaluation = results.checkpoints[-1].evaluation
    methods = evaluation.methods if evaluation else ()
    header = ["task", "gg_accuracy"]
    for method in methods:
        key = label(method, results.settings)
        header += [f"{results.scenario}_accuracy {key}", f"task_accuracy {key}"]
    inferred = _inferred_rates(evaluation, results.scenario) if evaluation else {}
    blank = [""] * (len(header) - 2)
    rows: list[list[object]] = [list(header)]
    for task, correct in enumerate(results.gg_correct):
        gg_accuracy = f"{correct / results.test_images:.4f}"
        rows.append([task, gg_accuracy, *inferred.get(task, blank)])
    return as_csv(rows)


def _inferred_rates(evaluation: Evaluation, scenario: str) -> dict[int, list[str]]:
    """Return accuracy and task accuracy of each method in turn, by task."""
    column = {name: evaluation.counts[..., i] for i, name in enumerate(COUNTS)}
    rates_MT2 = np.stack(
        [
            column[f"{scenario}_hits"] / column["images"],
            column["task_hits"] / column["decisions"],
        ],
        axis=-1,
    )
    return {
        task: [f"{rate:.4f}" for rate in rates_M2.flat]
        for task, rates_M2 in zip(evaluation.tasks, rates_MT2.swapaxes(0, 1), strict=True)
    }


def _per_checkpoint(results: Results) -> bytes:
    """One row per checkpoint: its metrics, what was asked, and 95 % half-widths."""
    columns = [_checkpoint_columns(checkpoint, results) for checkpoint in results.checkpoints]
    keys = list(columns[-1])
    return as_csv([keys, *([values[key] for key in keys] for values in columns)])


def _checkpoint_columns(checkpoint: Checkpoint, results: Results) -> dict[str, object]:
    scenario, settings = results.scenario, results.settings
    values = metrics(checkpoint, scenario, settings, results.test_images)
    values.pop(f"{scenario}/accuracy_ci95", None)
    columns: dict[str, object] = {"tasks_learned": checkpoint.learned}
    columns |= {key: f"{value:.6f}" for key, value in values.items()}
    if evaluation := checkpoint.evaluation:
        columns |= {
            "tasks_asked": len(evaluation.tasks),
            "images_per_task": evaluation.images_per_task,
        }
        for method in evaluation.methods:
            key, of = label(method, settings), results.test_images
            width = evaluation.accuracy_half_width(method, scenario, of)
            columns[f"{scenario}/accuracy/{key} ±95"] = f"{width:.6f}"
            width = evaluation.task_accuracy_half_width(method, of)
            columns[f"{scenario}/task_accuracy/{key} ±95"] = f"{width:.6f}"
    return columns


def _picture(results: Results) -> bytes:
    """Accuracy against tasks learned, one line per method, as in the paper's Figure 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves = _curves(results)
    learned = [checkpoint.learned for checkpoint in results.checkpoints]
    for (name, (values, widths)), marker in zip(curves.items(), itertools.cycle("os^Dv")):
        (line,) = axes.plot(learned, values, marker=marker, markersize=5, label=name)
        band = (values - widths, values + widths)
        axes.fill_between(learned, *band, color=line.get_color(), alpha=0.15, linewidth=0)
    gg = np.array([100 * checkpoint.gg_accuracy for checkpoint in results.checkpoints])
    axes.plot(learned, gg, "k--", linewidth=1.2, label="GG: task given (upper bound)")
    scale = axis_scale(learned)
    axes.set_xscale(scale)
    shown = spread_ticks(learned, scale)
    axes.set_xticks(shown, [f"{k:,}" for k in shown])
    axes.minorticks_off()
    axes.set_ylim(*limits([gg, *(values for values, _ in curves.values())]))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{results.name} ({results.dataset})")
    axes.grid(visible=True, alpha=0.3)
    # Below the axes: wherever the curves go, it hides none of them.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    if note := sample_note(results):
        axes.set_xlabel(f"tasks learned\n{note.replace('±', 'band')}", fontsize=9)
    return as_png(figure)


def as_png(figure: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _curves(results: Results) -> dict[str, tuple[Curve, Curve]]:
    """Return accuracies in % and their 95 % half-widths at the checkpoints, by name."""
    evaluations = [c.evaluation for c in results.checkpoints if c.evaluation]
    if not evaluations:
        return {}
    scenario, of = results.scenario, results.test_images
    return {
        f"{_SCENARIO_NAMES[scenario]}: task inferred by {method_name(method, results.settings)}": (
            100 * np.array([e.accuracy(method, scenario) for e in evaluations]),
            100 * np.array([e.accuracy_half_width(method, scenario, of) for e in evaluations]),
        )
        for method in results.settings.methods
    }


def axis_scale(ticks: Sequence[int]) -> Literal["linear", "log"]:
    """Return the scale on which the closest two of the ascending ticks are further apart."""
    if len(ticks) < 2:
        return "linear"
    linear, log = (_fractions(ticks, scale) for scale in ("linear", "log"))
    return "linear" if np.diff(linear).min() >= np.diff(log).min() else "log"


def spread_ticks(ticks: Sequence[int], scale: str) -> list[int]:
    """Return the ascending ticks whose labels have room, the last one among them."""
    shown: list[int] = []
    edge = math.inf
    for tick, place in zip(reversed(ticks), reversed(_fractions(ticks, scale)), strict=True):
        if edge - place >= _LABEL_ROOM:
            shown.insert(0, tick)
            edge = place
    return shown


def _fractions(ticks: Sequence[int], scale: str) -> list[float]:
    """Return where the ticks are on the axis, from 0 to 1."""
    places = np.log(ticks) if scale == "log" else np.array(ticks, dtype=float)
    length = places[-1] - places[0] or 1.0
    return list((places - places[0]) / length)


def limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the ends of the accuracy axis: whole percents with all values well inside."""
    lowest, highest = min(c.min() for c in curves), max(c.max() for c in curves)
    bottom, top = math.floor(lowest - 0.5), min(100, math.ceil(highest + 0.5))
    return max(0, min(bottom, top - _LEAST_SPAN)), top
