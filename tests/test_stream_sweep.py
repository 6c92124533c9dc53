"""Open-set runs as trials of a sweep: by a plain loop, and killed on real Ray."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.runfolder import RunFolder
from orchestrator.stream_book import StreamBook
from orchestrator.stream_jobs import StreamJobs
from supsup.bank import Bank
from supsup.config import checkpoints
from supsup.fields import with_values
from supsup.manifest import make_manifest
from supsup.streams import Stream
from sweeps.banks import Banks
from sweeps.driver import Opened, SweepJobs
from sweeps.ears import Ready, measured
from sweeps.plan import Cell, bank_states
from sweeps.presets import preset
from sweeps.report import table, write
from sweeps.spec import spec_of
from sweeps.storage import open_storage
from sweeps.study import SweepStudy
from sweeps.worker import SweepWorker, setup_for
from tests.streaming import sha256
from tests.test_sweep_driver import Notes

SUPSUP = str(Path(sys.executable).with_name("supsup"))
FIELDS = {
    "tasks": 4, "train.batches": 60, "train.learning_rate": 1e-3, "train.precision": "fp32",
    "train.device": "cpu", "train.engine": "dense", "openset.decide_every": 20,
    "openset.budget": 50, "eval.images": 20, "eval.at": "2", "eval.methods": "h-shortlist",
    "eval.shortlist": 3, "block_size": 3,
}  # fmt: skip
TREE = {
    "name": "streams", "recipe": "open-digits", "base": FIELDS,
    "grid": {"openset.threshold": ["fixed", "calibrated"]},
}  # fmt: skip


class Streams:
    """Prepares open-set trials for a worker in this process."""

    def __init__(self, spec, folder, data, notes):
        self.spec, self.folder, self.data, self.notes = spec, folder, data, notes

    def ready(self, trial):
        config = self.spec.config(trial.values, trial.seed)
        return Ready(trial, config, make_manifest(config, self.data).fingerprint)

    def tracker(self, ready):
        return self.notes

    def open(self, ready, ears, stack):
        folder, manifest = self.of(ready), make_manifest(ready.config, self.data)
        folder.path.mkdir(exist_ok=True)
        bank = Bank.open(folder.path) if folder.has_bank else Bank.create(folder.path, manifest)
        book = StreamBook(
            config=ready.config,
            checkpoints=checkpoints(ready.config),
            data=self.data,
            bank=bank,
            folder=folder,
            tracker=ears,
            reporter=ears,
        )
        jobs = StreamJobs(book, lambda value: value, 1)
        return Opened(jobs, setup_for(ready.config, manifest.weights_sha256), self.data)

    def of(self, ready):
        return RunFolder(self.folder, ready.fingerprint[:8])


def sweep_of(tree, folder, data):
    spec = spec_of(tree)
    study = SweepStudy(spec, open_storage(None, folder), (2, 4), shared=False)
    if spec.search is None:
        study.enqueue([{**arm, "seed": 0} for arm in spec.arms()])
    notes = Notes()
    return spec, study, notes, SweepJobs(spec, study, Streams(spec, folder, data, notes), notes, 2)


def work_off(jobs):
    worker, seen = SweepWorker(2), []
    while job := jobs.next_job():
        seen.append((job.tag[0], job.args[2]))
        jobs.done(job, worker.call(*job.args))
    return seen


def test_streams_are_learned_side_by_side_and_compared(tmp_path, learned, digits_16):
    spec, study, notes, jobs = sweep_of(TREE, tmp_path, digits_16)
    seen = work_off(jobs)
    assert sorted(t for t, method in seen if method == "learn_stretch") == [0, 0, 1, 1]
    assert jobs.tally.trained == notes.tasks == 8
    records = study.records()
    assert [record.state for record in records] == ["done", "done"]
    last = records[0].curve[4]
    assert (last["masks"], last["missed"], last["false_new"], last["wrong"]) == (4, 0, 0, 0)
    assert last["accuracy"] > 0.7
    assert last["bytes"] > 0
    bank = Bank.open(tmp_path / records[0].fingerprint[:8])
    assert sha256(bank.read(range(4)).masks) == sha256(learned.learner.masks())
    shown = table(spec, records)
    headings = [str(column.header) for column in shown.columns]
    assert headings[-5:] == ["masks", "missed", "extra", "wrong", "mixed"]
    files = {path.name: path for path in write(spec, records, study.optuna, tmp_path / "report")}
    assert "| masks | missed | extra | wrong |" in files["comparison.md"].read_text()
    assert work_off(sweep_of(TREE, tmp_path, digits_16)[3]) == []


def test_a_poor_stream_of_a_search_is_stopped_at_its_checkpoint(
    tmp_path, monkeypatch, digits_16
):  # fmt: skip
    space = {"openset.epsilon": {"low": 0.1, "high": 0.2}}
    search = {"trials": 2, "space": space, "pruner": "median"}
    tree = {key: value for key, value in TREE.items() if key != "grid"} | {"search": search}
    _, study, _, jobs = sweep_of(tree, tmp_path, digits_16)
    monkeypatch.setattr(study, "should_prune", lambda number, step, value: number == 1)
    work_off(jobs)
    assert [record.state for record in study.records()] == ["done", "pruned"]
    assert jobs.tally.trained == 4 + 2


def test_a_plan_knows_how_far_a_stream_has_come(tmp_path, digits_16):
    spec, study, _, jobs = sweep_of(TREE, tmp_path, digits_16)
    job, other, worker = jobs.next_job(), jobs.next_job(), SweepWorker(1)
    assert (job.tag[0], other.tag[0], jobs.next_job()) == (0, 1, None)  # one each at a time
    jobs.done(job, worker.call(*job.args))
    banks = Banks(tmp_path, "open-digits")
    cells = []
    for arm in spec.arms():
        config = spec.config(arm, 0)
        mark = make_manifest(config, digits_16).fingerprint
        stream = Stream(config, digits_16)
        cells.append(
            Cell(values=arm, seed=0, config=config, fingerprint=mark, mask_bytes=1, stream=stream)
        )
    states = bank_states(banks, cells)
    assert [list(blocks) for _, blocks in states.values()] == [[range(2)], []]
    assert study.records()[0].state == "running"


def test_what_was_not_measured_is_no_measure(open_config):
    counts = {f"nns/{name}": 1.0 for name in ("masks", "missed", "false_new", "mixed")}
    values = counts | {"nns/wrong": 2.0, "nns/late": 3.0, "bank/bytes": 10.0}
    assert "accuracy" not in measured(open_config, values)
    found = measured(open_config, values | {"nns/accuracy": 0.5})
    assert (found["accuracy"], found["wrong"], found["masks"]) == (0.5, 5.0, 1.0)


def test_arms_of_one_stream_share_a_worker(open_config):
    other = with_values(open_config, {"eval.images": 7, "block_size": 1})
    assert setup_for(open_config, "0") == setup_for(other, "0")
    for changed in ({"tasks": 5}, {"openset.epsilon": 0.2}):
        assert setup_for(open_config, "0") != setup_for(with_values(open_config, changed), "0")


def test_the_preset_covers_streams_thresholds_epsilons_and_looks():
    full, quick = preset("open-set"), preset("open-set", quick=True)
    assert len(list(full.arms())) == 60
    assert quick.recipe == "open-digits"
    assert {spec.config({}, 0).scenario for spec in (full, quick)} == {"nns"}


# --- killed ----------------------------------------------------------------------------------


def steps_in(folder) -> int:
    files = folder.glob("runs/open-digits-*/stream/steps.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


def supsup_sweep(folder, *words) -> str:
    command = [SUPSUP, "sweep", *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def banks_in(folder) -> dict[str, str]:
    banks = [Bank.open(path.parent) for path in folder.glob("runs/*/manifest.json")]
    masks = {bank: sum(len(tasks) for tasks, _ in bank.blocks()) for bank in banks}
    return {bank.manifest.fingerprint: bank.sha256(count) for bank, count in masks.items()}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_killed_sweep_of_streams_goes_on_to_the_same_banks(tmp_path):
    lines = [f'"{path}" = {value!r}' for path, value in FIELDS.items()]
    streams = '"openset.stream" = ["paper", "recurring"]'
    looks = '"openset.look" = ["first", "both"]'
    text = "\n".join(['recipe = "open-digits"', "[base]", *lines, "[grid]", streams, looks])
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "streams.toml").write_text(text)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = subprocess.Popen(
        [SUPSUP, "sweep", "run", "streams.toml"], cwd=killed, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while steps_in(killed) < 15:
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    before = steps_in(killed)
    assert 15 <= before < 48
    said = supsup_sweep(killed, "resume", "streams")
    assert re.search(r"4 done; \d+ tasks trained now", said)
    for file in killed.glob("runs/open-digits-*/stream/steps.jsonl"):
        numbers = re.findall(r'"segment": (\d+)', file.read_text())
        assert [int(number) for number in numbers] == list(range(12))
    supsup_sweep(whole, "run", "streams.toml")
    assert banks_in(killed) == banks_in(whole)
    assert len(banks_in(killed)) == 4
