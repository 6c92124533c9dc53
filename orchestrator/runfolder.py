"""The folder of a run: its name, what was asked for, its evaluations, and its bank.

runs/NAME/  launch.json       what was asked for; rewritten when more is asked
            manifest.json     the bank's (supsup.bank), with blocks/ and damaged/
            evaluations/      one JSON file per checkpoint and evaluation setting
            records.jsonl     what tracking has to deliver (orchestrator.tracking)
            report/           table, per-task table and picture
"""

import dataclasses
import hashlib
import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from supsup.bank import Bank
from supsup.config import EvalConfig, RunConfig, method_parts
from supsup.errors import ConfigError, UserError, near
from supsup.evaluate import COUNTS, Evaluation
from supsup.fields import from_dict, to_dict
from supsup.files import write_atomically

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_EVAL = TypeAdapter(EvalConfig)
#: The folder of sweeps among the runs.
SWEEPS = "sweeps"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the user asked for: enough to go on after anything."""

    recipe: str
    config: RunConfig
    data_dir: str
    tracking_uri: str | None
    identity: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """Names the run for the tracking server, whatever becomes of the folder's name."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, runs_dir: Path, name: str) -> None:
        """Point to a run, existing or not.

        Raises:
            ConfigError: if the name is not fit to be one, or leads out of the runs folder.
        """
        check_name("run", name)
        if name == SWEEPS:
            raise ConfigError(f"run name is {name}, the folder of all sweeps; give another --name")
        self.name = name
        self.path = runs_dir / name
        if self.path.resolve().parent != runs_dir.resolve():
            raise ConfigError(f"run {name} is a link that leaves {runs_dir}; give another --name")

    @property
    def has_bank(self) -> bool:
        """Whether training ever began here."""
        return Bank.exists(self.path)

    # --- launch --------------------------------------------------------------------------------

    def write_launch(self, launch: Launch) -> None:
        """Store what was asked for."""
        body = dataclasses.asdict(launch) | {"config": to_dict(launch.config)}
        write_atomically(self.path / "launch.json", json.dumps(body, indent=1).encode())

    def read_launch(self) -> Launch:
        """Return what was asked for last.

        Raises:
            UserError: if there is no such run, or its file is damaged.
        """
        file = self.path / "launch.json"
        try:
            body = json.loads(file.read_bytes())
            return Launch(**{**body, "config": from_dict(body["config"])})
        except FileNotFoundError:
            raise no_such("run", self.name, self.path.parent) from None
        except OSError as error:
            raise UserError(f"{file} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, UserError):
            raise UserError(
                f"{file} is damaged; give the run command again with --name {self.name}"
            ) from None

    def identity(self) -> str | None:
        """Return the identity that the run was begun with; None if that is not known."""
        try:
            return self.read_launch().identity
        except UserError:
            return None

    # --- evaluations ---------------------------------------------------------------------------

    def write_evaluation(self, settings: EvalConfig, evaluation: Evaluation) -> None:
        """Store the evaluation of a checkpoint."""
        body = {
            "settings": _settings(settings),
            "columns": COUNTS,
            "learned": evaluation.learned,
            "tasks": evaluation.tasks,
            "methods": evaluation.methods,
            "counts": evaluation.counts.tolist(),
            "confusions": evaluation.confusions_X3.tolist(),
        }
        file = self._evaluation_file(settings, evaluation.learned)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(body).encode())

    def read_evaluation(
        self, settings: EvalConfig, learned: int, tasks: tuple[int, ...]
    ) -> Evaluation | None:
        """Return a stored evaluation of these tasks; None if there is none to be trusted."""
        try:
            body = json.loads(self._evaluation_file(settings, learned).read_bytes())
            counts = np.array(body["counts"], dtype=np.int64)
            confusions = np.array(body["confusions"], dtype=np.int64).reshape(-1, 3)
            same = body["tasks"] == list(tasks)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not same or counts.shape != (len(settings.methods), len(tasks), len(COUNTS)):
            return None
        return Evaluation(
            learned=learned,
            tasks=tasks,
            methods=settings.methods,
            counts=counts,
            confusions_X3=confusions,
        )

    def _evaluation_file(self, settings: EvalConfig, learned: int) -> Path:
        text = json.dumps(_settings(settings), sort_keys=True)
        short = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.path / "evaluations" / f"k-{learned:09d}-{short}.json"


def no_such(what: str, name: str, folder: Path) -> UserError:
    """Return the error for a run or sweep that a folder lacks; names the one that was meant."""
    there = [path.name for path in folder.glob("*") if path.is_dir()]
    hint = near(name, there) or "; see its names, or give --runs-dir"
    return UserError(f"there is no {what} {name} in {folder}{hint}")


def check_name(what: str, name: str) -> None:
    """Check a name that becomes a folder's.

    Raises:
        ConfigError: if it is not fit for that.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} name is {_printable(name)}, must be 1 to 64 of A-Z a-z 0-9 . _ - "
            "with no leading dot or dash"
        )


def check_runs_dir(runs_dir: Path) -> None:
    """Check that runs can be stored there, without creating anything.

    Raises:
        ConfigError: if it is a file, or can't be written to.
    """
    existing = next(p for p in (runs_dir, *runs_dir.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise ConfigError(f"runs folder {runs_dir}: {existing} is not a folder; give --runs-dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"runs folder {runs_dir}: no permission to write; give --runs-dir")


def find_run(runs_dir: Path, fingerprint: str) -> str | None:
    """Return the name of a run in the folder whose bank has this fingerprint, if any."""
    for manifest in sorted(runs_dir.glob("*/manifest.json")):
        try:
            if Bank.open(manifest.parent).manifest.fingerprint == fingerprint:
                return manifest.parent.name
        except UserError:
            continue
    return None


def _settings(settings: EvalConfig) -> dict[str, Any]:
    """Return what shapes an evaluation of a given number of tasks."""
    body: dict[str, Any] = _EVAL.dump_python(settings, mode="json")
    algorithms = {method_parts(method)[1] for method in settings.methods}
    unused = {"at", "memory_mb"}
    if "sketch" not in algorithms:
        unused.add("sketch")
    if not algorithms & {"sketch", "shortlist"}:
        unused.add("shortlist")
    return {name: value for name, value in body.items() if name not in unused}


def _printable(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
