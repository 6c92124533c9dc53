"""Open set: training with no task identity (scenario NNs; paper, Sections 3.4 and 4.3).

Every so many batches the learner looks at one batch: if no mask lowers the entropy of the
superposition's output clearly faster than the others, nobody knows this data, and a new mask is
allocated; else the best one is trained on. With ν the softmax of ``-∇_α H`` over k masks, data is
new where

    k · max ν < 1 + ε.

Before five masks are allocated, five take part: the rest are masks as they will be at the start of
their training.

The learner is one loop; where the masks are asked and trained is up to two small interfaces
(``Members``, ``Trainer``), so that the same loop runs over Ray workers.

Shapes: K masks that take part, O outputs and I inputs of a layer, W numbers per weight, N images
of a segment, B images of a batch, P pixels.
"""

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.config import OpenSetConfig, RunConfig
from supsup.datasets import Dataset
from supsup.errors import NonFiniteLoss
from supsup.inference import fill_factors, superposed
from supsup.masking import initial_scores, mask_bytes, pack
from supsup.material import as_tensor, layers_of
from supsup.models import Layer, fixed_weights
from supsup.packed import packed_masks
from supsup.streams import Segment
from supsup.train import BlockTrainer

#: Masks that take part in a decision at least (paper, Section 4.3).
LEAST_MASKS = 5
#: Masks whose gradients are computed together; shards of a bank consist of whole pages.
PAGE = 64
#: Recent decisions of each kind that calibrate ε, and how many there must be.
_RECENT: Mapping[str, int] = {"known": 256, "new": 64}
_ENOUGH = 8
#: Below this width in ln(margin - 1) a few equal margins would make ε certain of itself.
_LEAST_WIDTH = 0.02

Packed = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]


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

    Calibrated: ``ln(margin - 1)`` of recent recognitions and of recent allocations are each taken
    as normal, centre and width by median and median absolute deviation; ε lies as many widths
    below the one as above the other, so that both errors are equally likely. The chance is
    ``false_alarm``. Until there are enough of both, ε is the fixed one.
    """

    def __init__(self, openset: OpenSetConfig) -> None:
        """Begin with no decision seen."""
        self._fixed = openset.epsilon
        self._calibrated = openset.threshold == "calibrated"
        self._seen = {name: deque[float](maxlen=size) for name, size in _RECENT.items()}

    def observe(self, seen_margin: float, new: bool) -> None:
        """Take in a decision."""
        self._seen["new" if new else "known"].append(math.log(max(seen_margin - 1, 1e-12)))

    @property
    def epsilon(self) -> float:
        """The ε of the next decision."""
        known, new = self._distributions()
        if not (self._calibrated and known and new):
            return self._fixed
        return math.exp((new.mean * known.stdev + known.mean * new.stdev) / _widths(known, new))

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


# --- the masks -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MaskState:
    """A mask in training: all that its training depends on."""

    scores_W: Scores
    """Scores of all layers, end to end."""
    square_avg_W: Scores
    batches: int
    """Batches trained so far."""


class Members(Protocol):
    """The masks that take part in decisions."""

    def put(self, mask: int, packed_B: Packed) -> None:
        """Add the next mask, or replace one."""

    def scores(self, factor_W: Tensor) -> Scores:
        """Return, for each mask, minus the sum of the numbers of the bits that are set [K]."""


class Trainer(Protocol):
    """What trains the masks."""

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """Train a mask on a segment."""


class LocalMembers:
    """Masks in this process, in pages of ``PAGE``: a bank's, or a shard of one."""

    def __init__(self, layers: Sequence[Layer], weights: Sequence[Tensor]) -> None:
        """Begin empty."""
        self._layers, self._weights = layers, weights
        self._pages: list[Packed] = []
        self._count = 0
        self._page_of_tasks = torch.arange(PAGE)

    def put(self, mask: int, packed_B: Packed) -> None:
        """See ``Members``."""
        page, row = divmod(mask, PAGE)
        if page == len(self._pages):
            self._pages.append(np.zeros((PAGE, mask_bytes(self._layers)), np.uint8))
        self._pages[page][row] = packed_B
        self._count = max(self._count, mask + 1)

    def scores(self, factor_W: Tensor) -> Scores:
        """See ``Members``. A page is always computed whole, so that any sharding gives equal bits.

        Args:
            factor_W: numbers per weight, padded as ``packed_masks`` wants them.
        """
        sums = [
            packed_masks(torch.from_numpy(page), self._weights, self._layers).sums_of(
                factor_W, self._page_of_tasks
            )
            for page in self._pages
        ]
        scores_K: Scores = -torch.cat(sums)[: self._count].numpy()
        return scores_K


class LocalTrainer:
    """Trains masks in this process, one at a time, on images as they come."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Generate the weights.

        Args:
            config: with precision, device and engine resolved.
            data: the data set of the run.
        """
        self._config = config
        self._blocks = BlockTrainer(config, data)
        self._material = self._blocks.material
        self._weights = [weight_OI[None] for weight_OI in self._material.weights]

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """See ``Trainer``. The rate goes by the batches that the mask itself has been trained on.

        Raises:
            NonFiniteLoss: if the loss of the last batch is not finite.
        """
        left = batches_left(self._config, state.batches)
        group = self._blocks.engine.resume(
            self._weights, *map(self._by_layer, (state.scores_W, state.square_avg_W))
        )
        done = state.batches
        for images_BP, labels_B in itertools.islice(segment.batches(), left):
            batch = self._blocks.engine.batch(as_tensor(images_BP), as_tensor(labels_B))
            group.learn(batch, done)
            done += 1
        scores_W, square_avg_W = (
            torch.cat([layer_TOI.flatten() for layer_TOI in layers]).cpu().numpy()
            for layers in (group.scores(), group.square_avgs())
        )
        if not np.isfinite(scores_W).all():
            raise NonFiniteLoss(
                f"mask {mask}: the scores are not finite; lower train.learning_rate"
            )
        return MaskState(scores_W=scores_W, square_avg_W=square_avg_W, batches=done)

    def _by_layer(self, flat_W: Scores) -> list[Tensor]:
        layers = self._material.layers
        parts = torch.split(as_tensor(flat_W), [layer.weights for layer in layers])
        return [
            part.view(1, layer.outputs, layer.inputs)
            for part, layer in zip(parts, layers, strict=True)
        ]


def initial_state(config: RunConfig, layers: Sequence[Layer], mask: int) -> MaskState:
    """Return the state that a mask starts from."""
    scores = [initial_scores(config.seed, mask, layer).ravel() for layer in layers]
    scores_W = np.concatenate(scores)
    return MaskState(scores_W=scores_W, square_avg_W=np.zeros_like(scores_W), batches=0)


def batches_left(config: RunConfig, batches: int) -> int | None:
    """Return how many batches a mask can still be trained on; None: without end.

    A rate that falls to 0 after ``train.batches`` leaves a mask as it is from there on.
    """
    if config.train.schedule == "constant":
        return None
    return max(0, config.train.batches - batches)


def packed_mask(state: MaskState, layers: Sequence[Layer]) -> Packed:
    """Return the packed mask [bytes] of a state's scores."""
    parts = np.split(state.scores_W, np.cumsum([layer.weights for layer in layers])[:-1])
    masks = [torch.from_numpy(part >= 0).view(1, -1) for part in parts]
    packed_B: Packed = pack(masks)[0]
    return packed_B


class Superposition:
    """The sum of the masks that take part, kept up to date mask by mask; exact, for it counts."""

    def __init__(self, layers: Sequence[Layer], weights: Sequence[Tensor], classes: int) -> None:
        """Begin empty."""
        # Any packed mask tells how vectors of numbers per weight are laid out.
        none = torch.zeros(1, mask_bytes(layers), dtype=torch.uint8)
        self._masks = packed_masks(none, weights, layers)
        self._classes = classes
        self._counts_1W = self._masks.vectors(1)
        self._factor_1W = self._masks.vectors(1)
        self._bits = self._masks.bits

    def add(self, packed_B: Packed, times: int = 1) -> None:
        """Add a mask, or take one away."""
        bits = np.unpackbits(packed_B, bitorder="little")
        self._counts_1W[0, : self._bits].add_(torch.from_numpy(bits), alpha=times)

    def factor(self, images_BP: Tensor, masks: int) -> Tensor:
        """Return ``δ xᵀ ⊙ W`` [W] of entropy over a batch at ``α = 1 / masks``.

        The gradient with respect to ``α_i`` is its sum over the bits of mask i. Good until the
        next call.
        """
        weights = superposed(self._masks, self._counts_1W / masks)
        fill_factors(self._masks, self._factor_1W, weights, images_BP[None], "h", self._classes)
        return self._factor_1W[0]


# --- the learner -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a learner did with a segment."""

    segment: int
    mask: int | None
    """The mask that the segment was given to; None: it looked new, and no mask was left."""
    new: bool
    """Whether the mask was allocated for it."""
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
        self._superposition = Superposition(self._layers, weights, data.classes)
        self._threshold = Threshold(config.openset)
        self._packed: list[Packed] = []
        self.allocated = 0
        for mask in range(LEAST_MASKS):
            self._put(mask, packed_mask(self._initial(mask), self._layers))

    @property
    def threshold(self) -> Threshold:
        """The rule's ε as it is now."""
        return self._threshold

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
        seconds = time.perf_counter() - started
        mask, new = self._placed(choice)
        changed = None if mask is None else self._train(mask, new, segment)
        step = Step(
            segment=segment.number,
            mask=mask,
            new=new,
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
        # Which of an untrained few masks is best says nothing about margins.
        if self.allocated > LEAST_MASKS:
            self._threshold.observe(step.margin, step.new or step.mask is None)

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
