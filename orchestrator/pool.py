"""A pool of workers that work off jobs: bounded retries, dead and hung workers replaced.

A worker has its next job queued behind the one that it runs, so that it doesn't idle while the
source takes its result. Workers run their queues in order: the head is what an actor was running
when it died. Only a worker that is up gets jobs, so one that finds no room, since its node is lost
or yet to come, keeps nobody waiting; where the number of workers is open, it follows the cluster.

The policy (how deep to queue, what a failure is, what is tried again, when to give up) is in
orchestrator.jobs; the loop submits, waits and hands on.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayError

from orchestrator.actors import Actors
from orchestrator.jobs import (
    Durations,
    Failure,
    Job,
    JobSource,
    Kind,
    PoolBroken,
    as_failure,
    is_broken,
    queue_depth,
    should_cut,
    should_retry,
    store_full,
)

__all__ = ["Failure", "Job", "JobSource", "PoolBroken", "WorkerPool"]

#: Seconds between two looks at the cluster and the clock.
_LOOK_SECONDS = 5.0
#: Seconds without a single worker after which the pool gives up.
_NOBODY_SECONDS = 300.0


@dataclass(eq=False)
class _Worker:
    actor: Any
    birth: Any
    """Reference that is ready when the worker is up; None: it is."""
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)
    """References of results to come, and the jobs that they are of, in order."""
    since: float = 0.0
    """When it began with the head of its queue."""


@dataclass
class _State:
    workers: list[_Worker] = field(default_factory=list)
    again: deque[Job] = field(default_factory=deque)
    history: dict[Any, Counter[Kind]] = field(default_factory=dict)
    durations: Durations = field(default_factory=Durations)
    deaths_in_a_row: int = 0


class WorkerPool:
    """Runs jobs on workers."""

    def __init__(
        self,
        actors: Actors,
        size: int,
        most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        nobody_seconds: float = _NOBODY_SECONDS,
    ) -> None:
        """Start the workers.

        Args:
            actors: where they come from.
            size: how many; where their number is open, how many at first.
            most: how many can ever be of use; None: any number.
            clock: returns the time in seconds.
            nobody_seconds: how long there may be no worker at all.
        """
        self._actors, self._size, self._most = actors, size, most
        self._clock, self._nobody_seconds = clock, nobody_seconds
        self._state = _State()
        self._state.workers = [self._start() for _ in range(size)]
        self._looked = self._last_up = clock()

    @property
    def actors(self) -> list[Any]:
        """The handles of the workers."""
        return [worker.actor for worker in self._state.workers]

    def run(self, source: JobSource, at_look: Callable[[], None] = lambda: None) -> None:
        """Work until the source has no job and none is running.

        Args:
            source: where the jobs come from.
            at_look: called at every look at the cluster, however long the jobs take.

        Raises:
            ClusterFailed: if workers die again and again, none comes up, the cluster is gone, or
                its object store is full.
        """
        self._last_up = self._clock()
        while True:
            self._hand_out(source)
            if self._is_finished(source):
                return
            for worker in self._wait():
                if worker.birth is not None:
                    self._take_up(worker)
                else:
                    self._collect(source, worker)
            if self._clock() - self._looked >= _LOOK_SECONDS:
                self._look(source)
                at_look()

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._state.workers:
            self._actors.kill(worker.actor)
        self._state = _State()

    # --- jobs ----------------------------------------------------------------------------------

    def _hand_out(self, source: JobSource) -> None:
        """Give jobs to the workers with the fewest, as long as there are jobs and room."""
        state = self._state
        up = [worker for worker in state.workers if worker.birth is None]
        while up:
            left = len(state.again) + source.left()
            worker = min(up, key=lambda w: len(w.queue))
            # What is about to come up shall find something to do.
            depth = queue_depth(left, len(up)) if len(up) == len(state.workers) else 1
            if len(worker.queue) >= depth:
                return
            job = state.again.popleft() if state.again else source.next_job()
            if job is None:
                return
            if not worker.queue:
                worker.since = self._clock()
            worker.queue.append((self._actors.submit(worker.actor, job), job))

    def _is_finished(self, source: JobSource) -> bool:
        state = self._state
        if state.again or any(worker.queue for worker in state.workers):
            return False
        job = source.next_job()
        if job is not None:
            state.again.append(job)
        return job is None

    def _wait(self) -> list[_Worker]:
        """Wait a while for a worker that comes up, or has a result."""
        workers = self._state.workers
        waiting = {w.birth: w for w in workers if w.birth is not None}
        waiting |= {w.queue[0][0]: w for w in workers if w.queue}
        if not waiting:
            return []
        pause = max(0.0, self._looked + _LOOK_SECONDS - self._clock())
        return [waiting[reference] for reference in self._actors.wait(list(waiting), pause)]

    def _collect(self, source: JobSource, worker: _Worker) -> None:
        """Take the result at the head of a worker's queue; the worker is looked at last again."""
        state = self._state
        state.workers.remove(worker)
        state.workers.append(worker)
        reference, job = worker.queue.popleft()
        seconds, worker.since = self._clock() - worker.since, self._clock()
        try:
            result = self._actors.result(reference)
        except RayError as error:
            self._after_failure(source, job, worker, as_failure(error))
            return
        state.deaths_in_a_row = 0
        state.durations.add(job, seconds)
        source.done(job, result)

    # --- failures ------------------------------------------------------------------------------

    def _after_failure(
        self, source: JobSource, job: Job, worker: _Worker, failure: Failure
    ) -> None:
        state = self._state
        history = state.history.setdefault(job.tag, Counter())
        history[failure.kind] += 1
        failure = replace(failure, tries=history.total())
        # A worker that ran out of memory may hold on to the most of it.
        if failure.kind in ("died", "memory", "hung"):
            self._replace(worker, failure)
        if should_cut(failure.kind, job) and job.cut is not None:
            source.retrying(job, failure)
            state.again.extend(job.cut())
        elif should_retry(failure.kind, history):
            source.retrying(job, failure)
            state.again.append(job)
        elif failure.kind == "room":
            # It is the same for all jobs: they would be done, each twice, for nothing.
            raise store_full(failure.reason.partition(": ")[2])
        else:
            source.failed(job, failure)

    def _replace(self, worker: _Worker, failure: Failure) -> None:
        """Start another worker for one that died; what was queued behind is nobody's fault."""
        state = self._state
        if failure.kind != "memory":
            state.deaths_in_a_row += 1
        if is_broken(state.deaths_in_a_row, len(state.workers)):
            raise PoolBroken(
                f"{state.deaths_in_a_row} workers died in a row, the last one because: "
                f"{failure.reason}"
            )
        self._actors.kill(worker.actor)
        state.again.extendleft(queued for _, queued in reversed(worker.queue))
        place = state.workers.index(worker)
        state.workers[place] = self._start()

    # --- workers -------------------------------------------------------------------------------

    def _start(self) -> _Worker:
        actor = self._actors.start()
        return _Worker(actor, self._actors.born(actor))

    def _take_up(self, worker: _Worker) -> None:
        """Note that a worker is up, or that it died before."""
        try:
            self._actors.result(worker.birth)
        except RayError as error:
            self._replace(worker, as_failure(error))
            return
        worker.birth = None

    def _look(self, source: JobSource) -> None:
        """Look at the cluster and the clock: who is missing, too many, or hangs."""
        self._looked = self._clock()
        state = self._state
        room = self._actors.room()
        if any(worker.birth is None for worker in state.workers):
            self._last_up = self._looked
        elif self._looked - self._last_up > self._nobody_seconds:
            raise PoolBroken(
                f"no worker came up in {self._nobody_seconds / 60:.0f} minutes; see ray status, "
                "and whether other runs hold all that there is"
            )
        if room is not None:
            self._follow(max(1, min(room, self._most or room)))
        for worker in list(state.workers):
            self._check_clock(source, worker)

    def _follow(self, target: int) -> None:
        """Have as many workers as there is room for; one that is up is never stopped."""
        workers = self._state.workers
        for worker in [w for w in workers if w.birth is not None]:
            if len(workers) > target:
                workers.remove(worker)
                self._actors.kill(worker.actor)
        workers.extend(self._start() for _ in range(target - len(workers)))

    def _check_clock(self, source: JobSource, worker: _Worker) -> None:
        """Stop a worker whose job takes far longer than others like it."""
        if not worker.queue:
            return
        reference, job = worker.queue[0]
        seconds, limit = self._clock() - worker.since, self._state.durations.limit(job)
        if limit is None or seconds <= limit or self._actors.wait([reference], 0):
            return
        worker.queue.popleft()
        reason = f"no result after {seconds:.0f} s, where {limit:.0f} s are far more than is usual"
        self._after_failure(source, job, worker, Failure("hung", reason))
