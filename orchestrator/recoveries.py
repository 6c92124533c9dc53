"""What became of finding HopSupSup's masks again, on disk and as numbers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from orchestrator.drawing import as_csv
from supsup.files import write_atomically
from supsup.hopfield import Recovery

_COLUMNS = ("tasks_learned", *(field.name for field in dataclasses.fields(Recovery)))


class Recoveries:
    """Recoveries by number of tasks learned, in a folder."""

    def __init__(self, folder: Path) -> None:
        """Point to the folder, existing or not."""
        self._folder = folder

    def write(self, learned: int, found: Sequence[Recovery]) -> None:
        """Store the recoveries among so many masks."""
        self._folder.mkdir(exist_ok=True)
        body = [dataclasses.asdict(recovery) for recovery in sorted(found, key=lambda r: r.task)]
        write_atomically(self._file(learned), json.dumps(body).encode())

    def read(self, learned: int) -> list[Recovery]:
        """Return the recoveries among so many masks; none if there are none to be trusted."""
        try:
            return [Recovery(**row) for row in json.loads(self._file(learned).read_bytes())]
        except (OSError, ValueError, TypeError):
            return []

    def table(self, numbers: Sequence[int], folder: Path) -> list[Path]:
        """Write a table of all recoveries into a folder, if there are any; return its path."""
        rows = [[k, *dataclasses.astuple(recovery)] for k in numbers for recovery in self.read(k)]
        if not rows:
            return []
        path = folder / "recovery.csv"
        write_atomically(path, as_csv([_COLUMNS, *rows]))
        return [path]

    def _file(self, learned: int) -> Path:
        return self._folder / f"recoveries-{learned:09d}.json"


def recovery_metrics(found: Sequence[Recovery]) -> dict[str, float]:
    """Return how well masks were found: how many exactly, or as the nearest; how far off; when."""
    if not found:
        return {}
    steps = [recovery.steps for recovery in found if recovery.steps > 0]
    values = {
        "hop/exact": len(steps) / len(found),
        "hop/nearest": sum(recovery.found == recovery.task for recovery in found) / len(found),
        "hop/distance": float(np.mean([recovery.distance for recovery in found])),
    }
    if steps:
        values |= {"hop/steps": float(np.mean(steps)), "hop/steps_max": float(max(steps))}
    return values


def capacity(by_learned: Mapping[int, Sequence[Recovery]]) -> int | None:
    """Return the most tasks at which every mask that was asked for was found exactly.

    Args:
        by_learned: recoveries by number of tasks learned; numbers without any don't count.

    Returns:
        0 if there are none such; None if nothing was asked for.
    """
    asked = {learned: found for learned, found in by_learned.items() if found}
    if not asked:
        return None
    whole = (k for k, found in asked.items() if all(recovery.steps > 0 for recovery in found))
    return max(whole, default=0)
