"""One command's work from start to end: check, connect, lock, work, report.

Everything that a user can get wrong is checked before anything is written.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.blocks import learned_prefix
from orchestrator.cluster import Machine, check_device, connect
from orchestrator.jobs import ClusterFailed
from orchestrator.progress import Reporter
from orchestrator.results import folder_name
from orchestrator.runfolder import Launch, RunFolder, check_runs_dir, find_run
from orchestrator.tracking import store_for
from orchestrator.work import Outcome, RunWork, shelf_of
from supsup.bank import Bank, locked
from supsup.baselines.asking import check_learner
from supsup.config import RunConfig, checkpoints
from supsup.datasets import Dataset, default_data_dir, load_dataset
from supsup.errors import ConfigError, UserError
from supsup.fields import as_text, with_values
from supsup.identity import is_auto, needs_general, resolve, training_fields
from supsup.inference import check_methods
from supsup.manifest import Manifest, make_manifest
from supsup.material import layers_of, statistics_of
from supsup.sparse import mostly_background
from supsup.streams import Stream
from supsup.tasks import task_family


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a command finds runs and workers."""

    runs_dir: Path
    workers: int | None
    address: str | None


def run(where: Where, launch: Launch, name: str | None, reporter: Reporter) -> Outcome:
    """Train what is missing of a run and evaluate it.

    Args:
        where: the runs folder and the workers.
        launch: what to do.
        name: the run's name; None continues the run with the same fingerprint, if there is one.
        reporter: where progress goes.

    Raises:
        UserError: if something is asked that can't be done; nothing is written then.
    """
    started = time.time()
    check_runs_dir(where.runs_dir)
    store = store_for(launch.tracking_uri, where.runs_dir)
    config = launch.config
    if name is not None:
        config = _like_existing(config, RunFolder(where.runs_dir, name))
    data = load(config, launch.data_dir)
    if name is not None and not is_auto(config):
        # All that is needed to refuse another configuration, before Ray starts.
        _folder(where.runs_dir, name, launch.recipe, make_manifest(config, data))
    with ExitStack() as ending:
        with _saying_what_the_bank_needs(config):
            cluster = ending.enter_context(
                connect(where.address, where.workers, config.train.device)
            )
            config = resolve_on(cluster.machine, config, data)
        manifest = make_manifest(config, data)
        folder = _folder(where.runs_dir, name, launch.recipe, manifest)
        _make(folder)
        with locked(folder.path):
            bank = open_bank(folder, manifest)
            launch = dataclasses.replace(launch, identity=folder.identity() or launch.identity)
            folder.write_launch(launch)
            bank.discard_leftovers()
            stock = bank.stock()
            if config.scenario == "nns" and stock.damaged:
                raise UserError(
                    f"damaged: {stock.damaged[0]}; a mask of an open-set run can't be trained "
                    "again alone: begin again with another --name"
                )
            task = RunWork(cluster, config, checkpoints(config), data, bank, folder, reporter)
            with _naming_the_remedy(f"supsup resume {folder.name}"):
                return task.work(stock, store, launch, folder.path / "report", started)


def evaluate(
    where: Where,
    name: str,
    settings: Mapping[str, Any],
    data_dir: str | None,
    tracking_uri: str | None,
    reporter: Reporter,
) -> Outcome:
    """Evaluate a run's bank again, without training, on whatever the workers are.

    Args:
        where: the runs folder and the workers.
        name: the run.
        settings: fields of the evaluation that differ from the run's, by dotted path.
        data_dir: where the data is; None: where the run found it.
        tracking_uri: where the MLflow run is; None: where the run put it.
        reporter: where progress goes.

    Raises:
        UserError: if there is no such run, it is damaged, or more tasks are asked for than it
            learned.
    """
    started = time.time()
    folder = RunFolder(where.runs_dir, name)
    launch = folder.read_launch()
    launch = dataclasses.replace(
        launch,
        data_dir=data_dir or launch.data_dir,
        tracking_uri=tracking_uri or launch.tracking_uri,
    )
    store = store_for(launch.tracking_uri, where.runs_dir)
    bank = Bank.open(folder.path)
    config = with_values(
        dataclasses.replace(bank.manifest.config, eval=launch.config.eval),
        {"scenario": launch.config.scenario, "eval.at": (), **settings},
    )
    learned = learned_prefix(learned_on_disk(bank))
    if bank.manifest.config.scenario == "nns":
        at = _stream_checkpoint(name, config, learned)
    else:
        at = _checkpoints_learned(name, config, learned, launch.recipe)
        config = dataclasses.replace(config, tasks=at[-1])
    data = load(config, launch.data_dir)
    stock = bank.stock()
    again = "begin again with another --name" if config.scenario == "nns" else ""
    repair = again or f"repair with supsup resume {name}"
    needed = [damage for damage in stock.damaged if damage.tasks.start < at[-1]]
    if needed:
        raise UserError(f"damaged: {needed[0]}; {repair}")
    if data.sha256 != bank.manifest.dataset_sha256:
        raise UserError(f"the data set is not the one that {name} was trained on; see --data-dir")
    with (
        locked(folder.path),
        connect(where.address, where.workers, "auto") as cluster,
    ):
        config = with_values(config, {"train.device": cluster.machine.device})
        task = RunWork(cluster, config, at, data, bank, folder, reporter, train=False)
        report_dir = folder.path / "report" / f"{config.scenario}-{folder_name(config.eval)}"
        with _naming_the_remedy("the same command"):
            return task.work(stock, store, launch, report_dir, started)


@contextmanager
def _saying_what_the_bank_needs(config: RunConfig) -> Iterator[None]:
    """Replace the remedy where all is settled already, and other workers the only way."""
    try:
        yield
    except UserError as error:
        train = config.train
        if train.device != "cuda" or is_auto(config):
            raise
        raise type(error)(
            f"{str(error).partition(';')[0]}; these masks are trained on GPUs, by the "
            f"{train.engine} engine: go on where that can be had, or begin another run"
        ) from None


def _make(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(
            f"{folder.path} is a file, must be a run's folder; move it, or give another --name"
        ) from None


@contextmanager
def _naming_the_remedy(again: str) -> Iterator[None]:
    """Say how to go on when there is nobody left to work."""
    try:
        yield
    except ClusterFailed as error:
        raise type(error)(f"{error}; what is finished is safe, go on with {again}") from error


def _checkpoints_learned(
    name: str, config: RunConfig, learned: int, recipe: str
) -> tuple[int, ...]:
    """Return the numbers of tasks to evaluate at; all must be learned."""
    if config.scenario == "nns":
        raise ConfigError(
            f"scenario is nns, but the tasks of {name} were named in training; choose gns or gnu"
        )
    at = config.eval.at or checkpoints(dataclasses.replace(config, tasks=max(learned, 1)))
    if at[-1] > learned:
        raise ConfigError(
            f"eval.at is {at[-1]}, must be at most {learned}, the tasks that {name} has learned; "
            f"train more with supsup run {recipe} --name {name} --tasks {at[-1]}"
        )
    return at


def _stream_checkpoint(name: str, config: RunConfig, masks: int) -> tuple[int, ...]:
    """Return the one checkpoint of an open-set run whose masks are kept: the end of its stream."""
    if config.scenario != "nns":
        raise ConfigError(
            f"scenario is {config.scenario}, but no task was named in the training of {name}: "
            "it is nns"
        )
    if not masks:
        raise UserError(f"the stream of {name} is not over; go on with supsup resume {name}")
    if config.eval.at not in ((), (config.tasks,)):
        raise ConfigError(
            f"eval.at is {as_text(config.eval.at)}, must be {config.tasks} or none: an open-set "
            "run keeps the masks of its end alone"
        )
    return (config.tasks,)


def load(config: RunConfig, data_dir: str) -> Dataset:
    """Load a run's data set, and check that the run can be done with it."""
    folder = Path(data_dir) if data_dir else default_data_dir()
    data = load_dataset(config.dataset, folder, config.image_size)
    check(config, data)
    return data


def check(config: RunConfig, data: Dataset) -> None:
    """Check that a configuration fits a data set.

    Raises:
        ConfigError: naming what doesn't.
    """
    layers_of(config, data)
    if config.train.batch_size == 1 and statistics_of(config, data):
        raise ConfigError(
            "train.batch_size is 1, must be at least 2 for "
            f"{config.model.name}, whose batch norm goes by the batch"
        )
    if config.learner != "supsup":
        check_learner(config)
    if config.scenario == "nns":
        if special := needs_general(config):
            raise ConfigError(
                f"scenario is nns, which is not made for {special}: its streams are permuted tasks "
                "of an MLP by threshold and rmsprop; choose gg, gns or gnu"
            )
        Stream(config, data)
    if config.scenario != "gg":
        classes = task_family(config, data).classes
        check_methods(config.eval.methods, config.model.output_size, classes)


def resolve_on(machine: Machine, config: RunConfig, data: Dataset) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what the workers are."""
    check_device(config.train.device, machine)
    return resolve(
        config,
        device=machine.device,
        native_bf16=machine.native_bf16,
        sparse=machine.sparse_precisions if mostly_background(data) else (),
        fused=machine.fused,
    )


def _like_existing(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Let ``auto`` mean what it meant when the bank was begun."""
    if not folder.has_bank:
        return config
    train = Bank.open(folder.path).manifest.config.train
    return resolve(
        config,
        device=train.device,
        native_bf16=train.precision == "bf16",
        sparse=(train.precision,) if train.engine == "sparse" else (),
        fused=train.engine == "fused",
    )


def _folder(runs_dir: Path, name: str | None, recipe: str, manifest: Manifest) -> RunFolder:
    if name is None:
        name = find_run(runs_dir, manifest.fingerprint) or f"{recipe}-{manifest.fingerprint[:8]}"
    folder = RunFolder(runs_dir, name)
    if not folder.has_bank:
        return folder
    existing = Bank.open(folder.path).manifest
    if existing.fingerprint != manifest.fingerprint:
        raise ConfigError(
            f"run {name} exists and was trained differently ({_differences(existing, manifest)}); "
            "choose another --name, or none"
        )
    return folder


def _differences(old: Manifest, new: Manifest) -> str:
    before, after = training_fields(old.config), training_fields(new.config)
    changed = [
        f"{key} {before.get(key)} there, {after.get(key)} here"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]
    if old.dataset_sha256 != new.dataset_sha256:
        changed.append("the data set's content")
    return ", ".join(changed)


def open_bank(folder: RunFolder, manifest: Manifest) -> Bank:
    """Open a run's bank, or begin it. Hold its lock."""
    if not folder.has_bank:
        return Bank.create(folder.path, manifest)
    bank = Bank.open(folder.path)
    if bank.manifest.weights_sha256 != manifest.weights_sha256:
        raise UserError(
            f"the weights generated here are not those of {folder.name}: the random generator "
            "changed; use the versions in its manifest.json"
        )
    return bank


def learned_on_disk(bank: Bank) -> list[range]:
    """Return the tasks that a run learned, unread."""
    blocks = [tasks for tasks, _ in bank.blocks()]
    return blocks + [range(task, task + 1) for task in shelf_of(bank).tasks()]
