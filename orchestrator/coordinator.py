"""The coordinator: hands out blocks and evaluations, commits results as they arrive.

``RunJobs`` is the source of the pool's jobs. A block is committed to the bank the moment its
result arrives. A checkpoint is evaluated as soon as all its tasks are learned, spread over the
workers between the blocks of the tasks that follow. What is kept here of a task is one number,
its accuracy; a checkpoint's masks live as long as the jobs that name them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from orchestrator.blocks import LearnedPrefix, halves, remaining
from orchestrator.chain import Chain
from orchestrator.checkpoints import Checkpoints
from orchestrator.jobs import Failure, Job, given_up, tried_again
from orchestrator.progress import Reporter
from orchestrator.results import Checkpoint, Results, field_metrics, metrics
from orchestrator.runfolder import RunFolder
from supsup.bank import Bank, Stock
from supsup.config import RunConfig
from supsup.evaluate import Evaluation
from supsup.storage import mask_storage
from supsup.train import TrainedBlock
from supsup.transfer import LegacyStore, chained

_TRAINED = "tasks trained"


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
        stock: Stock,
        folder: RunFolder,
        tracker: MetricSink,
        reporter: Reporter,
        put: Callable[[Any], Any],
        workers: int,
        train: bool = True,
        ahead: bool = True,
    ) -> None:
        """Take stock of the bank, and finish the checkpoints that no worker is needed for.

        Args:
            config: the resolved configuration; its tasks and evaluation are what to do.
            checkpoints: numbers of tasks learned to evaluate at, ascending.
            bank: the bank, locked by this process.
            stock: what the bank holds.
            folder: where evaluations are kept.
            tracker: where metrics go.
            reporter: where progress goes.
            put: stores an object for all workers and returns its reference.
            workers: how many work off the jobs.
            train: whether missing tasks are trained.
            ahead: whether the tasks behind a checkpoint are trained while it is evaluated.
        """
        self.failures: list[str] = []
        self.trained = 0
        self.first_block_at: float | None = None
        self._config, self._bank, self._folder = config, bank, folder
        self._sizes = bank.manifest.sizes(config.tasks)
        self._tracker, self._reporter, self._put = tracker, reporter, put
        self._ahead = ahead
        for damage in stock.damaged if train else ():
            moved = bank.set_aside(damage)
            reporter.note(f"damaged: {damage}; moved to {moved}, its tasks are trained again")
        self._prefix = LearnedPrefix(stock.tasks)
        self._gg_correct = np.zeros(config.tasks, dtype=np.int64)
        for tasks, gg_correct in zip(stock.tasks, stock.gg_correct, strict=True):
            self._note_gg(tasks.start, gg_correct)
        self._chain: Chain | None = None
        missing = remaining(config.tasks, config.block_size, stock.tasks) if train else []
        if missing and chained(config):
            store = LegacyStore(folder.path / "transfer", config, bank.manifest.fingerprint)
            self._chain = Chain(config, store, stock.tasks, put)
            missing = self._chain.todo
            reporter.note(
                f"tasks depend on each other with mask.transfer {config.mask.transfer}: they are "
                "trained one after another"
            )
        self._todo = deque(missing)
        self._queue: deque[Job] = deque()
        self._finished: dict[int, Checkpoint] = {}
        self._worker_seconds = 0.0
        self._warned: set[str] = set()
        reporter.start(_TRAINED, config.tasks, config.tasks - sum(len(block) for block in missing))
        self._checkpoints = Checkpoints(
            config=config,
            numbers=checkpoints,
            sizes=self._sizes,
            folder=folder,
            reporter=reporter,
            workers=workers,
            show=self._show,
        )
        self._checkpoints.settle(self.learned)

    @property
    def learned(self) -> int:
        """Tasks in the bank from task 0 on without a gap."""
        return self._prefix.length

    @property
    def widest(self) -> int:
        """Jobs that can ever run side by side, at most; 0 if there is nothing to do."""
        return max(self._startable(), self._checkpoints.widest)

    def results(self, name: str, dataset: str) -> Results | None:
        """Return what the run has to show so far; None before the first checkpoint."""
        if not self._finished:
            return None
        ordered = tuple(self._finished[k] for k in sorted(self._finished))
        manifest, learned = self._bank.manifest, ordered[-1].learned
        return Results(
            name=name,
            dataset=dataset,
            scenario=self._config.scenario,
            settings=self._config.eval,
            checkpoints=ordered,
            gg_correct=self._gg_correct[:learned],
            sizes=self._sizes[:learned],
            storage=mask_storage(manifest.config.mask, manifest.layers, manifest.statistics),
        )

    def drop_rest(self) -> None:
        """Start no more jobs; what workers have in hand is still taken."""
        self._todo.clear()
        self._queue.clear()
        self._checkpoints.drop_rest()

    # --- JobSource -----------------------------------------------------------------------------

    def left(self) -> int:
        """Return how many jobs can start now, those of checkpoints not opened yet not counted."""
        return len(self._queue) + self._startable()

    def _startable(self) -> int:
        """Return how many blocks can start now."""
        if self._chain is None:
            return len(self._todo)
        return min(len(self._todo), int(self._chain.ready()))

    def next_job(self) -> Job | None:
        """Return an evaluation that is due, else the next block."""
        while not self._queue and (due := self._checkpoints.due(self.learned)) is not None:
            self._open_checkpoint(due)
        if self._queue:
            return self._queue.popleft()
        if self._startable() and (self._ahead or self._todo[0].start < self._checkpoints.next):
            block = self._todo.popleft()
            return self._chain.job(block) if self._chain else _training(block)
        return None

    def done(self, job: Job, result: Any) -> None:
        """Commit a block, or add up an evaluation."""
        if job.tag[0] == "train":
            self._warn(result.slow)
            if self._chain:
                self._chain.keep(job.tag[1], result.legacy)
            self._commit(result.block)
            if self._chain:
                self._chain.committed(job.tag[1])
        else:
            self._checkpoints.add(result)

    def failed(self, job: Job, failure: Failure) -> None:
        """Note a job that is given up; the others go on."""
        text = given_up(_describe(job), failure)
        self.failures.append(text)
        self._reporter.note(text)
        if job.method == "evaluate":
            self._checkpoints.give_up(job.args[2])
        elif self._chain and self._todo:
            self._reporter.note(f"{len(self._todo)} blocks behind it start from it: left out")
            self._todo.clear()

    def retrying(self, job: Job, failure: Failure) -> None:
        """Say that a job is tried again."""
        self._reporter.note(tried_again(_describe(job), job, failure))

    # --- results -------------------------------------------------------------------------------

    def _commit(self, block: TrainedBlock) -> None:
        self._bank.commit(block)
        self._prefix.add(range(block.first, block.first + len(block.masks)))
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
        """Queue the jobs of a checkpoint. They alone hold the reference of its masks."""
        rows = self._bank.read(range(learned))
        masks = self._put(rows.masks)
        norm = (None, self._put(rows.statistics)) if self._bank.manifest.statistics else ()
        for tasks in self._checkpoints.open(learned):
            args = (self._config.eval, masks, learned, tasks, *norm)
            self._queue.append(_evaluation(tasks, args))

    def _show(self, learned: int, evaluation: Evaluation | None) -> None:
        rates_T = self._gg_correct[:learned] / self._sizes[:learned]
        checkpoint = Checkpoint(
            learned=learned,
            gg_accuracy=float(rates_T.mean()),
            evaluation=evaluation,
        )
        self._finished[learned] = checkpoint
        values = metrics(checkpoint, self._config.scenario, self._config.eval, self._sizes)
        results = self.results(self._folder.name, self._config.dataset)
        values |= field_metrics(results) if results else {}
        values["bank/bytes"] = float(self._bank.size(learned))
        if self.trained:
            values["train/seconds_per_task"] = self._worker_seconds / self.trained
        self._tracker.metrics(values, learned)
        self._reporter.note(_summary(checkpoint, self._config.scenario))


def _training(block: range) -> Job:
    """Return the job that trains a block; cut, it trains its halves, to the same masks."""

    def cut() -> list[Job]:
        return [_training(range(half[0], half[-1] + 1)) for half in halves(block)]

    split_up = cut if len(block) > 1 else None
    return Job("train", (block,), tag=("train", block), size=len(block), cut=split_up)


def _evaluation(tasks: Sequence[int], args: tuple[Any, ...]) -> Job:
    """Return the job that evaluates some tasks; ``args`` are its arguments, they the fourth."""

    def cut() -> list[Job]:
        return [_evaluation(half, (*args[:3], half, *args[4:])) for half in halves(tasks)]

    learned, split_up = args[2], cut if len(tasks) > 1 else None
    size = float(len(tasks) * learned)
    return Job("evaluate", args, tag=("evaluate", learned, tasks), size=size, cut=split_up)


def _describe(job: Job) -> str:
    tasks = job.tag[-1]
    name = f"tasks {tasks[0]} to {tasks[-1]}"
    return name if job.tag[0] == "train" else f"evaluation of {name} among {job.tag[1]}"


def _summary(checkpoint: Checkpoint, scenario: str) -> str:
    text = f"{checkpoint.learned} tasks learned: GG {100 * checkpoint.gg_accuracy:.2f} %"
    evaluation = checkpoint.evaluation
    if evaluation is None:
        return text
    name = {"gns": "GNs", "gnu": "GNu"}[scenario]
    accuracy = evaluation.accuracy(evaluation.methods[0], scenario)
    return f"{text}, {name} {100 * accuracy:.2f} % ({evaluation.methods[0]})"
