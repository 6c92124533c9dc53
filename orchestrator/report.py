"""What a run shows: a table, files of tables and pictures, from stored results alone.

Shapes: T tasks, M methods.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from orchestrator.drawing import Curve, as_csv, as_png, axis_scale, limits, spread_ticks
from orchestrator.field_report import confusion_files, matrix_files
from orchestrator.results import (
    FEW_METHODS,
    SCENARIO_NAMES,
    Checkpoint,
    Results,
    field_metrics,
    label,
    method_name,
    metrics,
)
from supsup.evaluate import COUNTS, Evaluation
from supsup.files import write_atomically

#: Columns of a terminal, and a margin.
_WIDTH = 78


def table(results: Results) -> Table:
    """Return the table of accuracies (in %) against tasks learned.

    A column per method, or a row where there are too many for a terminal.
    """
    scenario = SCENARIO_NAMES[results.scenario]
    title, said = f"{results.name}: accuracy in % on {results.dataset}", notes(results)
    shown = Table(
        title=title,
        caption="\n".join(said) or None,
        caption_justify="left",
        # As wide as what stands above and below, or it is broken into many lines.
        min_width=min(_WIDTH, max(map(len, [title, *said]))),
    )
    shown.add_column("tasks\nlearned", justify="right")
    shown.add_column("GG", justify="right")
    methods = results.settings.methods if results.scenario != "gg" else ()
    long = len(methods) > FEW_METHODS
    if long:
        shown.add_column("method")
        shown.add_column(f"{scenario} (task found)", justify="right")
    for name in () if long else (method_name(method, results.settings) for method in methods):
        shown.add_column(f"{name}\n{scenario} (task found)", justify="right")
    for checkpoint in results.checkpoints:
        row = [str(checkpoint.learned), f"{100 * checkpoint.gg_accuracy:.2f}"]
        cells = _cells(checkpoint, methods, results)
        if not long:
            shown.add_row(*row, *cells)
            continue
        for method, cell in zip(methods, cells, strict=True):
            shown.add_row(*row, method_name(method, results.settings), cell)
            row = ["", ""]
    return shown


def _cells(checkpoint: Checkpoint, methods: Sequence[str], results: Results) -> list[str]:
    """Return ``accuracy (task found)`` in %, with the 95 % interval if it is an estimate."""
    evaluation = checkpoint.evaluation
    if evaluation is None:
        return []
    cells = []
    for method in methods:
        text = f"{100 * evaluation.accuracy(method, results.scenario):.2f}"
        if evaluation.is_sample(results.sizes):
            width = evaluation.accuracy_half_width(method, results.scenario, results.sizes)
            text += " ± ?" if math.isnan(width) else f" ± {100 * width:.2f}"
        cells.append(f"{text} ({100 * evaluation.task_accuracy(method):.2f})")
    return cells


def notes(results: Results) -> list[str]:
    """Return what is to be said below the table: estimates, change over tasks, bytes."""
    found = [note] if (note := sample_note(results)) else []
    values = field_metrics(results)
    if "forgetting" in values:
        fell, gained = 100 * values["forgetting"], 100 * values["backward_transfer"]
        found.append(
            f"{SCENARIO_NAMES[results.scenario]}, % points: forgetting {fell:.2f}, "
            f"backward transfer {gained:.2f}"
        )
    if results.forward_transfer:
        found.append(
            f"GG, % points: forward transfer {100 * results.forward_transfer:.2f} against the "
            "tasks trained alone"
        )
    if storage := results.storage:
        tasks = results.checkpoints[-1].learned
        found.append(
            f"stored per task: {storage.per_task:,} bytes ({storage.what}); shared: "
            f"{storage.shared:,}; {tasks} tasks: {storage.total(tasks) / 1e6:,.2f} MB"
        )
    return found


def sample_note(results: Results) -> str | None:
    """Say what the estimates rest on; None if every task and image was asked about."""
    evaluation = results.checkpoints[-1].evaluation
    if evaluation is None or not evaluation.is_sample(results.sizes):
        return None
    images_T, sizes_T = evaluation.column("images"), evaluation.sizes_asked(results.sizes)
    images = f"{_span(images_T)} of {_span(sizes_T)}"
    if (images_T == sizes_T).all():
        images = f"all {_span(sizes_T)}"
    return (
        f"{SCENARIO_NAMES[results.scenario]} at {evaluation.learned} tasks: estimate from "
        f"{_part(len(evaluation.tasks), evaluation.learned)} tasks, {images} test images of each; "
        "± is the 95 % interval"
    )


def _span(counts_T: npt.NDArray[np.int64]) -> str:
    low, high = counts_T.min(), counts_T.max()
    return str(low) if low == high else f"{low} to {high}"


def _part(some: int, total: int) -> str:
    return f"all {total}" if some == total else f"{some} of {total}"


def write(results: Results, folder: Path) -> list[Path]:
    """Write the tables and pictures of a run; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = results.checkpoints[-1].evaluation
    title = f"{results.name} ({results.dataset}), {SCENARIO_NAMES[results.scenario]}"
    if evaluation is not None:
        title += f", {method_name(evaluation.methods[0], results.settings)}"
    files = {
        "per_task.csv": _per_task(results),
        "accuracy.csv": _per_checkpoint(results),
        "accuracy.png": _picture(results),
        **matrix_files(results.matrix(), title),
        **(confusion_files(evaluation, title) if evaluation is not None else {}),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _per_task(results: Results) -> bytes:
    """One row per task: GG accuracy, and by each method how often it was found, after all.

    A task that the evaluation didn't ask about has GG alone.
    """
    evaluation = results.checkpoints[-1].evaluation
    methods = evaluation.methods if evaluation else ()
    header = ["task", "test_images", "gg_accuracy"]
    for method in methods:
        key = label(method, results.settings)
        header += [f"{results.scenario}_accuracy {key}", f"task_accuracy {key}"]
    inferred = _inferred_rates(evaluation, results.scenario) if evaluation else {}
    blank = [""] * (2 * len(methods))
    rows: list[list[object]] = [list(header)]
    given = zip(results.gg_correct, results.sizes, strict=True)
    for task, (correct, size) in enumerate(given):
        rows.append([task, size, f"{correct / size:.4f}", *inferred.get(task, blank)])
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
    return as_csv([keys, *([values.get(key, "") for key in keys] for values in columns)])


def _checkpoint_columns(checkpoint: Checkpoint, results: Results) -> dict[str, object]:
    scenario, settings = results.scenario, results.settings
    values = metrics(checkpoint, scenario, settings, results.sizes)
    values.pop(f"{scenario}/accuracy_ci95", None)
    columns: dict[str, object] = {"tasks_learned": checkpoint.learned}
    values |= field_metrics(results.until(checkpoint.learned))
    columns |= {key: f"{value:.6f}" for key, value in values.items()}
    if evaluation := checkpoint.evaluation:
        columns |= {
            "tasks_asked": len(evaluation.tasks),
            "images_per_task": f"{evaluation.column('images').mean():g}",
        }
        for method in evaluation.methods:
            key, of = label(method, settings), results.sizes
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
        color = line.get_color()
        if len(learned) == 1:
            axes.errorbar(learned, values, widths, color=color, capsize=4)
        band = (values - widths, values + widths)
        axes.fill_between(learned, *band, color=color, alpha=0.15, linewidth=0)
    gg = np.array([100 * checkpoint.gg_accuracy for checkpoint in results.checkpoints])
    name = "GG: task given (upper bound)"
    if len(learned) == 1:
        axes.axhline(gg[0], color="k", linestyle="--", linewidth=1.2, label=name)
        axes.set_xlim(learned[0] - 1, learned[0] + 1)
    else:
        axes.plot(learned, gg, "k--", linewidth=1.2, label=name)
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


def _curves(results: Results) -> dict[str, tuple[Curve, Curve]]:
    """Return accuracies in % and their 95 % half-widths at the checkpoints, by name."""
    evaluations = [c.evaluation for c in results.checkpoints if c.evaluation]
    if not evaluations:
        return {}
    scenario, of = results.scenario, results.sizes
    return {
        f"{SCENARIO_NAMES[scenario]}: task inferred by {method_name(method, results.settings)}": (
            100 * np.array([e.accuracy(method, scenario) for e in evaluations]),
            100 * np.array([e.accuracy_half_width(method, scenario, of) for e in evaluations]),
        )
        for method in results.settings.methods
    }
