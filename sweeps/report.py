"""What a sweep shows: tables of arms, paired differences, and pictures, from its study alone."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.drawing import as_csv, as_png, axis_scale, limits, spread_ticks
from supsup.files import write_atomically
from sweeps.compare import Arm, Estimate, arm_labels, arms, differences, final, overall
from sweeps.spec import OBJECTIVES, VARIANT, SweepSpec
from sweeps.storage_picture import storage_picture
from sweeps.study import Record

#: Measures in the tables: heading, factor, digits.
_MEASURES = {
    "accuracy": ("accuracy, %", 100, 2),
    "task_accuracy": ("task found, %", 100, 2),
    "gg_accuracy": ("GG, %", 100, 2),
    "masks": ("masks", 1, 1),
    "missed": ("missed", 1, 1),
    "false_new": ("extra", 1, 1),
    "wrong": ("wrong", 1, 1),
    "mixed": ("mixed", 1, 1),
    "bytes": ("bank, MB", 1e-6, 2),
}
#: What the headings of an open set mean.
_LEGEND = (
    "Open set: masks allocated; tasks missed: without a mask; extra: masks for known tasks; wrong: "
    "decisions for another task's mask; mixed: segments left out since their ends differed."
)
#: Arms of a search in its table, and lines in a picture, the best ones.
_MOST_ROWS, _MOST_LINES = 20, 12
#: Arms that fit into one panel of a picture.
_MOST_IN_PANEL = 8


def write(
    spec: SweepSpec, records: Sequence[Record], study: optuna.Study, folder: Path
) -> list[Path]:
    """Write tables and pictures into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = ranked(spec, arms(records))
    contents = {
        "comparison.md": _markdown(spec, found, records).encode(),
        "comparison.csv": as_csv(_comparison_rows(found)),
        "trials.csv": as_csv(_trial_rows(spec, records)),
    }
    if found:
        contents["accuracy.png"] = _picture(spec, found)
        contents |= storage_picture(spec.name, found)
    if spec.search:
        contents |= _search_pictures(spec, study)
    written = []
    for name, content in contents.items():
        write_atomically(folder / name, content)
        written.append(folder / name)
    return written


def ranked(spec: SweepSpec, found: Sequence[Arm]) -> list[Arm]:
    """Return the arms of a grid as they are, those of a search from the best on."""
    if spec.search is None:
        order = list(spec.arms())
        return sorted(found, key=lambda arm: order.index(arm.values))
    first = spec.search.objectives[0]
    sign = -1 if OBJECTIVES[first] == "maximize" else 1
    return sorted(found, key=lambda arm: sign * overall(arm, first).mean)


# --- tables ----------------------------------------------------------------------------------


def table(spec: SweepSpec, records: Sequence[Record]) -> Table:
    """Return the comparison as a table for a terminal."""
    found = ranked(spec, arms(records))
    labels = [arm.label for arm in found]
    title = f"sweep {spec.name}: mean over seeds ± 95 % interval"
    shown = Table(title=title, box=SIMPLE_HEAD, padding=0)
    for heading in _headings(found):
        if heading == "arm":
            shown.add_column(heading, min_width=min(22, max(map(len, labels), default=0)))
        else:
            shown.add_column(heading.replace(", ", "\n"), justify="right")
    for row in _rows(found[:_MOST_ROWS] if spec.search else found):
        shown.add_row(*row)
    captions = []
    if spec.search and len(found) > _MOST_ROWS:
        captions.append(f"the best {_MOST_ROWS} of {len(found)}")
    if "masks" in _shown_measures(found):
        captions.append(_LEGEND)
    shown.caption, shown.caption_justify = ". ".join(captions) or None, "left"
    return shown


def _shown_measures(found: Sequence[Arm]) -> list[str]:
    """Return the measures that there are; where masks are counted, their bytes say no more."""
    names = [
        name for name in _MEASURES if any(not math.isnan(overall(arm, name).mean) for arm in found)
    ]
    return [name for name in names if name != "bytes" or "masks" not in names]


def _headings(found: Sequence[Arm]) -> list[str]:
    return ["arm", "seeds", *(_MEASURES[name][0] for name in _shown_measures(found))]


def _rows(found: Sequence[Arm]) -> list[list[str]]:
    names = _shown_measures(found)
    return [
        [
            arm.label,
            str(len(arm.by_seed)),
            *(as_text(overall(arm, name), *_MEASURES[name][1:]) for name in names),
        ]
        for arm in found
    ]


def as_text(value: Estimate, factor: float = 1, digits: int = 2, signed: bool = False) -> str:
    """Return ``mean ± half-width``, the latter only where there is one."""
    if math.isnan(value.mean):
        # Such as tasks found where none is inferred.
        return ""
    sign = "+" if signed else ""
    mean = f"{factor * value.mean:{sign}.{digits}f}"
    if math.isnan(value.half_width) or not value.half_width:
        return mean
    return f"{mean} ± {factor * value.half_width:.{digits}f}"


def _markdown(spec: SweepSpec, found: Sequence[Arm], records: Sequence[Record]) -> str:
    parts = [
        f"# Sweep {spec.name}",
        f"{spec.recipe}, protocol {spec.protocol}, seeds {', '.join(map(str, spec.seeds))}. "
        "Means over seeds ± 95 % interval (t distribution), after all tasks.",
        _as_markdown(_headings(found), _rows(found)),
    ]
    if "masks" in _shown_measures(found):
        parts.append(_LEGEND)
    if spec.search is None and (rows := _difference_rows(found)):
        parts += ["## Accuracy against the best arm, paired by seed, in points", rows]
    ended = [r for r in records if r.state in ("failed", "pruned")]
    if ended:
        lines = [f"- trial {r.number}, seed {r.seed}, {r.state}: {r.reason}" for r in ended]
        parts += ["## Not done", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _difference_rows(found: Sequence[Arm]) -> str:
    rows = [
        [d.arm, d.than, str(d.estimate.n), as_text(d.estimate, 100, 2, signed=True)]
        for d in differences(found, "accuracy")
        if d.estimate.n
    ]
    return _as_markdown(["arm", "than", "seeds", "difference"], rows) if rows else ""


def _as_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _comparison_rows(found: Sequence[Arm]) -> list[list[object]]:
    names = _shown_measures(found)
    header: list[object] = ["arm", "seeds"]
    for name in names:
        header += [name, f"{name} ±95"]
    header += ["accuracy against the best arm", "± 95 of the difference"]
    against = {d.arm: d.estimate for d in differences(found, "accuracy")}
    rows: list[list[object]] = [header]
    for arm in found:
        row: list[object] = [arm.label, len(arm.by_seed)]
        for value in (overall(arm, name) for name in names):
            row += [f"{value.mean:.6f}", f"{value.half_width:.6f}"]
        difference = against.get(arm.label)
        row += (
            [f"{difference.mean:.6f}", f"{difference.half_width:.6f}"] if difference else ["", ""]
        )
        rows.append(row)
    return rows


def _trial_rows(spec: SweepSpec, records: Sequence[Record]) -> list[list[object]]:
    rows: list[list[object]] = [
        ["trial", "state", "seed", *spec.varied, *_MEASURES, "seconds", "fingerprint", "reason"]
    ]
    for r in records:
        measures = [final(r, name) for name in _MEASURES]
        values = [r.values.get(path, "") for path in spec.varied]
        seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
        shown = ["" if math.isnan(x) else f"{x:.6f}" for x in measures]
        rows.append(
            [r.number, r.state, r.seed, *values, *shown, seconds, r.fingerprint[:16], r.reason]
        )
    return rows


# --- pictures --------------------------------------------------------------------------------


def _picture(spec: SweepSpec, found: Sequence[Arm]) -> bytes:
    """Accuracy against tasks learned: a line an arm, a band from the worst to the best seed.

    Many arms of a grid have a panel for each value of the first field that differs.
    """
    from matplotlib.figure import Figure

    panels = _panels(spec, found)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (8, 5.5) if len(panels) == 1 else (4.2 * columns + 0.6, 3.4 * rows + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    curves, learned = [], set()
    styles = _styles([label for lines in panels.values() for label in lines])
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        for label, arm in lines.items():
            steps, low, mean, high = _band(arm)
            style = styles[label]
            axes.plot(steps, mean, markersize=4, label=label, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
            curves += [low, high]
            learned |= set(steps)
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    ticks = sorted(learned)
    scale = axis_scale(ticks)
    shown = spread_ticks(ticks, scale)
    for axes in all_axes[: len(panels)]:
        axes.set_xscale(scale)
        axes.set_xticks(shown, [f"{k:,}" for k in shown])
        axes.minorticks_off()
    all_axes[0].set_ylim(*limits(curves))
    seeds = max(len(arm.by_seed) for arm in found)
    band = f"; band: lowest to highest of {seeds} seeds" if seeds > 1 else ""
    for number, axes in enumerate(all_axes[: len(panels)]):
        if number + columns >= len(panels):
            axes.set_xlabel(f"tasks learned{band}")
            axes.tick_params(labelbottom=True)
        if number % columns == 0:
            axes.set_ylabel("test accuracy, %")
    figure.suptitle(spec.name)
    named = {
        label: handle
        for axes in all_axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    longest = max(map(len, named))
    legend = {"ncols": 2 if longest < 45 else 1, "frameon": False, "fontsize": 9}
    figure.legend(named.values(), named.keys(), loc="outside lower center", **legend)
    return as_png(figure)


def _panels(spec: SweepSpec, found: Sequence[Arm]) -> dict[str, dict[str, Arm]]:
    """Return the panels of the picture by title, and in each the arms by label."""
    fields = [path for path in spec.varied if path != VARIANT]
    first = next((path for path in fields if len({a.values[path] for a in found}) > 1), None)
    if spec.search or first is None or len(found) <= _MOST_IN_PANEL:
        return {"": {arm.label: arm for arm in found[:_MOST_LINES]}}
    rest = [{path: v for path, v in arm.values.items() if path != first} for arm in found]
    panels: dict[str, dict[str, Arm]] = {}
    for arm, label in zip(found, arm_labels(rest), strict=True):
        (title,) = arm_labels([{first: arm.values[first]}])
        panels.setdefault(title, {})[label] = arm
    return {title: dict(list(lines.items())[:_MOST_LINES]) for title, lines in panels.items()}


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour and marker of every label, the same in all panels."""
    names = dict.fromkeys(labels)
    return {
        label: {"color": f"C{number % 10}", "marker": "os^Dv<>P"[number % 8]}
        for number, label in enumerate(names)
    }


def _band(arm: Arm) -> tuple[list[int], Any, Any, Any]:
    """Return the checkpoints that all seeds reached, and lowest, mean, highest accuracy in %."""
    curves = [record.curve for record in arm.by_seed.values()]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values_SK = 100 * np.array([[curve[k]["accuracy"] for k in steps] for curve in curves])
    return steps, values_SK.min(0), values_SK.mean(0), values_SK.max(0)


def _search_pictures(spec: SweepSpec, study: optuna.Study) -> Mapping[str, bytes]:
    """Return Optuna's own pictures of a search, those that its trials are enough for."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    search = spec.search
    if search is None:
        return {}
    name_of: dict[str, Any] = {"target_name": search.objectives[0]}
    first = _by_first_objective(search.objectives, study)
    wanted: dict[str, Callable[[], Any]] = {
        "parallel-coordinates.png": lambda: plots.plot_parallel_coordinate(first, **name_of),
        "importance.png": lambda: plots.plot_param_importances(first, **name_of),
    }
    if len(search.objectives) in (2, 3):
        names: list[str] = list(search.objectives)
        wanted["pareto.png"] = lambda: plots.plot_pareto_front(study, target_names=names)
    pictures = {}
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    for name, draw in wanted.items() if len(done) > 1 else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                draw()
            except (ValueError, RuntimeError):
                # Trials that are all alike have no importances.
                continue
            figure = pyplot.gcf()
            figure.set_size_inches(9, 5.5)
            pictures[name] = as_png(figure, whole=True)
            pyplot.close(figure)
    return pictures


def _by_first_objective(objectives: Sequence[str], study: optuna.Study) -> optuna.Study:
    """Return a study of one objective: of several, Optuna takes the lowest for the best."""
    if len(objectives) == 1:
        return study
    maximize = OBJECTIVES[objectives[0]] == "maximize"
    first = optuna.create_study(direction="maximize" if maximize else "minimize")
    for trial in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        first.add_trial(
            optuna.trial.create_trial(
                params=trial.params, distributions=trial.distributions, value=trial.values[0]
            )
        )
    return first


def parent_metrics(spec: SweepSpec, records: Sequence[Record]) -> dict[str, float]:
    """Return the few metrics that the sweep itself has in MLflow."""
    found = arms(records)
    values = {
        f"trials/{state}": float(sum(r.state == state for r in records))
        for state in ("done", "pruned", "failed")
    }
    if found:
        best = max(found, key=lambda arm: overall(arm, "accuracy").mean)
        values["best/accuracy"] = overall(best, "accuracy").mean
    return values
