"""Open set: training with no task identity (scenario NNs; paper, Sections 3.4 and 4.3).

Every so many batches the learner looks at one batch: if no mask lowers the entropy of the
superposition's output clearly faster than the others, nobody knows this data, and a new mask is
allocated; else the best one is trained on. With ν the softmax of ``-∇_α H`` over k masks, data is
new where

    k · max ν < 1 + ε.

Before five masks are allocated, five take part: the rest are masks as they will be at the start of
their training.

The learner is one loop; where the masks are asked and trained is up to two small interfaces,
``Members`` (supsup.members) and ``Trainer`` (supsup.apprentice): so the same loop runs over Ray
workers.

Shapes: K masks that take part, B images of a batch and bytes of a packed mask, P pixels.
"""

import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.apprentice import MaskState, Trainer, batches_left, initial_state, packed_mask
from supsup.config import OpenSetConfig, RunConfig
from supsup.datasets import Dataset
from supsup.material import as_tensor, layers_of
from supsup.members import Members, Packed, Scores, Superposition
from supsup.models import fixed_weights
from supsup.streams import Segment

#: Masks that take part in a decision at least (paper, Section 4.3).
LEAST_MASKS = 5
#: Recent decisions of each kind that calibrate ε, and how many there must be.
_RECENT: Mapping[str, int] = {"known": 256, "new": 64}
_ENOUGH = 8
#: Above this chance of a false alarm the margins of known and new data don't part.
_MOST_FALSE_ALARM = 0.01
#: Below this width in ln(margin - 1) a few equal margins would make ε certain of itself.
_LEAST_WIDTH = 0.02

# --- the decision ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Existing:
    """The data belongs to a mask that is there."""

    mask: int


@dataclass(frozen=True)
class New:
    """No mask knows the data."""


def margin(scores_K: Scores) -> float:
    """Return ``k · max softmax(scores)``: 1 where all are equal, k where one stands out."""
    scores = scores_K.astype(np.float64)
    return len(scores) / float(np.exp(scores - scores.max()).sum())


def decide(scores_K: Scores, allocated: int, epsilon: float) -> Existing | New:
    """Say which mask data belongs to (paper, Section 3.4).

    Args:
        scores_K: ``-∂H/∂α`` of every mask that takes part.
        allocated: how many of them, from the first on, are allocated.
        epsilon: ε of the rule.
    """
    best = int(scores_K.argmax())
    if best >= allocated or margin(scores_K) < 1 + epsilon:
        return New()
    return Existing(best)


class Threshold:
    """ε, fixed or calibrated by the margins of the decisions so far.

    Calibrated: ``ln(margin - 1)`` of the first recognition of each mask, while it is trained
    least and stands out least, and of allocations are each taken as normal, centre and width of
    recent ones by median and median absolute deviation; ε lies as many widths below the one as
    above the other, so that both errors are equally likely. The chance is ``false_alarm``. Until
    there are enough of both, and where they overlap so much that no ε tells them apart, ε is the
    fixed one.
    """

    def __init__(self, openset: OpenSetConfig) -> None:
        """Begin with no decision seen."""
        self._fixed = openset.epsilon
        self._calibrated = openset.threshold == "calibrated"
        self._allocated = 0
        self._recognised: set[int] = set()
        self._seen = {name: deque[float](maxlen=size) for name, size in _RECENT.items()}

    def take(self, step: "Step") -> None:
        """Take in what a learner did."""
        self._allocated += step.new
        # Which of an untrained few masks is best says nothing about margins.
        if self._allocated <= LEAST_MASKS or step.mixed:
            return
        new = step.new or step.mask is None
        if new or step.mask not in self._recognised:
            self.observe(step.margin, new)
        if not new and step.mask is not None:
            self._recognised.add(step.mask)

    def observe(self, seen_margin: float, new: bool) -> None:
        """Take in a margin, and what was decided."""
        self._seen["new" if new else "known"].append(math.log(max(seen_margin - 1, 1e-12)))

    @property
    def epsilon(self) -> float:
        """The ε of the next decision."""
        known, new = self._distributions()
        if not (self._calibrated and known and new):
            return self._fixed
        between = (new.mean * known.stdev + known.mean * new.stdev) / _widths(known, new)
        return math.exp(between) if known.cdf(between) < _MOST_FALSE_ALARM else self._fixed

    @property
    def false_alarm(self) -> float:
        """The chance that known data is taken for new, as the margins so far have it; or nan."""
        known, _ = self._distributions()
        return known.cdf(math.log(self.epsilon)) if known else math.nan

    def _distributions(self) -> tuple[statistics.NormalDist | None, statistics.NormalDist | None]:
        known, new = (
            self._normal(self._seen[name]) if len(self._seen[name]) >= _ENOUGH else None
            for name in ("known", "new")
        )
        return known, new

    def _normal(self, values: Sequence[float]) -> statistics.NormalDist:
        centre = statistics.median(values)
        deviation = statistics.median(abs(value - centre) for value in values)
        return statistics.NormalDist(centre, max(1.4826 * deviation, _LEAST_WIDTH))


def _widths(known: statistics.NormalDist, new: statistics.NormalDist) -> float:
    return known.stdev + new.stdev


# --- the learner -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a learner did with a segment."""

    segment: int
    mask: int | None
    """The mask that the segment was given to. None: it is mixed, or no mask was left for it."""
    new: bool
    """Whether the mask was allocated for it."""
    mixed: bool
    """Whether its first and its last batch were decided differently."""
    margin: float
    epsilon: float
    decision_seconds: float
    packed_B: Packed | None = field(repr=False)
    """The mask as it is now; None if it didn't change."""
    state: MaskState | None = field(repr=False)
    """What its training goes on from; None if it didn't change, or can't be trained any more."""
    batches: int
    """Batches that the mask has been trained on."""


class OpenSetLearner:
    """Learns a stream, segment by segment."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        members: Members,
        trainer: Trainer,
        states: Callable[[int], MaskState | None],
        first_mask: int = 0,
    ) -> None:
        """Let the first masks take part, untrained.

        Args:
            config: resolved.
            data: the data set of the run.
            members: where masks are asked.
            trainer: where masks are trained.
            states: recalls what a mask's training goes on from, as the last step that changed it
                said.
            first_mask: the number under which this learner's mask 0 draws its initial scores.
        """
        self._config, self._data = config, data
        self._layers = layers_of(config, data)
        self._members, self._trainer, self._states = members, trainer, states
        self._first_mask = first_mask
        weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, self._layers)]
        depth = config.openset.depth
        self._superposition = Superposition(self._layers, weights, data.classes, depth)
        self._threshold = Threshold(config.openset)
        self._packed: list[Packed] = []
        self.allocated = 0
        for mask in range(LEAST_MASKS):
            self._put(mask, packed_mask(self._initial(mask), self._layers))

    def masks(self) -> Packed:
        """Return the allocated masks [K, bytes]."""
        return np.stack(self._packed[: self.allocated])

    def restore(self, steps: Iterable[Step], masks: Mapping[int, Packed]) -> None:
        """Become what a learner was after some steps.

        Args:
            steps: all of them, in order; their masks and states are not looked at.
            masks: every allocated mask as it was then.
        """
        for step in steps:
            self._note(step)
        for mask, packed_B in sorted(masks.items()):
            self._put(mask, packed_B)

    def learn(self, segment: Segment) -> Step:
        """Decide whose a segment is, and train that mask on it."""
        started = time.perf_counter()
        epsilon = self._threshold.epsilon
        scores_K = self._scores(segment)
        choice = decide(scores_K, self.allocated, epsilon)
        mixed = self._config.openset.look == "both" and choice != self._decided_last(segment)
        seconds = time.perf_counter() - started
        mask, new = (None, False) if mixed else self._placed(choice)
        changed = None if mask is None else self._train(mask, new, segment)
        step = Step(
            segment=segment.number,
            mask=mask,
            new=new,
            mixed=mixed,
            margin=margin(scores_K),
            epsilon=epsilon,
            decision_seconds=seconds,
            packed_B=packed_mask(changed, self._layers) if changed else None,
            state=changed if changed and self._goes_on(changed) else None,
            batches=changed.batches if changed else 0,
        )
        self._note(step)
        if step.mask is not None and step.packed_B is not None:
            self._put(step.mask, step.packed_B)
        return step

    def recognise(self, segment: Segment) -> Existing | New:
        """Decide whose a segment is, and learn nothing from it."""
        return decide(self._scores(segment), self.allocated, self._threshold.epsilon)

    def _decided_last(self, segment: Segment) -> Existing | New:
        """Decide by the last batch: a task may have ended in between."""
        last = dataclasses.replace(
            segment,
            images_NP=segment.images_NP[-segment.batch_size :],
            labels_N=segment.labels_N[-segment.batch_size :],
        )
        return self.recognise(last)

    def _scores(self, segment: Segment) -> Scores:
        images_BP, _ = next(segment.batches())
        factor_W = self._superposition.factor(self._normalised(images_BP), len(self._packed))
        return self._members.scores(factor_W)

    def _placed(self, choice: Existing | New) -> tuple[int | None, bool]:
        """Return the mask that data is given to, and whether it is a new one."""
        if isinstance(choice, Existing):
            return choice.mask, False
        if self.allocated < self._config.openset.budget:
            return self.allocated, True
        return None, False

    def _train(self, mask: int, new: bool, segment: Segment) -> MaskState | None:
        """Return the mask's state after the segment; None if it stays as it is."""
        number = self._first_mask + mask
        state = self._initial(mask) if new else self._states(mask)
        if state is None:
            return None
        if segment.begins_task:
            state = MaskState(
                scores_W=state.scores_W, square_avg_W=np.zeros_like(state.square_avg_W), batches=0
            )
        return self._trainer.train(number, segment, state)

    def _initial(self, mask: int) -> MaskState:
        return initial_state(self._config, self._layers, self._first_mask + mask)

    def _goes_on(self, state: MaskState) -> bool:
        """Say whether a mask's training can go on."""
        told = self._config.openset.boundaries == "told"
        return told or batches_left(self._config, state.batches) != 0

    def _note(self, step: Step) -> None:
        self.allocated += step.new
        self._threshold.take(step)

    def _put(self, mask: int, packed_B: Packed) -> None:
        if mask < len(self._packed):
            self._superposition.add(self._packed[mask], -1)
            self._packed[mask] = packed_B
        else:
            self._packed.append(packed_B)
        self._superposition.add(packed_B)
        self._members.put(mask, packed_B)

    def _normalised(self, images_BP: npt.NDArray[np.uint8]) -> Tensor:
        pixels = as_tensor(images_BP).float()
        return (pixels / self._data.scale - self._data.mean) / self._data.std
