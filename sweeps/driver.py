"""The driver: several trials at the same time over one pool of workers.

``SweepJobs`` is the source of the pool's jobs. Each trial is a source itself (``TrialJobs``), on an
ordinary run folder; the next job is of the trial with the fewest at work, so that all go on alike
and no worker idles. Trials of one bank take turns: what one has trained, the next finds there.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.cluster import Cluster
from orchestrator.jobs import ClusterFailed
from orchestrator.pool import Failure, Job, JobSource
from orchestrator.worker import THREADS, WorkerSetup
from supsup.errors import DeterminismFault, RunFailed, UserError, one_line
from sweeps.ears import Ears, Progress, Ready, Tracks
from sweeps.endings import Best, as_text, line, outcome
from sweeps.spec import SweepSpec
from sweeps.study import Curve, SweepStudy, Trial
from sweeps.worker import RemoteSweepWorker


class TrialJobs(JobSource, Protocol):
    """A run as a trial: the jobs that train and evaluate it, in this order a checkpoint at a time.

    A job's method is one of ``TaskWorker``; the driver adds the run's setup and data to its
    arguments. What a checkpoint measured goes to the ``MetricSink`` that the jobs were made with,
    which is the trial's ``Ears``; the trial is done if there is a checkpoint at its last task.
    """

    failures: list[str]
    """What was given up, and why; none: all went well."""

    @property
    def trained(self) -> int:
        """Tasks trained by this driver."""

    @property
    def widest(self) -> int:
        """Jobs that can ever run side by side, at most; 0 if there is nothing to do."""

    def drop_rest(self) -> None:
        """Start no more jobs; what workers have in hand is still taken."""


@dataclass(frozen=True)
class Opened:
    """What a trial works with, once its bank is open and locked."""

    jobs: TrialJobs
    setup: WorkerSetup
    data: Any
    """Reference of the data set."""


class Prepares(Protocol):
    """What turns trials into runs."""

    def ready(self, trial: Trial) -> Ready:
        """Return a trial's configuration; raises UserError if it can't be run."""

    def tracker(self, ready: Ready) -> Tracks:
        """Begin to track a trial."""

    def open(self, ready: Ready, ears: Ears, stack: contextlib.ExitStack) -> Opened:
        """Open a trial's bank, locked until the stack ends."""


@dataclass(eq=False)
class _Active:
    ready: Ready
    ears: Ears
    tracker: Tracks
    opened: Opened
    stack: contextlib.ExitStack
    running: int = 0
    problem: str = ""

    @property
    def jobs(self) -> TrialJobs:
        return self.opened.jobs


@dataclass
class Tally:
    """What a driver has done."""

    trained: int = 0


class SweepJobs:
    """The jobs of all trials that are running."""

    def __init__(
        self,
        spec: SweepSpec,
        study: SweepStudy,
        prepares: Prepares,
        progress: Progress,
        concurrency: int,
        may_start: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin with no trial.

        Args:
            spec: the sweep.
            study: its trials.
            prepares: turns trials into runs.
            progress: where progress goes.
            concurrency: trials at the same time, at most.
            may_start: whether another trial may still start.
        """
        self.tally = Tally()
        self._spec, self._study, self._prepares = spec, study, prepares
        self._progress, self._concurrency, self._may_start = progress, concurrency, may_start
        self._active: list[_Active] = []
        self._held: list[Ready] = []
        self._of: dict[Any, tuple[_Active, Job]] = {}
        self._returned: list[Job] = []
        self._best = Best(spec.objectives[0], study.records())

    # --- JobSource -----------------------------------------------------------------------------

    def left(self) -> int:
        """Return how many jobs can start now, at least about."""
        return len(self._returned) + sum(active.jobs.left() for active in self._active)

    def next_job(self) -> Job | None:
        """Return a job of the trial with the fewest at work."""
        if self._returned:
            return self._returned.pop()
        while True:
            while len(self._active) < self._concurrency and self._start():
                pass
            job, ended = self._pick()
            if job is not None or not ended:
                return job

    def give_back(self, job: Job) -> None:
        """Take a job back that was not started."""
        self._returned.append(job)

    def done(self, job: Job, result: Any) -> None:
        """Hand a result to its trial, whose bank stores it."""
        active, inner = self._of.pop(job.tag)
        active.running -= 1
        before = active.jobs.trained
        try:
            active.jobs.done(inner, result)
        except ClusterFailed:
            raise  # No fault of the trial.
        except (UserError, RunFailed) as error:
            active.problem = active.problem or str(error)
        if trained := active.jobs.trained - before:
            self.tally.trained += trained
            self._progress.trained(trained)
        if active.ears.pruned_at is not None or active.problem:
            active.jobs.drop_rest()

    def failed(self, job: Job, failure: Failure) -> None:
        """End a trial of which a job is given up: its checkpoints can't be reached any more."""
        active, inner = self._of.pop(job.tag)
        active.running -= 1
        active.jobs.failed(inner, failure)
        active.jobs.drop_rest()

    def retrying(self, job: Job, failure: Failure) -> None:
        """Say that a job is tried again."""
        active, inner = self._of[job.tag]
        active.jobs.retrying(inner, failure)

    def close(self) -> None:
        """Leave the trials that run to whoever resumes the sweep."""
        for active in self._active:
            active.tracker.close("KILLED", {"state": "interrupted"})
            active.stack.close()
        self._active = []

    # --- trials --------------------------------------------------------------------------------

    def _pick(self) -> tuple[Job | None, bool]:
        """Return a job, if there is one, and whether a trial ended."""
        ended = False
        for active in sorted(self._active, key=lambda active: active.running):
            job = self._job_of(active)
            if job is not None:
                return self._wrapped(active, job), ended
            if not active.running:
                self._end(active)
                ended = True
        return None, ended

    def _job_of(self, active: _Active) -> Job | None:
        """Return the next job of a trial; what is damaged in it ends this trial alone."""
        try:
            return active.jobs.next_job()
        except (UserError, DeterminismFault) as error:
            active.problem = active.problem or one_line(error, 500)
            active.jobs.drop_rest()
            return None

    def _wrapped(self, active: _Active, job: Job) -> Job:
        active.running += 1
        opened = active.opened
        tag = (active.ready.trial.number, job.tag)
        self._of[tag] = active, job
        args = (opened.setup, opened.data, job.method, *job.args)
        kind = (active.ready.trial.number, job.method if job.kind is None else job.kind)
        cut = functools.partial(self._cut, active, job, tag) if job.cut else None
        return Job("call", args, tag, size=job.size, kind=kind, cut=cut)

    def _cut(self, active: _Active, job: Job, tag: Any) -> list[Job]:
        """Return smaller jobs in a job's place."""
        self._of.pop(tag)
        active.running -= 1
        return [self._wrapped(active, part) for part in (job.cut() if job.cut else ())]

    def _start(self) -> bool:
        """Start a trial; say whether there was one to start."""
        busy = {active.ready.fingerprint for active in self._active}
        for ready in self._held:
            if ready.fingerprint not in busy:
                self._held.remove(ready)
                self._open(ready)
                return True
        while len(self._held) < self._concurrency and self._may_start():
            trial = self._study.next()
            if trial is None:
                return False
            self._progress.began()
            prepared = self._ready(trial)
            if prepared is not None and prepared.fingerprint in busy:
                self._held.append(prepared)
                continue
            if prepared is not None:
                self._open(prepared)
            return True
        return False

    def _ready(self, trial: Trial) -> Ready | None:
        try:
            return self._prepares.ready(trial)
        except UserError as error:
            self._finish(trial, "failed", {}, reason=one_line(error, 500))
            return None

    def _open(self, ready: Ready) -> None:
        number = ready.trial.number
        self._study.note(number, "fingerprint", ready.fingerprint)
        tracker = self._prepares.tracker(ready)
        ears = Ears(
            ready,
            tracker,
            self._progress,
            lambda step, value: self._study.should_prune(number, step, value),
        )
        with contextlib.ExitStack() as stack:
            try:
                opened = self._prepares.open(ready, ears, stack)
            except ClusterFailed:
                tracker.close("KILLED", {"state": "interrupted"})
                raise
            except (UserError, RunFailed) as error:
                self._finish(
                    ready.trial, "failed", {}, reason=one_line(error, 500), tracker=tracker
                )
                return
            self._active.append(_Active(ready, ears, tracker, opened, stack.pop_all()))
        if ears.pruned_at is not None:
            opened.jobs.drop_rest()

    def _end(self, active: _Active) -> None:
        self._active.remove(active)
        active.stack.close()
        curve, config = active.ears.curve, active.ready.config
        problem = active.problem or next(iter(active.jobs.failures), "")
        last = curve.get(config.tasks, {})
        names = self._spec.objectives
        values = [last.get(name, math.nan) for name in names]
        state, reason = outcome(
            problem, active.ears.pruned_at, dict(zip(names, values, strict=True))
        )
        self._finish(active.ready.trial, state, curve, values, reason, active.tracker)

    def _finish(
        self,
        trial: Trial,
        state: Any,
        curve: Curve,
        values: list[float] | None = None,
        reason: str = "",
        tracker: Tracks | None = None,
    ) -> None:
        """End a trial; one that another driver took meanwhile is let go as it is."""
        if tracker is not None and self._study.holds(trial.number):
            tags = {"state": state, "reason": reason} if reason else {"state": state}
            tracker.close("FAILED" if state == "failed" else "FINISHED", tags)
        elif tracker is not None:
            tracker.leave()
        reached = ""
        if not self._study.finish(trial.number, state, curve, values or (), reason):
            state, reason = "elsewhere", "another driver took it over, and ends it"
        elif state == "done" and values:
            self._best.add(trial.number, values[0])
            reached = as_text(self._spec.objectives[0], values[0])
        self._progress.ended(state, line(trial, state, reached, reason), str(self._best))


def start_worker(cluster: Cluster, keep: int) -> Any:
    """Start one worker actor that keeps so many runs."""
    gpus = 1 if cluster.machine.device == "cuda" else 0
    options = RemoteSweepWorker.options(num_cpus=THREADS, num_gpus=gpus, max_restarts=0)
    return options.remote(keep)
