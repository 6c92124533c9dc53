"""The mask bank: a directory that holds a run's masks, readable while it grows.

``manifest.json``, written once, says what the bank is; ``blocks/`` holds one safetensors file
per block of tasks. The directory is the index. A block is committed by linking a synced
temporary file to its final name, so every state on disk is "absent" or "complete"; a block is
never overwritten. See docs/bank.md for the format.

Shapes: T tasks, B bytes of a packed mask.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from supsup.errors import BankError, DeterminismFault, DiskFault, one_line
from supsup.files import publish, sync_folder, write_atomically
from supsup.manifest import Manifest, dump_manifest, parse_manifest
from supsup.masking import padding_is_zero
from supsup.train import TrainedBlock

_BLOCK_NAME = re.compile(r"tasks-(\d{9})-(\d{9})\.safetensors")
#: What a block holds of every task, in the order of the checksum.
_ROW_TENSORS = {
    "masks": np.uint8,
    "gg_correct": np.int64,
    "loss": np.float32,
    "statistics": np.float32,
}


@dataclasses.dataclass(frozen=True)
class Damage:
    """A block that can't be trusted, and why."""

    path: Path
    tasks: range
    reason: str

    def __str__(self) -> str:
        return f"tasks {self.tasks.start} to {self.tasks[-1]} ({self.path.name}): {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What a bank holds of some adjoining tasks."""

    masks: npt.NDArray[np.uint8]
    gg_correct: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]
    statistics: npt.NDArray[np.float32]
    """Of batch norm [T, statistics]; of no width without batch norm, and not stored then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stock:
    """What a bank holds, every block of it read and checked."""

    tasks: list[range]
    """The tasks of each block that can be trusted, in order."""
    gg_correct: list[npt.NDArray[np.int64]]
    """Test images that are right when the task is given, per task of each of those blocks."""
    damaged: list[Damage]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a bank, or the folder that it will be in, for writing.

    Raises:
        BankError: if another process holds it; names its pid and host.
    """
    lock = filelock.FileLock(path / "lock", blocking=False, mode=0o600)
    holder = path / "lock-holder.json"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BankError(f"{path} is in use by {_holder(holder)}; wait for it or stop it") from None
    except OSError as error:
        raise BankError(f"{path} can't be locked: {error.strerror}") from None
    try:
        who = {"pid": os.getpid(), "host": socket.gethostname()}
        write_atomically(holder, json.dumps(who).encode())
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_bytes())
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


class Bank:
    """A mask bank on disk. Reading needs no lock; committing does: see ``locked``."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use ``Bank.create`` or ``Bank.open``."""
        self.path = path
        self.manifest = manifest
        self._blocks = path / "blocks"

    # --- making and opening ------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> "Bank":
        """Create an empty bank.

        Raises:
            BankError: if there is one already.
        """
        (path / "blocks").mkdir(parents=True, exist_ok=True)
        if not publish(path / "manifest.json", dump_manifest(manifest)):
            raise BankError(f"{path} has a bank already")
        sync_folder(path.parent)
        return cls(path, manifest)

    @classmethod
    def open(cls, path: Path) -> "Bank":
        """Open an existing bank.

        Raises:
            BankError: if there is none, or its manifest is damaged or from a later version.
        """
        file = path / "manifest.json"
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            raise BankError(f"{path} is no mask bank: it has no manifest.json") from None
        except OSError as error:
            raise BankError(f"{file} can't be read: {error.strerror}") from None
        return cls(path, parse_manifest(file, text))

    @staticmethod
    def exists(path: Path) -> bool:
        """Say whether there is a bank, damaged or not."""
        return (path / "manifest.json").exists()

    # --- writing -----------------------------------------------------------------------------

    def commit(self, block: TrainedBlock) -> Path:
        """Store a block. When this returns, it survives a power cut.

        A block that is there already with equal bytes is a retry that arrived twice.

        Raises:
            DeterminismFault: if it is there already with other bytes.
            BankError: if the block doesn't fit this bank; a ``DiskFault`` if the disk fails.
        """
        tasks = range(block.first, block.first + len(block.masks))
        statistics = block.statistics
        if statistics is None:
            statistics = np.empty((len(tasks), 0), np.float32)
        rows = Rows(
            masks=block.masks, gg_correct=block.gg_correct, loss=block.loss, statistics=statistics
        )
        problem = self._misfit(rows)
        if problem:
            raise BankError(f"block of task {block.first} doesn't fit {self.path}: {problem}")
        path = self._blocks / f"tasks-{tasks.start:09d}-{tasks[-1]:09d}.safetensors"
        content = self._encode(tasks, rows)
        try:
            new = publish(path, content)
        except OSError as error:
            raise DiskFault(
                f"{path} can't be written: {error.strerror}; the blocks before it are safe, "
                "mend the disk and run supsup resume"
            ) from error
        if not new and path.read_bytes() != content:
            raise DeterminismFault(
                f"{path} exists and differs from what was trained now for the same tasks; "
                "versions or hardware changed under this bank, start another with --name"
            )
        return path

    def discard_leftovers(self) -> None:
        """Remove temporary files that a killed writer left. Hold the lock."""
        for path in self._blocks.glob(".*.tmp"):
            path.unlink()

    def set_aside(self, damage: Damage) -> Path:
        """Move a damaged block out of the way, so that its tasks count as missing."""
        folder = self.path / "damaged"
        folder.mkdir(exist_ok=True)
        number = sum(1 for _ in folder.iterdir())
        target = folder / f"{number:04d}-{damage.path.name}"
        damage.path.rename(target)
        sync_folder(self._blocks)
        return target

    # --- reading -----------------------------------------------------------------------------

    def blocks(self) -> list[tuple[range, Path]]:
        """Return the blocks on disk in task order, unread.

        Raises:
            BankError: if two blocks hold the same task.
        """
        found = []
        for path in self._blocks.iterdir():
            name = _BLOCK_NAME.fullmatch(path.name)
            if name:
                found.append((range(int(name[1]), int(name[2]) + 1), path))
        found.sort(key=lambda item: item[0].start)
        for (before, first), (after, second) in itertools.pairwise(found):
            if after.start < before.stop:
                raise BankError(
                    f"task {after.start} is in both {first.name} and {second.name}; "
                    "remove one of them"
                )
        return found

    def verify(self) -> Iterator[tuple[range, Rows | Damage]]:
        """Read every block in full; yield its tasks, and its rows or what is wrong with it."""
        for tasks, path in self.blocks():
            try:
                yield tasks, self._read_block(tasks, path, tasks)
            except BankError as error:
                reason = str(error).rpartition(" is damaged: ")[2]
                yield tasks, Damage(path, tasks, reason)

    def stock(self) -> Stock:
        """Read and check every block, and say what there is; keeps none of the masks."""
        stock = Stock(tasks=[], gg_correct=[], damaged=[])
        for tasks, found in self.verify():
            if isinstance(found, Damage):
                stock.damaged.append(found)
            else:
                stock.tasks.append(tasks)
                stock.gg_correct.append(found.gg_correct)
        return stock

    def read(self, tasks: range) -> Rows:
        """Return the rows of some tasks, checked. Reads those tasks' bytes alone.

        Raises:
            BankError: if a task is missing or damaged; names it.
        """
        count = len(tasks)
        rows = Rows(
            masks=np.empty((count, self.manifest.mask_bytes), np.uint8),
            gg_correct=np.empty(count, np.int64),
            loss=np.empty(count, np.float32),
            statistics=np.empty((count, self.manifest.statistics), np.float32),
        )
        for wanted, part in self._read_through(tasks):
            place = slice(wanted.start - tasks.start, wanted.stop - tasks.start)
            for name in _ROW_TENSORS:
                getattr(rows, name)[place] = getattr(part, name)
        return rows

    def sha256(self, tasks: int) -> str:
        """Return the SHA-256 over the masks of the first tasks, in task order.

        Raises:
            BankError: if one of them is missing or damaged; names it.
        """
        digest = hashlib.sha256()
        for _, part in self._read_through(range(tasks)):
            digest.update(part.masks.data)
        return digest.hexdigest()

    def size(self, learned: int | None = None) -> int:
        """Return the bytes on disk of all blocks, or of those with the first ``learned`` tasks."""
        return sum(
            path.stat().st_size
            for tasks, path in self.blocks()
            if learned is None or tasks.start < learned
        )

    # --- one block ---------------------------------------------------------------------------

    def _misfit(self, rows: Rows) -> str | None:
        manifest = self.manifest
        count = len(rows.masks)
        shapes = {
            "masks": (count, manifest.mask_bytes),
            "gg_correct": (count,),
            "loss": (count,),
            "statistics": (count, manifest.statistics),
        }
        for name, shape in shapes.items():
            array = getattr(rows, name)
            if array.shape != shape or array.dtype != _ROW_TENSORS[name] or not count:
                return (
                    f"{name} is {array.dtype} {array.shape}, must be {_ROW_TENSORS[name]} {shape}"
                )
        if not padding_is_zero(rows.masks, manifest.layers):
            return "there are bits set behind the last weight of a layer"
        if rows.gg_correct.min() < 0 or rows.gg_correct.max() > manifest.test_images:
            return f"gg_correct must lie in 0..{manifest.test_images}"
        return None

    def _encode(self, tasks: range, rows: Rows) -> bytes:
        # One metadata key: safetensors doesn't promise an order for several.
        header = {"bank": self.manifest.fingerprint, "first": tasks.start, "last": tasks[-1]}
        tensors = {
            **{name: np.ascontiguousarray(getattr(rows, name)) for name in self._stored()},
            "crc32": _crc32(rows),
        }
        return safetensors.numpy.save(tensors, metadata={"supsup": json.dumps(header)})

    def _read_through(self, tasks: range) -> Iterator[tuple[range, Rows]]:
        """Yield some tasks with their rows, block by block in order.

        Raises:
            BankError: if a task is missing or damaged; names it.
        """
        expected = tasks.start
        for block, path in self.blocks():
            wanted = range(max(block.start, expected), min(block.stop, tasks.stop))
            if wanted.start != expected:
                break
            if wanted:
                yield wanted, self._read_block(block, path, wanted)
                expected = wanted.stop
        if expected != tasks.stop:
            raise BankError(
                f"{self.path} lacks task {expected}; train it with supsup resume {self.path.name}"
            )

    def _read_block(self, block: range, path: Path, wanted: range) -> Rows:
        """Read some tasks of a block through a memory map.

        Raises:
            BankError: naming the block, if it can't be trusted.
        """
        local = slice(wanted.start - block.start, wanted.stop - block.start)
        try:
            with safetensors.safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {}).get("supsup", "{}"))
                slices = {name: file.get_slice(name) for name in (*self._stored(), "crc32")}
                counts = {part.get_shape()[0] for part in slices.values()}
                crc32 = slices.pop("crc32")[local]
                read = {name: part[local] for name, part in slices.items()}
                read.setdefault("statistics", np.empty((len(wanted), 0), np.float32))
                rows = Rows(**read)
        except (safetensors.SafetensorError, json.JSONDecodeError, OSError, TypeError) as error:
            raise BankError(self._damaged(block, path, f"unreadable ({one_line(error)})")) from None
        expected = {"bank": self.manifest.fingerprint, "first": block.start, "last": block[-1]}
        if header != expected:
            problem = f"its header says {header}, not {expected}"
        elif counts != {len(block)}:
            problem = f"it doesn't hold {len(block)} tasks"
        else:
            problem = self._misfit(rows) or _crc_problem(rows, crc32, wanted) or ""
        if problem:
            raise BankError(self._damaged(block, path, problem))
        return rows

    def _stored(self) -> list[str]:
        """Return what a block of this bank holds of every task."""
        return [name for name in _ROW_TENSORS if name != "statistics" or self.manifest.statistics]

    def _damaged(self, block: range, path: Path, reason: str) -> str:
        return f"{path.name} (tasks {block.start} to {block[-1]}) is damaged: {reason}"


def _crc32(rows: Rows) -> npt.NDArray[np.int64]:
    """Return a CRC-32 per task over everything that the block holds of it."""
    checksums = np.zeros(len(rows.masks), np.int64)
    for name in _ROW_TENSORS:
        for i, row in enumerate(getattr(rows, name)):
            checksums[i] = zlib.crc32(row.tobytes(), int(checksums[i]))
    return checksums


def _crc_problem(rows: Rows, crc32: npt.NDArray[np.int64], tasks: range) -> str | None:
    bad = np.flatnonzero(_crc32(rows) != crc32)
    if not len(bad):
        return None
    return "checksum of task " + ", ".join(str(tasks[int(i)]) for i in bad) + " doesn't match"
