"""Ray actors that are called by number: bounded retries, dead actors replaced.

Unlike the pool's workers (orchestrator.pool), these may hold something between calls, such as a
shard of the masks. What a call sends is asked for anew whenever it is sent, so that a replaced
actor can be given again what the dead one held.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.pool import as_failure, should_retry
from supsup.errors import RunFailed


@dataclass(frozen=True)
class Call:
    """A call of one actor's method."""

    worker: int
    method: str
    args: Callable[[], tuple[Any, ...]]
    """Returns what to send; called again before every retry."""


class Crew:
    """A fixed number of actors."""

    def __init__(
        self, make_worker: Callable[[], Any], size: int, note: Callable[[str], None]
    ) -> None:
        """Start the actors.

        Args:
            make_worker: starts one actor and returns its handle.
            size: how many.
            note: told of what is tried again.
        """
        self._make_worker, self._note = make_worker, note
        self._actors = [make_worker() for _ in range(size)]
        self.lives = [0] * size
        """How often each actor was replaced."""

    def __len__(self) -> int:
        """Return the number of actors."""
        return len(self._actors)

    def map(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Make calls side by side; yield their results in order.

        Raises:
            RunFailed: if a call fails again and again.
        """
        sent = [(self.lives[call.worker], self._send(call)) for call in calls]
        for call, (life, reference) in zip(calls, sent, strict=True):
            yield self._result(call, life, reference)

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
            ray.kill(actor)

    def _send(self, call: Call) -> Any:
        return getattr(self._actors[call.worker], call.method).remote(*call.args())

    def _result(self, call: Call, life: int, reference: Any) -> Any:
        history: Counter[str] = Counter()
        while True:
            try:
                return ray.get(reference)
            except RayError as error:
                failure = as_failure(error)
            history[failure.kind] += 1
            if not should_retry(failure.kind, history):
                raise RunFailed(f"{call.method} failed, given up: {failure.reason}")
            self._note(f"{call.method} is tried again: {failure.reason}")
            if failure.kind == "died" and self.lives[call.worker] == life:
                ray.kill(self._actors[call.worker])
                self._actors[call.worker] = self._make_worker()
                self.lives[call.worker] += 1
            life, reference = self.lives[call.worker], self._send(call)
