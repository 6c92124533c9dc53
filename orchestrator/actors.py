"""What a pool asks of Ray, in one place: to start, to call, to wait for and to stop actors."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from orchestrator.jobs import NO_ROOM, HeadLost, Job, first_line, store_full
from orchestrator.reach import check_reachable
from supsup.errors import UserError

#: Seconds without an answer of the cluster's head after which it is gone. Ray itself ends the
#: process, without a word, after 60.
_GONE_SECONDS = 30.0


def put(value: Any) -> Any:
    """Put something into the object store, once for all workers; return its reference.

    Raises:
        StoreFull: if there is no room for it, in memory or on disk.
    """
    try:
        return ray.put(value)
    except NO_ROOM as error:
        raise store_full(first_line(error)) from error


class Actors(Protocol):
    """Where a pool has its workers from."""

    def start(self) -> Any:
        """Start a worker; return its handle."""

    def born(self, actor: Any) -> Any:
        """Return what is ready as soon as the worker is up."""

    def submit(self, actor: Any, job: Job) -> Any:
        """Give a worker a job behind those that it has; return what will be ready with it."""

    def wait(self, references: Sequence[Any], seconds: float) -> list[Any]:
        """Wait until one of them is ready, but no longer than so many seconds."""

    def result(self, reference: Any) -> Any:
        """Return a result; raises RayError if there is none."""

    def kill(self, actor: Any) -> None:
        """Stop a worker at once."""

    def room(self) -> int | None:
        """Return how many workers the cluster has room for now; None: their number is fixed.

        Raises:
            HeadLost: if the cluster is gone.
        """


class RayActors:
    """Actors of a cluster that this process is a driver of."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        room: Callable[[], int] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Start none yet.

        Args:
            make_worker: starts one actor and returns its handle.
            room: counts what the cluster has room for; None: the number of workers is fixed.
            check: raises HeadLost if the cluster is gone; None: asks Ray's head.
        """
        self._make_worker, self._room = make_worker, room
        self._check = check or Watch(ask_head).check
        self._gone = False

    def start(self) -> Any:
        """Start a worker."""
        return self._make_worker()

    def born(self, actor: Any) -> Any:
        """Return a reference that is ready when the worker is up."""
        return actor.__ray_ready__.remote()

    def submit(self, actor: Any, job: Job) -> Any:
        """Call a worker's method."""
        return getattr(actor, job.method).remote(*job.args)

    def wait(self, references: Sequence[Any], seconds: float) -> list[Any]:
        """Wait for one of some references."""
        ready: list[Any] = ray.wait(list(references), timeout=seconds)[0]
        return ready

    def result(self, reference: Any) -> Any:
        """Return the value of a reference."""
        return ray.get(reference)

    def kill(self, actor: Any) -> None:
        """Stop a worker. Without a head it would take a minute, and the process with it."""
        if not self._gone:
            ray.kill(actor)

    def room(self) -> int | None:
        """Return how many workers the cluster has room for."""
        try:
            self._check()
        except HeadLost:
            self._gone = True
            raise
        return self._room() if self._room else None


class Watch:
    """Notices when a cluster's head is gone: Ray waits for it, and then ends the process."""

    def __init__(
        self,
        ask: Callable[[], str],
        seconds: float = _GONE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take it for well.

        Args:
            ask: returns what is wrong with the head; empty: nothing.
            seconds: for how long it must be wrong.
            clock: returns the time in seconds.
        """
        self._ask, self._seconds, self._clock = ask, seconds, clock
        self._since: float | None = None

    def check(self) -> None:
        """Ask the head.

        Raises:
            HeadLost: if it hasn't answered for long.
        """
        problem = self._ask()
        if not problem:
            self._since = None
            return
        if self._since is None:
            self._since = self._clock()
        silent = self._clock() - self._since
        if silent >= self._seconds:
            raise HeadLost(f"the head of the Ray cluster is gone for {silent:.0f} s ({problem})")


def ask_head() -> str:
    """Return what is wrong with the head of the cluster that this process is in; empty: nothing."""
    try:
        check_reachable(ray.get_runtime_context().gcs_address)
    except UserError as error:
        return str(error).partition(";")[0]
    return ""
