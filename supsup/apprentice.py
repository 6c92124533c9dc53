"""Training one mask of an open-set learner, a segment of the stream at a time.

Between segments a mask is its ``MaskState``: training that stops, and goes on later or elsewhere,
is the same as training that never stopped.

Shapes: W weights of all layers, end to end; B images of a batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from supsup.config import RunConfig
from supsup.datasets import Dataset, Images, Labels
from supsup.errors import NonFiniteLoss
from supsup.masking import initial_scores, pack
from supsup.material import Material, as_tensor
from supsup.members import Packed, Scores
from supsup.models import Layer
from supsup.streams import Segment
from supsup.train import RESUMABLE_ENGINES

Item = TypeVar("Item")


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

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """See ``Trainer``. The rate goes by the batches that the mask itself has been trained on.

        Raises:
            NonFiniteLoss: if the loss of the last batch is not finite.
        """
        left = batches_left(self._config, state.batches)
        group = self._engine.resume(
            self._weights, *map(self._by_layer, (state.scores_W, state.square_avg_W))
        )
        done = state.batches
        for batch in _one_ahead(self._prepared, itertools.islice(segment.batches(), left)):
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

    def _prepared(self, batch: tuple[Images, Labels]) -> Any:
        images_BP, labels_B = batch
        return self._engine.batch(as_tensor(images_BP), as_tensor(labels_B))

    def _by_layer(self, flat_W: Scores) -> list[Tensor]:
        layers = self._material.layers
        parts = torch.split(as_tensor(flat_W), [layer.weights for layer in layers])
        return [
            part.view(1, layer.outputs, layer.inputs)
            for part, layer in zip(parts, layers, strict=True)
        ]


def _one_ahead(prepare: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[Any]:
    """Yield what is made of some items, each made while the one before is worked with."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Any] | None = None
        for item in items:
            ready, coming = coming, pool.submit(prepare, item)
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
