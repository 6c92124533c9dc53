"""The fused engine: permuted tasks of an MLP on a GPU, a handful of Triton kernels per step.

A weight's gradient is used where it is computed: the kernel that adds it up over the batch updates
the score by RMSprop, and writes the new masked weight. What a step moves is then about the state
itself, which bounds it: 22 bytes per weight in bf16. Images are shared by the tasks as in
supsup.dense.

A task's masks don't depend on which tasks share a launch; matrix products of a library do, for it
chooses its kernels by their number.

Shapes: T tasks, B images of a batch, P pixels, O outputs and I inputs of a layer, S output neurons.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from supsup.feed import Batch, Feed
from supsup.gpu import Recording, Replayed, free_memory
from supsup.material import TEST_CHUNK, Material, learning_rates

#: What rows of numbers are made a multiple of, so that they are read 32 bytes at a time or more.
PADDING = 16
#: The part of a GPU's free memory that tasks trained together may take.
_GPU_PART = 0.8
#: Compute capability from which on the tensor cores multiply bf16.
_CAPABLE = (8, 0)
#: Products are added unrounded; Triton's default changes between versions, and masks with it.
_ROUNDING = {"enable_fp_fusion": True}


class _Tile(NamedTuple):
    """What a program of a kernel has: images, outputs and inputs, and warps to work on them."""

    images: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def meta(self) -> dict[str, int]:
        """Return what a launch is told."""
        return {
            "IMAGES": self.images, "OUTPUTS": self.outputs, "INPUTS": self.inputs,
            "num_warps": self.warps, "num_stages": self.stages, **_ROUNDING,
        }  # fmt: skip


#: Tiles per kernel, by the bytes of a number. No kernel spills registers: of the update's tiles,
#: 64 x 128 weights by 4 warps did, and took twice the time.
_TILES = {
    2: {
        "forward": _Tile(128, 64, 64, 4, 3),
        "propagate": _Tile(128, 64, 64, 4, 3),
        "update": _Tile(128, 64, 64, 8, 2),
    },
    4: {
        "forward": _Tile(64, 64, 32, 4, 3),
        "propagate": _Tile(64, 32, 64, 4, 3),
        "update": _Tile(32, 64, 64, 8, 2),
    },
}


def fused_kernels_here() -> bool:
    """Say whether this machine has a GPU and what Triton needs to compile its kernels."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _CAPABLE:
        return False
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return (
        importlib.util.find_spec("triton") is not None
        and headers.exists()
        and any(shutil.which(name) for name in compilers if name)
    )


class FusedEngine:
    """Trains tasks together on a GPU."""

    def __init__(self, material: Material) -> None:
        """Move the data to the device.

        Raises:
            RuntimeError: if Triton isn't installed.
        """
        self.material = material
        self.kernels = _kernels()
        self.feed = Feed(material, PADDING)
        self.tiles = _TILES[material.dtype.itemsize]
        self.recording = Recording(allocates=False)
        self.rates = learning_rates(material.config).to(material.device, torch.float32)

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most."""
        material = self.material
        free = free_memory(material.device)
        size, batch = material.dtype.itemsize, material.config.train.batch_size
        # Beside scores, mean squares and both kinds of weights: scores as they are drawn.
        weights = sum(layer.weights for layer in material.layers) * (2 * size + 4 * 4)
        neurons = sum(layer.outputs for layer in material.layers) * size * (2 * batch + TEST_CHUNK)
        return max(1, int(_GPU_PART * free) // (weights + neurons))

    def begin(self, tasks: range) -> "FusedGroup":
        """Return the state of some tasks, untrained."""
        return FusedGroup(self, *self.material.initial_state(tasks))

    def resume(
        self, weights: Sequence[Tensor], scores: Sequence[Tensor], square_avgs: Sequence[Tensor]
    ) -> "FusedGroup":
        """Return masks in training, from weights and state [T, O, I] per layer."""
        return FusedGroup(self, weights, scores, square_avgs)

    def batches(self, images_NP: Tensor, y_N: Tensor) -> Sequence[Batch]:
        """Return the images [B, P] of batches as the network takes them, and the labels [B]."""
        return self.feed.batches(images_NP, y_N)


class FusedGroup:
    """Tasks in training together."""

    def __init__(
        self,
        engine: FusedEngine,
        weights: Sequence[Tensor],
        scores: Sequence[Tensor],
        square_avgs: Sequence[Tensor] | None = None,
    ) -> None:
        """Start from weights and scores [T, O, I] per layer; without mean squares, from zero."""
        material = engine.material
        self._engine, self._tasks = engine, len(scores[0])
        squares: Sequence[Tensor | None] = square_avgs or [None] * len(scores)
        self._layers = [
            _Layer(engine, *matrices) for matrices in zip(weights, scores, squares, strict=True)
        ]
        size, device = material.config.train.batch_size, material.device
        self._outputs = self._room(size, self._layers)
        self._deltas = self._room(size, self._layers[:-1])
        self._number_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._replayed = Replayed(engine.recording) if device.type == "cuda" else None
        # What a replayed step reads lies where it lay when the step was recorded.
        self._batch: Batch | None = None

    def step(self, number: int) -> None:
        """Train all tasks on a batch of the run's own order."""
        batch = self._engine.feed.training_batch(number)
        if self._replayed is None:
            self.learn(batch, number)
            return
        if self._batch is None:
            self._batch = batch
        lasting = self._batch
        for kept, new in zip(lasting, batch, strict=True):
            kept.copy_(new)
        self._set_number(number)
        self._replayed(lambda: self._take_step(*lasting))

    def learn(self, batch: Batch, number: int) -> None:
        """Train all tasks on a batch, as their ``number``-th.

        Nothing is recorded: where batches come from elsewhere, another thread makes them ready on
        the GPU, and masks have few of them in a row.

        Raises:
            ValueError: if the batch isn't of the run's size.
        """
        if len(batch[1]) != self._engine.material.config.train.batch_size:
            raise ValueError(f"the batch has {len(batch[1])} images")
        self._set_number(number)
        self._take_step(*batch)

    def _set_number(self, number: int) -> None:
        """Say where the rate is; behind the last batch it stays what it was."""
        self._number_1.fill_(min(number, len(self._engine.rates) - 1))

    def _take_step(self, x_BP: Tensor, y_B: Tensor) -> None:
        *inputs, logits_TBS = self._forward(x_BP, self._outputs)
        self._layers[-1].gradient_at_logits(logits_TBS, y_B)
        delta = logits_TBS
        for i in reversed(range(len(inputs))):
            # Before the layer's weights are others.
            back = self._deltas[i - 1] if i else None
            if back is not None:
                self._layers[i].propagate(delta, inputs[i], back)
            self._layers[i].update(inputs[i], delta, self._number_1)
            if back is not None:
                delta = back

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of a training batch as the masks are, and its labels [B]."""
        x_BP, y_B = self._engine.feed.training_batch(number)
        return self._logits(x_BP, self._outputs), y_B

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [B], in order."""
        outputs: list[Tensor] = []
        for x_BP, y_B in self._engine.feed.test_batches():
            if not outputs or outputs[0].shape[1] != len(y_B):
                outputs = self._room(len(y_B), self._layers)
            yield self._logits(x_BP, outputs), y_B

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""
        return [layer.trimmed(layer.scores) for layer in self._layers]

    def square_avgs(self) -> list[Tensor]:
        """Return RMSprop's mean squares [T, O, I] per layer."""
        return [layer.trimmed(layer.second) for layer in self._layers]

    def _logits(self, x_BP: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        size = self._engine.material.config.model.output_size
        return self._forward(x_BP, outputs)[-1][..., :size]

    def _forward(self, x_BP: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the input of every layer [T, B, I], the first [B, P], and the logits last."""
        acts = [x_BP]
        for layer, out in zip(self._layers, outputs, strict=True):
            layer.forward(acts[-1], out, relu=layer is not self._layers[-1])
            acts.append(out)
        return acts

    def _room(self, images: int, layers: Sequence["_Layer"]) -> list[Tensor]:
        """Return room for the outputs [T, B, O] of some layers."""
        material = self._engine.material
        shape = self._tasks, images
        return [
            torch.empty(*shape, layer.width, dtype=material.dtype, device=material.device)
            for layer in layers
        ]


class _Layer:
    """A layer of some tasks, and the launches of its kernels."""

    def __init__(
        self,
        engine: FusedEngine,
        weights_TOI: Tensor,
        scores_TOI: Tensor,
        square_avg_TOI: Tensor | None,
    ) -> None:
        material = engine.material
        self._engine, self._kernels = engine, engine.kernels
        self._tasks, self._outputs, self._fan_in = scores_TOI.shape
        self._inputs, self.width = _padded(self._fan_in), _padded(self._outputs)
        # Tasks whose pixels aren't permuted here have one matrix in common.
        shared = weights_TOI.stride(0) == 0
        self._weights = self._taken(weights_TOI[:1] if shared else weights_TOI, material.dtype)
        self._weights_task = 0 if shared else self._outputs * self._inputs
        self.scores = self._taken(scores_TOI, torch.float32)
        self.second = (
            torch.zeros_like(self.scores)
            if square_avg_TOI is None
            else self._taken(square_avg_TOI, torch.float32)
        )
        self._masked = torch.where(self.scores >= 0, self._weights, 0)

    def forward(self, x: Tensor, out: Tensor, *, relu: bool) -> None:
        """Write the layer's output [T, B, O] for its input, [T, B, I] or [B, I]."""
        images = x.shape[-2]
        tile = self._engine.tiles["forward"]
        grid = _parts(self.width, tile.outputs), _parts(images, tile.images), self._tasks
        self._kernels.forward_layer[grid](
            x, self._masked, out, images, self._outputs, self._inputs, self.width, _per_task(x),
            RELU=relu, **tile.meta(),
        )  # fmt: skip

    def gradient_at_logits(self, logits_TBS: Tensor, y_B: Tensor) -> None:
        """Replace the logits by the gradient of the cross-entropy, summed over the batch."""
        width = 1 << (self.width - 1).bit_length()
        warps = min(16, max(4, width // 1024))
        self._kernels.cross_entropy_gradient[(self._tasks * len(y_B),)](
            logits_TBS, y_B, len(y_B), self._outputs, self.width,
            WIDTH=width, num_warps=warps, **_ROUNDING,
        )  # fmt: skip

    def propagate(self, delta: Tensor, x: Tensor, back: Tensor) -> None:
        """Write the gradient at the layer's input."""
        images = delta.shape[1]
        tile = self._engine.tiles["propagate"]
        grid = _parts(self._inputs, tile.inputs), _parts(images, tile.images), self._tasks
        self._kernels.propagate[grid](
            delta, self._masked, x, back, images, self._outputs, self._inputs, self.width,
            **tile.meta(),
        )  # fmt: skip

    def update(self, x: Tensor, delta: Tensor, number_1: Tensor) -> None:
        """Update the scores, and the masked weights, by a batch's inputs and gradients."""
        images, train = delta.shape[1], self._engine.material.config.train
        tile = self._engine.tiles["update"]
        grid = _parts(self._inputs, tile.inputs), _parts(self._outputs, tile.outputs), self._tasks
        self._kernels.update_layer[grid](
            x, delta, self._weights, self.scores, self.second, self._masked, self._engine.rates,
            number_1, images, self._outputs, self._inputs, self.width, _per_task(x),
            self._weights_task, train.alpha, 1 - train.alpha, train.epsilon, **tile.meta(),
        )  # fmt: skip

    def trimmed(self, matrices_TOI: Tensor) -> Tensor:
        """Return matrices without the zeros behind their rows."""
        return matrices_TOI[..., : self._fan_in]

    def _taken(self, matrices_TOI: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy on the device with zeros behind its rows."""
        moved = matrices_TOI.to(self._engine.material.device, dtype)
        return functional.pad(moved, (0, self._inputs - self._fan_in)).clone(
            memory_format=torch.contiguous_format
        )


def _padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


def _parts(size: int, tile: int) -> int:
    return -(-size // tile)


def _per_task(x: Tensor) -> int:
    """Return how many numbers lie between two tasks' inputs; 0 if they share them."""
    return x.stride(0) if x.dim() == 3 else 0


def _kernels() -> Any:
    """Return the module of the kernels; Triton takes a while to load."""
    try:
        module: ModuleType = importlib.import_module("supsup.fused_kernels")
    except ImportError as error:
        raise RuntimeError(
            f"train.engine is fused, but this machine lacks Triton ({error}); give every node the "
            "same, or set train.engine to dense"
        ) from error
    return module
