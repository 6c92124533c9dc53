"""The work of one command on a locked bank: its jobs done by workers, tracked and shown."""

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
from orchestrator.chunks import ChunkedRun
from orchestrator.cluster import Cluster, put_data
from orchestrator.coordinator import MetricSink, RunJobs
from orchestrator.crew import Crew
from orchestrator.progress import Reporter
from orchestrator.reference import forward_transfer
from orchestrator.results import Results, subject
from orchestrator.runfolder import Launch, RunFolder
from orchestrator.stream import StreamRun
from orchestrator.stream_book import StreamBook
from orchestrator.tracking import Store, Tracker
from orchestrator.worker import WorkerSetup
from supsup.bank import Bank, Stock
from supsup.baselines.asking import rule_of
from supsup.baselines.shelf import Shelf
from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.fields import as_text, config_fields, get_field
from supsup.identity import training_fields


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


class RunWork:
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
        """Take what the command found.

        Args:
            cluster: the workers.
            config: the resolved configuration.
            at: numbers of tasks learned to evaluate at, ascending.
            data: the data set.
            bank: the bank, locked by this process.
            folder: the run's folder.
            reporter: where progress goes.
            train: whether to train what is missing.
        """
        self._cluster, self._config, self._at, self._data = cluster, config, at, data
        self._bank, self._folder, self._reporter, self._train = bank, folder, reporter, train

    def work(
        self, stock: Stock, store: Store, launch: Launch, report_dir: Path, started: float
    ) -> Outcome:
        """Do what is left, write the report, and return what came out.

        Args:
            stock: what the bank holds.
            store: where MLflow keeps runs.
            launch: what was asked for.
            report_dir: where the report goes.
            started: when the command was given, in seconds of the clock.
        """
        train = self._config.train
        self._reporter.note(
            f"run {self._folder.name}: {self._config.tasks} tasks on {self._cluster.workers} "
            f"workers ({train.device}, {train.precision if self._train else 'fp32'})"
        )
        if self._config.scenario == "nns":
            return self._work_stream(store, launch, report_dir, started)
        with _tracking(self._folder, store, launch, self._reporter, self._train) as tracking:
            if self._train:
                tracking.own.begin(*self._description())
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

    def _jobs(self, stock: Stock, tracker: MetricSink) -> RunJobs | BaselineJobs:
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

    def _with_reference(self, results: Results, tracker: MetricSink) -> Results:
        """Add what the run is measured against, and record it."""
        rates_T = results.gg_correct / results.sizes
        found = forward_transfer(self._config, rates_T, self._bank)
        if found is not None:
            tracker.metrics({"forward_transfer": found}, len(rates_T))
        return dataclasses.replace(results, forward_transfer=found)

    def _work_stream(
        self, store: Store, launch: Launch, report_dir: Path, started: float
    ) -> Outcome:
        with _tracking(self._folder, store, launch, self._reporter, self._train) as tracking:
            if self._train:
                tracking.own.begin(*self._description())
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

    def _stream_run(self, tracker: MetricSink) -> StreamRun | ChunkedRun:
        parts: dict[str, Any] = {
            "config": self._config,
            "data": self._data,
            "bank": self._bank,
            "folder": self._folder,
            "tracker": tracker,
            "reporter": self._reporter,
        }
        if self._config.openset.chunks == 1:
            return StreamRun(StreamBook(checkpoints=self._at, **parts))
        return ChunkedRun(**parts)

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


class _Evaluated:
    """The tracker of a command that trains nothing: the run's own figures stay as they are."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record what the methods reached that were asked: SCENARIO/MEASURE/METHOD."""
        self._tracker.metrics({k: v for k, v in values.items() if k.count("/") == 2}, step)

    def artifact(self, path: Path) -> None:
        """Record a file."""
        self._tracker.artifact(path)


class _Tracking:
    def __init__(self, tracker: Tracker, train: bool) -> None:
        self.own = tracker
        self.tracker = tracker if train else _Evaluated(tracker)
        self.status = "FAILED"
        self.delivered = False


@contextmanager
def _tracking(
    folder: RunFolder, store: Store, launch: Launch, reporter: Reporter, train: bool
) -> Iterator[_Tracking]:
    """Track a run; however its training ends, its MLflow run ends with it."""
    tracker = Tracker(folder.path, store, folder.name, launch.identity, reporter.note)
    tracking = _Tracking(tracker, train)
    try:
        yield tracking
    except (KeyboardInterrupt, SystemExit):
        tracking.status = "KILLED"
        raise
    finally:
        tracking.delivered = tracker.close(tracking.status if train else None)


def shelf_of(bank: Bank) -> Shelf:
    """Return what a learner other than SupSup learned, beside the manifest of its run."""
    learner = bank.manifest.config.learner
    forgets = learner != "supsup" and rule_of(learner).forgets
    return Shelf(bank.path, bank.manifest.fingerprint, forgets=forgets)


def git_commit() -> str:
    """Return the commit of this platform's code; empty if it isn't known."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
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
