"""What every engine trains on: a run's data, fixed weights and random streams.

Shapes: T tasks, N images, B images of a batch, P pixels, O outputs and I inputs of a layer.
"""

import functools
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.config import MLPS, RunConfig
from supsup.datasets import Dataset
from supsup.errors import ConfigError
from supsup.masking import draw_scores, make_masks, pack
from supsup.models import Layer, fixed_weights, make_layers
from supsup.nets import Net, make_module
from supsup.seeding import generator
from supsup.tasks import inverse, permutation, task_family

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
#: Test images that go through the network at once.
TEST_CHUNK = 1000
#: Training batches that come from elsewhere and are made ready together, at most.
BATCHES = 10
#: Threads that draw scores for a GPU, at most, and tasks whose scores are drawn together.
_DRAWERS, _DRAWN = 8, 32


def layers_of(config: RunConfig, data: Dataset) -> tuple[Layer, ...]:
    """Return the layers of the run's network over this data set.

    Raises:
        ConfigError: if the network has fewer outputs than a task has classes, there are fewer
            tasks than the run wants, or the network isn't made for such images.
    """
    size, classes = config.model.output_size, task_family(config, data).classes
    if size < classes:
        of = f"a task of {data.name}" if config.family == "split" else data.name
        raise ConfigError(
            f"model.output_size is {size}, must be at least {classes}, the classes of {of}"
        )
    if config.model.name in MLPS:
        return make_layers(config.model.name, data.pixels, size)
    return net_of(config, data).layers


def net_of(config: RunConfig, data: Dataset) -> Net:
    """Return the run's network over this data set, as a function of weights and statistics.

    Raises:
        ConfigError: if the network isn't made for such images.
    """
    module = make_module(config.model.name, data.shape, config.model.output_size)
    return Net(module, data.shape)


def statistics_of(config: RunConfig, data: Dataset) -> int:
    """Return how many statistics batch norm keeps of a task; 0 without batch norm."""
    return 0 if config.model.name in MLPS else net_of(config, data).statistics


def batch_indices(root: int, images: int, batch: int, batches: int) -> npt.NDArray[np.int64]:
    """Return the images [batches, B] of every batch: epochs in fresh orders, end to end."""
    needed = batch * batches
    epochs = [
        generator(root, "order", epoch).permutation(images) for epoch in range(-(-needed // images))
    ]
    return np.concatenate(epochs)[:needed].reshape(batches, batch)


def learning_rate(config: RunConfig, batch: int) -> float:
    """Return the rate at a batch of a task, counted from 0."""
    part = batch / config.train.batches
    falling = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}
    return config.train.learning_rate * falling[config.train.schedule]


def learning_rates(config: RunConfig) -> Tensor:
    """Return the rate at every batch, float64 [batches]."""
    count = config.train.batches
    rates = (learning_rate(config, batch) for batch in range(count))
    return torch.from_numpy(np.fromiter(rates, np.float64, count))


def as_tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """Return a tensor on the same memory, never to be written to."""
    with warnings.catch_warnings():
        # Arrays from an object store are read-only.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class Material:
    """Data, fixed weights, the order of the batches, and where tasks start from."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Generate the fixed weights.

        Args:
            config: with precision and device resolved.
            data: the data set of the run; its arrays may be read-only.
        """
        self.config, self.data = config, data
        self.device = torch.device(config.train.device)
        self.dtype = DTYPES[config.train.precision]
        self.layers = layers_of(config, data)
        self.family = task_family(config, data)
        # The general engine permutes images, the others weights.
        self._permuted = config.train.engine != "general"
        self.weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, self.layers)]
        self.order = torch.from_numpy(self.batches(len(data.train_images))).to(self.device)

    def batches(self, images: int) -> npt.NDArray[np.int64]:
        """Return the images [batches, B] of every batch of a task that has so many."""
        train = self.config.train
        return batch_indices(self.config.seed, images, train.batch_size, train.batches)

    def on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Return an array as a tensor on the device, on the CPU without a copy."""
        return as_tensor(array).to(self.device)

    def normalised(self, images_BP: Tensor) -> Tensor:
        """Return pixels as they enter the network, in the training precision."""
        if images_BP.dtype == self.dtype:
            return images_BP
        data = self.data
        parts = [
            ((part.float() / data.scale - data.mean) / data.std).to(self.dtype)
            for part in torch.split(images_BP, TEST_CHUNK)
        ]
        return torch.cat(parts)

    def initial_state(self, tasks: range) -> tuple[list[Tensor], list[Tensor]]:
        """Return fixed weights and initial scores [T, O, I] per layer.

        Where the engine permutes weights, the columns of the first layer are in each task's pixel
        order, so that they meet images whose pixels are not permuted.
        """
        weights = [
            weight_OI.to(self.device).expand(len(tasks), -1, -1) for weight_OI in self.weights
        ]
        scores = [self._initial_scores(tasks, layer) for layer in self.layers]
        if not self._permuted:
            return weights, scores
        undone_TI = self._places([inverse(order) for order in self._orders(tasks)])
        return [_columns(weights[0], undone_TI), *weights[1:]], [
            _columns(scores[0], undone_TI),
            *scores[1:],
        ]

    def packed_masks(self, tasks: range, scores: Sequence[Tensor]) -> npt.NDArray[np.uint8]:
        """Return the masks [T, bytes] of trained scores, in the order of the fixed weights."""
        first, *rest = make_masks(self.config.mask, self.layers, scores)
        if self._permuted:
            first = _columns(first, self._places(self._orders(tasks)))
        return pack([first, *rest])

    def _initial_scores(self, tasks: range, layer: Layer) -> Tensor:
        """Return the scores [T, O, I] that a layer's training starts from, on the device."""
        shape = len(tasks), layer.outputs, layer.inputs
        scores_TOI = torch.empty(shape, device=self.device)
        if self.device.type == "cpu":
            for task, scores_OI in zip(tasks, scores_TOI.numpy(), strict=True):
                draw_scores(self.config.seed, task, layer, scores_OI)
            return scores_TOI
        # A GPU would wait for one core longer than it trains.
        with ThreadPoolExecutor(min(_DRAWERS, len(os.sched_getaffinity(0)))) as pool:
            for start in range(0, len(tasks), _DRAWN):
                part = slice(start, start + _DRAWN)
                drawn_KOI = torch.empty(len(tasks[part]), *shape[1:], pin_memory=True)
                draw = functools.partial(draw_scores, self.config.seed)
                layers = itertools.repeat(layer)
                list(pool.map(draw, tasks[part], layers, drawn_KOI.numpy()))
                scores_TOI[part].copy_(drawn_KOI, non_blocking=True)
        return scores_TOI

    def _places(self, orders: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """Return orders of pixels [T, I] on the device."""
        return torch.from_numpy(np.stack(orders)).to(self.device)

    def _orders(self, tasks: range) -> list[npt.NDArray[np.int64]]:
        pixels = self.layers[0].inputs
        return [permutation(self.config.seed, task, pixels) for task in tasks]


def _columns(matrices_TOI: Tensor, places_TI: Tensor) -> Tensor:
    """Reorder the columns of each task's matrix by the task's order."""
    return matrices_TOI.gather(2, places_TI[:, None].expand(matrices_TOI.shape))
