"""The coordinator of the other learners, without Ray: jobs are done here, by a plain worker."""

import json

import numpy as np
import pytest

from orchestrator.baseline import BaselineJobs
from orchestrator.jobs import Failure
from orchestrator.recoveries import Recoveries, capacity, recovery_metrics
from orchestrator.report import table, write
from orchestrator.runfolder import RunFolder
from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.baselines.asking import rule_of
from supsup.baselines.learner import Learned
from supsup.baselines.shelf import Shelf
from supsup.config import checkpoints
from supsup.errors import BankError, DeterminismFault
from supsup.fields import with_values
from supsup.hopfield import Recovery
from supsup.manifest import make_manifest


class Notes:
    """Takes metrics and progress."""

    def __init__(self):
        self.points, self.said, self.counts = {}, [], {}

    def metrics(self, values, step):
        self.points[step] = values

    def start(self, what, total, done=0):
        self.counts[what] = [done, total]

    def advance(self, what, by):
        self.counts[what][0] += by

    def note(self, text):
        self.said.append(text)


@pytest.fixture
def make(quick, digits, tmp_path):
    """Give a function that opens a run of a learner in the same folder, again and again."""

    def opened(learner, **values):
        config = with_values(
            quick,
            {
                "family": "split", "class_order": "sorted", "tasks": 4, "learner": learner,
                "scenario": "gg", "train.engine": "general", "train.optimizer": "adam",
                "train.batches": 8, "eval.at": "1,2,3", "eval.methods": "h-one-shot", **values,
            },
        )  # fmt: skip
        manifest = make_manifest(config, digits)
        folder = RunFolder(tmp_path, "run")
        folder.path.mkdir(exist_ok=True)
        notes = Notes()
        jobs = BaselineJobs(
            config=config,
            checkpoints=checkpoints(config),
            sizes=manifest.sizes(config.tasks),
            shelf=Shelf(folder.path, manifest.fingerprint, forgets=rule_of(learner).forgets),
            folder=folder,
            tracker=notes,
            reporter=notes,
            put=lambda value: value,
            workers=2,
        )
        setup = WorkerSetup(config=config, weights_sha256=manifest.weights_sha256)
        return jobs, TaskWorker(setup, digits), notes

    return opened


def work(jobs, worker, most=1000):
    """Do jobs one after another; return their tags."""
    tags = []
    while len(tags) < most and (job := jobs.next_job()) is not None:
        jobs.done(job, getattr(worker, job.method)(*job.args))
        tags.append(job.tag)
    return tags


def test_independent_tasks_start_side_by_side_a_chain_one_by_one(make):
    jobs, _, _ = make("upper-bound")
    assert jobs.widest == jobs.left() == 4
    assert [jobs.next_job().tag for _ in range(4)] == [("learn", task) for task in range(4)]
    jobs, _, _ = make("psp")
    assert (jobs.widest, jobs.left()) == (1, 1)
    assert jobs.next_job().tag == ("learn", 0)
    assert jobs.next_job() is None


def test_a_trained_trunk_is_waited_for_once(make):
    jobs, worker, _ = make("heads")
    first = jobs.next_job()
    assert first.args[1] is None
    assert jobs.next_job() is None
    jobs.done(first, worker.learn(*first.args))
    others = [jobs.next_job() for _ in range(3)]
    trunks = [job.args[1] for job in others]
    assert trunks[0] is trunks[1] is trunks[2]
    assert set(trunks[0]) == {"linear0.weight", "linear1.weight"}


@pytest.mark.parametrize("learner", ["lower-bound", "psp", "batche", "upper-bound"])
def test_stopped_anywhere_it_goes_on_to_the_same_end(make, learner, tmp_path):
    results = []
    for stop in (0, 1, 3):
        if stop:
            jobs, worker, _ = make(learner)
            work(jobs, worker, most=stop)
        jobs, worker, notes = make(learner)
        assert jobs.learned == stop
        work(jobs, worker)
        assert jobs.trained == 4 - stop
        result = jobs.results("run", "split digits")
        files = {path.name: path.read_bytes() for path in (tmp_path / "run/learned").iterdir()}
        rows = result.matrix().accuracy_KT
        results.append((result.gg_correct.tolist(), np.nan_to_num(rows, nan=-1).tolist(), files))
        assert notes.points[4]["gg/accuracy"] == pytest.approx(np.nanmean(rows[-1]))
        for path in (tmp_path / "run/learned").iterdir():
            path.unlink()
    assert results[0] == results[1] == results[2]
    trunks = [name for name in results[0][2] if name.startswith("trunk")]
    expected = {"lower-bound": [3], "psp": [3], "batche": [0], "upper-bound": []}[learner]
    assert trunks == [f"trunk-{task:09d}.safetensors" for task in expected]


def test_what_is_shown_has_the_form_of_a_run_of_supsup(make, tmp_path):
    jobs, worker, notes = make("lower-bound", **{"train.batches": 60})
    work(jobs, worker)
    assert sorted(notes.points) == [1, 2, 3, 4]
    assert notes.counts["tasks trained"] == [4, 4]
    assert {"gg/accuracy", "forgetting", "bank/bytes", "train/seconds_per_task"} <= set(
        notes.points[4]
    )
    assert notes.points[4]["forgetting"] > 0.1
    results = jobs.results("run", "split digits")
    names = {path.name for path in write(results, tmp_path / "report")}
    assert {"accuracy.png", "accuracy.csv", "per_task.csv", "accuracy_matrix.csv"} <= names
    assert table(results).row_count == 4
    assert jobs.results("run", "").storage.total(9) == notes.points[4]["bank/bytes"]


def test_batche_is_asked_which_task_images_are_of(make):
    values = {"scenario": "gnu", "eval.batch": 8, "eval.images": 16, "eval.at": "2"}
    jobs, worker, notes = make("batche", **values)
    tags = work(jobs, worker)
    assert ("learn", 3) in tags
    assert {tag[1] for tag in tags if tag[0] == "ask"} == {2, 4}
    point = notes.points[4]
    assert point["gnu/accuracy"] <= point["gg/accuracy"] + 0.2
    assert 0 <= point["gnu/task_accuracy/h-one-shot-b8"] <= 1
    again, _, later = make("batche", **values)
    assert again.widest == 0
    assert later.points[4]["gnu/accuracy"] == point["gnu/accuracy"]
    assert point["bank/bytes"] > 4 * (64 * 300 + 300 * 100)


def test_a_number_of_tasks_at_which_nobody_looked_back_is_said(make, monkeypatch):
    monkeypatch.setattr("orchestrator.baseline._ALL_ROWS", 1)
    jobs, worker, _ = make("lower-bound", **{"eval.at": "3"})
    work(jobs, worker)
    again, _, notes = make("lower-bound", **{"eval.at": "2,3"})
    assert sorted(notes.points) == [3, 4]
    assert any("not known after 2 tasks: lower-bound forgets" in text for text in notes.said)
    rows = again.results("run", "").matrix().accuracy_KT
    assert np.isnan(rows[1]).tolist() == [True, False, True, True]


def test_a_task_that_fails_is_given_up_and_the_others_go_on(make):
    jobs, worker, notes = make("upper-bound")
    job = jobs.next_job()
    jobs.retrying(job, Failure("died", "gone"))
    jobs.failed(job, Failure("raised", "ValueError: no", tries=2))
    work(jobs, worker)
    assert jobs.failures == ["task 0 failed 2 times, given up: ValueError: no"]
    assert "task 0: tried again, since gone" in notes.said
    assert (jobs.learned, jobs.trained) == (0, 3)
    assert jobs.results("run", "") is None


# --- what is on disk -------------------------------------------------------------------------


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_rot_is_noticed_and_learned_again(make, tmp_path):
    jobs, worker, _ = make("upper-bound")
    work(jobs, worker)
    file = tmp_path / "run/learned/task-000000002.safetensors"
    sound = file.read_bytes()
    damage(file)
    jobs, worker, notes = make("upper-bound")
    assert any("task-000000002.safetensors is damaged" in text for text in notes.said)
    assert jobs.left() == 1
    assert work(jobs, worker) == [("learn", 2)]
    assert file.read_bytes() == sound
    assert len(list((tmp_path / "run/damaged").iterdir())) == 1


@pytest.mark.parametrize(
    ("learner", "file"),
    [("lower-bound", "trunk-000000003"), ("lower-bound", "task-000000001"),
     ("batche", "trunk-000000000")],
)  # fmt: skip
def test_a_chain_that_is_torn_begins_again(make, tmp_path, learner, file):
    jobs, worker, _ = make(learner)
    work(jobs, worker)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/learned").iterdir()}
    damage(tmp_path / f"run/learned/{file}.safetensors")
    jobs, worker, notes = make(learner)
    assert any("all tasks are learned again" in text for text in notes.said)
    assert jobs.learned == 0
    work(jobs, worker)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run/learned").iterdir()}
    assert after == before


def learned(value=1.0):
    own = {"x": np.full(3, value, np.float32)}
    correct = np.array([7], dtype=np.int64)
    return Learned(task=0, own=own, trunk=None, correct=correct, loss=0.5, seconds=1.0)


def test_equal_work_is_taken_twice_and_other_work_is_a_fault(tmp_path):
    shelf = Shelf(tmp_path, "f" * 64, forgets=False)
    shelf.commit(learned())
    shelf.commit(learned())
    with pytest.raises(DeterminismFault):
        shelf.commit(learned(2.0))
    found = shelf.read(0)
    assert (found.own["x"].tolist(), found.correct.tolist(), found.loss) == ([1, 1, 1], [7], 0.5)
    with pytest.raises(BankError, match="its run doesn't match"):
        Shelf(tmp_path, "e" * 64, forgets=False).read(0)
    with pytest.raises(BankError, match="is missing"):
        shelf.trunk(0)


def test_every_byte_of_a_task_is_covered(tmp_path):
    shelf = Shelf(tmp_path, "f" * 64, forgets=False)
    shelf.commit(learned())
    (file,) = (tmp_path / "learned").iterdir()
    sound = file.read_bytes()
    for place in range(0, len(sound), 3):
        torn = bytearray(sound)
        torn[place] ^= 0x10
        file.write_bytes(torn)
        with pytest.raises(BankError, match="damaged"):
            shelf.read(0)


# --- HopSupSup -------------------------------------------------------------------------------


def recovery(task, steps, distance=0):
    return Recovery(task=task, found=task, distance=distance, steps=steps, images=10, correct=9)


def test_recoveries_are_kept_and_summed_up(tmp_path):
    kept = Recoveries(tmp_path / "evaluations")
    assert recovery_metrics(kept.read(3)) == {}
    found = [recovery(2, -1, 12), recovery(0, 14), recovery(1, 26)]
    kept.write(3, found)
    assert [one.task for one in kept.read(3)] == [0, 1, 2]
    values = recovery_metrics(kept.read(3))
    exact = {"hop/exact": 2 / 3, "hop/nearest": 1, "hop/steps": 20, "hop/steps_max": 26}
    assert values == {**exact, "hop/distance": 4}
    (path,) = kept.table([2, 3], tmp_path)
    lines = path.read_text().splitlines()
    assert lines[0] == "tasks_learned,task,found,distance,steps,images,correct"
    assert lines[1] == "3,0,0,0,14,10,9"
    file = next((tmp_path / "evaluations").iterdir())
    file.write_text(json.dumps([{"task": 1}]))
    assert kept.read(3) == []


def test_the_capacity_is_the_most_tasks_of_which_every_mask_was_found():
    whole, lost = [recovery(0, 3), recovery(1, 9)], [recovery(0, 3), recovery(1, -1, 2)]
    assert capacity({}) is None
    assert capacity({2: []}) is None
    assert capacity({2: lost}) == 0
    assert capacity({2: whole, 10: whole, 20: lost}) == 10


def test_hopsupsup_is_a_run_as_the_others_are(make):
    values = {
        "model.name": "bnnet", "model.output_size": 10, "scenario": "gnu", "tasks": 2,
        "eval.at": "", "eval.methods": "h-gradient-descent", "eval.batch": 8, "eval.images": 0,
        "train.optimizer": "sgd", "train.learning_rate": 0.1, "train.batches": 6,
    }  # fmt: skip
    jobs, worker, notes = make("hopsupsup", **values)
    tags = work(jobs, worker)
    assert [tag[0] for tag in tags].count("learn") == 2
    point = notes.points[2]
    assert {"hop/exact", "hop/distance", "gnu/accuracy"} <= set(point)
    assert point["hop/capacity"] in (0, 2)
    assert point["bank/bytes"] == 8 + 2 * 4 * (2048 * 2048 + 2048)
    assert point["gnu/task_accuracy/h-gradient-descent-b8"] == 1
