"""What a sweep would do, before it does anything: pure planning, and what it needs to know."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from supsup.baselines.rules import RULES
from supsup.config import RunConfig
from supsup.errors import UserError
from supsup.identity import training_fields
from supsup.masking import mask_bytes
from supsup.material import layers_of
from supsup.streams import Stream
from sweeps.banks import Banks, Found, Site, tasks_missing
from sweeps.compare import arm_labels
from sweeps.spec import SweepSpec, Values
from sweeps.study import Record, latest

#: What changes the time that a task takes, besides the number of batches.
_COST = ("scenario", "learner", "dataset", "image_size", "model.name", "model.output_size",
         "mask.algorithm", "train.batch_size", "train.optimizer", "train.precision", "train.device",
         "train.engine")  # fmt: skip
#: Files of records that are looked through for rates, the newest first.
_RATE_FILES = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trial of a grid: an arm with a seed."""

    values: Values
    seed: int
    config: RunConfig
    """Resolved."""
    fingerprint: str
    mask_bytes: int
    stream: Stream | None = None
    """What an open-set trial learns."""

    @property
    def params(self) -> dict[str, Any]:
        """The trial's parameters in the study."""
        return {**self.values, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell, and what is left to do for it."""

    cell: Cell
    done: bool
    train: int
    """Tasks that it is the first to need."""
    bank: str
    """Name of the run folder."""
    seconds: float | None
    """Time to train them on one worker; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep would do."""

    spec: SweepSpec
    cells: tuple[PlannedCell, ...]
    alone: int
    """Tasks that would be trained if no bank were shared, but those on disk were used."""

    @property
    def train(self) -> int:
        """Tasks to train."""
        return sum(planned.train for planned in self.cells)

    @property
    def saved(self) -> int:
        """Tasks that sharing banks between trials saves."""
        return self.alone - self.train

    @property
    def bytes(self) -> int:
        """Bytes of the masks to come."""
        return sum(planned.train * planned.cell.mask_bytes for planned in self.cells)

    @property
    def seconds(self) -> float | None:
        """Time to train on one worker; None if some of it is not known."""
        known = [planned.seconds for planned in self.cells if planned.train]
        if any(seconds is None for seconds in known):
            return None
        return sum(seconds for seconds in known if seconds is not None)

    def seconds_on(self, workers: int) -> float | None:
        """Return the time to train on so many workers: at least that of the longest chain."""
        if self.seconds is None:
            return None
        chains: dict[str, float] = {}
        for planned in self.cells:
            if is_chain(planned.cell.config):
                mark = planned.cell.fingerprint
                chains[mark] = chains.get(mark, 0.0) + (planned.seconds or 0.0)
        return max(self.seconds / workers, *chains.values(), 0.0)


def is_chain(config: RunConfig) -> bool:
    """Say whether a run learns its tasks one after another, however many workers there are."""
    rule = RULES.get(config.learner)
    in_order = config.scenario == "nns" or config.mask.transfer != "none"
    return in_order or (rule is not None and rule.forgets)


def grid_cells(spec: SweepSpec, site: Site) -> list[Cell]:
    """Return every arm with every seed, resolved.

    Raises:
        UserError: if a data set is missing, or an arm doesn't fit it or this machine.
    """
    return [_cell(spec, site, arm, seed) for arm in spec.arms() for seed in spec.seeds]


def _cell(spec: SweepSpec, site: Site, values: Values, seed: int) -> Cell:
    config = site.resolved(spec.config(values, seed))
    data = site.data(config)
    return Cell(
        values=values,
        seed=seed,
        config=config,
        fingerprint=site.fingerprint(config),
        mask_bytes=mask_bytes(layers_of(config, data)) if config.learner == "supsup" else 0,
        stream=Stream(config, data) if config.scenario == "nns" else None,
    )


def search_ends(spec: SweepSpec, site: Site) -> list[RunConfig]:
    """Return the first and the last corner of a search's space, resolved.

    Raises:
        UserError: if one of them doesn't fit its data set or this machine.
    """
    if spec.search is None:
        return []
    space = spec.search.space.items()
    corners = [{path: x.ends[end] for path, x in space} for end in (0, -1)]
    return [site.resolved(spec.config(corner, spec.seeds[0])) for corner in corners]


def most_seconds(
    spec: SweepSpec, ends: Sequence[RunConfig], rates: Mapping[tuple[Any, ...], float], workers: int
) -> float | None:
    """Return the time to train a whole search, by its dearest corner, if known."""
    known = [rates.get(cost_key(training_fields(config))) for config in ends]
    times = [
        (rate * config.train.batches * config.tasks, config)
        for rate, config in zip(known, ends, strict=True)
        if rate is not None
    ]
    if spec.search is None or len(times) < len(ends):
        return None
    dearest = max(seconds for seconds, _ in times)
    chains = [seconds for seconds, config in times if is_chain(config)]
    return max(dearest * spec.search.trials / workers, *chains, 0.0)


def plan(
    spec: SweepSpec,
    cells: Sequence[Cell],
    banks: Mapping[str, tuple[str, Sequence[range]]],
    records: Sequence[Record],
    rates: Mapping[tuple[Any, ...], float],
) -> Plan:
    """Say what is left to do for every cell, in order.

    Args:
        spec: the sweep.
        cells: its trials.
        banks: name of the run folder and blocks on disk, by fingerprint.
        records: the trials that the study has already.
        rates: seconds per batch of a task on one worker, by ``cost_key``.
    """
    settled = {
        tuple(sorted({**record.values, "seed": record.seed}.items()))
        for record in records
        if record.state == "done"
    }
    level: dict[str, int] = {}
    planned, alone = [], 0
    for cell in cells:
        name, blocks = banks[cell.fingerprint]
        done = tuple(sorted(cell.params.items())) in settled
        needed = 0 if done else tasks_missing(cell.config.tasks, blocks)
        begun = level.get(cell.fingerprint, 0)
        train = max(0, needed - begun)
        level[cell.fingerprint] = max(begun, needed)
        alone += needed
        rate = rates.get(cost_key(training_fields(cell.config)))
        seconds = None if rate is None else rate * cell.config.train.batches * train
        planned.append(PlannedCell(cell=cell, done=done, train=train, bank=name, seconds=seconds))
    return Plan(spec=spec, cells=tuple(planned), alone=alone)


def bank_states(banks: Banks, cells: Sequence[Cell]) -> dict[str, tuple[str, Sequence[range]]]:
    """Return name and blocks of every bank that the cells need, by fingerprint."""
    states: dict[str, tuple[str, Sequence[range]]] = {}
    for cell in cells:
        if cell.fingerprint not in states:
            found = banks.found(cell.fingerprint)
            name = banks.folder(cell.fingerprint).name
            states[cell.fingerprint] = (name, _learned(cell, found) if found else ())
    return states


def _learned(cell: Cell, found: Found) -> Sequence[range]:
    """Return the tasks that are learned: of a stream, those that went by."""
    if cell.stream is None:
        return found.blocks
    return [range(len(cell.stream.finished_by(found.segments - 1)))] if found.segments else []


# --- rates -----------------------------------------------------------------------------------


def cost_key(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells apart tasks that take different times, from training fields."""
    return tuple(str(fields.get(name, "")) for name in _COST)


def recorded_rates(runs_dir: Path) -> dict[tuple[Any, ...], float]:
    """Return seconds per batch of a task on one worker, as runs and trials recorded them."""
    files = [*runs_dir.glob("*/records.jsonl"), *runs_dir.glob("sweeps/*/trials/*/records.jsonl")]
    files.sort(key=lambda file: file.stat().st_mtime)
    rates: dict[tuple[Any, ...], float] = {}
    for file in files[-_RATE_FILES:]:
        rates |= _rate(file)
    return rates


def _rate(file: Path) -> dict[tuple[Any, ...], float]:
    fields: dict[str, Any] = {}
    seconds = 0.0
    for line in file.read_bytes().splitlines():
        try:
            record = json.loads(line)
            values = record.get("values", {})
        except (ValueError, AttributeError):
            continue
        if record.get("kind") == "params":
            fields = values
        seconds = values.get("train/seconds_per_task", seconds)
    try:
        return {cost_key(fields): seconds / int(fields["train.batches"])} if seconds else {}
    except (KeyError, ValueError):
        return {}


# --- shown -----------------------------------------------------------------------------------


def table(planned: Plan, workers: int, device: str) -> Table:
    """Return the plan by arm."""
    spec = planned.spec
    shown = Table(title=f"sweep {spec.name}", caption=_summary(planned, workers, device))
    shown.caption_justify = "left"
    for name in ("arm", "seeds", "tasks", "done", "evaluate only", "tasks to train", "bank"):
        shown.add_column(name, justify="left" if name in ("arm", "bank") else "right")
    labels = arm_labels([planned.cell.values for planned in planned.cells])
    by_arm: dict[str, list[PlannedCell]] = {}
    for label, cell in zip(labels, planned.cells, strict=True):
        by_arm.setdefault(label, []).append(cell)
    for label, cells in by_arm.items():
        shown.add_row(label, *_row(cells))
    return shown


def _row(cells: Sequence[PlannedCell]) -> list[str]:
    idle = sum(not planned.done and not planned.train for planned in cells)
    names = sorted({planned.bank for planned in cells})
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        str(len(cells)),
        str(max(planned.cell.config.tasks for planned in cells)),
        str(sum(planned.done for planned in cells)),
        str(idle),
        str(sum(planned.train for planned in cells)),
        names[0] + more,
    ]


def _summary(planned: Plan, workers: int, device: str) -> str:
    done = sum(cell.done for cell in planned.cells)
    seconds = planned.seconds_on(workers)
    time = "unknown (nothing like it was recorded here, and the workers are elsewhere)"
    if seconds is not None:
        time = f"about {seconds / 60:.1f} min on {workers} workers"
    unit = "GPUs" if device == "cuda" else "cores"
    return (
        f"{len(planned.cells)} trials, {done} done; {planned.train} tasks to train, "
        f"{planned.saved} saved by sharing banks; {planned.bytes / 1e6:.1f} MB; "
        f"training time {time}; {workers} {unit} asked for and there"
    )


def line(planned: Plan, workers: int) -> str:
    """Return the plan in a line."""
    done = sum(cell.done for cell in planned.cells)
    seconds = planned.seconds_on(workers)
    time = "" if seconds is None else f", about {seconds / 60:.1f} min of training"
    return (
        f"sweep {planned.spec.name}: {len(planned.cells)} trials, {done} done; {planned.train} "
        f"tasks to train, {planned.saved} saved by sharing banks{time}"
    )


def search_table(
    spec: SweepSpec, records: Sequence[Record], most_seconds: float | None, workers: int
) -> Table:
    """Return the plan of a search; ``most_seconds``: training on the workers, nothing pruned."""
    search = spec.search
    if search is None:
        raise UserError(f"sweep {spec.name} is a grid")
    shown = Table("field", "values", title=f"search {spec.name}")
    for path, x in search.space.items():
        bounds = f"{x.low:g} to {x.high:g}{' (log)' if x.log else ''}" if x.low is not None else ""
        step = f" by {x.step:g}" if x.step is not None else ""
        shown.add_row(path, ", ".join(map(str, x.choices)) if x.choices else bounds + step)
    done = sum(record.state in ("done", "pruned", "failed") for record in latest(records))
    tasks = spec.first().tasks
    time = "training time unknown"
    if most_seconds is not None:
        time = f"at most about {most_seconds / 60:.1f} min of training on {workers} workers"
    shown.caption = (
        f"{search.trials} trials of {tasks} tasks by {search.sampler}, {done} ended; "
        f"objectives {', '.join(search.objectives)}; {pruning(spec)}; {time}"
    )
    return shown


def pruning(spec: SweepSpec) -> str:
    """Say how poor trials are stopped."""
    search = spec.search
    if search is None or search.pruner == "none":
        return "not pruned"
    if not search.pruned:
        return "not pruned: there are several objectives"
    return f"pruned by {search.pruner}"


def summary_counts(records: Sequence[Record]) -> dict[str, int]:
    """Return the number of trials by state."""
    states = ("done", "running", "waiting", "pruned", "failed")
    return {state: sum(record.state == state for record in records) for state in states}
