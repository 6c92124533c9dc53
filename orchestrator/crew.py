"""Ray actors that are called by number: bounded retries, dead and hung actors replaced.

Unlike the pool's workers (orchestrator.pool), these may hold something between calls, such as a
shard of the masks. What a call sends is asked for anew whenever it is sent, so that a replaced
actor can be given again what the dead one held.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError

from orchestrator.actors import Actors, RayActors
from orchestrator.jobs import (
    Durations,
    Failure,
    Job,
    Kind,
    PoolBroken,
    as_failure,
    should_retry,
)
from supsup.errors import RunFailed

#: Seconds between two looks at the cluster and the clock.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Call:
    """A call of one actor's method."""

    worker: int
    method: str
    args: Callable[[], tuple[Any, ...]]
    """Returns what to send; called again before every retry."""


@dataclass(frozen=True)
class _Sent:
    job: Job
    life: int
    reference: Any


@dataclass(frozen=True)
class _Result:
    value: Any


class Crew:
    """A fixed number of actors."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        size: int,
        note: Callable[[str], None],
        start_seconds: float = 300.0,
        actors: Actors | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the actors.

        Args:
            make_worker: starts one actor and returns its handle.
            size: how many.
            note: told of what is tried again.
            start_seconds: how long an actor may take to come up.
            actors: what starts and calls them; None: Ray.
            clock: returns the time in seconds.
        """
        self._ray: Actors = actors or RayActors(make_worker)
        self._note, self._start_seconds, self._clock = note, start_seconds, clock
        self._actors = [self._ray.start() for _ in range(size)]
        self._births = [self._ray.born(actor) for actor in self._actors]
        # A call that was ready before it was waited for seems to have taken no time.
        self._durations = Durations(typical=max)
        self.lives = [0] * size
        """How often each actor was replaced."""

    def __len__(self) -> int:
        """Return the number of actors."""
        return len(self._actors)

    def map(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Make calls side by side; yield their results in order.

        Raises:
            RunFailed: if a call fails again and again.
            ClusterFailed: if an actor finds no room any more, or the cluster is gone.
        """
        sent = [self._send(call) for call in calls]
        for call, first in zip(calls, sent, strict=True):
            yield self._result(call, first)

    def call(self, worker: int, method: str, *args: Any) -> Any:
        """Make one call and return its result.

        Raises:
            RunFailed: if it fails again and again.
        """
        (result,) = self.map([Call(worker, method, lambda: args)])
        return result

    def close(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            self._ray.kill(actor)

    def _send(self, call: Call) -> _Sent:
        job = Job(call.method, call.args(), tag=call.worker)
        reference = self._ray.submit(self._actors[call.worker], job)
        return _Sent(job, self.lives[call.worker], reference)

    def _result(self, call: Call, sent: _Sent) -> Any:
        history: Counter[Kind] = Counter()
        while True:
            found = self._wait_for(call.worker, sent)
            if not isinstance(found, Failure):
                return found.value
            history[found.kind] += 1
            found = replace(found, tries=history.total())
            if not should_retry(found.kind, history):
                raise RunFailed(f"{call.method} failed, given up: {found.reason}")
            self._note(f"{call.method}: tried again, since {found.cause}")
            if found.kind in ("died", "memory", "hung") and self.lives[call.worker] == sent.life:
                self._replace(call.worker)
            sent = self._send(call)

    def _wait_for(self, worker: int, sent: _Sent) -> "_Result | Failure":
        """Wait for a call, and watch the cluster and the clock meanwhile."""
        since, up = self._clock(), False
        while not self._ray.wait([sent.reference], _LOOK_SECONDS):
            self._ray.room()
            if self.lives[worker] != sent.life:
                continue
            now = self._clock()
            if not up:
                up = bool(self._ray.wait([self._births[worker]], 0))
                if not up and now - since > self._start_seconds:
                    raise PoolBroken(
                        f"there is no room for a worker for {self._start_seconds / 60:.0f} "
                        "minutes; see ray status, or go on with fewer --workers"
                    )
                since = now if up else since
            limit = self._durations.limit(sent.job)
            if up and limit is not None and now - since > limit:
                return Failure("hung", f"no result after {now - since:.0f} s")
        try:
            result = _Result(self._ray.result(sent.reference))
        except RayError as error:
            return as_failure(error)
        self._durations.add(sent.job, self._clock() - since)
        return result

    def _replace(self, worker: int) -> None:
        self._ray.kill(self._actors[worker])
        self._actors[worker] = self._ray.start()
        self._births[worker] = self._ray.born(self._actors[worker])
        self.lives[worker] += 1
