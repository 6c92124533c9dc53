"""Measures of continual learning, for every task family and learner: pure functions of accuracies.

Everything starts from the accuracy matrix: ``a[k, j]`` is the accuracy on task j after k tasks were
learned, for the numbers k that were looked at. How they are defined differs in the literature; each
function says whose definition it is, and what it is relative to.

Shapes: K numbers of tasks learned, T tasks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rates = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AccuracyMatrix:
    """Accuracies on tasks after some numbers of tasks learned."""

    learned: tuple[int, ...]
    """The numbers of tasks learned, ascending."""
    accuracy_KT: Rates
    """Fractions; nan where a task was not learned yet, or not asked about."""

    def rows(self) -> Iterator[tuple[int, Rates]]:
        """Yield each number of tasks learned with the accuracies [T] then."""
        yield from zip(self.learned, self.accuracy_KT, strict=True)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[int, Rates]]) -> "AccuracyMatrix":
        """Join rows: a number of tasks learned, and accuracies [T or fewer] from task 0 on."""
        tasks = max(len(rates_T) for _, rates_T in rows)
        accuracy_KT = np.full((len(rows), tasks), math.nan)
        for row_T, (_, rates_T) in zip(accuracy_KT, rows, strict=True):
            row_T[: len(rates_T)] = rates_T
        return cls(learned=tuple(k for k, _ in rows), accuracy_KT=accuracy_KT)

    @classmethod
    def unchanging(cls, learned: Sequence[int], rates_T: Rates) -> "AccuracyMatrix":
        """Return the matrix of a learner that can't forget, such as SupSup with the task given."""
        return cls.of_rows([(k, rates_T[:k]) for k in learned])


def average_accuracy(matrix: AccuracyMatrix) -> float:
    """Return the mean accuracy on the tasks learned, after the last: ``A = mean_j a[T, j]``.

    Lopez-Paz & Ranzato 2017 (Gradient Episodic Memory), their ACC.
    """
    return _mean(matrix.accuracy_KT[-1])


def forgetting(matrix: AccuracyMatrix) -> float:
    """Return how far accuracies fell from their best: ``mean_j (max_k<T a[k, j] - a[T, j])``.

    Chaudhry et al. 2018 (Riemannian Walk). Over the tasks that were asked about before the last
    row and in it; nan if there are none. Negative if all that changed was for the better.
    """
    *_, last_T = matrix.accuracy_KT
    best_T = np.full_like(last_T, math.nan)
    for row_T in matrix.accuracy_KT[:-1]:
        best_T = np.fmax(best_T, row_T)
    return _mean(best_T - last_T)


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """Return how accuracies changed since tasks were learned: ``mean_j (a[T, j] - a[j, j])``.

    Lopez-Paz & Ranzato 2017, their BWT. Where not every number of tasks was looked at, ``a[j, j]``
    is the first accuracy on a task that is known. Negative: forgetting. nan if no task was asked
    about twice.
    """
    *_, last_T = matrix.accuracy_KT
    first_T = np.full_like(last_T, math.nan)
    for row_T in matrix.accuracy_KT[:-1]:
        first_T = np.where(np.isnan(first_T), row_T, first_T)
    return _mean(last_T - first_T)


def forward_transfer(learned_T: Rates, alone_T: Rates) -> float:
    """Return what the tasks before gave to a new one: ``mean_j>1 (a[j, j] - alone[j])``.

    The reference is each task learned alone, by the same training: minus the intransigence of
    Chaudhry et al. 2018, whose reference is a model trained on all data. Not the FWT of Lopez-Paz &
    Ranzato 2017, which asks about tasks before they are learned: a task that has no mask yet has
    no accuracy. nan with fewer than two tasks.

    Args:
        learned_T: accuracy on each task when it was learned.
        alone_T: that of the reference, of as many tasks or more.
    """
    return _mean((learned_T - alone_T[: len(learned_T)])[1:])


def confusion_matrix(
    tasks: int, confusions_X3: npt.NDArray[np.int64], hits_T: npt.NDArray[np.int64]
) -> Rates:
    """Return how often each task [rows] was taken for each [columns], as parts of a row, [T, T].

    Args:
        tasks: the tasks, from 0 on; rows of tasks without decisions are nan.
        confusions_X3: task, other task that it was taken for, and how many decisions.
        hits_T: decisions that were right about each task.
    """
    counts_TT = np.diag(hits_T).astype(np.float64)
    counts_TT[confusions_X3[:, 0], confusions_X3[:, 1]] = confusions_X3[:, 2]
    total_T1 = counts_TT.sum(1, keepdims=True)
    parts_TT = np.full((tasks, tasks), math.nan)
    np.divide(counts_TT, total_T1, out=parts_TT, where=total_T1 > 0)
    return parts_TT


def _mean(values_T: Rates) -> float:
    """Return the mean of the values that are known; nan if none is."""
    known = values_T[~np.isnan(values_T)]
    return float(known.mean()) if len(known) else math.nan
