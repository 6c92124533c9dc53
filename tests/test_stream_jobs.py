"""A stream as jobs of a pool against the plain loop: same steps, same bank, whoever does what."""

import itertools

import numpy as np
import pytest

from orchestrator import stream_jobs
from orchestrator.pool import Failure
from orchestrator.runfolder import RunFolder
from orchestrator.stream_book import StreamBook
from orchestrator.stream_jobs import StreamJobs
from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.bank import Bank
from supsup.fields import with_values
from supsup.ledger import Ledger
from supsup.manifest import make_manifest
from supsup.streams import Stream
from tests.streaming import Killed, Recorder, Silent, sha256, stream_run, values_of


def jobs_of(path, config, data, sink, checkpoints=(2, 4)) -> StreamJobs:
    folder = RunFolder(path, "open")
    exists = folder.has_bank
    bank = (
        Bank.open(folder.path) if exists else Bank.create(folder.path, make_manifest(config, data))
    )
    book = StreamBook(
        config=config,
        checkpoints=checkpoints,
        data=data,
        bank=bank,
        folder=folder,
        tracker=sink,
        reporter=sink,
    )
    return StreamJobs(book, lambda value: value, 2)


def worker_of(config, data) -> TaskWorker:
    manifest = make_manifest(config, data)
    return TaskWorker(WorkerSetup(config=config, weights_sha256=manifest.weights_sha256), data)


def work_off(jobs: StreamJobs, workers) -> list[str]:
    """Work off all jobs, each on the next worker; return what they were."""
    seen = []
    for worker in workers:
        job = jobs.next_job()
        if job is None:
            return seen
        seen.append(job.method)
        jobs.done(job, getattr(worker, job.method)(*job.args))
    raise AssertionError("too few workers for all jobs")


def masks_of(path) -> str:
    return sha256(Bank.open(path / "open").read(range(4)).masks)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(stream_jobs, "STRETCH", 2)


@pytest.mark.parametrize("order", ["one", "in turn", "a new one each time"])
@pytest.mark.usefixtures("short")
def test_any_worker_learns_any_stretch(tmp_path, learned, open_config, digits_16, order):
    make = lambda: worker_of(open_config, digits_16)  # noqa: E731
    workers = {
        "one": itertools.repeat(make()),
        "in turn": itertools.cycle([make(), make()]),
        "a new one each time": (make() for _ in itertools.count()),
    }[order]
    sink = Silent()
    jobs = jobs_of(tmp_path, open_config, digits_16, sink)
    assert jobs.widest
    seen = work_off(jobs, workers)
    assert seen.count("learn_stretch") == 6
    assert (jobs.trained, jobs.learned_now, jobs.widest, jobs.left()) == (4, 12, 0, 0)
    assert masks_of(tmp_path) == sha256(learned.learner.masks())
    results = jobs.results()
    assert [d.margin for d in results.decisions] == [step.margin for step in learned.steps]
    assert list(sink.values) == [2, 4]
    assert sink.values[4]["nns/accuracy"] > 0.7
    assert sink.values[4]["nns/masks"] == 4
    assert not list((tmp_path / "open" / "stream" / "masks").iterdir())

    again = jobs_of(tmp_path, open_config, digits_16, Silent())
    assert (again.widest, again.next_job()) == (0, None)
    assert values_of(again.results()) == values_of(results)
    assert stream_run(tmp_path, open_config, digits_16, Silent()).settled


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.usefixtures("short")
def test_a_task_that_comes_back_is_trained_on(tmp_path, open_config, digits_16, schedule):
    """Two workers in turn: the state of a mask comes from the other one, or from long ago."""
    values = {"openset.stream": "recurring", "train.schedule": schedule}
    config = with_values(open_config, values)
    plain = Recorder(config, digits_16)
    for segment in Stream(config, digits_16):
        plain.learn(segment)
    sink = Silent()
    jobs = jobs_of(tmp_path, config, digits_16, sink)
    work_off(jobs, itertools.cycle([worker_of(config, digits_16) for _ in range(2)]))
    steps = jobs.results().decisions
    assert [d.margin for d in steps] == [step.margin for step in plain.steps]
    found = Bank.open(tmp_path / "open").read(range(plain.learner.allocated)).masks
    assert np.array_equal(found, plain.learner.masks())


@pytest.mark.parametrize("kill_at", [3, 6, 11])
@pytest.mark.usefixtures("short")
def test_a_killed_run_goes_on_to_the_same_bank(
    tmp_path, monkeypatch, learned, open_config, digits_16, kill_at
):  # fmt: skip
    append, count = Ledger._append, 0

    def dying(self: Ledger, line: dict) -> None:
        nonlocal count
        append(self, line)
        count += 1
        if count == kill_at:
            raise Killed

    worker = worker_of(open_config, digits_16)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", dying)
        with pytest.raises(Killed):
            work_off(jobs_of(tmp_path, open_config, digits_16, Silent()), itertools.repeat(worker))
    sink = Silent()
    jobs = jobs_of(tmp_path, open_config, digits_16, sink)
    work_off(jobs, itertools.repeat(worker))  # which has learned more than was stored
    assert jobs.learned_now == 12 - kill_at
    assert masks_of(tmp_path) == sha256(learned.learner.masks())
    assert list(sink.values) == [2, 4]
    assert all(checkpoint.evaluation for checkpoint in jobs.results().checkpoints)


@pytest.mark.usefixtures("short")
def test_what_fails_half_way_through_a_stretch_is_tried_again(
    tmp_path, monkeypatch, learned, open_config, digits_16
):  # fmt: skip
    worker = worker_of(open_config, digits_16)
    jobs = jobs_of(tmp_path, open_config, digits_16, Silent())
    segment = Stream.segment
    while (job := jobs.next_job()).tag != ("learn_stretch", range(6, 8)):
        jobs.done(job, getattr(worker, job.method)(*job.args))

    def broken(self, number, batches=None):
        if number == 7:  # the one before it begins a task, and allocates
            raise OSError("a cosmic ray")
        return segment(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "segment", broken)
        with pytest.raises(OSError, match="cosmic"):
            worker.learn_stretch(*job.args)
    jobs.retrying(job, Failure("raised", "OSError: a cosmic ray"))
    assert jobs.next_job() is None
    jobs.done(job, worker.learn_stretch(*job.args))
    work_off(jobs, itertools.repeat(worker))
    assert masks_of(tmp_path) == sha256(learned.learner.masks())


def test_a_job_given_up_ends_the_run_with_its_reason(tmp_path, open_config, digits_16):
    sink = Silent()
    jobs = jobs_of(tmp_path, open_config, digits_16, sink)
    jobs.failed(jobs.next_job(), Failure("raised", "NonFiniteLoss: mask 0"))
    assert jobs.failures == ["segments 0 to 5 failed, given up: NonFiniteLoss: mask 0"]
    assert (jobs.next_job(), jobs.left(), jobs.widest) == (None, 0, 0)


def test_a_run_that_is_stopped_hears_no_half_evaluation(tmp_path, open_config, digits_16):
    sink = Silent()
    jobs = jobs_of(tmp_path, open_config, digits_16, sink)
    worker = worker_of(open_config, digits_16)
    job = jobs.next_job()
    jobs.done(job, worker.learn_stretch(*job.args))
    first, second = jobs.next_job(), jobs.next_job()
    assert first.method == second.method == "evaluate"
    jobs.done(first, worker.evaluate(*first.args))
    jobs.drop_rest()
    assert not sink.values
    jobs.done(second, worker.evaluate(*second.args))
    assert list(sink.values) == [2]
    assert jobs.next_job() is None
