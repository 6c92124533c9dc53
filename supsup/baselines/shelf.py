"""What a baseline learned, on disk: a file per task, and the weights that tasks share.

As in a bank (supsup.bank) every file is absent or complete, carries a checksum, and is never
overwritten; equal work gives equal bytes.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from supsup.baselines.learner import Learned
from supsup.baselines.network import Arrays
from supsup.errors import BankError, DeterminismFault, DiskFault, one_line
from supsup.files import make_folder, publish, sync_folder


class Shelf:
    """The tasks that a run learned. Writing needs the lock of the run's folder."""

    def __init__(self, path: Path, fingerprint: str, *, forgets: bool) -> None:
        """Point to a folder, existing or not.

        Args:
            path: the run's folder.
            fingerprint: of the run's training.
            forgets: whether the shared weights after a task replace those before it.
        """
        self._run, self._path, self._fingerprint = path, path / "learned", fingerprint
        self._forgets = forgets

    def commit(self, learned: Learned) -> None:
        """Store a task. When this returns, it survives a power cut.

        Raises:
            DeterminismFault: if it is there already, and was learned otherwise.
            DiskFault: if the disk fails.
        """
        make_folder(self._path)
        body = {
            **{f"own/{name}": array for name, array in learned.own.items()},
            "correct": learned.correct,
            "loss": np.array([learned.loss], dtype=np.float64),
        }
        if learned.trunk is not None:
            self._publish("trunk", learned.task, learned.trunk)
        self._publish("task", learned.task, body)
        if self._forgets:
            for path in self._path.glob("trunk-*.safetensors"):
                if path != self._file("trunk", learned.task):
                    path.unlink()

    def stock(self) -> Iterator[tuple[Learned, str]]:
        """Yield every task in order, and what is wrong with it: "" if nothing is."""
        for path in sorted(self._path.glob("task-*.safetensors")):
            task = int(path.stem.removeprefix("task-"))
            try:
                yield self.read(task), ""
            except BankError as error:
                yield _unknown(task), str(error)

    def tasks(self) -> list[int]:
        """Return the tasks on disk, ascending, unread."""
        names = (path.stem.removeprefix("task-") for path in self._path.glob("task-*.safetensors"))
        return sorted(map(int, names))

    def read(self, task: int) -> Learned:
        """Return a task, without the shared weights.

        Raises:
            BankError: if it is missing or damaged.
        """
        body = self._read("task", task)
        own = {key.removeprefix("own/"): x for key, x in body.items() if key.startswith("own/")}
        loss = float(body["loss"][0])
        return Learned(
            task=task, own=own, trunk=None, correct=body["correct"], loss=loss, seconds=0.0
        )

    def trunk(self, task: int) -> Arrays:
        """Return the shared weights as a task left them.

        Raises:
            BankError: if they are missing or damaged.
        """
        return self._read("trunk", task)

    def shared(self) -> Arrays | None:
        """Return the shared weights as they are now; None if they come from the seed.

        Raises:
            BankError: if they are damaged.
        """
        files = sorted(self._path.glob("trunk-*.safetensors"))
        return self.trunk(int(files[-1].stem.removeprefix("trunk-"))) if files else None

    def discard_leftovers(self) -> None:
        """Remove temporary files that a killed writer left."""
        for path in self._path.glob(".*.tmp"):
            path.unlink()

    def set_aside(self, kind: str, task: int) -> None:
        """Move a file that can't be trusted out of the way, so that it is learned again."""
        path = self._file(kind, task)
        if path.exists():
            folder = self._run / "damaged"
            folder.mkdir(exist_ok=True)
            path.rename(folder / f"{sum(1 for _ in folder.iterdir()):04d}-{path.name}")
            sync_folder(self._path)

    def size(self) -> int:
        """Return the bytes on disk."""
        return sum(path.stat().st_size for path in self._path.glob("*.safetensors"))

    # --- files ---------------------------------------------------------------------------------

    def _file(self, kind: str, task: int) -> Path:
        return self._path / f"{kind}-{task:09d}.safetensors"

    def _publish(self, kind: str, task: int, body: Arrays) -> None:
        path = self._file(kind, task)
        arrays = {name: np.ascontiguousarray(body[name]) for name in sorted(body)}
        header = {"run": self._fingerprint, kind: task, "crc32": _crc32(arrays)}
        content = safetensors.numpy.save(arrays, metadata={"supsup": json.dumps(header)})
        try:
            new = publish(path, content)
        except OSError as error:
            raise DiskFault(
                f"{path} can't be written: {error.strerror}; the tasks before it are safe, "
                "mend the disk and run supsup resume"
            ) from error
        if not new and path.read_bytes() != content:
            raise DeterminismFault(
                f"{path} exists and differs from what was learned now for the same task; "
                "versions or hardware changed under this run, start another with --name"
            )

    def _read(self, kind: str, task: int) -> Arrays:
        path = self._file(kind, task)
        try:
            with safetensors.safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {}).get("supsup", "{}"))
                body = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except FileNotFoundError:
            raise BankError(f"{path} is missing; learn it again with supsup resume") from None
        except (safetensors.SafetensorError, json.JSONDecodeError, OSError, TypeError) as error:
            raise BankError(f"{path} is damaged: unreadable ({one_line(error)})") from None
        if header != {"run": self._fingerprint, kind: task, "crc32": _crc32(body)}:
            raise BankError(f"{path} is damaged: its checksum or its run doesn't match")
        return body


def _unknown(task: int) -> Learned:
    none = np.zeros(0, dtype=np.int64)
    return Learned(task=task, own={}, trunk=None, correct=none, loss=0.0, seconds=0.0)


def _crc32(arrays: Arrays) -> int:
    crc = 0
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name}{array.dtype}{array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
