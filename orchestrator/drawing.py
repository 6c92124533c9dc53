"""What tables and pictures share: files in memory, axes, ticks."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

#: The part of an axis that a tick's label needs, and the percents that an axis spans at least.
_LABEL_ROOM, _LEAST_SPAN = 0.08, 3
Curve = npt.NDArray[np.float64]


def as_csv(rows: Sequence[Sequence[object]]) -> bytes:
    """Return rows as the bytes of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def as_png(figure: Any, whole: bool = False) -> bytes:
    """Return a figure as the bytes of a PNG file; ``whole``: also what lies outside of it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, bbox_inches="tight" if whole else None)
    return stream.getvalue()


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
