"""Faults on a real run: the command in a process of its own, and what happens to it.

The command is ``supsup run``, with a Ray of its own. A fault is a signal to one of its processes;
the command is resumed whenever it ends otherwise than well.
"""

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from supsup.bank import Bank

SUPSUP = str(Path(sys.executable).with_name("supsup"))
_AGAIN = re.compile(r"^.*: tried .*, since .*$", re.MULTILINE)


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the worker actors of a command."""
    return _of(pid, lambda name: name.startswith("ray::") and "Worker" in name)


def _of(pid: int, wanted: Callable[[str], bool]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if wanted(" ".join(process.cmdline())):
                    found.append(process)
    return found


class Command:
    """A run in a process of its own, killed and resumed."""

    def __init__(
        self,
        runs_dir: Path,
        name: str,
        words: Sequence[str],
        log: Path,
        behind: Sequence[str] = (),
    ) -> None:
        """Start it.

        Args:
            runs_dir: the folder of all runs.
            name: the run's name.
            words: what follows ``supsup run``.
            log: where what it says goes.
            behind: a command that the run's own is put behind.
        """
        self.runs_dir, self.name, self.log = runs_dir, name, log
        self._behind = behind
        self._where = ("--runs-dir", str(runs_dir))
        self.started = 0
        self.seen: dict[str, str] = {}
        """SHA-256 of every block file that was ever there, by name."""
        self._process = self._start(("run", *words, "--name", name, *self._where))

    @property
    def pid(self) -> int:
        """The process id of the command at work."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it works."""
        return self._process.poll()

    def resume(self, *words: str) -> None:
        """Go on with the run, once its command has ended."""
        self._process.wait()
        self._process = self._start(("resume", self.name, *self._where, *words))

    def wait(self, seconds: float) -> int:
        """Return the exit status."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """Kill the command, and whatever it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def blocks(self) -> int:
        """Return how many blocks are committed; keeps in mind what is in those that are new."""
        folder = self.runs_dir / self.name / "blocks"
        names = {path.name for path in folder.glob("tasks-*")} if folder.exists() else set()
        for name in names - self.seen.keys():
            self.seen[name] = _sha256(folder / name)
        return len(names)

    def lost(self) -> list[str]:
        """Return the blocks that were there once, and are not there any more or are others."""
        folder = self.runs_dir / self.name / "blocks"
        return [
            name
            for name, before in self.seen.items()
            if not (folder / name).exists() or _sha256(folder / name) != before
        ]

    def said(self) -> str:
        """Return what all commands have said."""
        return self.log.read_text(errors="replace")

    def tried_again(self) -> int:
        """Return how often a job was tried again within a command."""
        return len(_AGAIN.findall(self.said()))

    def bank_sha256(self) -> str:
        """Return the SHA-256 over all masks."""
        bank = Bank.open(self.runs_dir / self.name)
        return bank.sha256(sum(len(tasks) for tasks, _ in bank.blocks()))

    def _start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        self.started += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._behind, SUPSUP, *words], stdout=log, stderr=log, start_new_session=True
            )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- faults ----------------------------------------------------------------------------------


def kill_worker(command: Command, draw: random.Random) -> bool:
    """SIGKILL a worker; say whether there was one."""
    return _signal(workers_of(command.pid), draw, signal.SIGKILL)


def stop_worker(command: Command, draw: random.Random) -> bool:
    """SIGSTOP a worker for some seconds."""
    return _pause(workers_of(command.pid), draw)


def stop_driver(command: Command, draw: random.Random) -> bool:
    """SIGSTOP the command itself for some seconds."""
    return command.status is None and _pause([psutil.Process(command.pid)], draw)


def kill_driver(command: Command, draw: random.Random) -> bool:
    """SIGKILL the command alone: its Ray and workers must see for themselves that it is gone."""
    return command.status is None and _signal([psutil.Process(command.pid)], draw, signal.SIGKILL)


def kill_all(command: Command, draw: random.Random) -> bool:
    """SIGKILL the command, its Ray and its workers at once: a power cut, but for the disk."""
    if command.status is not None:
        return False
    for process in psutil.Process(command.pid).children(recursive=True):
        _signal([process], draw, signal.SIGKILL)
    command.kill()
    return True


def kill_head(command: Command, draw: random.Random) -> bool:
    """SIGKILL the head of the command's Ray (GCS)."""
    return _signal(_of(command.pid, lambda name: "gcs_server" in name), draw, signal.SIGKILL)


def _signal(processes: Sequence[psutil.Process], draw: random.Random, number: int) -> bool:
    if not processes:
        return False
    try:
        draw.choice(processes).send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _pause(processes: Sequence[psutil.Process], draw: random.Random) -> bool:
    if not processes:
        return False
    chosen = draw.choice(processes)
    try:
        chosen.suspend()
        time.sleep(draw.uniform(1.0, 5.0))
        chosen.resume()
    except psutil.NoSuchProcess:
        return False
    return True


Fault = Callable[[Command, random.Random], bool]
FAULTS: dict[str, tuple[Fault, int]] = {
    "SIGKILL of a worker": (kill_worker, 9),
    "SIGSTOP of a worker, 1 to 5 s": (stop_worker, 4),
    "SIGSTOP of the driver, 1 to 5 s": (stop_driver, 2),
    "SIGKILL of the driver, then resume": (kill_driver, 3),
    "SIGKILL of everything, then resume": (kill_all, 2),
    "SIGKILL of Ray's head, then resume": (kill_head, 1),
}
"""By name: what is done, and its weight."""


@dataclass
class Record:
    """What became of a run under faults."""

    faults: Counter[str] = field(default_factory=Counter)
    recovery: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from a fault to the next block that was committed, by fault."""
    commands: int = 0
    seconds: float = 0.0


def disturb(
    command: Command,
    faults: Sequence[str],
    draw: random.Random,
    total: int,
    seconds: float = 3600.0,
) -> Record:
    """Have faults happen to a run, spread over its blocks, and resume it until it ends well.

    A fault that comes when it can't happen, such as a worker's death when there is none, is tried
    again until it can. Of ``total`` blocks, the last is left undisturbed.

    Raises:
        TimeoutError: if the run doesn't end in so many seconds.
    """
    record, left, open_faults = Record(), list(faults), []
    started = time.monotonic()
    before, next_at = 0, started
    while True:
        now, blocks = time.monotonic(), command.blocks()
        if now - started > seconds:
            command.kill()
            raise TimeoutError(f"the run didn't end in {seconds:.0f} s")
        if blocks > before:
            for name, at in open_faults:
                record.recovery.setdefault(name, []).append(now - at)
            before, open_faults = blocks, []
        if command.status == 0:
            break
        if command.status is not None:
            command.resume()
        # So many faults shall have happened by now.
        due = len(faults) * (blocks + 0.9) / total
        if left and len(faults) - len(left) < due and now >= next_at:
            if FAULTS[left[0]][0](command, draw):
                name = left.pop(0)
                record.faults[name] += 1
                open_faults.append((name, time.monotonic()))
            next_at = time.monotonic() + draw.uniform(0.5, 3.0)
        time.sleep(0.1)
    record.commands, record.seconds = command.started, time.monotonic() - started
    return record


def drawn(count: int, draw: random.Random) -> list[str]:
    """Return so many faults, each kind by its weight, the most frequent at least once."""
    names = list(FAULTS)
    weights = [weight for _, weight in FAULTS.values()]
    total = sum(weights)
    chosen = [
        n for n, weight in zip(names, weights, strict=True) for _ in range(weight * count // total)
    ]
    chosen += draw.choices(names, weights, k=count - len(chosen))
    draw.shuffle(chosen)
    return chosen
