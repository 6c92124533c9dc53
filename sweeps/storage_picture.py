"""Accuracy against bytes stored: what a learner's tasks take, as in the paper's Figure 2."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.drawing import as_png
from sweeps.compare import Arm, final

#: How much more the largest arm must take than the smallest for bytes to tell them apart.
_TELLING = 1.2


def storage_picture(name: str, found: Sequence[Arm]) -> Mapping[str, bytes]:
    """Return the picture by its file's name, a point an arm; none if all take about as much.

    The bars go from the worst to the best seed.
    """
    from matplotlib.figure import Figure

    points = {arm.label: _of(arm) for arm in found}
    points = {label: values for label, values in points.items() if not np.isnan(values).any()}
    sizes = [values[:, 0].mean() for values in points.values()]
    if len(sizes) < 2 or max(sizes) < _TELLING * min(sizes):
        return {}
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for (label, values), marker in zip(points.items(), itertools.cycle("os^Dv<>P"), strict=False):
        size, accuracy = values.mean(0)
        spread = [[accuracy - values[:, 1].min()], [values[:, 1].max() - accuracy]]
        axes.errorbar(size / 1e6, 100 * accuracy, 100 * np.array(spread), fmt=marker, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(0.1, 0.1)
    axes.set_xlabel("MB stored after all tasks")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(name)
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return {"storage.png": as_png(figure)}


def _of(arm: Arm) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return bytes and accuracy of every seed of an arm [seeds, 2]."""
    return np.array(
        [[final(r, "bytes"), final(r, "accuracy")] for r in arm.by_seed.values()], dtype=np.float64
    )
