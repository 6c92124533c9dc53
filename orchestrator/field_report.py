"""The measures of continual learning as files: the accuracy matrix and the confusion of tasks.

Shapes: K numbers of tasks learned, T tasks, X pairs of tasks.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from orchestrator.drawing import as_csv, as_png
from supsup.evaluate import Evaluation
from supsup.measures import AccuracyMatrix, Rates, confusion_matrix

#: Tasks that a heat map shows at most.
MAP_TASKS = 100


def matrix_files(matrix: AccuracyMatrix, title: str) -> dict[str, bytes]:
    """Return the accuracy matrix as files by name: a table, and a heat map if it is small."""
    tasks = range(matrix.accuracy_KT.shape[1])
    rows: list[list[object]] = [["tasks_learned", *(f"task {task}" for task in tasks)]]
    for k, row_T in zip(matrix.learned, matrix.accuracy_KT, strict=True):
        rows.append([k, *("" if math.isnan(x) else f"{x:.4f}" for x in row_T)])
    files = {"accuracy_matrix.csv": as_csv(rows)}
    if len(tasks) <= MAP_TASKS:
        files["accuracy_matrix.png"] = _heat_map(
            100 * matrix.accuracy_KT,
            title=title,
            rows=("tasks learned", [str(k) for k in matrix.learned]),
            columns="accuracy on task",
            unit="accuracy, %",
        )
    return files


def confusion_files(evaluation: Evaluation, title: str) -> Mapping[str, bytes]:
    """Return which tasks were taken for which, by the first method: a table, and a heat map."""
    hits_T, asked_T = evaluation.column("task_hits"), evaluation.column("decisions")
    asked = dict(zip(evaluation.tasks, asked_T.tolist(), strict=True))
    right = zip(evaluation.tasks, evaluation.tasks, hits_T.tolist(), strict=True)
    rows = sorted([*map(list, right), *evaluation.confusions_X3.tolist()])
    table = [["task", "taken for", "decisions", "of"], *([*row, asked[row[0]]] for row in rows)]
    files = {"task_confusion.csv": as_csv(table)}
    if evaluation.learned <= MAP_TASKS:
        every_T = np.zeros(evaluation.learned, dtype=np.int64)
        every_T[list(evaluation.tasks)] = hits_T
        files["task_confusion.png"] = _heat_map(
            100 * confusion_matrix(evaluation.learned, evaluation.confusions_X3, every_T),
            title=title,
            rows=("task", [str(task) for task in range(evaluation.learned)]),
            columns="taken for task",
            unit="% of the task's decisions",
            lowest=0,
        )
    return files


def _heat_map(
    percents: Rates,
    *,
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: str,
    unit: str,
    lowest: float | None = None,
) -> bytes:
    """Draw percents [K, T]; what is nan stays grey."""
    from matplotlib.figure import Figure

    height = min(6.5, 2 + 0.45 * len(percents))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    known = np.ma.masked_invalid(percents)
    image = axes.imshow(known, aspect="auto", interpolation="nearest", vmin=lowest, vmax=100)
    figure.colorbar(image, ax=axes, label=unit)
    name, labels = rows
    step = -(-len(labels) // 20)
    shown = list(range(0, len(labels), step))
    axes.set_yticks(shown, [labels[i] for i in shown])
    axes.set_xticks(range(0, percents.shape[1], -(-percents.shape[1] // 20)))
    axes.set_ylabel(name)
    axes.set_xlabel(columns)
    axes.set_title(title)
    if percents.size <= 12 * 12:
        _write_numbers(axes, percents)
    return as_png(figure)


def _write_numbers(axes: object, percents: npt.NDArray[np.float64]) -> None:
    """Write each number into its cell, dark on light and light on dark."""
    low, high = np.nanmin(percents), 100.0
    for (row, column), value in np.ndenumerate(percents):
        if not math.isnan(value):
            dark = value - low < 0.6 * (high - low)
            axes.text(  # type: ignore[attr-defined]
                column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
