import os
import time
from collections import Counter, deque

import psutil
import pytest
import ray

from orchestrator import pool
from orchestrator.pool import Job, PoolBroken, WorkerPool, queue_depth, should_retry
from orchestrator.worker import WorkerSetup
from tests.test_coordinator import Notes, make_jobs


def test_retries_are_bounded():
    assert [should_retry("died", Counter(died=n)) for n in (1, 3, 4)] == [True, True, False]
    assert [should_retry("raised", Counter(raised=n)) for n in (1, 2)] == [True, False]
    assert should_retry("raised", Counter(raised=1, died=3))


def test_workers_have_a_job_in_hand_but_not_the_last_ones():
    assert [queue_depth(left, workers=4) for left in (0, 3, 4, 100)] == [1, 1, 2, 2]


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

    def left(self):
        return len(self.jobs)

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
    assert (tmp_path / "died").exists()
    assert source.results["once"] == "alive"
    assert source.failures["raise"].reason == "ValueError: no"
    assert source.failures["die"].kind == "died"
    retries = Counter(source.retries)
    assert (retries["raise", "raised"], retries["die", "died"]) == (1, 3)
    # A result that was done but not sent when its worker died in the next job counts as a death:
    # of "once", or of the job before it.
    assert sum(count for (_, kind), count in retries.items() if kind == "died") >= 4


@pytest.mark.slow
def test_workers_that_die_and_die_stop_the_run(moody_pool, monkeypatch):
    monkeypatch.setattr(pool, "MAX_DEATHS_IN_A_ROW", 2)
    with pytest.raises(PoolBroken, match="3 workers died in a row"):
        moody_pool.run(Source(act("die")))


def queued_at_each_result(made, *jobs):
    """The jobs that each worker has, sorted, whenever the source takes a result."""
    source, seen = Source(*jobs), []
    source.done = lambda job, result: seen.append(sorted(len(w.queue) for w in made._state.workers))
    made.run(source)
    return seen


def test_a_worker_has_its_next_job_while_its_result_is_taken(cluster):
    made = WorkerPool(ray.remote(Moody).options(num_cpus=1).remote, 1)
    assert queued_at_each_result(made, *(act(f"b{i}") for i in range(4))) == [[1], [1], [1], [0]]
    made.close()


def test_the_last_job_waits_for_whoever_is_free(moody_pool):
    """Three jobs, two workers: the third is queued behind neither of the others."""
    seen = queued_at_each_result(moody_pool, act("a"), act("b"), act("c"))
    assert seen == [[0, 1], [0, 1], [0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bank(workers, cluster, quick, digits, bank, trained):
    assert run_on(cluster, workers, quick, digits, bank) == []
    assert (bank.read(range(8)).masks == trained.masks).all()


def run_on(cluster, workers, config, digits, bank, meanwhile=lambda pool: None):
    jobs = make_jobs(config, bank, Notes(), put=ray.put, workers=workers)
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
        for worker in made._state.workers:
            pid = ray.get(worker.actor.pid.remote())
            psutil.Process(pid).kill()
            killed.append(pid)
        time.sleep(0.5)

    assert run_on(cluster, 2, quick, digits, bank, kill) == []
    assert len(killed) == 2
    assert (bank.read(range(8)).masks == trained.masks).all()


@pytest.mark.slow
def test_jobs_queued_behind_a_killer_are_run_again(cluster):
    """One worker, so that the killer always has one of the others behind it."""
    remote = ray.remote(Moody).options(num_cpus=1)
    made = WorkerPool(remote.remote, 1)
    source = Source(act("die"), act("innocent"), act("another"))
    made.run(source)
    made.close()
    assert set(source.results) == {"innocent", "another"}
    assert set(source.failures) == {"die"}
    assert Counter(source.retries)["die", "died"] == 3
