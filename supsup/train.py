"""Training the masks of a block of tasks, several at once.

Permuting a task's pixels equals permuting the columns of its first layer,
``(x P) Wᵀ = x (W P⁻¹)ᵀ``. So tasks that are trained together share one batch of unpermuted images,
each with its own permuted copy of the weights and scores; the mask is put back into the order of
the weights when it is packed. What multiplies is an engine: ``dense`` (supsup.dense) anywhere,
``sparse`` (supsup.sparse) where most pixels are background.

Shapes: T tasks, B images of a batch, S output neurons, C classes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.dense import DenseEngine
from supsup.errors import NonFiniteLoss
from supsup.identity import resolve
from supsup.material import Material
from supsup.sparse import SparseEngine, mostly_background, sparse_precisions


class TaskGroup(Protocol):
    """Tasks in training together."""

    def step(self, number: int) -> None:
        """Train all tasks on a batch of the run's own order."""

    def learn(self, batch: Any, number: int) -> None:
        """Train all tasks on what the engine's ``batch`` returned, as their ``number``-th."""

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of a training batch as the masks are, and its labels [B]."""

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [B], in order."""

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""

    def square_avgs(self) -> list[Tensor]:
        """Return RMSprop's mean squares [T, O, I] per layer."""


class Engine(Protocol):
    """What trains tasks; keeps data from one group of tasks to the next."""

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most."""

    def begin(self, tasks: range) -> TaskGroup:
        """Return the state of some tasks, untrained."""

    def resume(
        self, weights: Sequence[Tensor], scores: Sequence[Tensor], square_avgs: Sequence[Tensor]
    ) -> TaskGroup:
        """Return masks in training, from weights and state [T, O, I] per layer."""

    def batch(self, images_BP: Tensor, y_B: Tensor) -> Any:
        """Return images, uint8 [B, P], and labels as ``learn`` takes them; good until the next."""


ENGINES: dict[str, type[DenseEngine] | type[SparseEngine]] = {
    "dense": DenseEngine,
    "sparse": SparseEngine,
}


@dataclass(frozen=True, kw_only=True)
class TrainedBlock:
    """What training a block gives: the masks, and how well each does on its own test set."""

    first: int
    masks: npt.NDArray[np.uint8]
    gg_correct: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]
    seconds: float


def native_bf16(device: str) -> bool:
    """Say whether the device multiplies bf16 in hardware (AVX512-BF16 or AMX, or a GPU)."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def resolve_here(config: RunConfig, data: Dataset) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what is best on this machine."""
    device = config.train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sparse = sparse_precisions() if device == "cpu" and mostly_background(data) else ()
    return resolve(config, device=device, native_bf16=native_bf16(device), sparse=sparse)


class BlockTrainer:
    """Trains blocks of tasks; keeps data and weights from one block to the next."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Move the data to the device and generate the fixed weights.

        Args:
            config: with precision, device and engine resolved.
            data: the data set of the run; its arrays may be read-only.
        """
        self.material = Material(config, data)
        self.engine: Engine = ENGINES[config.train.engine](self.material)

    def train(self, tasks: range) -> TrainedBlock:
        """Train the masks of some tasks. The result doesn't depend on which share the block.

        Raises:
            NonFiniteLoss: naming the first task whose loss is not finite at the end.
        """
        started = time.perf_counter()
        size = self.engine.tasks_at_once
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        parts = [self._train_group(group) for group in groups]
        masks, correct, losses = (np.concatenate(part) for part in zip(*parts, strict=True))
        return TrainedBlock(
            first=tasks.start,
            masks=masks,
            gg_correct=correct,
            loss=losses,
            seconds=time.perf_counter() - started,
        )

    def _train_group(
        self, tasks: range
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return masks [T, bytes], test images that are right [T], and last losses [T]."""
        batches = self.material.config.train.batches
        group = self.engine.begin(tasks)
        for number in range(batches):
            group.step(number)
        losses = _losses(*group.logits(batches - 1))
        if not np.isfinite(losses).all():
            bad = tasks[int(np.flatnonzero(~np.isfinite(losses))[0])]
            raise NonFiniteLoss(f"task {bad}: the loss is not finite; lower train.learning_rate")
        masks = self.material.packed_masks(tasks, group.scores())
        return masks, self._correct(group), losses

    def _correct(self, group: TaskGroup) -> npt.NDArray[np.int64]:
        """Return how many test images [T] each task has right."""
        classes = self.material.data.classes
        hits = [
            (logits_TBS[..., :classes].argmax(-1) == y_B).sum(-1)
            for logits_TBS, y_B in group.test_logits()
        ]
        return torch.stack(hits).sum(0).cpu().numpy()


def _losses(logits_TBS: Tensor, y_B: Tensor) -> npt.NDArray[np.float32]:
    """Return the mean cross-entropy [T]."""
    target_TB = y_B.expand(len(logits_TBS), -1)
    loss_TB = functional.cross_entropy(
        logits_TBS.float().transpose(1, 2), target_TB, reduction="none"
    )
    return loss_TB.mean(1).cpu().numpy()
