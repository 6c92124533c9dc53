"""Training one mask of an open-set learner, a segment of the stream at a time.

Between segments a mask is its ``MaskState``: training that stops, and goes on later or elsewhere,
is the same as training that never stopped.

Shapes: W weights of all layers, end to end; B images of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.errors import NonFiniteLoss
from supsup.masking import initial_scores, pack
from supsup.material import BATCHES, Material, as_tensor
from supsup.members import Packed, Scores
from supsup.models import Layer
from supsup.streams import Segment
from supsup.train import RESUMABLE_ENGINES, LearningGroup


@dataclass(frozen=True, kw_only=True)
class MaskState:
    """A mask in training: all that its training depends on."""

    scores_W: Scores
    """Scores of all layers, end to end."""
    square_avg_W: Scores
    batches: int
    """Batches trained so far."""


class Trainer(Protocol):
    """What trains the masks."""

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """Train a mask on a segment."""


class LocalTrainer:
    """Trains masks in this process, one at a time, on images as they come."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Generate the weights.

        Args:
            config: with precision, device and engine resolved.
            data: the data set of the run.
        """
        self._config = config
        self._material = Material(config, data)
        self._engine = RESUMABLE_ENGINES[config.train.engine](self._material)
        self._weights = [weight_OI[None] for weight_OI in self._material.weights]
        self._group: tuple[MaskState, LearningGroup] | None = None

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """See ``Trainer``. The rate goes by the batches that the mask itself has been trained on.

        Raises:
            NonFiniteLoss: if the scores are not finite at the end.
        """
        left = batches_left(self._config, state.batches)
        # Let go before it is trained: if that fails, it is the state of nothing.
        group, self._group = self._resumed(state), None
        done = state.batches
        for batches in _one_ahead(self._engine.batches, self._parts(segment, left)):
            for batch in batches:
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
        trained = MaskState(scores_W=scores_W, square_avg_W=square_avg_W, batches=done)
        self._group = trained, group
        return trained

    def _resumed(self, state: MaskState) -> LearningGroup:
        """Return a mask in training; mostly it is the one that was trained last."""
        if self._group is not None:
            last, group = self._group
            if all(
                np.array_equal(mine_W, last_W)
                for mine_W, last_W in (
                    (state.scores_W, last.scores_W),
                    (state.square_avg_W, last.square_avg_W),
                )
            ):
                return group
        scores, square_avgs = map(self._by_layer, (state.scores_W, state.square_avg_W))
        return self._engine.resume(self._weights, scores, square_avgs)

    def _parts(self, segment: Segment, batches: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of the first batches of a segment, some batches at a time."""
        count = len(segment.labels_N)
        if batches is not None:
            count = min(count, batches * segment.batch_size)
        step = BATCHES * segment.batch_size
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield as_tensor(segment.images_NP[part]), as_tensor(segment.labels_N[part])

    def _by_layer(self, flat_W: Scores) -> list[Tensor]:
        layers = self._material.layers
        parts = torch.split(as_tensor(flat_W), [layer.weights for layer in layers])
        return [
            part.view(1, layer.outputs, layer.inputs)
            for part, layer in zip(parts, layers, strict=True)
        ]


def _one_ahead(
    prepare: Callable[[Tensor, Tensor], Sequence[Any]], parts: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[Sequence[Any]]:
    """Yield what is made of some parts, each made while the one before is worked with."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Sequence[Any]] | None = None
        for part in parts:
            ready, coming = coming, pool.submit(prepare, *part)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


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
