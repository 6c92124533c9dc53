"""One command's work from start to end: check, connect, lock, work, report.

Everything that a user can get wrong is checked before anything is written.
"""

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator import report, stream_report
from orchestrator.actors import put
from orchestrator.baseline import BaselineJobs
from orchestrator.blocks import learned_prefix
from orchestrator.chunks import ChunkedRun
from orchestrator.cluster import Cluster, Machine, check_device, connect, put_data
from orchestrator.coordinator import RunJobs
from orchestrator.crew import Crew
from orchestrator.jobs import WorkersLost
from orchestrator.progress import Reporter
from orchestrator.reference import forward_transfer
from orchestrator.results import Results, folder_name, subject
from orchestrator.runfolder import Launch, RunFolder, check_runs_dir, find_run
from orchestrator.stream import StreamRun
from orchestrator.tracking import Store, Tracker, store_for
from orchestrator.worker import WorkerSetup
from supsup.bank import Bank, Stock, locked
from supsup.baselines.asking import check_learner, rule_of
from supsup.baselines.shelf import Shelf
from supsup.config import RunConfig, checkpoints
from supsup.datasets import Dataset, default_data_dir, load_dataset
from supsup.errors import ConfigError, UserError
from supsup.fields import as_text, config_fields, get_field, with_values
from supsup.identity import is_auto, needs_general, resolve, training_fields
from supsup.inference import check_methods
from supsup.manifest import Manifest, make_manifest
from supsup.material import layers_of
from supsup.sparse import mostly_background
from supsup.streams import Stream
from supsup.tasks import task_family


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a command finds runs and workers."""

    runs_dir: Path
    workers: int | None
    address: str | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command achieved."""

    folder: RunFolder
    table: Table | None
    failures: list[str]
    summary: str
    seconds: float
    first_result_seconds: float | None
    bank_bytes: int
    files: list[Path]
    store: Store
    delivered: bool


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
    with connect(where.address, where.workers, config.train.device) as cluster:
        config = resolve_on(cluster.machine, config, data)
        manifest = make_manifest(config, data)
        folder = _folder(where.runs_dir, name, launch.recipe, manifest)
        folder.path.mkdir(parents=True, exist_ok=True)
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
            task = _Task(cluster, config, checkpoints(config), data, bank, folder, reporter)
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
    """Evaluate a run's bank again, without training.

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
        connect(where.address, where.workers, config.train.device) as cluster,
    ):
        task = _Task(cluster, config, at, data, bank, folder, reporter, train=False)
        report_dir = folder.path / "report" / folder_name(config.eval)
        with _naming_the_remedy("the same command"):
            return task.work(stock, store, launch, report_dir, started)


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


class _Task:
    """The work of one command on a locked bank."""

    def __init__(
        self,
        cluster: Cluster,
        config: RunConfig,
        at: tuple[int, ...],
        data: Dataset,
        bank: Bank,
        folder: RunFolder,
        reporter: Reporter,
        train: bool = True,
    ) -> None:
        self._cluster, self._config, self._at, self._data = cluster, config, at, data
        self._bank, self._folder, self._reporter, self._train = bank, folder, reporter, train

    def work(
        self, stock: Stock, store: Store, launch: Launch, report_dir: Path, started: float
    ) -> Outcome:
        train = self._config.train
        self._reporter.note(
            f"run {self._folder.name}: {self._config.tasks} tasks on {self._cluster.workers} "
            f"workers ({train.device}, {train.precision})"
        )
        if self._config.scenario == "nns":
            return self._work_stream(store, launch, report_dir, started)
        with _tracking(self._folder, store, launch, self._reporter) as tracking:
            if self._train:
                tracking.tracker.begin(*self._description())
            jobs = self._jobs(stock, tracking.tracker)
            if jobs.widest:
                self._run_pool(jobs)
            results = jobs.results(self._folder.name, subject(self._config))
            if results:
                results = self._with_reference(results, tracking.tracker)
            files = report.write(results, report_dir) if results else []
            if isinstance(jobs, BaselineJobs) and results:
                files += jobs.extra_files(report_dir)
            for path in files:
                tracking.tracker.artifact(path)
            tracking.status = "FAILED" if jobs.failures else "FINISHED"
        now = f"{jobs.trained} tasks trained now, " if jobs.trained else ""
        first = jobs.first_block_at
        return Outcome(
            folder=self._folder,
            table=report.table(results) if results else None,
            failures=jobs.failures,
            summary=f"{now}{jobs.learned} learned",
            seconds=time.time() - started,
            first_result_seconds=first - started if first else None,
            bank_bytes=self._bank.size() + shelf_of(self._bank).size(),
            files=files,
            store=store,
            delivered=tracking.delivered,
        )

    def _jobs(self, stock: Stock, tracker: Tracker) -> RunJobs | BaselineJobs:
        if self._config.learner == "supsup":
            return RunJobs(
                config=self._config,
                checkpoints=self._at,
                bank=self._bank,
                stock=stock,
                folder=self._folder,
                tracker=tracker,
                reporter=self._reporter,
                put=put,
                workers=self._cluster.workers,
                train=self._train,
            )
        return BaselineJobs(
            config=self._config,
            checkpoints=self._at,
            sizes=self._bank.manifest.sizes(self._config.tasks),
            shelf=shelf_of(self._bank),
            folder=self._folder,
            tracker=tracker,
            reporter=self._reporter,
            put=put,
            workers=self._cluster.workers,
            train=self._train,
        )

    def _with_reference(self, results: Results, tracker: Tracker) -> Results:
        """Add what the run is measured against, and record it."""
        rates_T = results.gg_correct / results.sizes
        found = forward_transfer(self._config, rates_T, self._bank)
        if found is not None:
            tracker.metrics({"forward_transfer": found}, len(rates_T))
        return dataclasses.replace(results, forward_transfer=found)

    def _work_stream(
        self, store: Store, launch: Launch, report_dir: Path, started: float
    ) -> Outcome:
        with _tracking(self._folder, store, launch, self._reporter) as tracking:
            if self._train:
                tracking.tracker.begin(*self._description())
            stream = self._stream_run(tracking.tracker)
            with contextlib.ExitStack() as stack:
                crew = None if stream.settled else stack.enter_context(self._crew())
                results = stream.work(crew)
            files = stream_report.write(results, report_dir)
            for path in files:
                tracking.tracker.artifact(path)
            tracking.status = "FINISHED"
        now = f"{stream.learned_now} segments learned now, " if stream.learned_now else ""
        first = stream.first_step_at
        return Outcome(
            folder=self._folder,
            table=stream_report.table(results),
            failures=[],
            summary=f"{now}{stream.masks} masks for {self._config.tasks} tasks",
            seconds=time.time() - started,
            first_result_seconds=first - started if first else None,
            bank_bytes=self._bank.size(),
            files=files,
            store=store,
            delivered=tracking.delivered,
        )

    def _stream_run(self, tracker: Tracker) -> StreamRun | ChunkedRun:
        if self._config.openset.chunks == 1:
            return StreamRun(
                config=self._config,
                checkpoints=self._at,
                data=self._data,
                bank=self._bank,
                folder=self._folder,
                tracker=tracker,
                reporter=self._reporter,
            )
        return ChunkedRun(
            config=self._config,
            data=self._data,
            bank=self._bank,
            folder=self._folder,
            tracker=tracker,
            reporter=self._reporter,
        )

    def _run_pool(self, jobs: RunJobs | BaselineJobs) -> None:
        with self._workers() as start_worker:
            pool = self._cluster.pool(start_worker, jobs.widest)
            try:
                pool.run(jobs)
            finally:
                pool.close()

    @contextmanager
    def _crew(self) -> Iterator[Crew]:
        with self._workers() as start_worker:
            size, patience = self._cluster.workers, self._cluster.start_seconds
            crew = Crew(start_worker, size, self._reporter.note, patience)
            try:
                yield crew
            finally:
                crew.close()

    @contextmanager
    def _workers(self) -> Iterator[Callable[[], Any]]:
        """Give a function that starts a worker, while Ray runs."""
        manifest = self._bank.manifest
        setup = WorkerSetup(config=self._config, weights_sha256=manifest.weights_sha256)
        self._reporter.note("starting the workers")
        with self._cluster.started():
            data = put_data(self._data)
            yield lambda: self._cluster.start_worker(setup, data)

    def _description(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the parameters, which never change, and the tags of the MLflow run."""
        params = training_fields(self._config)
        manifest = self._bank.manifest
        tags = {
            info.path: as_text(get_field(self._config, info.path))
            for info in config_fields()
            if info.path not in params
        }
        tags |= {f"version.{name}": version for name, version in manifest.versions.items()}
        tags |= {
            "fingerprint": manifest.fingerprint,
            "dataset_sha256": manifest.dataset_sha256,
            "device": manifest.device,
            "bank": str(self._bank.path.resolve()),
            "workers": str(self._cluster.workers),
            "mlflow.source.git.commit": git_commit(),
            "mlflow.note.content": _note(self._config),
        }
        return params, {key: value for key, value in tags.items() if value}


class _Tracking:
    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.status = "FAILED"
        self.delivered = False


@contextmanager
def _tracking(
    folder: RunFolder, store: Store, launch: Launch, reporter: Reporter
) -> Iterator[_Tracking]:
    """Track a run; however it ends, its MLflow run ends with it."""
    tracker = Tracker(folder.path, store, folder.name, launch.identity, reporter.note)
    tracking = _Tracking(tracker)
    try:
        yield tracking
    except (KeyboardInterrupt, SystemExit):
        tracking.status = "KILLED"
        raise
    finally:
        tracking.delivered = tracking.tracker.close(tracking.status)


@contextmanager
def _naming_the_remedy(again: str) -> Iterator[None]:
    """Say how to go on when there is nobody left to work."""
    try:
        yield
    except WorkersLost as error:
        raise type(error)(f"{error}; what is finished is safe, go on with {again}") from error


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


def shelf_of(bank: Bank) -> Shelf:
    """Return what a learner other than SupSup learned, beside the manifest of its run."""
    learner = bank.manifest.config.learner
    forgets = learner != "supsup" and rule_of(learner).forgets
    return Shelf(bank.path, bank.manifest.fingerprint, forgets=forgets)


def learned_on_disk(bank: Bank) -> list[range]:
    """Return the tasks that a run learned, unread."""
    blocks = [tasks for tasks, _ in bank.blocks()]
    return blocks + [range(task, task + 1) for task in shelf_of(bank).tasks()]


def git_commit() -> str:
    """Return the commit of this platform's code; empty if it isn't known."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def _note(config: RunConfig) -> str:
    """Return the text that MLflow shows above a run, for a reader who was told nothing."""
    if config.scenario == "nns":
        return _stream_note(config)
    if config.learner != "supsup":
        return (
            f"**{config.learner}** on {config.family} {config.dataset}: {config.tasks} tasks, to "
            "compare SupSup with. The step of every metric is the number of tasks learned. "
            "`gg/accuracy`: the task is given. `forgetting` and `backward_transfer` say what "
            "became of the tasks before. Artifacts: `accuracy.png`, `accuracy.csv`, "
            "`per_task.csv`, `accuracy_matrix.csv` (tasks learned x task)."
        )
    scenario = {
        "gg": "task given at inference",
        "gns": "task inferred, labels shared between tasks",
        "gnu": "task inferred, labels not shared: a wrong task is a wrong answer",
    }[config.scenario]
    return (
        f"**SupSup** on {config.family} {config.dataset}: {config.tasks} tasks, one binary mask "
        f"each over fixed random weights. Scenario {config.scenario} ({scenario}).\n\n"
        "The step of every metric is the number of tasks learned. `gg/accuracy` is the upper "
        "bound: the right mask is given. `*/task_accuracy/*` is how often task inference finds "
        "the right mask. `average_accuracy`, `forgetting` and `backward_transfer` are those of "
        "the scenario. Artifacts: `accuracy.png` (the curve), `accuracy.csv`, `per_task.csv`, "
        "`accuracy_matrix.csv` (tasks learned x task), `task_confusion.csv`."
    )


def _stream_note(config: RunConfig) -> str:
    openset = config.openset
    told = openset.boundaries == "told"
    return (
        f"**SupSup, open set** on permuted {config.dataset}: {config.tasks} tasks in stream "
        f"`{openset.stream}`; nobody says which task the data belongs to, nor that it changed."
        f"{' Task boundaries are told, as in the code of the paper.' if told else ''}\n\n"
        "The step of every metric is the number of tasks gone by. `nns/masks`: masks allocated; "
        "`nns/missed`: tasks without one; `nns/false_new`: masks for known tasks; `nns/wrong`: "
        "known data given to another mask. Artifacts: `accuracy.png`, `masks.png`, "
        "`margins.png`, `checkpoints.csv`, `decisions.csv`."
    )
