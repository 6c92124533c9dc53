"""The banks of a sweep: ordinary run folders, found by training fingerprint, one for all arms."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import session
from orchestrator.cluster import Machine
from orchestrator.runfolder import Launch, RunFolder
from supsup.bank import Bank
from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.errors import UserError
from supsup.identity import fingerprint
from supsup.ledger import segments_in
from supsup.manifest import Manifest, make_manifest


class Site:
    """The machine that trains, and the data sets, each loaded once."""

    def __init__(self, machine: Machine, data_dir: str) -> None:
        """Remember where they are."""
        self.machine, self.data_dir = machine, data_dir
        self._data: dict[tuple[str, int], Dataset] = {}

    def data(self, config: RunConfig) -> Dataset:
        """Return a run's data set, and check that the run can be done with it.

        Raises:
            UserError: if it is missing, damaged, or doesn't fit the run.
        """
        key = data_key(config)
        if key not in self._data:
            self._data[key] = session.load(config, self.data_dir)
        session.check(config, self._data[key])
        return self._data[key]

    def resolved(self, config: RunConfig) -> RunConfig:
        """Return the configuration with ``auto`` replaced by what the workers are."""
        return session.resolve_on(self.machine, config, self.data(config))

    def fingerprint(self, resolved: RunConfig) -> str:
        """Return the training fingerprint of a resolved configuration."""
        return fingerprint(resolved, self.data(resolved).sha256)

    def manifest(self, resolved: RunConfig) -> Manifest:
        """Describe the bank of a resolved configuration."""
        return make_manifest(resolved, self.data(resolved))


def data_key(config: RunConfig) -> tuple[str, int]:
    """Return what tells data sets apart."""
    return config.dataset, config.image_size


@dataclass(frozen=True)
class Found:
    """A bank on disk."""

    name: str
    blocks: list[range]
    """Tasks of its blocks, unread."""
    segments: int
    """Segments that an open-set run has learned."""


class Banks:
    """The run folders by fingerprint."""

    def __init__(self, runs_dir: Path, recipe: str) -> None:
        """Look through the runs folder once."""
        self._runs_dir, self._recipe = runs_dir, recipe
        self._names: dict[str, str] = {}
        for file in sorted(runs_dir.glob("*/manifest.json"), reverse=True):
            try:
                self._names[Bank.open(file.parent).manifest.fingerprint] = file.parent.name
            except UserError:
                continue

    def folder(self, mark: str) -> RunFolder:
        """Return the folder of the bank with this fingerprint, existing or not."""
        name = self._names.setdefault(mark, f"{self._recipe}-{mark[:8]}")
        return RunFolder(self._runs_dir, name)

    def found(self, mark: str) -> Found | None:
        """Return what there is of a bank; None if nothing."""
        if mark not in self._names or not self.folder(mark).has_bank:
            return None
        bank = Bank.open(self.folder(mark).path)
        tasks = session.learned_on_disk(bank)
        return Found(bank.path.name, tasks, segments_in(bank.path / "stream"))


def open_bank(folder: RunFolder, manifest: Manifest, launch: Launch) -> Bank:
    """Open or begin a bank, and leave what other commands need to go on with it. Hold its lock."""
    bank = session.open_bank(folder, manifest)
    if bank.manifest.fingerprint != manifest.fingerprint:
        raise UserError(f"run {folder.name} has another bank than the sweep's; rename its folder")
    bank.discard_leftovers()
    try:
        known = folder.read_launch()
    except UserError:
        folder.write_launch(launch)
        return bank
    if known.config.tasks < launch.config.tasks:
        config = dataclasses.replace(known.config, tasks=launch.config.tasks)
        folder.write_launch(dataclasses.replace(known, config=config))
    return bank


def tasks_missing(tasks: int, blocks: Sequence[range]) -> int:
    """Return how many of the first tasks no block holds."""
    held = sum(len(range(block.start, min(block.stop, tasks))) for block in blocks)
    return tasks - held
