"""A pool of Ray actors that work off jobs: bounded retries, dead actors replaced.

A worker has its next job queued behind the one that it runs, so that it doesn't idle while the
source takes its result. Workers run their queues in order: the head is what an actor was running
when it died.

The policy (how deep to queue, what a failure is, what is tried again, when to give up) is in
plain functions; the loop submits, waits and hands on.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from supsup.errors import RunFailed, one_line

#: How often a job is tried again after its worker died, and after it raised an exception.
MAX_RETRIES = {"died": 3, "raised": 1}
#: Deaths of workers in a row, without a finished job between them, after which the pool gives up.
MAX_DEATHS_IN_A_ROW = 12


@dataclass(frozen=True)
class Job:
    """One call of a worker's method."""

    method: str
    args: tuple[Any, ...]
    tag: Any
    """What the source knows the job by; never sent to a worker."""


@dataclass(frozen=True)
class Failure:
    """Why a try of a job gave no result."""

    kind: Literal["died", "raised"]
    reason: str


class JobSource(Protocol):
    """Where jobs come from and results go."""

    def left(self) -> int:
        """Return how many jobs can start now, at least."""

    def next_job(self) -> Job | None:
        """Return a job that can start now, if any."""

    def done(self, job: Job, result: Any) -> None:
        """Take a result."""

    def failed(self, job: Job, failure: Failure) -> None:
        """Take notice of a job that will not be tried again."""

    def retrying(self, job: Job, failure: Failure) -> None:
        """Take notice of a failure that will be tried again."""


class PoolBroken(RunFailed):
    """Workers die one after another; the cluster needs attention."""


def should_retry(kind: str, history: Counter[str]) -> bool:
    """Decide whether a job is tried again after a failure; ``history`` counts this one too."""
    return history[kind] <= MAX_RETRIES[kind]


def as_failure(error: RayError) -> Failure:
    """Tell a user's exception from a dead actor."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return Failure("raised", f"{type(cause).__name__}: {cause}")
    return Failure("died", one_line(error, 300))


def queue_depth(left: int, workers: int) -> int:
    """Return how many jobs a worker may have at once.

    Two, so that it doesn't wait for the next; but the last jobs are for whoever is free first.
    """
    return 2 if left >= workers else 1


@dataclass(eq=False)
class _Worker:
    actor: Any
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)
    """Object references of results to come, and the jobs that they are of, in order."""

    def submit(self, job: Job) -> None:
        self.queue.append((getattr(self.actor, job.method).remote(*job.args), job))


@dataclass
class _State:
    workers: list[_Worker] = field(default_factory=list)
    again: deque[Job] = field(default_factory=deque)
    history: dict[Any, Counter[str]] = field(default_factory=dict)
    deaths_in_a_row: int = 0


class WorkerPool:
    """Runs jobs on a fixed number of actors."""

    def __init__(self, make_worker: Callable[[], Any], size: int) -> None:
        """Start the actors.

        Args:
            make_worker: starts one actor and returns its handle.
            size: how many.
        """
        self._make_worker = make_worker
        self._state = _State(workers=[_Worker(make_worker()) for _ in range(size)])

    def run(self, source: JobSource) -> None:
        """Work until the source has no job and none is running.

        Raises:
            PoolBroken: if workers die again and again.
        """
        while True:
            self._hand_out(source)
            heads = {w.queue[0][0]: w for w in self._state.workers if w.queue}
            if not heads:
                return
            ready, _ = ray.wait(list(heads))
            for reference in ready:
                self._collect(source, heads[reference])

    def close(self) -> None:
        """Stop the actors."""
        for worker in self._state.workers:
            ray.kill(worker.actor)
        self._state = _State()

    def _hand_out(self, source: JobSource) -> None:
        """Give jobs to the workers with the fewest, as long as there are jobs and room."""
        state = self._state
        while True:
            left = len(state.again) + source.left()
            worker = min(state.workers, key=lambda w: len(w.queue))
            if len(worker.queue) >= queue_depth(left, len(state.workers)):
                return
            job = state.again.popleft() if state.again else source.next_job()
            if job is None:
                return
            worker.submit(job)

    def _collect(self, source: JobSource, worker: _Worker) -> None:
        """Take the result at the head of a worker's queue; the worker is looked at last again."""
        state = self._state
        state.workers.remove(worker)
        state.workers.append(worker)
        reference, job = worker.queue.popleft()
        try:
            result = ray.get(reference)
        except RayError as error:
            self._after_failure(source, job, worker, as_failure(error))
            return
        state.deaths_in_a_row = 0
        source.done(job, result)

    def _after_failure(
        self, source: JobSource, job: Job, worker: _Worker, failure: Failure
    ) -> None:
        state = self._state
        if failure.kind == "died":
            self._replace(worker, failure)
        history = state.history.setdefault(job.tag, Counter())
        history[failure.kind] += 1
        if should_retry(failure.kind, history):
            state.again.append(job)
            source.retrying(job, failure)
        else:
            source.failed(job, failure)

    def _replace(self, worker: _Worker, failure: Failure) -> None:
        """Start another actor for one that died; what was queued behind is nobody's fault."""
        state = self._state
        state.deaths_in_a_row += 1
        if state.deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
            raise PoolBroken(
                f"{state.deaths_in_a_row} workers died in a row, the last one because: "
                f"{failure.reason}"
            )
        ray.kill(worker.actor)
        worker.actor = self._make_worker()
        state.again.extendleft(queued for _, queued in reversed(worker.queue))
        worker.queue.clear()
