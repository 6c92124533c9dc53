"""Jobs of a pool, and the policy of what becomes of those that fail: plain functions, no loop."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from supsup.errors import NonFiniteLoss, RunFailed, UserError, one_line

Kind = Literal["died", "raised", "memory", "hung", "room", "certain"]

#: How often a job is tried again after its worker died, after it raised an exception, after there
#: was no memory for it, after its worker gave no sign, after Ray's object store had no room for its
#: result, and after it failed as it always will.
MAX_RETRIES: dict[Kind, int] = {
    "died": 3, "raised": 1, "memory": 3, "hung": 1, "room": 1, "certain": 0,
}  # fmt: skip
#: Deaths of workers in a row, without a finished job between them, after which a pool gives up: so
#: many, and so many per worker, since a node takes all of its workers with it.
MAX_DEATHS_IN_A_ROW, MAX_DEATHS_PER_WORKER = 12, 3
#: A worker hangs if a job takes so many times the median of the jobs like it, and so many seconds.
HUNG_TIMES, HUNG_SECONDS = 10.0, 300.0
#: Jobs of a kind that must be done before it is known how long they take.
_KNOWN = 3
#: Jobs that the median is taken over, the last ones.
_LAST = 100
#: What Ray says when its object store is full, and the disk behind it.
NO_ROOM = (ObjectStoreFullError, OutOfDiskError)
#: What stands between our words on a death and Ray's; and where Ray says whose node it was.
_RAY_SAYS = "; Ray says: "
_NODE = re.compile(r"\bip:( \S+)")
#: What follows a failure of a kind that is certain to come again: equal bits in, equal bits out.
_CERTAIN = (NonFiniteLoss, UserError)


@dataclass(frozen=True)
class Job:
    """One call of a worker's method."""

    method: str
    args: tuple[Any, ...]
    tag: Any
    """What the source knows the job by; never sent to a worker."""
    size: float = 1.0
    """How much work it is, among those of its kind."""
    kind: Hashable = None
    """What jobs are alike but for their size; None: those of the method."""
    cut: "Callable[[], list[Job]] | None" = field(default=None, compare=False)
    """Returns smaller jobs that do the same together; None: it can't be cut."""


@dataclass(frozen=True)
class Failure:
    """Why a job gave no result."""

    kind: Kind
    reason: str
    tries: int = 1
    """How often the job failed."""

    @property
    def cause(self) -> str:
        """The reason in our own words."""
        return self.reason.partition(_RAY_SAYS)[0]


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
        """Take notice of a failure that will be tried again, perhaps in smaller jobs."""


class ClusterFailed(RunFailed):
    """The cluster can't go on; what is finished is safe, and a resume goes on."""


class PoolBroken(ClusterFailed):
    """Workers die one after another, or none comes up; the cluster needs attention."""


class HeadLost(ClusterFailed):
    """The head of the cluster is gone; nothing can be asked of Ray any more."""


class StoreFull(ClusterFailed):
    """There is no room for data or results: it will take somebody to make some."""


def store_full(detail: str) -> StoreFull:
    """Return the error of a full object store; ``detail`` is what Ray says."""
    return StoreFull(
        f"Ray's object store has no room left ({detail}); free memory, or the disk under Ray's "
        "temporary folder"
    )


def should_retry(kind: Kind, history: Counter[Kind]) -> bool:
    """Decide whether a job is tried again after a failure; ``history`` counts this one too."""
    return history[kind] <= MAX_RETRIES[kind]


def should_cut(kind: Kind, job: Job) -> bool:
    """Decide whether a job is tried again in smaller ones, whatever was tried before."""
    return kind == "memory" and job.cut is not None


def given_up(what: str, failure: Failure) -> str:
    """Return the line on a job that will not be tried again."""
    often = f" {failure.tries} times" if failure.tries > 1 else ""
    return f"{what} failed{often}, given up: {failure.reason}"


def tried_again(what: str, job: Job, failure: Failure) -> str:
    """Return the line on a job that will be tried again."""
    how = "in smaller parts" if should_cut(failure.kind, job) else "again"
    return f"{what}: tried {how}, since {failure.cause}"


def is_broken(deaths_in_a_row: int, workers: int) -> bool:
    """Decide whether workers die so often that trying on is pointless."""
    return deaths_in_a_row > max(MAX_DEATHS_IN_A_ROW, MAX_DEATHS_PER_WORKER * workers)


def as_failure(error: RayError) -> Failure:
    """Tell a user's exception from a dead actor, and either from a lack of memory."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, NO_ROOM):
            return as_failure(cause)
        reason = f"{type(cause).__name__}: {one_line(cause, 300)}"
        if _lacks_memory(cause):
            return Failure("memory", reason)
        return Failure("certain" if isinstance(cause, _CERTAIN) else "raised", reason)
    if isinstance(error, NO_ROOM):
        told = first_line(error)
        return Failure("room", f"Ray's object store had no room for its result{_RAY_SAYS}{told}")
    if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
        return Failure("memory", "its node ran out of memory, and Ray killed the worker")
    return Failure("died", _cause_of_death(error))


def first_line(error: BaseException) -> str:
    """Return what an error says before it goes into details."""
    return one_line(Exception(str(error).partition("\n")[0]), 100)


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _cause_of_death(error: RayError) -> str:
    """Return what ended a worker, and what Ray says of it, without the actor's ids before that."""
    said = one_line(error, 2000)
    told = said[max(0, said.find("The actor ", 1)) :][:300]
    if "its node has died" not in told:
        return f"its worker died{_RAY_SAYS}{told}"
    place = _NODE.search(said)
    return f"its node{place[1] if place else ''} was lost{_RAY_SAYS}{told}"


def queue_depth(left: int, workers: int) -> int:
    """Return how many jobs a worker may have at once.

    Two, so that it doesn't wait for the next; but the last jobs are for whoever is free first.
    """
    return 2 if left >= workers else 1


class Durations:
    """How long jobs take, by kind."""

    def __init__(self, typical: Callable[[list[float]], float] = statistics.median) -> None:
        """Begin without knowing; ``typical`` sums up the last durations."""
        self._typical = typical
        self._rates: dict[Hashable, list[float]] = {}

    def add(self, job: Job, seconds: float) -> None:
        """Count in a job that is done."""
        rates = self._rates.setdefault(_kind(job), [])
        rates.append(seconds / job.size)
        del rates[:-_LAST]

    def limit(self, job: Job) -> float | None:
        """Return the seconds after which a job's worker hangs; None as long as nobody can tell."""
        rates = self._rates.get(_kind(job), [])
        if len(rates) < _KNOWN:
            return None
        return max(HUNG_SECONDS, HUNG_TIMES * self._typical(rates) * job.size)


def _kind(job: Job) -> Hashable:
    return job.method if job.kind is None else job.kind
