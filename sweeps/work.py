"""The work of one command on a sweep whose folder is locked: its trials, tracked and shown."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.actors import put
from orchestrator.baseline import BaselineJobs
from orchestrator.cluster import Cluster
from orchestrator.coordinator import RunJobs
from orchestrator.outbox import Outbox
from orchestrator.runfolder import Launch, RunFolder
from orchestrator.stream_book import StreamBook
from orchestrator.stream_jobs import StreamJobs
from orchestrator.work import git_commit, shelf_of
from supsup.bank import Bank, locked
from supsup.config import RunConfig, checkpoints
from supsup.errors import UserError
from supsup.fields import as_text, config_fields, get_field
from supsup.files import write_atomically
from supsup.identity import training_fields
from supsup.manifest import Manifest
from sweeps import plan as planning
from sweeps import report as reporting
from sweeps.banks import Banks, Site, data_key, open_bank
from sweeps.driver import Opened, SweepJobs, TrialJobs, start_worker
from sweeps.ears import Ears, Ready, Tracks
from sweeps.endings import Best
from sweeps.plan import pruning
from sweeps.progress import SweepProgress
from sweeps.spec import SweepSpec, to_tree
from sweeps.study import Record, SweepStudy, Trial, latest
from sweeps.tracking import Deliveries, TrialTracker
from sweeps.worker import setup_for


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

    def run(self, jobs: SweepJobs, keep: int, sign: Callable[[], None]) -> None:
        """Work off all jobs, signing meanwhile; starts nothing if there are none."""
        first = jobs.next_job()
        if first is None:
            return
        jobs.give_back(first)
        self.start()
        pool = self._cluster.pool(lambda: start_worker(self._cluster, keep))
        try:
            pool.run(jobs, at_look=sign)
        finally:
            pool.close()

    def close(self) -> None:
        self._data.clear()
        self._stack.close()


class SweepWork:
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
        """Take what the command found.

        Args:
            spec: the sweep.
            options: where everything is.
            cluster: the workers.
            site: the machine that trains, with the data sets.
            banks: the run folders by fingerprint.
            folder: the sweep's folder, locked by this process.
            study: its trials.
            deliveries: what MLflow is to get.
            shown: where progress goes.
        """
        self._spec, self._options, self._cluster, self._site = spec, options, cluster, site
        self._banks, self._folder, self._study = banks, folder, study
        self._deliveries, self._shown = deliveries, shown
        self._workers = _Workers(cluster, shown.note)
        self._parent = parent_tracker(study, deliveries, folder, spec)
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
            self._workers.run(jobs, concurrency, self._study.sign)
        except BaseException:
            jobs.close()
            self._parent.close("KILLED", {})
            self._deliveries.close()
            raise
        finally:
            self._workers.close()
        files = show(self._spec, self._study, self._folder, self._parent)
        self._parent.close(ending(self._study.records()), {})
        delivered = self._deliveries.close()
        return outcome_of(self._spec, self._study, files, jobs.tally.trained, started, delivered)

    def _may_start(self, started: float) -> Any:
        hours = self._spec.search.hours if self._spec.search else None
        return lambda: hours is None or time.time() - started < 3600 * hours

    def _show_counts(self) -> None:
        records = self._study.records()
        counts: Counter[str] = Counter(
            r.state for r in records if r.state in ("done", "pruned", "failed")
        )
        total = self._spec.search.trials if self._spec.search else len(records)
        best = Best(self._spec.objectives[0], records)
        self._shown.start(max(total, len(records)), counts, str(best))

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
        }
        workers: dict[str, Any] = {"put": self._workers.put, "workers": self._cluster.workers}
        stock = bank.stock()
        if ready.config.scenario == "nns":
            if stock.damaged:
                raise UserError(
                    f"damaged: {stock.damaged[0]}; a mask of an open-set run can't be trained "
                    f"again alone: remove {folder.path} to begin again"
                )
            return StreamJobs(StreamBook(data=self._site.data(ready.config), **parts), **workers)
        search = self._spec.search
        ahead = search is None or not search.pruned
        if ready.config.learner == "supsup":
            return RunJobs(stock=stock, ahead=ahead, **parts, **workers)
        del parts["bank"]
        sizes = bank.manifest.sizes(ready.config.tasks)
        return BaselineJobs(sizes=sizes, shelf=shelf_of(bank), ahead=ahead, **parts, **workers)

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


def parent_tracker(
    study: SweepStudy, deliveries: Deliveries, folder: Path, spec: SweepSpec
) -> TrialTracker:
    """Return the tracker of the sweep itself, the parent of its trials."""
    return deliveries.tracker(folder, spec.name, study.identity)


def show(spec: SweepSpec, study: SweepStudy, folder: Path, parent: TrialTracker) -> list[Path]:
    """Write the report, and hand it to MLflow."""
    records = latest(study.records())
    files = reporting.write(spec, records, study.optuna, folder / "report")
    written = folder / "report" / "spec.json"
    write_atomically(written, json.dumps(to_tree(spec), indent=1).encode())
    for path in (*files, written):
        parent.artifact(path)
    parent.metrics(reporting.parent_metrics(spec, records), 0)
    return files


def ending(records: list[Record]) -> str:
    """Return the status that MLflow shows of a sweep with these trials."""
    return "FAILED" if any(r.state == "failed" for r in latest(records)) else "FINISHED"


def outcome_of(
    spec: SweepSpec,
    study: SweepStudy,
    files: list[Path],
    trained: int,
    started: float,
    delivered: bool,
) -> Outcome:
    """Return what a command achieved."""
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
