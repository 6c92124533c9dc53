"""The worker: trains blocks and evaluates tasks. An ordinary class; Ray wraps it in one line."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from orchestrator.stretch import History, Recall, StretchLearner
from supsup.apprentice import LocalTrainer, MaskState
from supsup.baselines.asking import Answer, Learner, make_learner
from supsup.baselines.learner import Learned
from supsup.baselines.network import Arrays
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.errors import SlowPath
from supsup.evaluate import Evaluation, Evaluator
from supsup.material import as_tensor, layers_of
from supsup.members import LocalMembers, Packed, Scores
from supsup.models import fixed_weights, weights_sha256
from supsup.openset import Existing, OpenSetLearner, Step
from supsup.streams import Segment, Stream
from supsup.train import BlockTrainer, TrainedBlock
from supsup.transfer import Legacy

#: What the training of masks goes on from, by mask; None: it can't go on.
States = dict[int, MaskState | None]
#: Threads of a worker. One: matrix products of this size gain nothing from sharing cores.
THREADS = 1


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker is told once. The weights are not sent: their seed is in ``config``."""

    config: RunConfig
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained block, and what made its training slow."""

    block: TrainedBlock
    slow: tuple[str, ...]
    legacy: Legacy | None = None
    """What the block leaves to the next, where tasks start from those before."""


class TaskWorker:
    """Trains and evaluates tasks of one run. Holds nothing that matters if it dies."""

    def __init__(self, setup: WorkerSetup, data: Dataset) -> None:
        """Keep the arguments; the work starts with the first call, where errors have a block."""
        self._setup, self._data = setup, data
        torch.set_num_threads(THREADS)

    def train(self, tasks: range) -> Trained:
        """Train a block of tasks.

        Raises:
            RuntimeError: if this machine generates other weights than the bank's.
        """
        with _slow_paths() as slow:
            block = self._trainer.train(tasks)
        return Trained(block=block, slow=tuple(slow))

    def train_after(self, tasks: range, legacy: Legacy | None) -> Trained:
        """Train a block of tasks that start from those before, given what they left.

        Raises:
            RuntimeError: if this machine generates other weights than the bank's.
        """
        with _slow_paths() as slow:
            block, left = self._trainer.train_after(tasks, legacy)
        return Trained(block=block, slow=tuple(slow), legacy=left)

    def evaluate(
        self,
        evaluation: EvalConfig,
        masks_TB: npt.NDArray[np.uint8],
        learned: int,
        tasks: Sequence[int],
        owners_T: npt.NDArray[np.int64] | None = None,
        statistics_TS: npt.NDArray[np.float32] | None = None,
    ) -> Evaluation:
        """Evaluate some tasks among the first ``learned`` masks, or an open-set learner's."""
        return self._evaluator.evaluate(
            evaluation, masks_TB, learned, tasks, owners_T, statistics_TS
        )

    def given(self, masks_KB: npt.NDArray[np.uint8], tasks: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return how many test images each mask has right, given the task that it is asked."""
        return self._evaluator.given(masks_KB, tasks)

    # --- learners other than SupSup ------------------------------------------------------------

    def learn(self, task: int, trunk: Arrays | None, look_back: bool) -> Learned:
        """Learn a task: see ``Learner``."""
        return self._learner.learn(task, trunk, look_back)

    def ask(
        self,
        evaluation: EvalConfig,
        trunk: Arrays | None,
        own: Sequence[Arrays],
        learned: int,
        tasks: Sequence[int],
    ) -> Answer:
        """Evaluate some tasks among the first ``learned``: see ``Learner``."""
        return self._learner.evaluate(evaluation, trunk, own[:learned], tasks)

    @cached_property
    def _learner(self) -> Learner:
        self._check_weights()
        return make_learner(self._setup.config, self._data)

    # --- open set ------------------------------------------------------------------------------

    def scores(self, changed: Mapping[int, Packed], factor_W: npt.NDArray[np.float32]) -> Scores:
        """Take in masks of this worker's shard, and answer for all of it: see ``Members``."""
        for mask, packed_B in sorted(changed.items()):
            self._members.put(mask, packed_B)
        return self._members.scores(as_tensor(factor_W))

    def train_mask(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """Train a mask on a segment: see ``Trainer``."""
        return self._mask_trainer.train(mask, segment, state)

    def pid(self) -> int:
        """Return the process id, once the worker is up."""
        return os.getpid()

    def learn_chunk(
        self, chunk: int, number: int, before: tuple[list[Step], dict[int, Packed], States] | None
    ) -> Step:
        """Learn a segment of a chunk of the stream, by a learner of its own.

        Args:
            chunk: the chunk.
            number: the segment.
            before: the steps before, the masks and the states that they left; None: this worker
                took those steps itself.
        """
        if before is not None:
            self._learners[chunk] = self._chunk_learner(chunk, *before)
        learner, states = self._learners[chunk]
        step = learner.learn(self._stream.segment(number))
        if step.mask is not None and step.packed_B is not None:
            states[step.mask] = step.state
        return step

    def recognise(
        self, chunk: int, masks_KB: Packed, steps: list[Step], segments: Sequence[int]
    ) -> list[int | None]:
        """Say which of a chunk's masks the first batches of some segments belong to, if any."""
        masks = dict(enumerate(masks_KB))
        learner, _ = self._chunk_learner(chunk, steps, masks, {})
        choices = [learner.recognise(self._stream.segment(number, 1)) for number in segments]
        return [choice.mask if isinstance(choice, Existing) else None for choice in choices]

    def _chunk_learner(
        self, chunk: int, steps: list[Step], masks: dict[int, Packed], states: States
    ) -> tuple[OpenSetLearner, States]:
        learner = self._plain_learner(states.get, chunk * self._setup.config.openset.budget)
        learner.restore(steps, masks)
        return learner, states

    def learn_stretch(self, numbers: range, history: History) -> list[Step]:
        """Learn some segments of the one stream in a row: see ``StretchLearner``."""
        return self._stretches.learn(map(self._stream.segment, numbers), history)

    def _plain_learner(self, recall: Recall, first_mask: int = 0) -> OpenSetLearner:
        config, layers = self._setup.config, layers_of(self._setup.config, self._data)
        weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, layers)]
        members = LocalMembers(layers, weights, config.openset.depth)
        return OpenSetLearner(config, self._data, members, self._mask_trainer, recall, first_mask)

    @cached_property
    def _stretches(self) -> StretchLearner:
        return StretchLearner(self._plain_learner, _fetched)

    @cached_property
    def _learners(self) -> dict[int, tuple[OpenSetLearner, States]]:
        return {}

    @cached_property
    def _stream(self) -> Stream:
        return Stream(self._setup.config, self._data)

    @cached_property
    def _trainer(self) -> BlockTrainer:
        self._check_weights()
        return BlockTrainer(self._setup.config, self._data)

    @cached_property
    def _mask_trainer(self) -> LocalTrainer:
        self._check_weights()
        return LocalTrainer(self._setup.config, self._data)

    @cached_property
    def _members(self) -> LocalMembers:
        self._check_weights()
        config = self._setup.config
        layers = layers_of(config, self._data)
        weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, layers)]
        return LocalMembers(layers, weights, config.openset.depth)

    @cached_property
    def _evaluator(self) -> Evaluator:
        self._check_weights()
        return Evaluator(self._setup.config, self._data)

    def _check_weights(self) -> None:
        config = self._setup.config
        found = weights_sha256(fixed_weights(config.seed, layers_of(config, self._data)))
        if found != self._setup.weights_sha256:
            raise RuntimeError(
                f"the weights generated here (SHA-256 {found[:12]}) are not the bank's "
                f"({self._setup.weights_sha256[:12]}); give every node the locked versions"
            )


def _fetched(value: Any) -> Any:
    """Return what a reference stands for; what is no reference stands for itself."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


@contextmanager
def _slow_paths() -> Iterator[list[str]]:
    """Gather what made the work slow; the list is full when the context ends."""
    slow: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowPath)
        yield slow
    slow += [str(w.message) for w in caught if issubclass(w.category, SlowPath)]


RemoteTaskWorker = ray.remote(TaskWorker)
