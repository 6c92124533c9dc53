"""The ledger of an open-set run: every step that a learner took, and the masks as they are now.

``steps.jsonl`` has one line per segment, and writing that line is the commit: what a line names is
on disk before it. ``masks/`` has one safetensors file per mask, of the step that changed it last:
the packed mask and, while its training can go on, scores and RMSprop's mean squares. A reader that
comes after a kill finds every line but perhaps the last, and each line's mask whole.

Shapes: B bytes of a packed mask, W weights.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from supsup.apprentice import MaskState
from supsup.errors import BankError, DiskFault
from supsup.files import make_folder, publish, sync_folder
from supsup.members import Packed
from supsup.openset import Step

_MASK_NAME = re.compile(r"(\d{9})-(\d{9})\.safetensors")
_STEPS = "steps.jsonl"
_LINE = ("segment", "mask", "new", "mixed", "margin", "epsilon", "decision_seconds", "batches")


def segments_in(folder: Path) -> int:
    """Return how many segments the ledger in a folder has; 0 if there is none. Changes nothing."""
    file = folder / _STEPS
    return file.read_bytes().count(b"\n") if file.exists() else 0


@dataclass(frozen=True)
class _Version:
    """Which step changed a mask last, and the CRC-32 of the file that it left."""

    segment: int
    crc32: int


class Ledger:
    """The ledger in a folder. One writer: hold the run's lock."""

    def __init__(self, folder: Path) -> None:
        """Open a ledger, or begin one; removes what a killed writer left unfinished.

        Raises:
            BankError: if a line of it can't be read.
        """
        self._file, self._masks = folder / _STEPS, folder / "masks"
        make_folder(self._masks)
        self._versions: dict[int, _Version] = {}
        self._last: tuple[int, MaskState | None] | None = None
        self.steps: list[Step] = []
        if self._file.exists():
            self._read()
        self._sweep()

    @property
    def segments(self) -> int:
        """Segments that are learned."""
        return len(self.steps)

    def commit(self, step: Step) -> None:
        """Store a step. When this returns, it survives a power cut.

        Raises:
            DiskFault: if the disk fails; the steps before it are safe.
        """
        line: dict[str, Any] = {name: getattr(step, name) for name in _LINE}
        try:
            if step.mask is not None and step.packed_B is not None:
                line["crc32"] = self._write_mask(step.mask, step.segment, step.packed_B, step.state)
            self._append(line)
        except OSError as error:
            raise DiskFault(
                f"{self._file.parent} can't be written: {error.strerror}; the steps before it are "
                "safe, mend the disk and run supsup resume"
            ) from error
        self._take(line)
        if step.mask is not None and step.packed_B is not None:
            self._last = step.mask, step.state

    def masks(self) -> Iterator[tuple[int, Packed]]:
        """Yield every allocated mask [B] as it is now, in order.

        Raises:
            BankError: if one is missing or damaged; names it.
        """
        for mask in sorted(self._versions):
            yield mask, self._load(mask)["packed"]

    def state(self, mask: int) -> MaskState | None:
        """Return what a mask's training goes on from; None if it can't go on.

        Raises:
            BankError: if the mask is missing or damaged.
        """
        if self._last and self._last[0] == mask:
            return self._last[1]
        tensors = self._load(mask)
        if "scores" not in tensors:
            return None
        return MaskState(
            scores_W=tensors["scores"],
            square_avg_W=tensors["square_avg"],
            batches=int(tensors["batches"][0]),
        )

    def clear(self) -> None:
        """Remove the masks; the steps stay. For when a bank holds them."""
        for path in self._masks.iterdir():
            path.unlink()

    # --- files ---------------------------------------------------------------------------------

    def _write_mask(
        self, mask: int, segment: int, packed_B: Packed, state: MaskState | None
    ) -> int:
        tensors: dict[str, npt.NDArray[Any]] = {"packed": packed_B}
        if state is not None:
            tensors |= {
                "scores": state.scores_W,
                "square_avg": state.square_avg_W,
                "batches": np.array([state.batches], np.int64),
            }
        content = safetensors.numpy.save(tensors)
        path = self._path(mask, segment)
        path.unlink(missing_ok=True)  # of a step that was never committed
        publish(path, content)
        return zlib.crc32(content)

    def _append(self, line: dict[str, Any]) -> None:
        with self._file.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not self.steps:
            sync_folder(self._file.parent)

    def _take(self, line: dict[str, Any]) -> None:
        step = Step(**{name: line[name] for name in _LINE}, packed_B=None, state=None)
        self.steps.append(step)
        if "crc32" in line and step.mask is not None:
            before = self._versions.get(step.mask)
            self._versions[step.mask] = _Version(step.segment, line["crc32"])
            if before is not None:
                self._path(step.mask, before.segment).unlink(missing_ok=True)

    def _read(self) -> None:
        content = self._file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._file, whole)
        for number, text in enumerate(content[:whole].splitlines()):
            try:
                line = json.loads(text)
                self._take(line)
            except (ValueError, KeyError, TypeError):
                raise BankError(f"{self._file} is damaged: line {number + 1}") from None

    def _sweep(self) -> None:
        """Remove files of steps that were never committed."""
        for path in self._masks.iterdir():
            name = _MASK_NAME.fullmatch(path.name)
            version = self._versions.get(int(name[1])) if name else None
            if version is None or name is None or version.segment != int(name[2]):
                path.unlink()

    def _path(self, mask: int, segment: int) -> Path:
        return self._masks / f"{mask:09d}-{segment:09d}.safetensors"

    def _load(self, mask: int) -> dict[str, Any]:
        version = self._versions[mask]
        path = self._path(mask, version.segment)
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if zlib.crc32(content) == version.crc32:
                return safetensors.numpy.load(content)
        raise BankError(
            f"{path} is missing or damaged; an open-set run can't go on without it: begin again "
            "with another --name"
        )
