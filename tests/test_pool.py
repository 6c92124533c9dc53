import os
import time
from collections import Counter, deque

import psutil
import pytest
import ray

from orchestrator import pool
from orchestrator.coordinator import RunJobs
from orchestrator.pool import Job, PoolBroken, WorkerPool, should_retry
from orchestrator.runfolder import RunFolder
from orchestrator.worker import WorkerSetup
from supsup.config import checkpoints
from tests.test_coordinator import Notes


def test_retries_are_bounded():
    assert [should_retry("died", Counter(died=n)) for n in (1, 3, 4)] == [True, True, False]
    assert [should_retry("raised", Counter(raised=n)) for n in (1, 2)] == [True, False]
    assert should_retry("raised", Counter(raised=1, died=3))


class Moody:
    """A worker that does as it is told."""

    def act(self, what):
        if what == "die":
            os._exit(1)
        if what == "raise":
            raise ValueError("no")
        return what

    def die_once(self, path):
        if not os.path.exists(path):  # noqa: PTH110
            open(path, "w").close()  # noqa: PTH123
            os._exit(1)
        return "alive"


class Source:
    def __init__(self, *jobs):
        self.jobs = deque(jobs)
        self.results, self.failures, self.retries = {}, {}, []

    def next_job(self):
        return self.jobs.popleft() if self.jobs else None

    def done(self, job, result):
        self.results[job.tag] = result

    def failed(self, job, failure):
        self.failures[job.tag] = failure

    def retrying(self, job, failure):
        self.retries.append((job.tag, failure.kind))


@pytest.fixture
def moody_pool(cluster):
    remote = ray.remote(Moody).options(num_cpus=1)
    made = WorkerPool(remote.remote, 2)
    yield made
    made.close()


def act(what, tag=None):
    return Job("act", (what,), tag=tag or what)


def test_a_bad_job_hurts_itself_alone(moody_pool, tmp_path):
    once = Job("die_once", (str(tmp_path / "died"),), tag="once")
    source = Source(act("a"), act("raise"), once, act("die"), *(act(f"b{i}") for i in range(6)))
    moody_pool.run(source)
    assert set(source.results) == {"a", "once", *(f"b{i}" for i in range(6))}
    assert source.results["once"] == "alive"
    assert source.failures["raise"].reason == "ValueError: no"
    assert source.failures["die"].kind == "died"
    assert Counter(source.retries) == {
        ("raise", "raised"): 1,
        ("die", "died"): 3,
        ("once", "died"): 1,
    }


def test_workers_that_die_and_die_stop_the_run(moody_pool, monkeypatch):
    monkeypatch.setattr(pool, "MAX_DEATHS_IN_A_ROW", 2)
    with pytest.raises(PoolBroken, match="3 workers died in a row"):
        moody_pool.run(Source(act("die")))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bank(workers, cluster, quick, digits, bank, trained):
    assert run_on(cluster, workers, quick, digits, bank) == []
    assert (bank.read(range(8)).masks == trained.masks).all()


def run_on(cluster, workers, config, digits, bank, meanwhile=lambda pool: None):
    notes = Notes()
    jobs = RunJobs(
        config=config,
        checkpoints=checkpoints(config),
        bank=bank,
        folder=RunFolder(bank.path.parent, bank.path.name),
        tracker=notes,
        reporter=notes,
        put=ray.put,
    )
    setup = WorkerSetup(config=config, weights_sha256=bank.manifest.weights_sha256)
    data = ray.put(digits)
    made = WorkerPool(lambda: cluster.start_worker(setup, data), workers)
    meanwhile(made)
    made.run(jobs)
    made.close()
    return jobs.failures


def test_killed_workers_lose_nothing(cluster, quick, digits, bank, trained):
    """SIGKILL both workers as soon as they are up; their blocks are run again."""
    killed = []

    def kill(made):
        for worker in made._state.idle:
            pid = ray.get(worker.pid.remote())
            psutil.Process(pid).kill()
            killed.append(pid)
        time.sleep(0.5)

    assert run_on(cluster, 2, quick, digits, bank, kill) == []
    assert len(killed) == 2
    assert (bank.read(range(8)).masks == trained.masks).all()
