"""The sparse engine: the first layer over the pixels that are not background.

Four of five pixels of a handwritten digit are background, where a normalised image ``s v + c`` (of
bytes ``v``) is the constant ``c``. The background's part of the first layer is ``c`` times the sum
of the masked weights; only the other pixels need products. Forward, gradient and score update of
that layer are C++ kernels: in bf16 for CPUs with AVX512-BF16 (sparse.cpp), in fp32 for those with
AVX2 (sparse_avx2.cpp); the gradient never leaves the registers. The other layers are those of the
dense engine. Exact but for rounding: bytes are exact in bf16, and in fp32 the first layer's
products are whole numbers, so they are rounded less than the dense engine's.

Shapes: T tasks, B images of a batch, P pixels, Q pairs of pixels, O outputs of the first layer, V
tiles of 32 outputs.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from supsup import native
from supsup.datasets import Dataset
from supsup.dense import CPU_TASKS, DenseLayers
from supsup.errors import ConfigError
from supsup.material import BATCHES, TEST_CHUNK, Material, learning_rate

#: Below this fraction of pixels that are not background the kernels are faster than products.
_DENSE_FRACTION = 0.35
_TILE = 32
#: Pixels that the kernels can number: pairs of them in 16 bits.
MOST_PIXELS = 2 << 16
#: The kernels of each precision.
KERNELS = {"bf16": "sparse", "fp32": "sparse_avx2"}


def sparse_precisions() -> tuple[str, ...]:
    """Return the precisions in which this machine has the kernels; compiles them at first."""
    return tuple(p for p, name in KERNELS.items() if native.load(name) is not None)


def mostly_background(data: Dataset) -> bool:
    """Say whether the kernels can skip background, and there is so much of it that it pays."""
    if data.pixels > MOST_PIXELS:
        return False
    return bool((data.train_images != 0).mean() < _DENSE_FRACTION)


@dataclass(frozen=True)
class _Pixels:
    """The pixels of some images that are not background, in pairs by image and one by one."""

    images: int
    row_start: Tensor
    row_pair: Tensor
    row_value: Tensor
    column_start: Tensor
    column_image: Tensor
    column_value: Tensor

    def rows(self) -> tuple[ctypes.c_void_p, ...]:
        return tuple(map(native.pointer, (self.row_start, self.row_pair, self.row_value)))

    def columns(self) -> tuple[ctypes.c_void_p, ...]:
        columns = (self.column_start, self.column_image, self.column_value)
        return tuple(map(native.pointer, columns))


#: The pixels of some images, and their labels [B].
Batch = tuple[_Pixels, Tensor]


class SparseEngine:
    """Trains tasks together, the first layer over pixels that are not background."""

    def __init__(self, material: Material) -> None:
        """List the pixels of the test images.

        Raises:
            ConfigError: if the images have more pixels than the kernels can number.
            RuntimeError: if the kernels can't be had on this machine.
        """
        if material.data.pixels > MOST_PIXELS:
            raise ConfigError(
                f"train.engine is sparse, which is made for images of {MOST_PIXELS} pixels at most "
                f"and not of {material.data.pixels}; set it to dense"
            )
        precision = material.config.train.precision
        kernels = native.load(KERNELS[precision])
        if kernels is None:
            needs = {"bf16": "AVX512-BF16", "fp32": "AVX2 with FMA"}[precision]
            raise RuntimeError(
                f"train.engine is sparse and train.precision {precision}, but this machine lacks "
                f"{needs} or a C++ compiler; give every node the same, or set train.engine to dense"
            )
        self.kernels = kernels
        self.material = material
        data = material.data
        self._images = material.on_device(data.train_images)
        self._labels = material.on_device(data.train_labels)
        self._batch = self._room(material.config.train.batch_size)
        images_NP, labels_N = material.on_device(data.test_images), data.test_labels
        self._test = []
        for start in range(0, len(labels_N), TEST_CHUNK):
            chunk = slice(start, start + TEST_CHUNK)
            pixels = self._room(len(images_NP[chunk]))
            self._list(images_NP[chunk], pixels)
            self._test.append((_trimmed(pixels[0]), material.on_device(labels_N[chunk])))

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most."""
        return CPU_TASKS

    def begin(self, tasks: range) -> "SparseGroup":
        """Return the state of some tasks, untrained."""
        return SparseGroup(self, *self.material.initial_state(tasks))

    def resume(
        self, weights: Sequence[Tensor], scores: Sequence[Tensor], square_avgs: Sequence[Tensor]
    ) -> "SparseGroup":
        """Return masks in training, from weights and state [T, O, I] per layer."""
        return SparseGroup(self, weights, scores, square_avgs)

    def training_batch(self, number: int) -> Batch:
        """Return a batch of the run's own order, for ``learn``; good until the next batch."""
        indices_B = self.material.order[number]
        self._list(self._images.index_select(0, indices_B), self._batch)
        return self._batch[0], self._labels.index_select(0, indices_B)

    def batches(self, images_NP: Tensor, y_N: Tensor) -> Sequence[Batch]:
        """Return the pixels and labels [B] of ``BATCHES`` at most; good until the second next."""
        room, size = next(self._rooms), self.material.config.train.batch_size
        self._list(images_NP, room)
        return list(zip(room, torch.split(y_N, size), strict=False))

    def test_batches(self) -> Sequence[tuple[_Pixels, Tensor]]:
        """Return the pixels of the test images, and their labels [B], in order."""
        return self._test

    def update(self, layers: DenseLayers, rate: float) -> None:
        """Update the scores of dense layers."""
        train = self.material.config.train
        buffers = (layers.grad, layers.weights, layers.scores, layers.square_avg, layers.masked)
        self.kernels.update_scores(
            *map(native.pointer, buffers),
            ctypes.c_int64(len(layers.scores)),
            *map(ctypes.c_float, (rate, train.alpha, train.epsilon, train.batch_size)),
        )

    @cached_property
    def _rooms(self) -> Iterator[Sequence[_Pixels]]:
        """Room for the batches that are learned from, and for those that come next, in turn."""
        size = self.material.config.train.batch_size
        return itertools.cycle([self._room(size, BATCHES), self._room(size, BATCHES)])

    def _room(self, images: int, batches: int = 1) -> Sequence[_Pixels]:
        """Return room for the pixels of that many batches; the lists of a kind lie end to end."""
        pixels = self.material.layers[0].inputs
        pairs = (pixels + 1) // 2

        def room(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batches, size, dtype=dtype)

        lists = (
            room(images + 1, torch.int32),
            room(images * pairs, torch.uint16),
            room(images * pairs, torch.uint32),
            room(2 * pairs + 1, torch.int32),
            room(images * pixels, torch.uint16),
            room(images * pixels, torch.float32),
        )
        return [_Pixels(images, *of_batch) for of_batch in zip(*lists, strict=True)]

    def _list(self, images_NP: Tensor, room: Sequence[_Pixels]) -> None:
        """Fill in the pixels of some images, whole batches of them."""
        images_NP, first = images_NP.contiguous(), room[0]
        self.kernels.list_pixels(
            native.pointer(images_NP),
            *map(ctypes.c_int64, (len(images_NP) // first.images, first.images)),
            ctypes.c_int64(images_NP.shape[1]),
            *first.rows(),
            *first.columns(),
        )


def _trimmed(pixels: _Pixels) -> _Pixels:
    """Keep what a forward pass needs."""
    none, pairs = torch.empty(0), int(pixels.row_start[-1])
    rows = (pixels.row_start, pixels.row_pair[:pairs].clone(), pixels.row_value[:pairs].clone())
    return _Pixels(pixels.images, *rows, none, none, none)


class SparseGroup:
    """Tasks in training together, their first layers sparse."""

    def __init__(
        self,
        engine: SparseEngine,
        weights: Sequence[Tensor],
        scores: Sequence[Tensor],
        square_avgs: Sequence[Tensor] | None = None,
    ) -> None:
        """Start from weights and scores [T, O, I] per layer; without mean squares, from zero."""
        self._engine, self._tasks = engine, len(scores[0])
        material = engine.material
        square_avgs = square_avgs or [torch.zeros_like(layer_TOI) for layer_TOI in scores]
        self._first = [
            _FirstLayer(engine, *matrices)
            for matrices in zip(weights[0], scores[0], square_avgs[0], strict=True)
        ]
        self.layers = DenseLayers(material, weights[1:], scores[1:], square_avgs[1:])
        batch = material.config.train.batch_size
        self._outputs = self.layers.activations(batch)
        self._hidden, self._delta = self._room(batch), self._room(batch)

    def step(self, number: int) -> None:
        """Train all tasks on a batch of the run's own order."""
        self.learn(self._engine.training_batch(number), number)

    def learn(self, batch: Batch, number: int) -> None:
        """Train all tasks on a batch, as their ``number``-th."""
        pixels, y_B = batch
        acts = self._forward(pixels, self._hidden, self._outputs)
        delta = self.layers.backward(acts, y_B)
        self.layers.propagate(delta, 0, self._delta)
        rate = learning_rate(self._engine.material.config, number)
        for first, hidden_BO, delta_BO in zip(self._first, self._hidden, self._delta, strict=True):
            first.update(pixels, hidden_BO, delta_BO, rate)
        self._engine.update(self.layers, rate)

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of a training batch as the masks are, and its labels [B]."""
        pixels, y_B = self._engine.training_batch(number)
        return self._forward(pixels, self._hidden, self._outputs)[-1], y_B

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [B], in order."""
        outputs = self.layers.activations(TEST_CHUNK)
        for pixels, y_B in self._engine.test_batches():
            yield self._forward(pixels, self._room(pixels.images), outputs)[-1], y_B

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""
        first_TOI = torch.stack([first.scores_OI() for first in self._first])
        return [first_TOI, *self.layers.by_layer(self.layers.scores)]

    def square_avgs(self) -> list[Tensor]:
        """Return RMSprop's mean squares [T, O, I] per layer."""
        first_TOI = torch.stack([first.square_avg_OI() for first in self._first])
        return [first_TOI, *self.layers.by_layer(self.layers.square_avg)]

    def _room(self, images: int) -> Tensor:
        material = self._engine.material
        shape = (self._tasks, images, material.layers[0].outputs)
        return torch.empty(shape, dtype=material.dtype)

    def _forward(
        self, pixels: _Pixels, hidden_TBO: Tensor, outputs: Sequence[Tensor]
    ) -> list[Tensor]:
        for first, hidden_BO in zip(self._first, hidden_TBO, strict=True):
            first.forward(pixels, hidden_BO)
        return self.layers.forward(hidden_TBO, outputs)


class _FirstLayer:
    """The first layer of one task: buffers in tiles [V, P, 32], as the kernels want them."""

    def __init__(
        self, engine: SparseEngine, weight_OI: Tensor, score_OI: Tensor, square_avg_OI: Tensor
    ) -> None:
        material = engine.material
        self._kernels = engine.kernels
        self._shape = weight_OI.shape
        # Weights are ±c. The kernels of fp32 take signs, and c with the pixels.
        in_bf16 = material.dtype == torch.bfloat16
        unit = 1.0 if in_bf16 else float(weight_OI.abs().max())
        self._weights = _tiles(weight_OI / unit).to(torch.bfloat16 if in_bf16 else torch.int8)
        self._scores = _tiles(score_OI)
        self._square_avg = _tiles(square_avg_OI)
        masked_VPK = torch.where(self._scores >= 0, self._weights, 0)
        # Both pixels of a pair side by side: [V, Q, 32, 2].
        self._masked = masked_VPK.view(len(masked_VPK), -1, 2, _TILE).transpose(2, 3).contiguous()
        self._sum = masked_VPK.float().sum(1).view(-1)
        data, train = material.data, material.config.train
        slope, background = 1 / (data.scale * data.std), -data.mean / data.std
        self._affine = tuple(map(ctypes.c_float, (unit * slope, unit * background)))
        self._smoothing = tuple(map(ctypes.c_float, (train.alpha, train.epsilon)))
        self._scratch = _aligned(_TILE * train.batch_size)

    def forward(self, pixels: _Pixels, hidden_BO: Tensor) -> None:
        """Write the layer's output, after the ReLU."""
        self._kernels.first_layer_forward(
            *pixels.rows(),
            *map(native.pointer, (self._masked, self._sum)),
            *self._affine,
            *map(ctypes.c_int64, (pixels.images, self._shape[1], self._shape[0])),
            native.pointer(hidden_BO),
        )

    def update(self, pixels: _Pixels, hidden_BO: Tensor, delta_BO: Tensor, rate: float) -> None:
        """Update the scores, given the output and the gradient of the summed loss at it."""
        buffers = (
            delta_BO, hidden_BO, self._weights, self._scores, self._square_avg, self._masked,
            self._sum,
        )  # fmt: skip
        self._kernels.first_layer_update(
            *pixels.columns(),
            *map(native.pointer, buffers),
            *self._affine,
            *map(ctypes.c_int64, (pixels.images, self._shape[1], self._shape[0])),
            ctypes.c_float(rate),
            *self._smoothing,
            native.pointer(self._scratch),
        )

    def scores_OI(self) -> Tensor:
        """Return the scores [O, I]."""
        return self._matrix(self._scores)

    def square_avg_OI(self) -> Tensor:
        """Return the mean squares [O, I]."""
        return self._matrix(self._square_avg)

    def _matrix(self, tiles: Tensor) -> Tensor:
        outputs, inputs = self._shape
        return tiles[:, :inputs].transpose(1, 2).reshape(-1, inputs)[:outputs]


def _tiles(matrix_OI: Tensor) -> Tensor:
    """Cut a matrix into tiles [V, I, 32] of 32 outputs; zeros fill it up, inputs to a pair."""
    outputs, inputs = matrix_OI.shape
    padded = torch.nn.functional.pad(matrix_OI, (0, inputs % 2, 0, -outputs % _TILE))
    return padded.view(-1, _TILE, padded.shape[1]).transpose(1, 2).contiguous()


def _aligned(size: int) -> Tensor:
    """Return room for that many floats that starts on a cache line."""
    room = torch.empty(size + 16)
    return room[-(room.data_ptr() // 4) % 16 :][:size]
