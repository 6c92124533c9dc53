"""The coordinator: hands out blocks and evaluations, commits results as they arrive.

``RunJobs`` is the source of the pool's jobs. A block is committed to the bank the moment its
result arrives. A checkpoint is evaluated as soon as all its tasks are learned, spread over the
workers between the blocks of the tasks that follow.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from orchestrator.blocks import learned_prefix, remaining, split
from orchestrator.pool import Failure, Job
from orchestrator.progress import Reporter
from orchestrator.report import Checkpoint, Results, metrics
from orchestrator.runfolder import RunFolder
from supsup.bank import Bank
from supsup.config import RunConfig
from supsup.evaluate import Evaluation, merge
from supsup.train import TrainedBlock

#: Tasks that one evaluation job asks about. Any size gives the same counts.
EVALUATION_TASKS = 5

_TRAINED, _EVALUATED = "tasks trained", "tasks evaluated"


class MetricSink(Protocol):
    """Where metrics go."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Record metrics at a number of tasks learned."""


class RunJobs:
    """The jobs of a run, and what became of them."""

    def __init__(
        self,
        *,
        config: RunConfig,
        checkpoints: Sequence[int],
        bank: Bank,
        folder: RunFolder,
        tracker: MetricSink,
        reporter: Reporter,
        put: Callable[[Any], Any],
        train: bool = True,
    ) -> None:
        """Take stock of the bank.

        Args:
            config: the resolved configuration; its tasks and evaluation are what to do.
            checkpoints: numbers of tasks learned to evaluate at, ascending.
            bank: the bank, locked by this process.
            folder: where evaluations are kept.
            tracker: where metrics go.
            reporter: where progress goes.
            put: stores an object for all workers and returns its reference.
            train: whether missing tasks are trained.
        """
        self.failures: list[str] = []
        self.trained = 0
        self.first_block_at: float | None = None
        self._config, self._bank, self._folder = config, bank, folder
        self._tracker, self._reporter, self._put = tracker, reporter, put
        self._done, damaged = bank.intact()
        for damage in damaged if train else ():
            moved = bank.set_aside(damage)
            reporter.note(f"damaged: {damage}; moved to {moved}, its tasks are trained again")
        self._gg_correct = np.zeros(config.tasks, dtype=np.int64)
        for tasks in self._done:
            self._note_gg(tasks.start, bank.read(tasks).gg_correct)
        self._todo = deque(remaining(config.tasks, config.block_size, self._done) if train else ())
        self._waiting = deque(checkpoints)
        self._queue: deque[Job] = deque()
        self._parts: dict[int, list[Evaluation]] = {}
        self._finished: dict[int, Checkpoint] = {}
        self._masks: Any = None
        self._worker_seconds = 0.0
        self._warned: set[str] = set()
        missing = sum(len(block) for block in self._todo)
        reporter.start(_TRAINED, config.tasks, config.tasks - missing)
        if config.scenario != "gg":
            reporter.start(_EVALUATED, sum(checkpoints))

    @property
    def learned(self) -> int:
        """Tasks in the bank from task 0 on without a gap."""
        return learned_prefix(self._done)

    def results(self, name: str, dataset: str) -> Results | None:
        """Return what the run has to show so far; None before the first checkpoint."""
        if not self._finished:
            return None
        ordered = tuple(self._finished[k] for k in sorted(self._finished))
        return Results(
            name=name,
            dataset=dataset,
            scenario=self._config.scenario,
            settings=self._config.eval,
            checkpoints=ordered,
            gg_correct=self._gg_correct[: ordered[-1].learned],
            test_images=self._bank.manifest.test_images,
        )

    # --- JobSource -----------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """Return an evaluation that is due, else the next block."""
        while not self._queue and self._waiting and self._waiting[0] <= self.learned:
            self._open_checkpoint(self._waiting.popleft())
        if self._queue:
            return self._queue.popleft()
        if self._todo:
            block = self._todo.popleft()
            return Job("train", (block,), tag=("train", block))
        return None

    def done(self, job: Job, result: Any) -> None:
        """Commit a block, or add up an evaluation."""
        if job.method == "train":
            self._warn(result.slow)
            self._commit(result.block)
        else:
            self._add(result)

    def failed(self, job: Job, failure: Failure) -> None:
        """Note a job that is given up; the others go on."""
        text = f"{_describe(job)} failed, given up: {failure.reason}"
        self.failures.append(text)
        self._reporter.note(text)

    def retrying(self, job: Job, failure: Failure) -> None:
        """Say that a job is tried again."""
        cause = "its worker died" if failure.kind == "died" else failure.reason
        self._reporter.note(f"{_describe(job)} is tried again: {cause}")

    # --- results -------------------------------------------------------------------------------

    def _commit(self, block: TrainedBlock) -> None:
        self._bank.commit(block)
        self._done.append(range(block.first, block.first + len(block.masks)))
        self._note_gg(block.first, block.gg_correct)
        self.trained += len(block.masks)
        self._worker_seconds += block.seconds
        if self.first_block_at is None:
            self.first_block_at = time.time()
        self._reporter.advance(_TRAINED, len(block.masks))

    def _warn(self, slow: Iterable[str]) -> None:
        for text in slow:
            if text not in self._warned:
                self._warned.add(text)
                self._reporter.note(f"warning: {text}")

    def _note_gg(self, first: int, correct_T: Any) -> None:
        room = self._gg_correct[first : first + len(correct_T)]
        room[:] = correct_T[: len(room)]

    def _open_checkpoint(self, learned: int) -> None:
        stored = self._folder.read_evaluation(self._config.eval, learned)
        if self._config.scenario == "gg" or stored is not None:
            if stored is not None:
                self._reporter.advance(_EVALUATED, learned)
            self._finish(learned, None if self._config.scenario == "gg" else stored)
            return
        self._masks = self._put(self._bank.read(range(learned)).masks)
        self._parts[learned] = []
        for tasks in split(range(learned), EVALUATION_TASKS):
            args = (self._config.eval, self._masks, learned, tasks)
            self._queue.append(Job("evaluate", args, tag=("evaluate", learned, tasks)))

    def _add(self, part: Evaluation) -> None:
        parts = self._parts[part.learned]
        parts.append(part)
        self._reporter.advance(_EVALUATED, part.counts.shape[1])
        if sum(p.counts.shape[1] for p in parts) == part.learned:
            whole = merge(self._parts.pop(part.learned))
            self._folder.write_evaluation(self._config.eval, whole)
            self._finish(part.learned, whole)

    def _finish(self, learned: int, evaluation: Evaluation | None) -> None:
        images = learned * self._bank.manifest.test_images
        checkpoint = Checkpoint(
            learned=learned,
            gg_accuracy=float(self._gg_correct[:learned].sum() / images),
            evaluation=evaluation,
        )
        self._finished[learned] = checkpoint
        values = metrics(checkpoint, self._config.scenario, self._config.eval)
        values["bank/bytes"] = float(self._bank.size(learned))
        if self.trained:
            values["train/seconds_per_task"] = self._worker_seconds / self.trained
        self._tracker.metrics(values, learned)
        self._reporter.note(_summary(checkpoint, self._config.scenario))


def _describe(job: Job) -> str:
    tasks = job.tag[-1]
    name = f"tasks {tasks.start} to {tasks[-1]}"
    return name if job.method == "train" else f"evaluation of {name} among {job.tag[1]}"


def _summary(checkpoint: Checkpoint, scenario: str) -> str:
    text = f"{checkpoint.learned} tasks learned: GG {100 * checkpoint.gg_accuracy:.2f} %"
    evaluation = checkpoint.evaluation
    if evaluation is None:
        return text
    name = {"gns": "GNs", "gnu": "GNu"}[scenario]
    accuracy = evaluation.accuracy(evaluation.methods[0], scenario)
    return f"{text}, {name} {100 * accuracy:.2f} % ({evaluation.methods[0]})"
