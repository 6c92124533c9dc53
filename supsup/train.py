"""Training the masks of a block of tasks, several at once.

Permuting a task's pixels equals permuting the columns of its first layer,
``(x P) Wᵀ = x (W P⁻¹)ᵀ``. So tasks that are trained together share one batch of unpermuted images,
each with its own permuted copy of the weights and scores; the mask is put back into the order of
the weights when it is packed. What multiplies is an engine: ``dense`` (supsup.dense) anywhere,
``sparse`` (supsup.sparse) where most pixels are background, ``fused`` (supsup.fused) on a GPU.
Other networks, mask algorithms, optimisers and tasks are the ``general`` engine's (supsup.general),
which permutes no weights.

Shapes: T tasks, B images of a batch, S output neurons, C classes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from supsup.fused import FusedEngine, fused_kernels_here
from supsup.general import GeneralEngine, GeneralGroup
from supsup.gpu import repeatable
from supsup.identity import resolve
from supsup.material import Material
from supsup.sparse import SparseEngine, mostly_background, sparse_precisions
from supsup.transfer import Legacy, chained, handed_on, inherited


class TaskGroup(Protocol):
    """Tasks in training together."""

    def step(self, number: int) -> None:
        """Train all tasks on a batch of the run's own order."""

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of a training batch as the masks are, and its labels.

        They are shared [B], or the tasks' own [T, B].
        """

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [B] or [T, B], in order."""

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""


class Engine(Protocol):
    """What trains tasks; keeps data from one group of tasks to the next."""

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most."""

    def begin(self, tasks: range) -> TaskGroup:
        """Return the state of some tasks, untrained."""


class LearningGroup(TaskGroup, Protocol):
    """Masks in training together, on batches that come from elsewhere."""

    def learn(self, batch: Any, number: int) -> None:
        """Train all masks on what the engine's ``batch`` returned, as their ``number``-th."""

    def square_avgs(self) -> list[Tensor]:
        """Return RMSprop's mean squares [T, O, I] per layer."""


class ResumableEngine(Engine, Protocol):
    """An engine whose training can stop, and go on from what it left."""

    def resume(
        self, weights: Sequence[Tensor], scores: Sequence[Tensor], square_avgs: Sequence[Tensor]
    ) -> LearningGroup:
        """Return masks in training, from weights and state [T, O, I] per layer."""

    def batches(self, images_NP: Tensor, y_N: Tensor) -> Sequence[Any]:
        """Return batches for ``learn``, ``BATCHES`` at most; good until the second next call.

        Args:
            images_NP: the images of whole batches, uint8.
            y_N: the labels.
        """


RESUMABLE_ENGINES: Mapping[str, Callable[[Material], ResumableEngine]] = {
    "dense": DenseEngine,
    "sparse": SparseEngine,
    "fused": FusedEngine,
}
ENGINES: Mapping[str, Callable[[Material], Engine]] = {
    **RESUMABLE_ENGINES,
    "general": GeneralEngine,
}


@dataclass(frozen=True, kw_only=True)
class TrainedBlock:
    """What training a block gives: the masks, and how well each does on its own test set."""

    first: int
    masks: npt.NDArray[np.uint8]
    gg_correct: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]
    seconds: float
    statistics: npt.NDArray[np.float32] | None = None
    """Of batch norm, per task [T, statistics]; None without batch norm."""


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
    return resolve(
        config,
        device=device,
        native_bf16=native_bf16(device),
        sparse=sparse,
        fused=device == "cuda" and fused_kernels_here(),
    )


class BlockTrainer:
    """Trains blocks of tasks; keeps data and weights from one block to the next."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Move the data to the device and generate the fixed weights.

        Args:
            config: with precision, device and engine resolved.
            data: the data set of the run; its arrays may be read-only.
        """
        self.material = Material(config, data)
        self.engine = ENGINES[config.train.engine](self.material)

    def train(self, tasks: range) -> TrainedBlock:
        """Train the masks of some tasks. The result doesn't depend on which share the block.

        Raises:
            NonFiniteLoss: naming the first task whose loss is not finite at the end.
        """
        if chained(self.material.config):
            raise ValueError("these tasks depend on those before them: use train_after")
        started = time.perf_counter()
        size = self.engine.tasks_at_once
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        parts = [self._train_group(group, self.engine.begin(group)) for group in groups]
        return join_blocks(parts, time.perf_counter() - started)

    def train_after(self, tasks: range, legacy: Legacy | None) -> tuple[TrainedBlock, Legacy]:
        """Train tasks that start from those before them, and return what they leave in turn.

        Args:
            tasks: adjoining tasks.
            legacy: what the tasks before them left; None before task 0.

        Raises:
            NonFiniteLoss: naming the first task whose loss is not finite at the end.
        """
        engine = self.engine
        if not isinstance(engine, GeneralEngine):
            raise TypeError("the general engine alone can start from scores that are given")
        started = time.perf_counter()
        parts = []
        for task in tasks:
            own = range(task, task + 1)
            group = engine.begin(own, inherited(self.material, legacy, task))
            parts.append(self._train_group(own, group))
            legacy = handed_on(self.material.config, legacy, group)
        if legacy is None:
            raise ValueError("there are no tasks to train")
        return join_blocks(parts, time.perf_counter() - started), legacy

    def _train_group(self, tasks: range, group: TaskGroup) -> TrainedBlock:
        """Train tasks that are trained together; the time is not taken."""
        with repeatable():
            return self._trained(tasks, group)

    def _trained(self, tasks: range, group: TaskGroup) -> TrainedBlock:
        batches = self.material.config.train.batches
        for number in range(batches):
            group.step(number)
        losses = _losses(*group.logits(batches - 1))
        if not np.isfinite(losses).all():
            bad = tasks[int(np.flatnonzero(~np.isfinite(losses))[0])]
            raise NonFiniteLoss(f"task {bad}: the loss is not finite; lower train.learning_rate")
        return TrainedBlock(
            first=tasks.start,
            masks=self.material.packed_masks(tasks, group.scores()),
            gg_correct=self._correct(group),
            loss=losses,
            seconds=0.0,
            statistics=group.statistics() if isinstance(group, GeneralGroup) else None,
        )

    def _correct(self, group: TaskGroup) -> npt.NDArray[np.int64]:
        """Return how many test images [T] each task has right."""
        classes = self.material.family.classes
        hits = [
            (logits_TBS[..., :classes].argmax(-1) == y_B).sum(-1)
            for logits_TBS, y_B in group.test_logits()
        ]
        return torch.stack(hits).sum(0).cpu().numpy()


def join_blocks(parts: Sequence[TrainedBlock], seconds: float) -> TrainedBlock:
    """Join blocks of adjoining tasks, in order, into one that took so many seconds."""
    statistics = [part.statistics for part in parts if part.statistics is not None]
    return TrainedBlock(
        first=parts[0].first,
        masks=np.concatenate([part.masks for part in parts]),
        gg_correct=np.concatenate([part.gg_correct for part in parts]),
        loss=np.concatenate([part.loss for part in parts]),
        seconds=seconds,
        statistics=np.concatenate(statistics) if statistics else None,
    )


def _losses(logits_TBS: Tensor, y_B: Tensor) -> npt.NDArray[np.float32]:
    """Return the mean cross-entropy [T]."""
    target_TB = y_B.expand(len(logits_TBS), logits_TBS.shape[1])
    loss_TB = functional.cross_entropy(
        logits_TBS.float().transpose(1, 2), target_TB, reduction="none"
    )
    return loss_TB.mean(1).cpu().numpy()
