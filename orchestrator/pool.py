"""A pool of Ray actors that work off jobs: bounded retries, dead actors replaced.

The policy (what a failure is, what is tried again, when to give up) is in plain functions; the
loop submits, waits and hands on.
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


@dataclass
class _State:
    idle: list[Any] = field(default_factory=list)
    running: dict[Any, tuple[Job, Any]] = field(default_factory=dict)
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
        self._state = _State(idle=[make_worker() for _ in range(size)])

    def run(self, source: JobSource) -> None:
        """Work until the source has no job and none is running.

        Raises:
            PoolBroken: if workers die again and again.
        """
        state = self._state
        while True:
            while state.idle and (job := self._next(source)):
                worker = state.idle.pop()
                state.running[getattr(worker, job.method).remote(*job.args)] = job, worker
            if not state.running:
                return
            ready, _ = ray.wait(list(state.running))
            for reference in ready:
                self._collect(source, reference)

    def close(self) -> None:
        """Stop the actors."""
        for worker in [*self._state.idle, *(worker for _, worker in self._state.running.values())]:
            ray.kill(worker)
        self._state = _State()

    def _next(self, source: JobSource) -> Job | None:
        return self._state.again.popleft() if self._state.again else source.next_job()

    def _collect(self, source: JobSource, reference: Any) -> None:
        job, worker = self._state.running.pop(reference)
        try:
            result = ray.get(reference)
        except RayError as error:
            self._after_failure(source, job, worker, as_failure(error))
            return
        self._state.idle.append(worker)
        self._state.deaths_in_a_row = 0
        source.done(job, result)

    def _after_failure(self, source: JobSource, job: Job, worker: Any, failure: Failure) -> None:
        state = self._state
        if failure.kind == "died":
            state.deaths_in_a_row += 1
            if state.deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
                raise PoolBroken(
                    f"{state.deaths_in_a_row} workers died in a row, the last one because: "
                    f"{failure.reason}"
                )
            ray.kill(worker)
            worker = self._make_worker()
        state.idle.append(worker)
        history = state.history.setdefault(job.tag, Counter())
        history[failure.kind] += 1
        if should_retry(failure.kind, history):
            state.again.append(job)
            source.retrying(job, failure)
        else:
            source.failed(job, failure)
