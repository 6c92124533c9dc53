"""The driver: its policy by a plain loop over an ordinary worker, and the whole on real Ray."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from orchestrator.coordinator import RunJobs
from orchestrator.jobs import HeadLost, StoreFull
from orchestrator.pool import Failure
from orchestrator.runfolder import RunFolder
from supsup.bank import Bank, locked
from supsup.config import checkpoints
from supsup.errors import BankError, DeterminismFault, UserError
from supsup.fields import to_dict
from supsup.manifest import make_manifest
from supsup.train import BlockTrainer
from sweeps import session
from sweeps.driver import Opened, SweepJobs
from sweeps.ears import Ready, measured
from sweeps.endings import Best, outcome
from sweeps.plan import recorded_rates
from sweeps.progress import SweepProgress
from sweeps.report import write
from sweeps.spec import spec_of
from sweeps.storage import open_storage
from sweeps.study import Record, SweepStudy, latest
from sweeps.work import Options, _Workers
from sweeps.worker import SweepWorker, setup_for


def base(quick):
    """Return the quick configuration's values by dotted field, but those that trials vary."""
    tree = to_dict(quick)
    flat = {"tasks": 4, "dataset": "digits", "block_size": 2, "eval.at": [2]}
    for group in ("model", "train"):
        flat |= {f"{group}.{name}": value for name, value in tree[group].items()}
    return flat | {"eval.images": 10}


def grid(quick, seeds=(0,), **values):
    settings = {k: v for k, v in base(quick).items() if k not in values}
    return {
        "name": "sweep", "recipe": "permuted-digits", "base": settings, "seeds": list(seeds),
        "grid": values,
    }  # fmt: skip


class Notes:
    """Hears everything."""

    def __init__(self):
        self.lines, self.states, self.tasks = [], [], 0

    def began(self):
        self.states.append("began")

    def ended(self, state, text, best):
        self.states.append(state)
        self.lines.append(text)
        self.best = best

    def trained(self, tasks):
        self.tasks += tasks

    def note(self, text):
        self.lines.append(text)

    def metrics(self, values, step):
        pass

    def close(self, status, tags):
        self.states.append(status)

    def leave(self):
        self.states.append("left")


class Plain:
    """Prepares trials for a worker in this process."""

    def __init__(self, spec, folder, data, notes, ahead=True):
        self.spec, self.folder, self.data, self.notes, self.ahead = spec, folder, data, notes, ahead
        self.open_now = []

    def ready(self, trial):
        config = self.spec.config(trial.values, trial.seed)
        return Ready(trial, config, make_manifest(config, self.data).fingerprint)

    def tracker(self, ready):
        return self.notes

    def open(self, ready, ears, stack):
        assert ready.fingerprint not in self.open_now
        self.open_now.append(ready.fingerprint)
        stack.callback(self.open_now.remove, ready.fingerprint)
        folder = RunFolder(self.folder, ready.fingerprint[:8])
        folder.path.mkdir(exist_ok=True)
        stack.enter_context(locked(folder.path))
        manifest = make_manifest(ready.config, self.data)
        bank = Bank.open(folder.path) if folder.has_bank else Bank.create(folder.path, manifest)
        jobs = RunJobs(
            config=ready.config,
            checkpoints=checkpoints(ready.config),
            bank=bank,
            stock=bank.stock(),
            folder=folder,
            tracker=ears,
            reporter=ears,
            put=lambda value: value,
            workers=1,
            ahead=self.ahead,
        )
        return Opened(jobs, setup_for(ready.config, manifest.weights_sha256), self.data)


@pytest.fixture
def plain(tmp_path, digits):
    def make(tree, concurrency=2, ahead=True):
        spec = spec_of(tree)
        study = SweepStudy(spec, open_storage(None, tmp_path), (2, 4), shared=False)
        if spec.search is None:
            study.enqueue([{**arm, "seed": s} for arm in spec.arms() for s in spec.seeds])
        notes = Notes()
        prepares = Plain(spec, tmp_path, digits, notes, ahead)
        return SweepJobs(spec, study, prepares, notes, concurrency), study, notes

    return make


def loop(jobs, keep=2):
    """Work off all jobs; return which trial each was of."""
    worker, seen = SweepWorker(keep), []
    while job := jobs.next_job():
        seen.append((job.tag[0], job.args[2]))
        jobs.done(job, worker.call(*job.args))
    return seen


def test_arms_that_differ_in_inference_alone_train_once(plain, quick):
    methods = ["h-one-shot", "g-one-shot", "h-shortlist"]
    jobs, study, notes = plain(grid(quick, **{"eval.methods": methods, "tasks": [4, 6]}))
    seen = loop(jobs)
    assert notes.tasks == jobs.tally.trained == 6
    assert sum(method == "train" for _, method in seen) == 3
    assert [record.state for record in study.records()] == ["done"] * 6
    curves = {r.values["eval.methods"]: r.curve for r in study.records() if r.values["tasks"] == 6}
    assert len({curve[6]["gg_accuracy"] for curve in curves.values()}) == 1
    assert all(set(curve) == {2, 6} for curve in curves.values())


def test_trials_go_on_alike_as_many_as_may(plain, quick):
    jobs, _, _ = plain(grid(quick, (0, 1, 2), **{"train.batches": [3]}), 2)
    jobs_now = [jobs.next_job() for _ in range(4)]
    assert [job.tag[0] for job in jobs_now] == [0, 1, 0, 1]  # two trials, two blocks each
    assert jobs.next_job() is None
    worker = SweepWorker(2)
    for job in jobs_now:
        jobs.done(job, worker.call(*job.args))
    assert {trial for trial, _ in loop(jobs)} == {0, 1, 2}


def test_jobs_that_find_no_memory_are_done_in_parts(plain, quick):
    jobs, study, notes = plain(grid(quick, **{"train.batches": [3, 4]}))
    worker, whole = SweepWorker(2), 0
    while job := jobs.next_job():
        parts = [job]
        if job.cut:
            jobs.retrying(job, Failure("memory", "OutOfMemoryError"))
            parts, whole = job.cut(), whole + 1
        for part in parts:
            jobs.done(part, worker.call(*part.args))
    assert whole >= 4
    assert notes.tasks == 8
    assert [record.state for record in study.records()] == ["done", "done"]


def test_a_failed_arm_does_not_stop_the_others(plain, quick):
    jobs, study, _ = plain(grid(quick, **{"train.batches": [3, 4]}), 1)
    worker = SweepWorker(2)
    while job := jobs.next_job():
        if job.tag == (0, ("train", range(2, 4))):
            jobs.failed(job, Failure("raised", "NonFiniteLoss: task 2"))
        else:
            jobs.done(job, worker.call(*job.args))
    first, second = study.records()
    assert (first.state, second.state) == ("failed", "done")
    assert "NonFiniteLoss: task 2" in first.reason
    assert set(first.curve) == {2}


def test_what_a_bank_refuses_fails_its_trial_alone(plain, quick, monkeypatch):
    jobs, study, _ = plain(grid(quick, **{"train.batches": [3, 4]}), 1)
    commit = Bank.commit

    def refuse(bank, block):
        if bank.manifest.config.train.batches == 3:
            raise UserError("disk full; mend it")
        return commit(bank, block)

    monkeypatch.setattr(Bank, "commit", refuse)
    loop(jobs)
    assert [record.state for record in study.records()] == ["failed", "done"]
    assert study.records()[0].reason == "disk full; mend it"


@pytest.mark.parametrize("error", [BankError("damaged; mend it"), DeterminismFault("not alike")])
def test_what_is_damaged_in_a_trial_fails_it_alone(plain, quick, monkeypatch, error):
    jobs, study, notes = plain(grid(quick, **{"train.batches": [3, 4]}), 1)
    next_job = RunJobs.next_job

    def damaged(trial):
        if trial._config.train.batches == 3 and trial.trained:
            raise error
        return next_job(trial)

    monkeypatch.setattr(RunJobs, "next_job", damaged)
    loop(jobs)
    assert [record.state for record in study.records()] == ["failed", "done"]
    assert study.records()[0].reason == str(error)
    assert notes.states.count("FAILED") == 1


def test_what_ails_the_cluster_fails_no_trial(plain, quick, monkeypatch):
    jobs, study, _ = plain(grid(quick, **{"train.batches": [3, 4]}), 1)
    job = jobs.next_job()

    def full(*_):
        raise StoreFull("no room left; free memory")

    monkeypatch.setattr(Bank, "commit", full)
    with pytest.raises(StoreFull):
        jobs.done(job, SweepWorker(2).call(*job.args))
    assert [record.state for record in study.records()] == ["running", "waiting"]


def test_a_trial_that_the_cluster_cannot_open_is_left_to_a_resume(
    plain, quick, digits, monkeypatch, tmp_path
):
    tree = grid(quick, **{"train.batches": [3]})
    jobs, study, notes = plain(tree)

    def full(*_args, **_names):
        raise StoreFull("no room left; free memory")

    monkeypatch.setattr("tests.test_sweep_driver.RunJobs", full)
    with pytest.raises(StoreFull):
        jobs.next_job()
    assert [record.state for record in study.records()] == ["running"]
    assert notes.states == ["began", "KILLED"]
    config = spec_of(tree).config({"train.batches": 3}, 0)
    with locked(tmp_path / make_manifest(config, digits).fingerprint[:8]):
        pass  # Nobody holds its bank.


def test_a_trial_that_another_driver_took_is_let_go_with_a_note(plain, quick, monkeypatch):
    jobs, study, notes = plain(grid(quick, **{"train.batches": [3, 4]}), 1)
    holds = study._leases.holds
    monkeypatch.setattr(study._leases, "holds", lambda trial: trial.number and holds(trial))
    monkeypatch.setattr(study._leases, "is_orphan", lambda trial: False)
    loop(jobs)
    assert [record.state for record in study.records()] == ["running", "done"]
    assert "seed 0) elsewhere: another driver took it over" in notes.lines[-2]
    assert notes.states == ["began", "left", "elsewhere", "began", "FINISHED", "done"]


def test_the_driver_signs_while_its_workers_work(plain, quick):
    jobs, _, _ = plain(grid(quick, **{"train.batches": [3]}))

    class Pool:
        def run(self, source, at_look):
            assert source is jobs
            at_look()

        def close(self):
            pass

    class Here:
        started = staticmethod(contextlib.nullcontext)

        def pool(self, start):
            return Pool()

    signs = []
    _Workers(Here(), lambda text: None).run(jobs, 2, lambda: signs.append("sign"))
    assert signs == ["sign"]


def record(number, state, *objectives):
    return Record(
        number=number, state=state, values={}, seed=0, curve={}, objectives=objectives, reason="",
        fingerprint="", seconds=None,
    )  # fmt: skip


def test_the_best_trial_goes_by_the_objectives_direction_and_unit():
    known = [record(0, "done", 3e6), record(1, "failed"), record(2, "done", 2e6)]
    best = Best("bytes", known)
    assert str(best) == "trial 2, 2.00 MB"
    best.add(3, 2.5e6)
    assert str(best) == "trial 2, 2.00 MB"
    best.add(4, 1e6)
    assert str(best) == "trial 4, 1.00 MB"
    best = Best("accuracy", [record(0, "done", 0.5), record(1, "pruned", 0.9)])
    assert str(best) == "trial 0, 50.00 %"
    best.add(2, 0.75)
    assert str(best) == "trial 2, 75.00 %"
    assert str(Best("accuracy", [])) == ""


def test_a_search_for_few_bytes_says_them_in_megabytes(plain, quick):
    space = {"train.batches": {"low": 3, "high": 9}}
    tree = grid(quick) | {"search": {"trials": 2, "space": space, "objectives": ["bytes"]}}
    tree.pop("grid")
    tree["base"].pop("train.batches")
    jobs, study, notes = plain(tree, 1)
    loop(jobs)
    size = study.records()[0].objectives[0]
    assert size > 1000
    assert notes.lines[-1].endswith(f"done {size / 1e6:.2f} MB")
    assert notes.best == f"trial 0, {size / 1e6:.2f} MB"  # The first of two alike.


def test_a_poor_trial_of_a_search_trains_no_further_tasks(plain, quick, monkeypatch):
    space = {"train.batches": {"low": 3, "high": 40}}
    tree = grid(quick) | {"search": {"trials": 3, "space": space, "pruner": "median"}}
    tree.pop("grid")
    tree["base"].pop("train.batches")
    tree["base"] |= {"tasks": 8, "eval.at": [2, 4]}
    jobs, study, _ = plain(tree, 1, ahead=False)
    monkeypatch.setattr(study, "should_prune", lambda number, step, value: number == 1)
    loop(jobs)
    assert [record.state for record in study.records()] == ["done", "pruned", "done"]
    assert jobs.tally.trained == 8 + 2 + 8
    assert study.records()[1].reason == "poor after 2 tasks"


def test_nan_and_infinite_objectives_fail():
    assert outcome("", None, {"accuracy": 0.5}) == ("done", "")
    assert outcome("", None, {"accuracy": float("nan")})[0] == "failed"
    assert outcome("", None, {"accuracy": 0.5, "bytes": float("inf")}) == (
        "failed",
        "bytes is inf, must be finite",
    )
    assert outcome("boom", 4, {"accuracy": 0.5}) == ("failed", "boom")


def test_measures_have_one_name_in_all_scenarios(quick):
    values = {"gg/accuracy": 0.9, "bank/bytes": 10.0}
    gg = dataclasses.replace(quick, scenario="gg")
    assert measured(gg, values) == {"accuracy": 0.9, "gg_accuracy": 0.9, "bytes": 10.0}
    values |= {"gnu/accuracy": 0.7, "gnu/task_accuracy/h-shortlist": 0.8}
    assert measured(quick, values)["accuracy"] == 0.7
    assert measured(quick, values)["task_accuracy"] == 0.8


def test_a_worker_keeps_the_runs_that_it_used_last(quick, digits):
    worker = SweepWorker(keep=2)
    setups = []
    for seed in (0, 1, 2, 1):
        config = dataclasses.replace(quick, seed=seed)
        setups.append(setup_for(config, make_manifest(config, digits).weights_sha256))
        worker.call(setups[-1], digits, "train", range(1))
    assert list(worker._workers) == [setups[2], setups[1]]
    other = dataclasses.replace(quick, tasks=3, scenario="gns")
    assert setup_for(other, "0") == setup_for(quick, "0")


# --- the whole, on Ray -----------------------------------------------------------------------


class Never:
    """A cluster's context that must not be entered."""

    def __enter__(self):
        raise AssertionError("Ray was started")

    def __exit__(self, *_):
        pass


@pytest.fixture
def here(tmp_path):
    return Options(runs_dir=tmp_path / "runs", concurrency=2)


def on(cluster, started=contextlib.nullcontext):
    return dataclasses.replace(cluster, started=started)


def shown():
    return SweepProgress(Console(file=io.StringIO()))


def test_a_sweep_trains_every_task_once_and_is_found_done(cluster, quick, digits, here):
    """Two banks of 6 tasks for 8 trials."""
    methods = ["h-one-shot", "g-one-shot"]
    values = {"train.batches": [3, 4], "eval.methods": methods, "tasks": [4, 6]}
    spec = spec_of(grid(quick, **values))
    first = session.work(spec, here, on(cluster), shown())
    assert (first.counts["done"], first.trained, first.failures) == (8, 12, [])
    config = spec.config({"train.batches": 3, "tasks": 4, "eval.methods": "h-one-shot"}, 0)
    name = f"permuted-digits-{make_manifest(config, digits).fingerprint[:8]}"
    trained = BlockTrainer(config, digits).train(range(6))
    bank = Bank.open(here.runs_dir / name)
    np.testing.assert_array_equal(bank.read(range(6)).masks, trained.masks)
    second = session.work(spec, here, on(cluster, Never), shown())
    assert (second.counts["done"], second.trained) == (8, 0)
    assert {path.name for path in second.files} >= {"comparison.md", "accuracy.png"}
    assert RunFolder(here.runs_dir, name).read_launch().config.tasks == 6
    assert recorded_rates(here.runs_dir)
    _check_mlflow(here, first)


def test_a_sweep_without_a_cluster_says_how_it_goes_on(cluster, quick, here):
    def lost():
        raise HeadLost("the head is gone")

    spec = spec_of(grid(quick, **{"train.batches": [3]}))
    with pytest.raises(HeadLost) as caught:
        session.work(spec, here, on(cluster, lost), shown())
    assert str(caught.value) == (
        "the head is gone; what is finished is safe, go on with supsup sweep resume sweep "
        f"--runs-dir {here.runs_dir}"
    )


def test_a_failed_search_trial_is_tried_again_by_the_next_command(cluster, quick, here):
    space = {"train.batches": {"low": 3, "high": 9}}
    tree = grid(quick) | {"search": {"trials": 1, "space": space}}
    tree.pop("grid")
    tree["base"].pop("train.batches")
    spec = spec_of(tree)
    folder = here.runs_dir / "sweeps" / "sweep"
    folder.mkdir(parents=True)
    study = SweepStudy(spec, open_storage(None, folder), (2, 4), shared=False)
    study.finish(study.next().number, "failed", {}, reason="no luck")
    told = shown()
    found = session.work(spec, here, on(cluster), told)
    assert "1 that failed are tried again" in told._console.file.getvalue()
    assert [(r.number, r.state) for r in found.records] == [(1, "done")]


def test_a_bank_in_use_fails_its_trials_alone_until_the_next_run(plain, quick, digits, tmp_path):
    tree = grid(quick, **{"train.batches": [3, 4]})
    config = spec_of(tree).config({"train.batches": 3}, 0)
    held = tmp_path / make_manifest(config, digits).fingerprint[:8]
    held.mkdir()
    with locked(held):
        jobs, study, _ = plain(tree)
        loop(jobs)
    assert [record.state for record in study.records()] == ["failed", "done"]
    assert "is in use by process" in study.records()[0].reason
    jobs, study, _ = plain(tree)
    loop(jobs)
    assert [record.state for record in latest(study.records())] == ["done", "done"]
    assert jobs.tally.trained == 4


def _check_mlflow(here, outcome):
    import mlflow

    assert outcome.delivered
    client = mlflow.MlflowClient(f"sqlite:///{here.runs_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("supsup").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent = runs.pop("sweep")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials/done"] == 8
    assert json.loads(parent.data.tags["spec"])["name"] == "sweep"
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"comparison.md", "comparison.csv", "accuracy.png", "spec.json"} <= artifacts
    assert {r.data.tags["mlflow.parentRunId"] for r in runs.values()} == {parent.info.run_id}
    states = [run.data.tags["state"] for run in runs.values()]
    assert states == ["done"] * 8
    done = next(run for run in runs.values() if run.data.tags["state"] == "done")
    assert done.data.params["train.batches"] in ("3", "4")
    history = client.get_metric_history(done.info.run_id, "gnu/accuracy")
    assert len({point.step for point in history}) == 2


def test_a_search_reports_and_draws(plain, quick, tmp_path):
    space = {
        "train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "train.schedule": {"choices": ["constant", "linear"]},
    }
    objectives = ["accuracy", "bytes"]
    tree = {
        "name": "rates", "recipe": "permuted-digits",
        "base": {k: v for k, v in base(quick).items() if k not in space},
        "search": {"trials": 6, "space": space, "objectives": objectives},
    }  # fmt: skip
    jobs, study, _ = plain(tree, 1)
    loop(jobs)
    assert jobs.tally.trained == 24
    records = study.records()
    assert all(len(record.objectives) == 2 for record in records)
    files = write(spec_of(tree), records, study.optuna, tmp_path / "report")
    names = {path.name for path in files}
    assert names >= {"parallel-coordinates.png", "importance.png", "pareto.png", "accuracy.png"}
