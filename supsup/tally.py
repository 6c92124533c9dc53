"""Scores of an open-set learner against the truth that it never saw.

A mask belongs to the task that most of the images it was given are of. Of a decision's task,
that of most images in the batch looked at, some mask may be the owner already ("known") or not:

- known, given to another task's mask: **wrong**; given a new mask: **false** allocation;
- not known, given to a mask that is there: **late**; given a new mask: right;
- left out since its ends were decided differently: **mixed**.

A task that owns no mask in the end is **missed**. Data that looked new with no mask left was
**refused**.

Shapes: N images of a segment, K masks.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from supsup.openset import Step


@dataclass(frozen=True)
class Decision:
    """One decision with what is known of it afterwards."""

    segment: int
    task: int
    known: bool
    """Whether some mask belonged to the task."""
    margin: float
    epsilon: float
    masks: int
    """Masks allocated after it."""
    seconds: float


@dataclass
class Tally:
    """What a learner's decisions came to so far."""

    wrong: int = 0
    false_new: int = 0
    late: int = 0
    refused: int = 0
    mixed: int = 0
    masks: int = 0
    decisions: list[Decision] = field(default_factory=list)
    _images: list[Counter[int]] = field(default_factory=list)
    """Per mask, the images that it was given, by task."""
    _owned: Counter[int] = field(default_factory=Counter)
    """Masks by owner."""

    def add(self, step: Step, truth_N: npt.NDArray[np.int64], looked_at: int) -> None:
        """Take in a step.

        Args:
            step: what the learner did.
            truth_N: the task of every image of the segment.
            looked_at: images of it, from the first on, that the decision looked at.
        """
        task = _most(_by_task(truth_N[:looked_at]))
        known = self._owned[task] > 0
        self._count(step, task, known)
        if step.new:
            self.masks += 1
            self._images.append(Counter())
        if step.mask is not None:
            self._give(step.mask, truth_N)
        self.decisions.append(
            Decision(
                step.segment, task, known, step.margin, step.epsilon, self.masks,
                step.decision_seconds,
            )
        )  # fmt: skip

    def _count(self, step: Step, task: int, known: bool) -> None:
        if step.mixed:
            self.mixed += 1
        elif step.mask is None:
            self.refused += 1
        elif step.new:
            self.false_new += known
        elif not known:
            self.late += 1
        else:
            self.wrong += _most(self._images[step.mask]) != task

    def _give(self, mask: int, truth_N: npt.NDArray[np.int64]) -> None:
        images = self._images[mask]
        if images:
            self._owned[_most(images)] -= 1
        images.update(_by_task(truth_N))
        self._owned[_most(images)] += 1

    def owners(self) -> npt.NDArray[np.int64]:
        """Return the task that each mask belongs to [K]."""
        return np.array([_most(images) for images in self._images], dtype=np.int64)

    def missed(self, tasks: list[int]) -> int:
        """Return how many of some tasks own no mask."""
        return sum(self._owned[task] <= 0 for task in tasks)


def _by_task(truth_N: npt.NDArray[np.int64]) -> Counter[int]:
    tasks, counts = np.unique(truth_N, return_counts=True)
    return Counter(dict(zip(tasks.tolist(), counts.tolist(), strict=True)))


def _most(images: Counter[int]) -> int:
    """Return the task of most images; of several, the lowest."""
    return min(images, key=lambda task: (-images[task], task))
