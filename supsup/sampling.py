"""Which tasks and images an evaluation asks about when not all of them, and how far off that is.

Both draws are stratified and by seed: tasks over the order in which they were learned, images by
class. The interval is that of two-stage cluster sampling (Cochran, *Sampling Techniques*, 3rd ed.,
Section 10.4): first tasks are drawn, then decisions within each. It takes both draws as simple
random ones, which stratifying can only improve on.

Shapes: T tasks, C classes, N images of a test set.
"""

import math

import numpy as np
import numpy.typing as npt

from supsup.seeding import generator

_Z95 = 1.96


def sampled_tasks(root: int, learned: int, count: int) -> tuple[int, ...]:
    """Return the tasks that an evaluation among the first ``learned`` asks about, ascending.

    Args:
        root: the run's root seed.
        learned: tasks learned.
        count: how many to draw, one from each of as many equal strata; 0 takes all.
    """
    if count == 0 or count >= learned:
        return tuple(range(learned))
    bounds = np.arange(count + 1) * learned // count
    drawn_T = generator(root, "evaluation tasks", learned).integers(bounds[:-1], bounds[1:])
    return tuple(drawn_T.tolist())


def sampled_images(
    labels_N: npt.NDArray[np.int64], count: int, stream: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return ``count`` images with each class as frequent as in the test set, in random order.

    Args:
        labels_N: the class of every test image.
        count: how many to draw; 0, or all that there are, takes all in their own order.
        stream: where the draw comes from.
    """
    if count == 0 or count >= len(labels_N):
        return np.arange(len(labels_N))
    sizes_C = np.bincount(labels_N)
    drawn = [
        stream.choice(np.flatnonzero(labels_N == label), size, replace=False)
        for label, size in enumerate(_allocation(sizes_C, count))
    ]
    return stream.permutation(np.concatenate(drawn))


def _allocation(sizes_C: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Share ``count`` among strata in proportion to their sizes, by the largest remainders."""
    total = int(sizes_C.sum())
    shares_C, remainders_C = np.divmod(sizes_C * count, total)
    largest = np.argsort(-remainders_C, kind="stable")[: count - int(shares_C.sum())]
    shares_C[largest] += 1
    return shares_C


def half_width(
    rates_T: npt.NDArray[np.float64],
    decisions_T: npt.NDArray[np.int64],
    tasks: int,
    images_asked_T: npt.NDArray[np.float64] | float,
) -> float:
    """Return the half-width of the 95 % interval of the mean over all tasks of their rates.

    Cochran's equation 10.15, ``v = (1 - f1) s1² / n + f1 (1 - f2) s2² / (n m)``, with n tasks
    asked about, m decisions each, s1² the variance of the tasks' rates and s2² that within a
    task. Where tasks differ in the size of their test set, ``(1 - f2) s2² / m`` is the mean of the
    tasks' own: every task counts alike. The unit within a task is the decision, for images that
    share one are right or wrong together: its share of right images lies between 0 and 1, so
    ``p (1 - p)`` is the variance of a decision about one image and a bound for one about a group.
    A single decision says nothing of its variance, which is then taken as 1/4, the largest. Nor do
    decisions that were all right, or all wrong: the interval is then the rule of three's, 3 in as
    many as were taken.

    Args:
        rates_T: fraction of right answers of each task asked about.
        decisions_T: decisions about each of them.
        tasks: tasks that there are.
        images_asked_T: f2, the fraction of its test set that was asked about in each task.

    Returns:
        The half-width; 0 if everything was asked, nan if one task alone stands for several.
    """
    asked = len(rates_T)
    f1 = asked / tasks
    if asked == 1 < tasks:
        return math.nan
    between = float(rates_T.var(ddof=1)) if asked > 1 else 0.0
    several_T = decisions_T > 1
    of_mean_T = rates_T * (1 - rates_T) / np.where(several_T, decisions_T - 1, 1)
    within_T = (1 - np.asarray(images_asked_T)) * np.where(several_T, of_mean_T, 0.25)
    variance = (1 - f1) * between / asked + f1 * float(within_T.mean()) / asked
    whole_sets = bool(np.all(np.asarray(images_asked_T) >= 1))
    alike = bool(np.all(rates_T == 0) or np.all(rates_T == 1))
    if alike and not variance and not (whole_sets and asked == tasks):
        return min(1.0, 3 / (asked if whole_sets else int(decisions_T.sum())))
    return _Z95 * math.sqrt(variance)
