"""The coordinator of a learner other than SupSup: tasks in the order that they need, as jobs.

``BaselineJobs`` is a source of the pool's jobs, as ``RunJobs`` is. Tasks that need none before them
are learned side by side; a chain is learned one after another, by whichever worker is free. A task
is committed the moment its result arrives, so that a killed run goes on to the same end.

Shapes: T tasks.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.blocks import halves
from orchestrator.checkpoints import Checkpoints
from orchestrator.coordinator import MetricSink
from orchestrator.jobs import Failure, Job, given_up, tried_again
from orchestrator.progress import Reporter
from orchestrator.recoveries import Recoveries, capacity, recovery_metrics
from orchestrator.results import Checkpoint, Results, field_metrics, metrics
from orchestrator.runfolder import RunFolder
from supsup.baselines.asking import Answer, rule_of, storage
from supsup.baselines.learner import Learned
from supsup.baselines.shelf import Shelf
from supsup.config import RunConfig
from supsup.errors import BankError
from supsup.evaluate import Evaluation
from supsup.hopfield import Recovery
from supsup.measures import AccuracyMatrix, Rates

_TRAINED = "tasks trained"
#: A learner that forgets is asked about all tasks after each of so many, and at the checkpoints.
_ALL_ROWS = 50


class BaselineJobs:
    """The jobs of a run of another learner, and what became of them."""

    def __init__(
        self,
        *,
        config: RunConfig,
        checkpoints: Sequence[int],
        sizes: npt.NDArray[np.int64],
        shelf: Shelf,
        folder: RunFolder,
        tracker: MetricSink,
        reporter: Reporter,
        put: Callable[[Any], Any],
        workers: int,
        train: bool = True,
        ahead: bool = True,
    ) -> None:
        """Take stock of what was learned, and finish the checkpoints that no worker is needed for.

        Args:
            config: the resolved configuration.
            checkpoints: numbers of tasks learned to evaluate at, ascending.
            sizes: test images of every task [T].
            shelf: what was learned; its run's folder is locked by this process.
            folder: where evaluations are kept.
            tracker: where metrics go.
            reporter: where progress goes.
            put: stores an object for all workers and returns its reference.
            workers: how many work off the jobs.
            train: whether missing tasks are learned.
            ahead: whether the tasks behind a checkpoint are learned while it is evaluated.
        """
        self.failures: list[str] = []
        self.trained = 0
        self.first_block_at: float | None = None
        self._config, self._sizes, self._shelf, self._folder = config, sizes, shelf, folder
        self._tracker, self._reporter, self._put = tracker, reporter, put
        self._ahead = ahead
        self._rule = rule_of(config.learner)
        self._asked_at = frozenset(checkpoints)
        self._recoveries = Recoveries(folder.path / "evaluations")
        self._correct: dict[int, npt.NDArray[np.int64]] = {}
        self._take_stock(train)
        self._trunk: tuple[int, Any] | None = None
        missing = [task for task in range(config.tasks) if task not in self._correct]
        self._todo = deque(missing if train else ())
        self._running: set[int] = set()
        self._queue: deque[Job] = deque()
        self._found: dict[int, list[Recovery]] = {}
        self._finished: dict[int, Checkpoint] = {}
        self._worker_seconds = 0.0
        reporter.start(_TRAINED, config.tasks, config.tasks - len(missing))
        self._checkpoints = Checkpoints(
            config=config,
            numbers=checkpoints,
            sizes=sizes,
            folder=folder,
            reporter=reporter,
            workers=workers,
            show=self._show,
            unknown=self._unknown,
        )
        self._checkpoints.settle(self.learned)

    def _take_stock(self, train: bool) -> None:
        """Take in what is on disk; what can't be trusted is learned again, and what needs it."""
        self._shelf.discard_leftovers()
        for learned, problem in self._shelf.stock():
            if problem and train:
                self._reporter.note(f"damaged: {problem}; set aside, it is learned again")
                self._shelf.set_aside("task", learned.task)
            elif problem:
                raise BankError(f"{problem}; repair with supsup resume {self._folder.name}")
            else:
                self._correct[learned.task] = learned.correct
        if train and self._rule.trunk != "never" and self._correct:
            self._check_trunk()

    def _check_trunk(self) -> None:
        last = max(self._shelf.tasks()) if self._rule.forgets else 0
        missing = last >= len(self._correct) if self._rule.forgets else 0 not in self._correct
        try:
            self._shelf.trunk(last)
        except BankError as error:
            self._reporter.note(f"damaged: {error}")
            missing = True
        if missing:
            self._reporter.note("what tasks share is lost: all tasks are learned again")
            for task in self._shelf.tasks():
                self._shelf.set_aside("task", task)
            self._shelf.set_aside("trunk", last)
            self._correct = {}

    # --- what there is -------------------------------------------------------------------------

    @property
    def learned(self) -> int:
        """Tasks learned from task 0 on without a gap."""
        return next(k for k in range(len(self._correct) + 1) if k not in self._correct)

    @property
    def widest(self) -> int:
        """Jobs that can ever run side by side, at most; 0 if there is nothing to do."""
        tasks = min(1, len(self._todo)) if self._rule.forgets else len(self._todo)
        return max(tasks, self._checkpoints.widest)

    def results(self, name: str, dataset: str) -> Results | None:
        """Return what the run has to show so far; None before the first checkpoint."""
        if not self._finished:
            return None
        ordered = tuple(self._finished[k] for k in sorted(self._finished))
        learned = ordered[-1].learned
        given = None
        if self._rule.forgets:
            rows = [(k, self._row(k)) for k in range(1, learned + 1)]
            given = AccuracyMatrix.of_rows(rows)
        return Results(
            name=name,
            dataset=dataset,
            scenario=self._config.scenario,
            settings=self._config.eval,
            checkpoints=ordered,
            gg_correct=self._given_correct(learned),
            sizes=self._sizes[:learned],
            storage=storage(self._config.learner, self._shelf.read(0).own, self._shelf.shared()),
            given=given,
        )

    def _given_correct(self, learned: int) -> npt.NDArray[np.int64]:
        """Return the test images [T] of the first tasks that are right after them, task given."""
        if self._rule.forgets:
            return self._correct[learned - 1]
        return np.concatenate([self._correct[task] for task in range(learned)])

    def _given(self, learned: int) -> Rates:
        rates_T: Rates = self._given_correct(learned) / self._sizes[:learned]
        return rates_T

    def _row(self, learned: int) -> Rates:
        """Return a row [T] of the accuracy matrix; of tasks not asked about then, nan."""
        correct, rates_T = self._correct[learned - 1], np.full(learned, math.nan)
        rates_T[-len(correct) :] = correct / self._sizes[learned - len(correct) : learned]
        return rates_T

    def extra_files(self, folder: Path) -> list[Path]:
        """Write what there is to show beside the results; return the paths."""
        return self._recoveries.table(sorted(self._finished), folder)

    def drop_rest(self) -> None:
        """Start no more jobs; what workers have in hand is still taken."""
        self._todo.clear()
        self._queue.clear()
        self._checkpoints.drop_rest()

    # --- JobSource -----------------------------------------------------------------------------

    def left(self) -> int:
        """Return how many jobs can start now, those of checkpoints not opened yet not counted."""
        waiting = len(self._todo) if self._todo and self._can_start(self._todo[0]) else 0
        alone = waiting and self._rule.trains_trunk(self._todo[0])
        return len(self._queue) + (1 if alone else waiting)

    def next_job(self) -> Job | None:
        """Return an evaluation that is due, else the next task whose needs are met."""
        while not self._queue and (due := self._checkpoints.due(self.learned)) is not None:
            self._open_checkpoint(due)
        if self._queue:
            return self._queue.popleft()
        if not self._todo or not self._can_start(self._todo[0]):
            return None
        task = self._todo.popleft()
        look_back = task < _ALL_ROWS or task + 1 in self._asked_at
        return Job("learn", (task, self._trunk_for(task), look_back), tag=("learn", task))

    def _can_start(self, task: int) -> bool:
        if not self._ahead and task >= self._checkpoints.next:
            return False
        needed = self._rule.needs(task)
        return needed is None or needed in self._correct

    def _trunk_for(self, task: int) -> Any:
        """Return a reference of the shared weights that a task is learned from."""
        needed = self._rule.needs(task)
        if needed is None:
            return None
        if self._trunk is None or self._trunk[0] != needed:
            self._trunk = needed, self._put(self._shelf.trunk(needed))
        return self._trunk[1]

    def done(self, job: Job, result: Any) -> None:
        """Commit a task, or add up an evaluation."""
        if job.method == "learn":
            self._commit(result)
        else:
            self._add(result)

    def failed(self, job: Job, failure: Failure) -> None:
        """Note a job that is given up; what doesn't need it goes on."""
        text = given_up(_describe(job), failure)
        self.failures.append(text)
        self._reporter.note(text)
        if job.method != "learn":
            self._checkpoints.give_up(job.args[3])

    def retrying(self, job: Job, failure: Failure) -> None:
        """Say that a job is tried again."""
        self._reporter.note(tried_again(_describe(job), job, failure))

    # --- results -------------------------------------------------------------------------------

    def _commit(self, learned: Learned) -> None:
        self._shelf.commit(learned)
        self._correct[learned.task] = learned.correct
        self.trained += 1
        self._worker_seconds += learned.seconds
        if self.first_block_at is None:
            self.first_block_at = time.time()
        self._reporter.advance(_TRAINED, 1)
        if not self._checkpoints.infer:
            self._checkpoints.settle(self.learned)

    def _unknown(self, learned: int) -> str:
        """Say why the tasks can't be asked about as they were after so many; "" if they can."""
        if not self._rule.forgets or len(self._correct[learned - 1]) == learned:
            return ""
        return (
            f"not known after {learned} tasks: {self._config.learner} forgets, and was not asked "
            "then; choose other numbers of eval.at, or begin again with another --name"
        )

    def _open_checkpoint(self, learned: int) -> None:
        own = self._put([self._shelf.read(task).own for task in range(learned)])
        trunk = self._shelf.shared()
        shared = None if trunk is None else self._put(trunk)
        self._found[learned] = []
        for tasks in self._checkpoints.open(learned):
            self._queue.append(_asking((self._config.eval, shared, own, learned, tasks)))

    def _add(self, answer: Answer) -> None:
        learned = answer.evaluation.learned
        found = self._found[learned]
        found.extend(answer.recoveries)
        if found:
            self._recoveries.write(learned, found)
        self._checkpoints.add(answer.evaluation)

    def _show(self, learned: int, evaluation: Evaluation | None) -> None:
        scenario, settings = self._config.scenario, self._config.eval
        accuracy = float(self._given(learned).mean())
        checkpoint = Checkpoint(learned=learned, gg_accuracy=accuracy, evaluation=evaluation)
        self._finished[learned] = checkpoint
        values = metrics(checkpoint, scenario, settings, self._sizes)
        results = self.results(self._folder.name, self._config.dataset)
        if results is not None:
            values |= field_metrics(results)
            if results.storage is not None:
                values["bank/bytes"] = float(results.storage.total(learned))
        values |= recovery_metrics(self._recoveries.read(learned))
        known = capacity({number: self._recoveries.read(number) for number in self._finished})
        if known is not None:
            values["hop/capacity"] = float(known)
        if self.trained:
            values["train/seconds_per_task"] = self._worker_seconds / self.trained
        self._tracker.metrics(values, learned)
        self._reporter.note(_summary(checkpoint, scenario, values))


def _asking(args: tuple[Any, ...]) -> Job:
    """Return the job that evaluates some tasks, the last of its arguments."""
    *others, learned, tasks = args

    def cut() -> list[Job]:
        return [_asking((*others, learned, half)) for half in halves(tasks)]

    split_up = cut if len(tasks) > 1 else None
    size = float(len(tasks) * learned)
    return Job("ask", args, tag=("ask", learned, tuple(tasks)), size=size, cut=split_up)


def _describe(job: Job) -> str:
    if job.method == "learn":
        return f"task {job.tag[1]}"
    tasks = job.tag[2]
    return f"evaluation of tasks {tasks[0]} to {tasks[-1]} among {job.tag[1]}"


def _summary(checkpoint: Checkpoint, scenario: str, values: Mapping[str, float]) -> str:
    text = f"{checkpoint.learned} tasks learned: GG {100 * checkpoint.gg_accuracy:.2f} %"
    if checkpoint.evaluation is not None:
        method = checkpoint.evaluation.methods[0]
        name = {"gns": "GNs", "gnu": "GNu"}[scenario]
        text += f", {name} {100 * values[f'{scenario}/accuracy']:.2f} % ({method})"
    if "hop/exact" in values:
        text += f"; {100 * values['hop/exact']:.0f} % of the masks found exactly"
        if "hop/steps_max" in values:
            text += f", after {values['hop/steps_max']:.0f} steps at most"
    return text
