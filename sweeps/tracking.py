"""MLflow for a sweep: a parent run, its trials as children, delivered by one thread.

Each has an outbox in its own folder (see orchestrator.outbox): nothing waits for a server.
"""

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.outbox import ELSEWHERE, Address, Outbox, cannot_reach, deliver
from orchestrator.tracking import MlflowSink, Store, wait_for

_RETRY_SECONDS = 20.0


class TrialTracker:
    """Writes down what one MLflow run is to show."""

    def __init__(self, folder: Path, sink: MlflowSink, wake: threading.Event) -> None:
        """Use ``Deliveries.tracker``."""
        self.folder, self.sink = folder, sink
        self.outbox = Outbox(folder)
        self.closed = False
        self._wake = wake

    def begin(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record that the run goes on, with its parameters and tags."""
        self.outbox.extend(
            {"kind": "status", "status": "RUNNING"},
            {"kind": "params", "values": {key: str(value) for key, value in params.items()}},
            {"kind": "tags", "values": dict(tags)},
        )
        self._wake.set()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics; the step is the number of tasks learned."""
        self.outbox.metrics(values, step)
        self._wake.set()

    def artifact(self, path: Path) -> None:
        """Record that a file in the folder is to be shown."""
        self.outbox.append("artifact", path=str(path.relative_to(self.folder)))

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Record the end; it is delivered later."""
        self.outbox.extend(
            {"kind": "tags", "values": dict(tags)}, {"kind": "status", "status": status}
        )
        self.closed = True
        self._wake.set()

    def leave(self) -> None:
        """Record that another driver has the trial now, and ends its MLflow run."""
        self.outbox.append("status", status=ELSEWHERE)
        self.closed = True
        self._wake.set()


class Deliveries:
    """Delivers the records of all trackers in turn. Warns; never stops the sweep."""

    def __init__(self, store: Store, note: Callable[[str], None] = lambda text: None) -> None:
        """Start the thread; ``note`` is told when the end of the sweep waits for MLflow."""
        self._store, self._note = store, note
        self._trackers: list[TrialTracker] = []
        self._wake = threading.Event()
        self._closing = False
        self._warned = False
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def tracker(
        self, folder: Path, name: str, identity: str, parent: TrialTracker | None = None
    ) -> TrialTracker:
        """Return the tracker of an MLflow run, and deliver what its outbox holds already."""
        sink = MlflowSink(self._store, name, identity, parent.sink if parent else None)
        tracker = TrialTracker(folder, sink, self._wake)
        above = (parent.sink.name, parent.sink.identity) if parent else None
        tracker.outbox.send_to(
            Address(name=name, identity=identity, tracking_uri=self._store.given, parent=above)
        )
        self._trackers.append(tracker)
        return tracker

    def close(self) -> bool:
        """Wait as long as records get through, and say whether all did."""
        self._closing, self._moved = True, time.monotonic()
        self._wake.set()
        wait_for(self._thread, self._store, lambda: self._moved, self._note)
        return not any(tracker.outbox.pending() for tracker in list(self._trackers))

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            last = self._closing
            behind = [t for t in list(self._trackers) if not self._deliver(t)]
            if last:
                return
            if behind:
                self._wake.wait(_RETRY_SECONDS)
                self._wake.set()

    def _deliver(self, tracker: TrialTracker) -> bool:
        closed = tracker.closed
        try:
            deliver(tracker.outbox, tracker.sink, self._moves)
        # Whatever a server, a database or a network does, the sweep goes on.
        except Exception as error:  # noqa: BLE001
            self._warn(error)
            return False
        if closed:
            self._trackers.remove(tracker)
        return True

    def _moves(self) -> None:
        self._moved = time.monotonic()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(cannot_reach(error, "the sweep's folder"), stacklevel=1)
