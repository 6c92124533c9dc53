"""What a run is measured against: the same tasks, trained alike, each alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from supsup import measures
from supsup.bank import Bank
from supsup.config import RunConfig
from supsup.errors import UserError
from supsup.identity import training_fields
from supsup.manifest import Manifest

#: Training alike may differ in these: an engine without transfer rounds differently.
_MAY_DIFFER = ("mask.transfer", "train.engine")


def forward_transfer(config: RunConfig, learned_T: measures.Rates, bank: Bank) -> float | None:
    """Return what the tasks before gave to the next ones: see ``measures.forward_transfer``.

    Args:
        config: of the run.
        learned_T: its accuracies with the task given, each when the task was learned.
        bank: its bank; the run without transfer is looked for beside it.

    Returns:
        None if nothing says what the tasks had been alone.
    """
    if config.learner != "supsup":
        return None
    alone_T = learned_T
    if config.mask.transfer != "none":
        alone_T = _alone(bank.manifest, bank.path.parent)
    tasks = min(len(learned_T), len(alone_T))
    return measures.forward_transfer(learned_T[:tasks], alone_T) if tasks > 1 else None


def _alone(manifest: Manifest, runs_dir: Path) -> measures.Rates:
    """Return the accuracies [T or fewer] of a run that differs in having no transfer."""
    wanted = _identity(manifest)
    for file in sorted(runs_dir.glob("*/manifest.json")):
        try:
            other = Bank.open(file.parent)
            if other.manifest.config.mask.transfer != "none" or _identity(other.manifest) != wanted:
                continue
            stock = other.stock()
        except UserError:
            continue
        correct, at = [], 0
        for tasks, gg_correct in zip(stock.tasks, stock.gg_correct, strict=True):
            if tasks.start != at:
                break
            correct.append(gg_correct)
            at = tasks.stop
        correct_T = np.array(list(itertools.chain(*correct)), dtype=np.float64)
        return np.asarray(correct_T / other.manifest.sizes(at))
    return np.empty(0)


def _identity(manifest: Manifest) -> dict[str, Any]:
    fields = training_fields(manifest.config) | {"dataset_sha256": manifest.dataset_sha256}
    return {name: value for name, value in fields.items() if name not in _MAY_DIFFER}
