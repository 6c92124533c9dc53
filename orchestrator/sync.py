"""Delivers what the outboxes of a runs folder still hold, and puts right what a kill left RUNNING.

A folder whose command is at work is left to it: its lock tells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.outbox import RECORDS, Address, Outbox, deliver
from orchestrator.runfolder import SWEEPS, check_name, no_such
from orchestrator.tracking import MlflowSink, Store, experiment_id, store_for
from supsup.bank import locked
from supsup.errors import BankError, RunFailed, UserError, one_line, redacted

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What became of the records of a run, or of a sweep and its trials."""

    name: str
    delivered: int = 0
    put_right: int = 0
    """MLflow runs that were still RUNNING, and are KILLED now."""
    left: int = 0
    problem: str = ""
    """Why records are left; or who delivers them, if none are counted as left."""

    def __str__(self) -> str:
        words = [f"{self.delivered} records delivered"] if self.delivered else []
        words += [f"{self.put_right} left RUNNING by a kill, now KILLED"] if self.put_right else []
        words += [f"{self.left} records left"] if self.left else []
        words += [self.problem] if self.problem else []
        return f"{self.name}: {', '.join(words)}"


@dataclass(frozen=True)
class _Group:
    """Outboxes behind one lock."""

    name: str
    folder: Path
    outboxes: list[Path]


def sync(
    runs_dir: Path, names: Sequence[str], tracking_uri: str | None = None
) -> Iterator[Delivery]:
    """Deliver what is left; yield what there was to do, a run or sweep at a time.

    Args:
        runs_dir: the folder of all runs.
        names: runs and sweeps; none, or ``all``: every one.
        tracking_uri: where their MLflow runs are; None: where their last command put them.

    Raises:
        UserError: if there is no such folder, run or sweep, or the URI is none.
        RunFailed: at the end, if records are left.
    """
    if not runs_dir.is_dir():
        raise UserError(f"there is no runs folder {runs_dir}; give --runs-dir")
    store_for(tracking_uri, runs_dir)
    post = _Post(runs_dir, tracking_uri)
    left = 0
    for group in _groups(runs_dir, names):
        found = _sync_group(group, post)
        left += found.left
        if found.delivered or found.put_right or found.problem:
            yield found
    if left:
        raise RunFailed(
            f"{left} records are left and kept: {'; '.join(post.problems)}; "
            "give supsup sync again once that is mended"
        )


def _groups(runs_dir: Path, names: Sequence[str]) -> list[_Group]:
    found = []
    for records in sorted(runs_dir.glob(f"*/{RECORDS}")):
        found.append(_Group(records.parent.name, records.parent, [records.parent]))
    for folder in sorted((runs_dir / SWEEPS).glob("*")):
        outboxes = [folder, *sorted((folder / "trials").glob("*"))]
        held = [outbox for outbox in outboxes if (outbox / RECORDS).exists()]
        if held:
            found.append(_Group(f"sweep {folder.name}", folder, held))
    wanted = [name for name in names if name != ALL]
    for name in wanted:
        check_name("run", name)
        if not (runs_dir / name).is_dir() and not (runs_dir / SWEEPS / name).is_dir():
            raise no_such("run or sweep", name, runs_dir)
    if not wanted or len(wanted) < len(names):
        return found
    return [group for group in found if group.folder.name in wanted]


def _sync_group(group: _Group, post: "_Post") -> Delivery:
    seen = [Outbox(folder) for folder in group.outboxes]
    if not any(box.pending() or box.last_status() == "RUNNING" for box in seen):
        return Delivery(name=group.name)
    try:
        with locked(group.folder):
            # Opened again: its own command may have ended just now, and recorded that.
            boxes = [Outbox(folder) for folder in group.outboxes]
            return _deliver_all(group.name, boxes, post)
    except BankError as error:
        if "is in use by" in str(error):
            return Delivery(name=group.name, problem=f"left to its own command: {error}")
        left = sum(len(box.pending()) for box in seen)
        return Delivery(name=group.name, left=left, problem=post.note(str(error)))


def _deliver_all(name: str, boxes: Sequence[Outbox], post: "_Post") -> Delivery:
    delivered = put_right = left = 0
    problem = ""
    for box in boxes:
        if box.last_status() == "RUNNING":
            box.append("status", status="KILLED")
            put_right += 1
        count, reason = post.send(box)
        delivered, problem = delivered + count, reason or problem
        left += len(box.pending())
    return Delivery(name=name, delivered=delivered, put_right=put_right, left=left, problem=problem)


class _Post:
    """The ways to the stores; one that turns out to be closed is not tried again."""

    def __init__(self, runs_dir: Path, tracking_uri: str | None) -> None:
        self._runs_dir, self._tracking_uri = runs_dir, tracking_uri
        self._away: dict[str, str] = {}
        self.problems: list[str] = []
        """Why records are left, each reason once."""

    def send(self, box: Outbox) -> tuple[int, str]:
        """Deliver an outbox; return how many records there were, and what kept others from it."""
        pending, address = len(box.pending()), box.address()
        if not pending:
            return 0, ""
        if address is None:
            return 0, self.note(f"{box.folder} was begun by an earlier version; resume delivers")
        store = store_for(self._tracking_uri or address.tracking_uri, self._runs_dir)
        if store.uri in self._away:
            return 0, self._away[store.uri]
        try:
            return deliver(box, _sink(store, address)), ""
        # Whatever a server, a database or a network does: the records stay.
        except Exception as error:  # noqa: BLE001
            said = f"{redacted(store.uri)} doesn't take them ({type(error).__name__}: "
            reason = self.note(f"MLflow at {said}{one_line(error)})")
            if not _answers(store):
                self._away[store.uri] = reason
            return pending - len(box.pending()), reason

    def note(self, reason: str) -> str:
        """Keep a reason for the end, once."""
        if reason not in self.problems:
            self.problems.append(reason)
        return reason


def _sink(store: Store, address: Address) -> MlflowSink:
    parent = MlflowSink(store, *address.parent) if address.parent else None
    return MlflowSink(store, address.name, address.identity, parent)


def _answers(store: Store) -> bool:
    """Say whether a store answers at all: then others' records may get there."""
    try:
        experiment_id(store)
    # Any reason will do.
    except Exception:  # noqa: BLE001
        return False
    return True
