"""One sweep command's work from start to end: check, lock, plan, work, report.

runs/sweeps/NAME/  sweep.json      what was asked for
                   study.journal   the study, unless it is in a database (sweeps.study)
                   trials/NNNN/    what MLflow is to show of a trial
                   report/         tables and pictures
                   records.jsonl   what MLflow is to show of the sweep

Everything that a user can get wrong is checked before anything is written.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.actors import put
from orchestrator.baseline import BaselineJobs
from orchestrator.cluster import Cluster, connect
from orchestrator.coordinator import RunJobs
from orchestrator.outbox import Outbox
from orchestrator.runfolder import SWEEPS, Launch, RunFolder, check_name, check_runs_dir
from orchestrator.session import git_commit, shelf_of
from orchestrator.stream_jobs import StreamJobs
from orchestrator.tracking import store_for
from supsup.bank import Bank, locked
from supsup.config import RunConfig, checkpoints
from supsup.errors import ConfigError, UserError
from supsup.fields import as_text, config_fields, get_field
from supsup.files import write_atomically
from supsup.identity import training_fields
from supsup.manifest import Manifest
from sweeps import plan as planning
from sweeps import report as reporting
from sweeps.banks import Banks, Site, data_key, open_bank
from sweeps.calibrate import with_calibration
from sweeps.driver import Ears, Opened, Ready, SweepJobs, Tracks, TrialJobs, start_worker
from sweeps.plan import Cell, Plan, pruning
from sweeps.presets import NAMES, preset
from sweeps.progress import SweepProgress, progress
from sweeps.spec import SweepSpec, read_spec, spec_of, to_tree
from sweeps.study import (
    JOURNAL,
    Record,
    SweepStudy,
    Trial,
    check_storage,
    in_turn,
    latest,
    open_storage,
    public,
    read_records,
    repair,
)
from sweeps.tracking import Deliveries, TrialTracker
from sweeps.worker import setup_for

_MASKED = ":***@"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a sweep finds runs, data, workers, its study and MLflow."""

    runs_dir: Path = Path("runs")
    data_dir: str = ""
    tracking_uri: str | None = None
    storage: str | None = None
    workers: int | None = None
    address: str | None = None
    concurrency: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a sweep achieved."""

    name: str
    table: Table
    records: list[Record]
    counts: Mapping[str, int]
    trained: int
    seconds: float
    files: list[Path]
    delivered: bool

    @property
    def failures(self) -> list[str]:
        """What failed, and why."""
        return [
            f"trial {r.number} ({r.values}, seed {r.seed}) failed: {r.reason}"
            for r in self.records
            if r.state == "failed"
        ]


def spec_for(text: str, quick: bool = False) -> SweepSpec:
    """Return the sweep that a preset's name or a TOML file's path stands for.

    Raises:
        ConfigError: if it is neither, or the file is wrong.
    """
    if text in NAMES:
        return preset(text, quick)
    path = Path(text)
    if quick:
        raise ConfigError(f"--quick is for presets, {text} is none: {', '.join(NAMES)}")
    if path.suffix == ".toml" or path.exists():
        return read_spec(path)
    return preset(text)


# --- commands --------------------------------------------------------------------------------


def plan(spec: SweepSpec, options: Options) -> Table:
    """Return what a sweep would do. Writes nothing.

    Raises:
        UserError: if it can't be done.
    """
    store_for(options.tracking_uri, options.runs_dir)
    with _cluster(spec, options) as cluster:
        site = Site(cluster.machine, options.data_dir)
        records = _known_records(spec, options)
        rates = planning.recorded_rates(options.runs_dir)
        if spec.search is not None:
            ends = planning.search_ends(spec, site)
            if options.address is None:
                rates = with_calibration(rates, ends, site)
            seconds = planning.most_seconds(spec, ends, rates)
            return planning.search_table(spec, records, seconds, cluster.workers)
        banks = Banks(options.runs_dir, spec.recipe)
        cells = planning.grid_cells(spec, site)
        planned = _plan(spec, cells, records, rates, banks)
        if options.address is None and planned.train:
            to_train = [item.cell.config for item in planned.cells if item.train]
            rates = with_calibration(rates, to_train, site)
            planned = _plan(spec, cells, records, rates, banks)
        return planning.table(planned, cluster.workers, cluster.machine.device)


def run(
    spec: SweepSpec | Mapping[str, Any] | str,
    *,
    quick: bool = False,
    options: Options | None = None,
    shown: SweepProgress | None = None,
) -> Outcome:
    """Run a sweep, or go on with it.

    Args:
        spec: a specification, its nested plain values, a preset's name or a TOML file's path.
        quick: a preset's small variant.
        options: where everything is; None: in ./runs, on this machine.
        shown: where progress goes; None: the error stream.

    Raises:
        UserError: if something is asked that can't be done; nothing is written then.
    """
    if isinstance(spec, str):
        spec = spec_for(spec, quick)
    elif not isinstance(spec, SweepSpec):
        spec = spec_of(spec)
    options = options or Options()
    check_runs_dir(options.runs_dir)
    with contextlib.ExitStack() as stack:
        shown = shown or stack.enter_context(progress())
        cluster = stack.enter_context(_cluster(spec, options))
        return work(spec, options, cluster, shown)


def work(spec: SweepSpec, options: Options, cluster: Cluster, shown: SweepProgress) -> Outcome:
    """Run a sweep on a cluster: see ``run``."""
    started = time.time()
    store = store_for(options.tracking_uri, options.runs_dir)
    if options.storage:
        check_storage(options.storage)
    site = Site(cluster.machine, options.data_dir)
    cells = [] if spec.search else planning.grid_cells(spec, site)
    planning.search_ends(spec, site)
    folder = options.runs_dir / SWEEPS / spec.name
    if options.storage:
        # A database that can't be reached is said before anything is written.
        open_storage(options.storage, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        study = _study(spec, options, folder)
        _write_request(folder, spec, options)
        banks = Banks(options.runs_dir, spec.recipe)
        if cells:
            rates = planning.recorded_rates(options.runs_dir)
            planned = _plan(spec, cells, study.records(), rates, banks)
            shown.note(planning.line(planned, cluster.workers))
            order = in_turn([cell.fingerprint for cell in cells])
            study.enqueue([cells[i].params for i in order])
        else:
            shown.note(f"sweep {spec.name}: a search, {pruning(spec)}")
        deliveries = Deliveries(store, shown.note)
        sweep = _Sweep(spec, options, cluster, site, banks, folder, study, deliveries, shown)
        return sweep.work(started)


def resume(name: str, options: Options, shown: SweepProgress | None = None) -> Outcome:
    """Go on with a sweep that was begun.

    Raises:
        UserError: if there is no such sweep.
    """
    spec, options = request(name, options)
    return run(spec, options=options, shown=shown)


def status(name: str, options: Options) -> tuple[SweepSpec, list[Record], Table]:
    """Return a sweep's specification, trials and comparison. Writes nothing."""
    spec, options = request(name, options)
    records = _known_records(spec, options)
    return spec, records, reporting.table(spec, records)


def report(name: str, options: Options) -> Outcome:
    """Write a sweep's report, and hand it to MLflow.

    Raises:
        UserError: if there is no such sweep, or it is running.
    """
    started = time.time()
    spec, options = request(name, options)
    folder = options.runs_dir / SWEEPS / name
    with locked(folder):
        study = _study(spec, options, folder)
        deliveries = Deliveries(store_for(options.tracking_uri, options.runs_dir))
        parent = _parent(study, deliveries, folder, spec)
        files = _show(spec, study, folder, parent)
        parent.close(_ending(study.records()), {})
        return _outcome(spec, study, files, 0, started, deliveries.close())


# --- what was asked for ----------------------------------------------------------------------


def _write_request(folder: Path, spec: SweepSpec, options: Options) -> None:
    body = {
        "spec": to_tree(spec),
        "data_dir": options.data_dir,
        "tracking_uri": options.tracking_uri,
        "storage": public(options.storage) if options.storage else None,
    }
    write_atomically(folder / "sweep.json", json.dumps(body, indent=1).encode())


def request(name: str, options: Options) -> tuple[SweepSpec, Options]:
    """Return the sweep of that name, and the options that it was begun with where none are given.

    Raises:
        UserError: if there is no such sweep, or its file is damaged.
    """
    check_name("sweep", name)
    file = options.runs_dir / SWEEPS / name / "sweep.json"
    try:
        body = json.loads(file.read_bytes())
        spec = spec_of(body["spec"])
        storage = options.storage or body["storage"]
        known = Options(
            runs_dir=options.runs_dir,
            data_dir=options.data_dir or body["data_dir"],
            tracking_uri=options.tracking_uri or body["tracking_uri"],
            storage=storage,
            workers=options.workers,
            address=options.address,
            concurrency=options.concurrency,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no sweep {name} in {options.runs_dir}; begin it with supsup sweep run"
        ) from None
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; give supsup sweep run with the sweep again") from None
    if storage and _MASKED in storage:
        raise ConfigError(
            f"the storage {storage} needs its password, which isn't kept; "
            "give --storage or $SUPSUP_STORAGE again"
        )
    return spec, known


def _known_records(spec: SweepSpec, options: Options) -> list[Record]:
    """Return the trials of a sweep that may not have begun. Writes nothing."""
    folder = options.runs_dir / SWEEPS / spec.name
    if options.storage is None and not (folder / JOURNAL).exists():
        return []
    return read_records(spec, open_storage(options.storage, folder))


def _study(spec: SweepSpec, options: Options, folder: Path) -> SweepStudy:
    """Open the study of a sweep whose folder is locked."""
    if options.storage is None:
        repair(folder)
    return SweepStudy(
        spec,
        open_storage(options.storage, folder),
        checkpoints(spec.config({}, spec.seeds[0])),
        shared=options.storage is not None,
    )


def _plan(
    spec: SweepSpec,
    cells: list[Cell],
    records: list[Record],
    rates: Mapping[tuple[Any, ...], float],
    banks: Banks,
) -> Plan:
    states = planning.bank_states(banks, cells)
    return planning.plan(spec, cells, states, records, rates)


@contextmanager
def _cluster(spec: SweepSpec, options: Options) -> Iterator[Cluster]:
    """Connect to the workers; all arms run on the same kind."""
    varied = spec.config({}, spec.seeds[0]).train.device
    if "train.device" in spec.varied:
        varied = "auto"
    with connect(options.address, options.workers, varied) as cluster:
        yield cluster


# --- the work --------------------------------------------------------------------------------


class _Workers:
    """The cluster, started when it is needed first, and what its object store holds."""

    def __init__(self, cluster: Cluster, note: Any) -> None:
        self._cluster, self._note = cluster, note
        self._stack = contextlib.ExitStack()
        self._started = False
        self._data: dict[tuple[str, int], Any] = {}

    def start(self) -> None:
        if not self._started:
            self._note("starting the workers")
            self._stack.enter_context(self._cluster.started())
            self._started = True

    def put(self, value: Any) -> Any:
        self.start()
        return put(value)

    def data(self, site: Site, config: RunConfig) -> Any:
        key = data_key(config)
        if key not in self._data:
            self._data[key] = self.put(site.data(config))
        return self._data[key]

    def run(self, jobs: SweepJobs, keep: int) -> None:
        """Work off all jobs; starts nothing if there are none."""
        first = jobs.next_job()
        if first is None:
            return
        jobs.give_back(first)
        self.start()
        pool = self._cluster.pool(lambda: start_worker(self._cluster, keep))
        try:
            pool.run(jobs)
        finally:
            pool.close()

    def close(self) -> None:
        self._data.clear()
        self._stack.close()


class _Sweep:
    """The work of one command on a sweep whose folder is locked."""

    def __init__(
        self,
        spec: SweepSpec,
        options: Options,
        cluster: Cluster,
        site: Site,
        banks: Banks,
        folder: Path,
        study: SweepStudy,
        deliveries: Deliveries,
        shown: SweepProgress,
    ) -> None:
        self._spec, self._options, self._cluster, self._site = spec, options, cluster, site
        self._banks, self._folder, self._study = banks, folder, study
        self._deliveries, self._shown = deliveries, shown
        self._workers = _Workers(cluster, shown.note)
        self._parent = _parent(study, deliveries, folder, spec)
        self._manifests: dict[str, Manifest] = {}

    def work(self, started: float) -> Outcome:
        """Run what is left to do, and show what came out."""
        if self._study.is_settled():
            self._shown.note("every trial is done")
        self._deliver_leftovers()
        self._parent.begin({"recipe": self._spec.recipe}, self._tags())
        self._show_counts()
        concurrency = self._options.concurrency or self._cluster.workers + 1
        jobs = SweepJobs(
            self._spec, self._study, self, self._shown, concurrency, self._may_start(started)
        )
        try:
            self._workers.run(jobs, keep=concurrency)
        except BaseException:
            jobs.close()
            self._parent.close("KILLED", {})
            self._deliveries.close()
            raise
        finally:
            self._workers.close()
        files = _show(self._spec, self._study, self._folder, self._parent)
        self._parent.close(_ending(self._study.records()), {})
        delivered = self._deliveries.close()
        return _outcome(self._spec, self._study, files, jobs.tally.trained, started, delivered)

    def _may_start(self, started: float) -> Any:
        hours = self._spec.search.hours if self._spec.search else None
        return lambda: hours is None or time.time() - started < 3600 * hours

    def _show_counts(self) -> None:
        records = self._study.records()
        counts: Counter[str] = Counter(
            r.state for r in records if r.state in ("done", "pruned", "failed")
        )
        total = self._spec.search.trials if self._spec.search else len(records)
        self._shown.start(max(total, len(records)), counts)

    # --- Prepares ------------------------------------------------------------------------------

    def ready(self, trial: Trial) -> Ready:
        """Return a trial's configuration, resolved for the workers."""
        config = self._site.resolved(self._spec.config(trial.values, trial.seed))
        return Ready(trial, config, self._site.fingerprint(config))

    def tracker(self, ready: Ready) -> Tracks:
        """Begin to track a trial as a child of the sweep."""
        number = ready.trial.number
        tracker = self._child(number)
        params = training_fields(ready.config)
        arm = ", ".join(f"{path}={value}" for path, value in ready.trial.values.items())
        tags = {
            info.path: as_text(get_field(ready.config, info.path))
            for info in config_fields()
            if info.path not in params and not info.path.startswith("openset.")
        }
        tags |= {
            "sweep": self._spec.name,
            "arm": arm,
            "seed": str(ready.trial.seed),
            "fingerprint": ready.fingerprint,
            "bank": str(self._banks.folder(ready.fingerprint).path.resolve()),
            "state": "running",
            "reason": "",
        }
        tracker.begin(params, {key: value for key, value in tags.items() if value})
        return tracker

    def open(self, ready: Ready, ears: Ears, stack: contextlib.ExitStack) -> Opened:
        """Open a trial's bank, locked until the stack ends."""
        manifest = self._manifest(ready)
        folder = self._banks.folder(ready.fingerprint)
        folder.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder.path))
        launch = Launch(
            recipe=self._spec.recipe,
            config=ready.config,
            data_dir=self._options.data_dir,
            tracking_uri=self._options.tracking_uri,
        )
        bank = open_bank(folder, manifest, launch)
        jobs = self._jobs(ready, ears, bank, folder)
        setup = setup_for(ready.config, manifest.weights_sha256)
        data = self._workers.data(self._site, ready.config) if jobs.widest else None
        return Opened(jobs, setup, data)

    def _jobs(self, ready: Ready, ears: Ears, bank: Bank, folder: RunFolder) -> TrialJobs:
        """Return a trial's jobs; its bank is open and locked."""
        parts: dict[str, Any] = {
            "config": ready.config,
            "checkpoints": checkpoints(ready.config),
            "bank": bank,
            "folder": folder,
            "tracker": ears,
            "reporter": ears,
            "put": self._workers.put,
            "workers": self._cluster.workers,
        }
        stock = bank.stock()
        if ready.config.scenario == "nns":
            if stock.damaged:
                raise UserError(
                    f"damaged: {stock.damaged[0]}; a mask of an open-set run can't be trained "
                    f"again alone: remove {folder.path} to begin again"
                )
            return StreamJobs(data=self._site.data(ready.config), **parts)
        search = self._spec.search
        ahead = search is None or not search.pruned
        if ready.config.learner == "supsup":
            return RunJobs(stock=stock, ahead=ahead, **parts)
        del parts["bank"]
        sizes = bank.manifest.sizes(ready.config.tasks)
        return BaselineJobs(sizes=sizes, shelf=shelf_of(bank), ahead=ahead, **parts)

    def _manifest(self, ready: Ready) -> Manifest:
        """Return a bank's manifest, with the task count of whoever began it."""
        if ready.fingerprint not in self._manifests:
            # Trials of one bank follow one another: older ones aren't needed again.
            self._manifests = {ready.fingerprint: self._site.manifest(ready.config)}
        return self._manifests[ready.fingerprint]

    # --- MLflow --------------------------------------------------------------------------------

    def _child(self, number: int) -> TrialTracker:
        folder = self._folder / "trials" / f"{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._spec.name}-{number:04d}"
        identity = f"{self._study.identity}-{number}"
        return self._deliveries.tracker(folder, name, identity, self._parent)

    def _deliver_leftovers(self) -> None:
        """Take up what an earlier driver couldn't deliver of trials that have ended."""
        for folder in sorted((self._folder / "trials").glob("*")):
            box = Outbox(folder)
            if box.last_status() == "RUNNING":
                box.append("status", status="KILLED")
            if box.pending():
                self._child(int(folder.name)).closed = True

    def _tags(self) -> dict[str, str]:
        spec = self._spec
        tags = {
            "sweep": spec.name,
            "spec": json.dumps(to_tree(spec)),
            "workers": str(self._cluster.workers),
            "mlflow.source.git.commit": git_commit(),
            "mlflow.note.content": _note(spec),
        }
        return {key: value for key, value in tags.items() if value}


def _note(spec: SweepSpec) -> str:
    """Return the text that MLflow shows above a sweep, for a reader who was told nothing."""
    what = "a search" if spec.search else "a grid"
    return (
        f"**SupSup sweep** `{spec.name}`: {what} over {', '.join(spec.varied)} "
        f"({spec.recipe}, seeds {', '.join(map(str, spec.seeds))}; {pruning(spec)}). Its trials "
        "are the child runs; the step of their metrics is the number of tasks learned. "
        "Artifacts: `comparison.md` (means over seeds ± 95 % intervals, paired differences), "
        "`accuracy.png`, `trials.csv`, `spec.json`."
    )


def _parent(
    study: SweepStudy, deliveries: Deliveries, folder: Path, spec: SweepSpec
) -> TrialTracker:
    return deliveries.tracker(folder, spec.name, study.identity)


def _show(spec: SweepSpec, study: SweepStudy, folder: Path, parent: TrialTracker) -> list[Path]:
    """Write the report, and hand it to MLflow."""
    records = latest(study.records())
    files = reporting.write(spec, records, study.optuna, folder / "report")
    written = folder / "report" / "spec.json"
    write_atomically(written, json.dumps(to_tree(spec), indent=1).encode())
    for path in (*files, written):
        parent.artifact(path)
    parent.metrics(reporting.parent_metrics(spec, records), 0)
    return files


def _ending(records: list[Record]) -> str:
    return "FAILED" if any(r.state == "failed" for r in latest(records)) else "FINISHED"


def _outcome(
    spec: SweepSpec,
    study: SweepStudy,
    files: list[Path],
    trained: int,
    started: float,
    delivered: bool,
) -> Outcome:
    records = latest(study.records())
    return Outcome(
        name=spec.name,
        table=reporting.table(spec, records),
        records=records,
        counts=planning.summary_counts(records),
        trained=trained,
        seconds=time.time() - started,
        files=files,
        delivered=delivered,
    )
