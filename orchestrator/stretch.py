"""Learning a stream stretch by stretch, each on whichever worker is free.

A worker keeps a plain learner between stretches. What other workers learned in the meantime it
gets from the ``History`` that comes with every stretch: references, of which it fetches those of
the steps that it lacks, and what the training of a mask goes on from when that mask's turn comes.
So a job needs no particular worker, and one that learned the stretch before fetches nothing.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supsup.apprentice import MaskState
from supsup.members import Packed
from supsup.openset import OpenSetLearner, Step
from supsup.streams import Segment

#: Recalls what a mask's training goes on from.
Recall = Callable[[int], MaskState | None]


@dataclass(frozen=True)
class News:
    """What some steps in a row left behind."""

    steps: Sequence[Step]
    """Without masks and states."""
    masks: Mapping[int, Packed]
    """The masks that they changed, as they are at the end."""


@dataclass(frozen=True)
class History:
    """All that was learned before a stretch, by reference."""

    news: Sequence[tuple[int, Any]]
    """The segment that each ``News`` ends before, ascending; and its reference."""
    states: Mapping[int, Any]
    """References of the states of all masks whose training can go on."""


class Chronicle:
    """The history as whoever hands out the stretches keeps it; puts each piece away once."""

    def __init__(self, put: Callable[[Any], Any]) -> None:
        """Begin with nothing learned.

        Args:
            put: stores an object for all workers and returns its reference.
        """
        self._put = put
        self._news: list[tuple[int, Any]] = []
        self._states: dict[int, Any] = {}

    def add(
        self,
        steps: Sequence[Step],
        masks: Mapping[int, Packed],
        states: Mapping[int, MaskState | None],
    ) -> None:
        """Add what some steps in a row left behind: see ``News``; and the states of those masks."""
        bare = [dataclasses.replace(step, packed_B=None, state=None) for step in steps]
        if bare:
            self._news.append((bare[-1].segment + 1, self._put(News(bare, masks))))
        for mask, state in states.items():
            self._states.pop(mask, None)
            if state is not None:
                self._states[mask] = self._put(state)

    def history(self) -> History:
        """Return all that was added."""
        return History(tuple(self._news), dict(self._states))


class StretchLearner:
    """A learner that is brought up to date before every stretch."""

    def __init__(
        self, make: Callable[[Recall], OpenSetLearner], fetch: Callable[[Any], Any]
    ) -> None:
        """Begin with no learner.

        Args:
            make: makes a plain learner that has learned nothing.
            fetch: returns what a reference stands for.
        """
        self._make, self._fetch = make, fetch
        self._learner: OpenSetLearner | None = None
        self._at = 0
        self._own: dict[int, MaskState | None] = {}
        self._states: Mapping[int, Any] = {}

    def learn(self, segments: Iterable[Segment], history: History) -> list[Step]:
        """Learn segments that follow upon a history.

        Args:
            segments: the stretch.
            history: what came before it; not kept.
        """
        learner, at = self._caught_up(history)
        self._own, self._states = {}, history.states
        steps = []
        for segment in segments:
            step = learner.learn(segment)
            if step.mask is not None and step.packed_B is not None:
                self._own[step.mask] = step.state
            steps.append(step)
        self._learner, self._at = learner, at + len(steps)
        self._own, self._states = {}, {}
        return steps

    def _caught_up(self, history: History) -> tuple[OpenSetLearner, int]:
        """Return a learner that has learned the history, and the segments in it."""
        # Whatever fails from here on leaves no learner that is half way somewhere.
        learner, at, self._learner = self._learner, self._at, None
        if learner is None or at not in (end for end, _ in history.news):
            learner, at = self._make(self._recall), 0
        for end, reference in history.news:
            if end > at:
                news: News = self._fetch(reference)
                learner.restore(news.steps, news.masks)
                at = end
        return learner, at

    def _recall(self, mask: int) -> MaskState | None:
        if mask in self._own:
            return self._own[mask]
        if mask not in self._states:
            return None
        state: MaskState = self._fetch(self._states[mask])
        return state
