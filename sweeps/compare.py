"""Arms compared over seeds: means and paired differences, with 95 % intervals (t distribution)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from sweeps.spec import VARIANT
from sweeps.study import Record


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    n: int
    mean: float
    half_width: float
    """Of the 95 % interval; nan where one seed says nothing of it."""


@dataclass(frozen=True)
class Arm:
    """An arm: what it has set, and what its trials measured at the end, by seed."""

    label: str
    values: Mapping[str, Any]
    by_seed: Mapping[int, Record]


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another, over the seeds that both have."""

    arm: str
    than: str
    estimate: Estimate


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and half-width ``t(0.975, n - 1) s / sqrt(n)``."""
    n = len(values)
    if n < 2:
        return Estimate(n, float(values[0]) if n else math.nan, math.nan)
    s = float(np.std(values, ddof=1))
    return Estimate(n, float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * s / math.sqrt(n))


def arms(records: Sequence[Record]) -> list[Arm]:
    """Return the arms of which a trial is done, in the order in which they were begun."""
    done = [record for record in records if record.state == "done"]
    labels = arm_labels([record.values for record in done])
    found: dict[str, Arm] = {}
    for label, record in zip(labels, done, strict=True):
        before = found[label].by_seed if label in found else {}
        found[label] = Arm(label, record.values, {**before, record.seed: record})
    return list(found.values())


def final(record: Record, measure: str) -> float:
    """Return what a trial measured after all its tasks; nan if it didn't."""
    return record.curve[max(record.curve)].get(measure, math.nan) if record.curve else math.nan


def overall(arm: Arm, measure: str) -> Estimate:
    """Return an arm's mean of a measure over its seeds."""
    found = [final(record, measure) for record in arm.by_seed.values()]
    return estimate([value for value in found if not math.isnan(value)])


def paired(arm: Arm, than: Arm, measure: str) -> Estimate:
    """Return the mean difference of two arms over the seeds that both have."""
    common = sorted(set(arm.by_seed) & set(than.by_seed))
    return estimate(
        [final(arm.by_seed[s], measure) - final(than.by_seed[s], measure) for s in common]
    )


def differences(found: Sequence[Arm], measure: str) -> list[Difference]:
    """Return how much every arm differs from the best one."""
    if not found:
        return []
    best = max(found, key=lambda arm: overall(arm, measure).mean)
    return [
        Difference(arm.label, best.label, paired(arm, best, measure))
        for arm in found
        if arm is not best
    ]


def arm_labels(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each arm that shows only what differs between them."""
    paths = list(dict.fromkeys(path for arm in values for path in arm))
    varied = [path for path in paths if len({arm.get(path) for arm in values}) > 1] or paths
    shorts = [path.rpartition(".")[2] for path in varied]
    names = {
        path: short if shorts.count(short) == 1 else path
        for path, short in zip(varied, shorts, strict=True)
    }
    return [
        ", ".join(
            _shown(arm[path]) if path == VARIANT else f"{names[path]} {_shown(arm[path])}"
            for path in varied
            if path in arm
        )
        for arm in values
    ]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
