"""The coordinator without Ray: its jobs are done by a plain loop over an ordinary worker."""

import weakref

import numpy as np
import pytest

from orchestrator.coordinator import RunJobs
from orchestrator.pool import Failure, Job
from orchestrator.runfolder import RunFolder
from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.config import checkpoints
from supsup.evaluate import Evaluator
from supsup.fields import with_values
from supsup.sampling import sampled_tasks


class Notes:
    def __init__(self) -> None:
        self.lines, self.values, self.counts = [], {}, {}

    def start(self, what, total, done=0):
        self.counts[what] = done, total

    def advance(self, what, by):
        done, total = self.counts[what]
        self.counts[what] = done + by, total

    def note(self, text):
        self.lines.append(text)

    def metrics(self, values, step):
        self.values[step] = dict(values)


@pytest.fixture
def worker(quick, digits, bank):
    setup = WorkerSetup(config=quick, weights_sha256=bank.manifest.weights_sha256)
    return TaskWorker(setup, digits)


def make_jobs(config, bank, notes, **options):
    return RunJobs(
        config=config,
        checkpoints=options.pop("at", checkpoints(config)),
        bank=bank,
        stock=bank.stock(),
        folder=RunFolder(bank.path.parent, bank.path.name),
        tracker=notes,
        reporter=notes,
        put=options.pop("put", lambda value: value),
        workers=options.pop("workers", 1),
        **options,
    )


def work(jobs, worker, most=10**6):
    """Do up to that many jobs; return what was done."""
    seen = []
    while len(seen) < most and (job := jobs.next_job()):
        seen.append(job)
        jobs.done(job, getattr(worker, job.method)(*job.args))
    return seen


def test_a_run_trains_evaluates_and_shows(quick, bank, worker, trained, digits):
    notes = Notes()
    jobs = make_jobs(quick, bank, notes)
    seen = work(jobs, worker)
    expected = ["train"] * 2 + ["evaluate"] * 2 + ["train"] + ["evaluate"] * 2
    assert [job.method for job in seen] == expected
    np.testing.assert_array_equal(bank.read(range(8)).masks, trained.masks)
    assert notes.counts == {"tasks trained": (8, 8), "tasks evaluated": (12, 12)}
    assert set(notes.values) == {4, 8}
    images = 8 * len(digits.test_images)
    assert notes.values[8]["gg/accuracy"] == pytest.approx(trained.gg_correct.sum() / images)
    expected = Evaluator(quick, digits).evaluate(quick.eval, trained.masks, 8, range(8))
    accuracy = expected.accuracy("g-one-shot", "gnu")
    assert notes.values[8]["gnu/accuracy/g-one-shot"] == pytest.approx(accuracy)
    assert notes.values[8]["gnu/accuracy"] == pytest.approx(expected.accuracy("h-shortlist", "gnu"))
    assert notes.values[8]["bank/bytes"] == bank.size()
    assert notes.values[4]["bank/bytes"] < notes.values[8]["bank/bytes"]
    results = jobs.results("name", "digits")
    assert [checkpoint.learned for checkpoint in results.checkpoints] == [4, 8]
    np.testing.assert_array_equal(results.gg_correct, trained.gg_correct)


def test_a_stopped_run_goes_on_with_what_is_missing(quick, bank, worker, full_bank):
    sha256 = full_bank.sha256(8)
    for path in [path for _, path in full_bank.blocks()][1:]:
        path.unlink()
    notes = Notes()
    jobs = make_jobs(quick, bank, notes)
    trained_now = [job.args[0] for job in work(jobs, worker) if job.method == "train"]
    assert trained_now == [range(3, 6), range(6, 8)]
    assert bank.sha256(8) == sha256
    again = make_jobs(quick, bank, Notes())
    assert again.widest == 0
    assert work(again, worker) == []
    assert len(again.results("name", "digits").checkpoints) == 2


def test_more_tasks_train_the_others_alone(quick, full_bank, worker):
    more = with_values(quick, {"tasks": 11, "block_size": 4})
    blocks = [job.args[0] for job in work(make_jobs(more, full_bank, Notes()), worker)
              if job.method == "train"]  # fmt: skip
    assert blocks == [range(8, 11)]


def test_damage_is_named_moved_and_trained_again(quick, full_bank, worker):
    sha256 = full_bank.sha256(8)
    path = full_bank.blocks()[1][1]
    path.write_bytes(path.read_bytes()[:-3])
    notes = Notes()
    work(make_jobs(quick, full_bank, notes), worker)
    assert path.name in notes.lines[0]
    assert full_bank.sha256(8) == sha256
    assert len(list((full_bank.path / "damaged").iterdir())) == 1


def test_a_failed_block_hurts_its_checkpoints_alone(quick, bank, worker):
    notes = Notes()
    jobs = make_jobs(quick, bank, notes)
    while job := jobs.next_job():
        if job.tag == ("train", range(6, 8)):
            jobs.failed(job, Failure("raised", "NonFiniteLoss: task 6"))
        else:
            jobs.done(job, getattr(worker, job.method)(*job.args))
    assert jobs.failures == ["tasks 6 to 7 failed, given up: NonFiniteLoss: task 6"]
    assert [c.learned for c in jobs.results("name", "digits").checkpoints] == [4]
    assert jobs.learned == 6


def test_checkpoints_are_finished_in_order_and_one_that_fails_holds_up_none(
    quick, full_bank, worker
):
    notes = Notes()
    jobs = make_jobs(quick, full_bank, notes, at=(2, 5, 8), train=False)
    queue = []
    while job := jobs.next_job():
        queue.append(job)
    of = {k: [job for job in queue if job.tag[1] == k] for k in (2, 5, 8)}
    for job in of[8]:
        jobs.done(job, worker.evaluate(*job.args))
    assert not notes.values
    for job in of[2]:
        jobs.done(job, worker.evaluate(*job.args))
    assert set(notes.values) == {2}
    for job in of[5]:
        jobs.failed(job, Failure("raised", "no memory"))
    assert set(notes.values) == {2, 8}
    assert len(jobs.failures) == len(of[5])
    matrix = jobs.results("name", "digits").matrix()
    assert matrix.learned == (2, 8)
    expected = notes.values[8]["average_accuracy"]
    assert expected == pytest.approx(notes.values[8]["gnu/accuracy"])


def test_a_checkpoint_that_is_given_up_lets_training_go_on(quick, bank, worker):
    """Where training waits for evaluations (a pruned sweep), it must not wait for this one."""
    notes = Notes()
    jobs = make_jobs(quick, bank, notes, at=(4, 8), ahead=False)
    late = []
    while job := jobs.next_job():
        if job.tag[:2] == ("evaluate", 4):
            late = late or [worker.evaluate(*job.args)]
            jobs.failed(job, Failure("raised", "no memory"))
        else:
            jobs.done(job, getattr(worker, job.method)(*job.args))
    assert jobs.learned == 8
    jobs.done(Job("evaluate", (), tag=("evaluate", 4, ())), late[0])  # it was in some worker's hand
    assert set(notes.values) == {8}


def cut_up(job, do):
    """Do a job in the smallest parts that it can be cut into."""
    if job.cut is None:
        do(job)
    for part in job.cut() if job.cut else ():
        assert 0 < part.size < job.size
        cut_up(part, do)


def test_jobs_cut_into_single_tasks_give_the_same(quick, bank, worker, trained, digits):
    notes = Notes()
    jobs = make_jobs(quick, bank, notes)
    done = []

    def do(job):
        done.append(job.tag)
        jobs.done(job, getattr(worker, job.method)(*job.args))

    while job := jobs.next_job():
        cut_up(job, do)
    assert len(set(done)) == len(done) == 8 + 4 + 8
    np.testing.assert_array_equal(bank.read(range(8)).masks, trained.masks)
    expected = Evaluator(quick, digits).evaluate(quick.eval, trained.masks, 8, range(8))
    found = jobs.results("name", "digits").checkpoints[-1].evaluation
    np.testing.assert_array_equal(found.counts, expected.counts)


def test_what_is_tried_again_or_given_up_is_said(quick, bank):
    notes = Notes()
    jobs = make_jobs(quick, bank, notes)
    job = jobs.next_job()
    jobs.retrying(job, Failure("died", "its worker died; Ray says: killed"))
    jobs.retrying(job, Failure("memory", "OutOfMemoryError: CUDA"))
    jobs.failed(job, Failure("hung", "no result after 300 s", tries=2))
    assert notes.lines == [
        "tasks 0 to 2: tried again, since its worker died",
        "tasks 0 to 2: tried in smaller parts, since OutOfMemoryError: CUDA",
        "tasks 0 to 2 failed 2 times, given up: no result after 300 s",
    ]


def test_scenario_gg_evaluates_nothing(quick, full_bank, worker):
    notes = Notes()
    config = with_values(quick, {"scenario": "gg"})
    assert work(make_jobs(config, full_bank, notes), worker) == []
    assert set(notes.values[8]) == {
        "gg/accuracy", "bank/bytes", "bytes_per_task", "average_accuracy", "forgetting",
        "backward_transfer",
    }  # fmt: skip
    assert notes.values[8]["forgetting"] == 0


def test_a_sample_of_tasks_is_asked_about_and_counted(quick, full_bank, worker, trained, digits):
    config = with_values(quick, {"eval.tasks": 3})
    notes = Notes()
    jobs = make_jobs(config, full_bank, notes, workers=2)
    asked = {4: [], 8: []}
    for job in work(jobs, worker):
        asked[job.tag[1]] += job.tag[2]
    assert asked == {k: list(sampled_tasks(quick.seed, k, 3)) for k in (4, 8)}
    assert notes.counts["tasks evaluated"] == (6, 6)
    whole = Evaluator(quick, digits).evaluate(quick.eval, trained.masks, 8, range(8))
    found = jobs.results("name", "digits").checkpoints[-1].evaluation
    assert found.tasks == tuple(asked[8])
    np.testing.assert_array_equal(found.counts, whole.counts[:, asked[8]])
    assert notes.values[8]["gnu/accuracy_ci95"] > 0
    images = 8 * len(digits.test_images)
    assert notes.values[8]["gg/accuracy"] == pytest.approx(trained.gg_correct.sum() / images)
    assert work(make_jobs(config, full_bank, Notes()), worker) == []
    others = with_values(quick, {"eval.tasks": 2})
    assert {job.tag[1] for job in work(make_jobs(others, full_bank, Notes()), worker)} == {4, 8}


class Masks:
    """Stands for a reference to masks in an object store."""

    def __init__(self, value):
        self.value = value


def test_masks_of_a_checkpoint_are_freed_after_its_jobs(quick, full_bank, worker):
    alive = weakref.WeakSet()

    def put(value):
        masks = Masks(value)
        alive.add(masks)
        return masks

    jobs = make_jobs(quick, full_bank, Notes(), at=(4, 8), put=put, train=False)
    learned, most = [], 0
    while job := jobs.next_job():
        settings, masks, k, tasks = job.args
        learned.append(k)
        most = max(most, len(alive))
        jobs.done(job, worker.evaluate(settings, masks.value, k, tasks))
        del job, masks
    assert sorted(set(learned)) == [4, 8]
    assert most == 1
    assert not alive


def test_jobs_left_are_those_that_can_start(quick, full_bank, bank, worker):
    jobs = make_jobs(quick, full_bank, Notes(), at=(8,), train=False)
    assert (jobs.left(), jobs.widest) == (0, 8)
    jobs.next_job()
    assert jobs.left() == 1  # 20 images of each of 8 tasks: two jobs, one of them handed out


def test_a_block_is_found_by_no_look_at_the_others(quick, full_bank, worker, monkeypatch):
    """What a commit costs must not grow with the bank: no listing, no reading of blocks."""
    path = full_bank.blocks()[2][1]
    path.unlink()
    jobs = make_jobs(with_values(quick, {"scenario": "gg"}), full_bank, Notes(), at=())
    monkeypatch.setattr(type(full_bank), "blocks", None)
    monkeypatch.setattr(type(full_bank), "_read_block", None)
    assert len(work(jobs, worker)) == 1
    assert path.exists()
    assert jobs.learned == 8


def test_evaluation_alone_trains_nothing(quick, full_bank, worker):
    jobs = make_jobs(quick, full_bank, Notes(), at=(2, 5), train=False)
    assert {job.method for job in work(jobs, worker)} == {"evaluate"}
    assert [c.learned for c in jobs.results("name", "digits").checkpoints] == [2, 5]


def test_a_worker_with_other_weights_refuses(quick, digits):
    worker = TaskWorker(WorkerSetup(config=quick, weights_sha256="0" * 64), digits)
    with pytest.raises(RuntimeError, match="are not the bank's"):
        worker.train(range(1))
    with pytest.raises(RuntimeError, match="are not the bank's"):
        worker.evaluate(quick.eval, np.zeros((1, 1), np.uint8), 1, range(1))


def test_what_makes_training_slow_is_said_once(quick, bank, worker, monkeypatch):
    import warnings

    from supsup.errors import SlowPath

    trainer = worker._trainer
    train = trainer.train

    def slow(tasks):
        warnings.warn("no compiler", SlowPath, stacklevel=1)
        return train(tasks)

    monkeypatch.setattr(trainer, "train", slow)
    notes = Notes()
    work(make_jobs(quick, bank, notes), worker)
    assert notes.lines.count("warning: no compiler") == 1


def test_jobs_are_described():
    from orchestrator.coordinator import _describe

    assert _describe(Job("train", (), ("train", range(3, 6)))) == "tasks 3 to 5"
    evaluation = Job("evaluate", (), ("evaluate", 50, range(5, 10)))
    assert _describe(evaluation) == "evaluation of tasks 5 to 9 among 50"
