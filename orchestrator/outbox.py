"""The outbox: records on disk that MLflow has yet to get, so that none is lost.

``records.jsonl`` holds them in order, ``records-delivered.json`` how far MLflow has got them, and
``records-to.json`` which MLflow run they are for. A record that was delivered just before a crash
is delivered again: MLflow stores a metric with equal key, step, time and value once, and everything
else is set, not added.
"""

import dataclasses
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from supsup.errors import one_line
from supsup.files import write_atomically

RECORDS = "records.jsonl"
#: The status recorded by who lets an MLflow run go that another has taken over, and ends.
ELSEWHERE = "ELSEWHERE"
#: Seconds after which it is noted how far a delivery got.
_NOTE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Address:
    """Which MLflow run records are for."""

    name: str
    identity: str
    """Finds the MLflow run again, whatever it is called."""
    tracking_uri: str | None
    """Where it is; None: in the store of the runs folder."""
    parent: tuple[str, str] | None = None
    """Name and identity of the MLflow run above it."""


class Sink(Protocol):
    """Where records go."""

    def apply(self, record: Mapping[str, Any], folder: Path) -> None:
        """Take a record of the outbox in that folder; raises whatever keeps it from arriving."""


class Outbox:
    """The records of one run, on disk, and how many of them were delivered."""

    def __init__(self, folder: Path) -> None:
        """Open the outbox in a run's folder, or begin one. One process at a time may add to it."""
        self.folder = folder
        self._records = folder / RECORDS
        self._position = folder / "records-delivered.json"
        self._address = folder / "records-to.json"
        self._lock = threading.Lock()
        self._unsaved = b""
        self._size = self._whole_lines()
        self._named: set[int] = set()
        self._known: dict[tuple[str, int], float] | None = None

    # --- address -------------------------------------------------------------------------------

    def address(self) -> Address | None:
        """Return which MLflow run the records are for; None if that is not known."""
        try:
            body = json.loads(self._address.read_bytes())
            parent = body.pop("parent")
            return Address(**body, parent=tuple(parent) if parent else None)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def send_to(self, address: Address) -> None:
        """Say which MLflow run the records are for."""
        if self.address() != address:
            write_atomically(self._address, json.dumps(dataclasses.asdict(address)).encode())

    # --- adding --------------------------------------------------------------------------------

    def append(self, kind: str, **body: Any) -> None:
        """Add a record; it survives a power cut when this returns."""
        self.extend({"kind": kind, **body})

    def extend(self, *records: Mapping[str, Any]) -> None:
        """Add records, each with its ``kind``; they survive a power cut when this returns.

        If the disk refuses them, that is warned of, and they are kept in memory until the next.
        """
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        with self._lock:
            self._unsaved += lines.encode()
            try:
                self._save()
            except OSError as error:
                warnings.warn(
                    f"{self._records} can't be written ({error.strerror}); what it lacks is "
                    "recorded by the next command of the run",
                    stacklevel=2,
                )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Add metrics at a step, those that it has not recorded with the same value already."""
        if self._known is None:
            self._known = {
                (key, record["step"]): value
                for record in self._read(0)
                if record["kind"] == "metrics"
                for key, value in record["values"].items()
            }
        news = {k: float(v) for k, v in values.items() if self._known.get((k, step)) != float(v)}
        if news:
            self.append("metrics", values=news, step=step, timestamp=int(time.time() * 1000))
            self._known |= {(key, step): value for key, value in news.items()}

    def _save(self) -> None:
        """Append what is not saved yet, behind the last whole line."""
        flags = os.O_WRONLY | os.O_CREAT
        with os.fdopen(os.open(self._records, flags, 0o666), "wb") as file:
            # What an earlier try left behind it was cut off by the disk.
            file.truncate(self._size)
            file.seek(self._size)
            file.write(self._unsaved)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(self._unsaved)
        self._unsaved = b""

    def _whole_lines(self) -> int:
        """Return the bytes of all whole lines: a killed writer may have left half of one."""
        try:
            return self._records.read_bytes().rfind(b"\n") + 1
        except FileNotFoundError:
            return 0

    # --- delivering ----------------------------------------------------------------------------

    def pending(self) -> list[tuple[dict[str, Any], int]]:
        """Return the records that were not delivered, and the position behind each."""
        with self._lock:
            start = self._delivered()
            content = self._content(start if start <= self._size else 0)
            found, position = [], self._size - len(content)
            for line in content.splitlines(keepends=True):
                position += len(line)
                record = _parsed(line)
                if record is not None:
                    found.append((record, position))
                elif position not in self._named:
                    self._named.add(position)
                    warnings.warn(
                        f"{self._records} is damaged: the line that ends at byte {position} can't "
                        "be read and is left out",
                        stacklevel=2,
                    )
            return found

    def mark_delivered(self, position: int) -> None:
        """Remember that everything before the position was delivered."""
        write_atomically(self._position, json.dumps({"position": position}).encode())

    def last_status(self) -> str:
        """Return the status that the MLflow run was last given, or ELSEWHERE; empty if none."""
        statuses = [r["status"] for r in self._read(0) if r["kind"] == "status"]
        return str(statuses[-1]) if statuses else ""

    def _delivered(self) -> int:
        try:
            return max(0, int(json.loads(self._position.read_bytes())["position"]))
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _content(self, start: int) -> bytes:
        if not self._size:
            return b""
        try:
            with self._records.open("rb") as file:
                file.seek(start)
                return file.read(self._size - start)
        except FileNotFoundError:
            # Somebody removed it, and what else there is to say of that others say.
            return b""

    def _read(self, start: int) -> list[dict[str, Any]]:
        with self._lock:
            lines = self._content(start).splitlines()
        return [record for line in lines if (record := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def deliver(outbox: Outbox, sink: Sink, moved: Callable[[], None] = lambda: None) -> int:
    """Deliver what is pending, in order; return how many records there were.

    Raises:
        Exception: whatever the sink raises; what was delivered before is remembered.
    """
    delivered, reached, noted = 0, None, time.monotonic()
    # Then its state is what the other says, also where these records come late.
    let_go = outbox.last_status() == ELSEWHERE
    try:
        for record, position in outbox.pending():
            if not (let_go and record["kind"] == "status"):
                sink.apply(record, outbox.folder)
            delivered, reached = delivered + 1, position
            moved()
            if time.monotonic() - noted > _NOTE_SECONDS:
                outbox.mark_delivered(position)
                noted = time.monotonic()
    finally:
        if reached is not None:
            outbox.mark_delivered(reached)
    return delivered


def cannot_reach(error: Exception, kept_in: str) -> str:
    """Return what to say when records don't arrive."""
    return (
        f"MLflow can't be reached ({type(error).__name__}: {one_line(error)}); records are kept "
        f"in {kept_in} and delivered by supsup sync or the next command"
    )
