"""What an open-set run shows: a table, tables of checkpoints and decisions, and three pictures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.drawing import as_csv, as_png, axis_scale, limits, spread_ticks
from orchestrator.results import FEW_METHODS, label, method_name
from supsup.config import EvalConfig, RunConfig
from supsup.evaluate import Evaluation
from supsup.files import write_atomically
from supsup.tally import Decision

#: NNs shares its labels between tasks, as GNs does: a wrong mask may still be right.
_SHARED = "gns"


@dataclass(frozen=True, kw_only=True)
class StreamCheckpoint:
    """What there is after some number of tasks went by."""

    learned: int
    evaluation: Evaluation | None
    """None if it was not taken while the masks were as they were then."""
    masks: int
    missed: int
    false_new: int
    wrong: int
    late: int
    refused: int
    mixed: int
    decisions: int
    recent: tuple[Decision, ...]
    """The decisions since the checkpoint before."""
    false_alarm: float = math.nan
    """The chance that known data is taken for new, as the margins so far have it; nan: unknown."""
    joins: Mapping[str, int] | None = None
    """Of a stream in chunks: masks joined, wrong joins, missed joins."""


@dataclass(frozen=True, kw_only=True)
class StreamResults:
    """All that an open-set run has to show."""

    name: str
    dataset: str
    config: RunConfig
    checkpoints: tuple[StreamCheckpoint, ...]
    decisions: tuple[Decision, ...]
    mask_accuracy: float | None
    """Of every mask on the test set of the task that it belongs to; the mean."""
    test_images: int


def metrics(checkpoint: StreamCheckpoint, settings: EvalConfig) -> dict[str, float]:
    """Return the metrics of a checkpoint by their MLflow keys."""
    values = {
        f"nns/{name}": float(getattr(checkpoint, name))
        for name in ("masks", "missed", "false_new", "wrong", "late", "refused", "mixed")
    }
    values |= {f"nns/{name}": float(n) for name, n in (checkpoint.joins or {}).items()}
    recent = checkpoint.recent
    known, new = ([d.margin for d in recent if d.known is known] for known in (True, False))
    if known:
        values["nns/margin_known_least"] = min(known)
    if new:
        values["nns/margin_new_most"] = max(new)
    if recent:
        values["nns/epsilon"] = recent[-1].epsilon
        values["nns/decision_ms"] = 1e3 * statistics.median(d.seconds for d in recent)
    if math.isfinite(checkpoint.false_alarm):
        values["nns/false_alarm"] = checkpoint.false_alarm
    evaluation = checkpoint.evaluation
    if evaluation is not None:
        values["nns/accuracy"] = evaluation.accuracy(evaluation.methods[0], _SHARED)
        for method in evaluation.methods:
            key = label(method, settings)
            values[f"nns/accuracy/{key}"] = evaluation.accuracy(method, _SHARED)
            values[f"nns/task_accuracy/{key}"] = evaluation.task_accuracy(method)
    return values


def summary(checkpoint: StreamCheckpoint) -> str:
    """Say in a line what a checkpoint found."""
    text = (
        f"{checkpoint.learned} tasks went by: {checkpoint.masks} masks, {checkpoint.missed} tasks "
        f"missed, {checkpoint.false_new} masks too many, {checkpoint.wrong} decisions wrong"
    )
    if checkpoint.joins:
        text += "".join(f", {n} {name.replace('_', ' ')}" for name, n in checkpoint.joins.items())
    if checkpoint.evaluation is None:
        return text
    method = checkpoint.evaluation.methods[0]
    accuracy = checkpoint.evaluation.accuracy(method, _SHARED)
    return f"{text}; NNs {100 * accuracy:.2f} % ({method})"


def table(results: StreamResults) -> Table:
    """Return the table of masks, errors and accuracy (in %) against tasks gone by.

    A column per method, or a row where there are too many for a terminal.
    """
    openset = results.config.openset
    shown = Table(
        title=f"{results.name}: no task named, stream {openset.stream}, {results.dataset}",
        caption=_caption(results),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for name in ("tasks", "masks", "missed", "extra", "wrong"):
        shown.add_column(name, justify="right")
    methods = results.config.eval.methods
    names = [method_name(method, results.config.eval) for method in methods]
    long = len(methods) > FEW_METHODS
    if long:
        shown.add_column("method")
        shown.add_column("NNs %", justify="right")
    for name in () if long else names:
        shown.add_column("NNs %\n" + name.replace(" ", "\n", 1), justify="right")
    shown.add_column("margin\nknown\nnew", justify="right")
    for c in results.checkpoints:
        row = [str(n) for n in (c.learned, c.masks, c.missed, c.false_new, c.wrong + c.late)]
        margins = _margins(c.recent)
        cells = [_cell(c.evaluation, method, results, " " if long else "\n") for method in methods]
        if not long:
            shown.add_row(*row, *cells, margins)
            continue
        for name, cell in zip(names, cells, strict=True):
            shown.add_row(*row, name, cell, margins)
            row, margins = [""] * len(row), ""
    return shown


def _cell(evaluation: Evaluation | None, method: str, results: StreamResults, between: str) -> str:
    if evaluation is None:
        return "-"
    text = f"{100 * evaluation.accuracy(method, _SHARED):.2f}"
    if evaluation.is_sample(results.test_images):
        width = evaluation.accuracy_half_width(method, _SHARED, results.test_images)
        text += between + ("± ?" if math.isnan(width) else f"± {100 * width:.2f}")
    return text


def _margins(decisions: Sequence[Decision]) -> str:
    known = [d.margin for d in decisions if d.known]
    new = [d.margin for d in decisions if not d.known]
    return f"{min(known, default=math.nan):.2f}\n{max(new, default=math.nan):.2f}"


def _caption(results: StreamResults) -> str:
    openset = results.config.openset
    text = (
        "missed: tasks without a mask; extra: masks for known tasks; wrong: decisions for another "
        "task's mask; margins k·max ν: least of known, most of new data, to be told apart by 1 + ε "
        f"(ε {openset.epsilon:g}, {openset.threshold})"
    )
    if openset.boundaries == "told":
        text += "; task boundaries are told, as in the paper's code"
    if joins := results.checkpoints[-1].joins:
        text += (
            f"; {openset.chunks} chunks merged: {joins['joined']} masks joined, "
            f"{joins['wrong_joins']} wrongly, {joins['missed_joins']} joins missed"
        )
    if results.mask_accuracy is not None:
        text += f"; masks given their own task: {100 * results.mask_accuracy:.2f} %"
    return text


def write(results: StreamResults, folder: Path) -> list[Path]:
    """Write the tables and the pictures; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "checkpoints.csv": _checkpoint_rows(results),
        "decisions.csv": _decision_rows(results),
        "masks.png": _masks_picture(results),
        "margins.png": _margins_picture(results),
    }
    if any(c.evaluation for c in results.checkpoints):
        contents["accuracy.png"] = _accuracy_picture(results)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _checkpoint_rows(results: StreamResults) -> bytes:
    rows = [
        {"tasks": c.learned} | {k: f"{v:.6g}" for k, v in metrics(c, results.config.eval).items()}
        for c in results.checkpoints
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return as_csv([keys, *([row.get(key, "") for key in keys] for row in rows)])


def _decision_rows(results: StreamResults) -> bytes:
    header = ["segment", "task", "known", "margin", "epsilon", "masks", "ms"]
    rows = [
        [d.segment, d.task, int(d.known), f"{d.margin:.5f}", f"{d.epsilon:.5f}", d.masks,
         f"{1e3 * d.seconds:.2f}"]
        for d in results.decisions
    ]  # fmt: skip
    return as_csv([header, *rows])


def _masks_picture(results: StreamResults) -> bytes:
    """Masks allocated against tasks that there were."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    seen = np.cumsum(_first_times([d.task for d in results.decisions]))
    segments = [d.segment for d in results.decisions]
    axes.step(segments, seen, "k--", linewidth=1.2, where="post", label="tasks in the stream")
    masks = [d.masks for d in results.decisions]
    axes.step(segments, masks, linewidth=1.5, where="post", label="masks allocated")
    axes.set_xlabel(f"decisions, one every {results.config.openset.decide_every} batches")
    axes.set_title(f"{results.name}: stream {results.config.openset.stream}")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return as_png(figure)


def _first_times(tasks: Sequence[int]) -> list[bool]:
    seen: set[int] = set()
    return [not (task in seen or seen.add(task)) for task in tasks]  # type: ignore[func-returns-value]


def _margins_picture(results: StreamResults) -> bytes:
    """Margins of known and of new data against masks, with the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, known, colour in (("known data", True, "C0"), ("new data", False, "C3")):
        some = [d for d in results.decisions if d.known is known]
        margins = [d.margin - 1 for d in some]
        axes.plot([d.masks for d in some], margins, ".", color=colour, markersize=5, label=name)
    masks = [d.masks for d in results.decisions]
    epsilons = [d.epsilon for d in results.decisions]
    axes.plot(masks, epsilons, "k-", linewidth=1.2, label=f"ε ({results.config.openset.threshold})")
    axes.set_yscale("log")
    axes.set_xlabel("masks allocated")
    axes.set_ylabel("margin, k · max ν − 1")
    axes.set_title(f"{results.name}: stream {results.config.openset.stream}")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return as_png(figure)


def _accuracy_picture(results: StreamResults) -> bytes:
    """Accuracy against tasks gone by, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    evaluations = [c.evaluation for c in results.checkpoints if c.evaluation]
    learned = [evaluation.learned for evaluation in evaluations]
    curves = []
    for method in results.config.eval.methods:
        of = results.test_images
        values = np.array([100 * e.accuracy(method, _SHARED) for e in evaluations])
        widths = np.array([100 * e.accuracy_half_width(method, _SHARED, of) for e in evaluations])
        name = method_name(method, results.config.eval)
        (line,) = axes.plot(learned, values, marker="o", markersize=5, label=f"NNs: {name}")
        band = (values - widths, values + widths)
        axes.fill_between(learned, *band, color=line.get_color(), alpha=0.15, linewidth=0)
        curves.append(values)
    if results.mask_accuracy is not None:
        upper = 100 * results.mask_accuracy
        name = "masks given their own task, in the end"
        axes.axhline(upper, color="k", linestyle="--", linewidth=1.2, label=name)
        curves.append(np.array([upper]))
    axes.set_ylim(*limits(curves))
    scale = axis_scale(learned)
    axes.set_xscale(scale)
    shown = spread_ticks(learned, scale)
    axes.set_xticks(shown, [f"{k:,}" for k in shown])
    axes.minorticks_off()
    axes.set_xlabel("tasks gone by")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{results.name} ({results.dataset})")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return as_png(figure)
