"""The pool: by a script without Ray, who gets what and what is tried again; and on Ray."""

import itertools
import os
import time
from collections import Counter, deque

import psutil
import pytest
import ray
import torch
from ray.exceptions import OutOfDiskError

from orchestrator import jobs
from orchestrator.actors import RayActors, Watch
from orchestrator.jobs import (
    ClusterFailed,
    Durations,
    Failure,
    Job,
    PoolBroken,
    StoreFull,
    as_failure,
    is_broken,
    queue_depth,
    should_cut,
    should_retry,
)
from orchestrator.pool import WorkerPool
from orchestrator.worker import WorkerSetup
from supsup.errors import ConfigError, NonFiniteLoss
from tests.acting import Died, Raised, Script
from tests.test_coordinator import Notes, make_jobs

# --- policy ----------------------------------------------------------------------------------


def test_retries_are_bounded():
    tries = {"died": 3, "raised": 1, "memory": 3, "hung": 1, "certain": 0}
    for kind, most in tries.items():
        found = [should_retry(kind, Counter({kind: n})) for n in range(1, 6)]
        assert found == [n <= most for n in range(1, 6)]
    assert should_retry("raised", Counter(raised=1, died=3))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (Raised(ValueError("no")), "raised", "ValueError: no"),
        (Raised(NonFiniteLoss("task 3: the loss")), "certain", "NonFiniteLoss: task 3: the loss"),
        (Raised(ConfigError("tasks is 0")), "certain", "ConfigError: tasks is 0"),
        (Raised(torch.OutOfMemoryError("CUDA")), "memory", "OutOfMemoryError: CUDA"),
        (Raised(MemoryError()), "memory", "MemoryError: MemoryError"),
        (
            Raised(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")),
            "memory",
            "RuntimeError: DefaultCPUAllocator",
        ),
        (
            Died("It died.\n\tip: 10.0.0.7\nThe actor died because its node has died. Node Id"),
            "died",
            "its node 10.0.0.7 was lost; Ray says: The actor died because its node has died.",
        ),
        (
            Died("The actor died.\n\tclass_name: A\nThe actor is dead because its worker process"),
            "died",
            "its worker died; Ray says: The actor is dead because its worker process",
        ),
        (
            Raised(OutOfDiskError("Local disk is full")),
            "room",
            "Ray's object store had no room for its result; Ray says: Local disk is full",
        ),
        (
            Died("1 worker(s) were killed due to the node running low on memory. Memory on"),
            "memory",
            "its node ran out of memory, and Ray killed the worker",
        ),
    ],
)
def test_failures_are_told_apart(error, kind, said):
    failure = as_failure(error)
    assert failure.kind == kind
    assert failure.reason.startswith(said)
    assert "Ray says" not in failure.cause


def test_only_what_lacks_memory_is_cut():
    whole = Job("m", (), tag=0, cut=lambda: [])
    assert should_cut("memory", whole)
    assert not should_cut("memory", Job("m", (), tag=0))
    assert not should_cut("died", whole)


def test_a_lost_node_with_forty_workers_breaks_no_pool():
    assert [is_broken(n, workers=2) for n in (12, 13)] == [False, True]
    assert [is_broken(n, workers=40) for n in (40, 120, 121)] == [False, False, True]


def test_how_long_a_job_may_take_is_known_from_those_like_it():
    durations, job = Durations(), Job("train", (), tag=0, size=10)
    for _ in range(2):
        durations.add(job, 60.0)
        assert durations.limit(job) is None
    durations.add(job, 60.0)
    assert durations.limit(job) == 600.0
    assert durations.limit(Job("train", (), tag=1, size=1)) == 300.0
    assert durations.limit(Job("evaluate", (), tag=1)) is None
    assert durations.limit(Job("train", (), tag=1, kind="other")) is None
    worst = Durations(typical=max)
    for seconds in (0.0, 90.0, 0.0):
        worst.add(job, seconds)
    assert worst.limit(job) == 900.0


def test_workers_have_a_job_in_hand_but_not_the_last_ones():
    assert [queue_depth(left, workers=4) for left in (0, 3, 4, 100)] == [1, 1, 2, 2]


def test_a_silent_head_is_given_up_after_a_while():
    now, problem = 0.0, ""
    watch = Watch(lambda: problem, seconds=30.0, clock=lambda: now)
    watch.check()
    problem = "connection refused"
    watch.check()
    now = 29.0
    watch.check()
    problem = ""  # a link that was cut for a moment
    watch.check()
    problem, now = "connection refused", 40.0
    watch.check()
    now = 70.0
    with pytest.raises(ClusterFailed, match=r"gone for 30 s \(connection refused\)"):
        watch.check()


# --- the loop, by a script -------------------------------------------------------------------


class Source:
    def __init__(self, *jobs):
        self.jobs = deque(jobs)
        self.results, self.failures, self.retries = {}, {}, []

    def left(self):
        return len(self.jobs)

    def next_job(self):
        return self.jobs.popleft() if self.jobs else None

    def done(self, job, result):
        assert job.tag not in self.results
        self.results[job.tag] = result

    def failed(self, job, failure):
        self.failures[job.tag] = failure

    def retrying(self, job, failure):
        self.retries.append((job.tag, failure.kind))


def do(what, seconds=1.0, tag=None, **more):
    return Job("act", (what, seconds), tag=tag if tag is not None else what, **more)


def fine(count, seconds=1.0):
    return [do("ok", seconds, tag=i) for i in range(count)]


def work(script, jobs, size=2, most=None):
    source = Source(*jobs)
    made = WorkerPool(script, size, most, clock=script.clock)
    made.run(source)
    made.close()
    return source


def test_all_jobs_are_done_by_all_workers():
    script = Script()
    source = work(script, fine(10), size=3)
    assert set(source.results) == set(range(10))
    assert {number for number, _ in script.submitted} == {0, 1, 2}
    assert script.now == 4.0


def test_who_asks_is_called_at_every_look_however_long_a_job_takes():
    script, looks = Script(), [0.0]
    source = Source(do("ok", 600.0, tag="long"))
    made = WorkerPool(script, 1, clock=script.clock)
    made.run(source, at_look=lambda: looks.append(script.now))
    made.close()
    assert set(source.results) == {"long"}
    assert looks[-1] >= 595.0
    assert max(after - before for before, after in itertools.pairwise(looks)) <= 10.0


def test_a_bad_job_hurts_itself_alone():
    script = Script()
    jobs = [do("die", tag="die"), do(ValueError("no"), tag="raise"), *fine(6)]
    source = work(script, jobs)
    assert set(source.results) == set(range(6))
    assert source.failures["raise"] == Failure("raised", "ValueError: no", tries=2)
    assert (source.failures["die"].kind, source.failures["die"].tries) == ("died", 4)
    # What was queued behind a death is run again, and not counted against it.
    assert set(source.retries) == {("die", "died"), ("raise", "raised")}


def test_a_full_object_store_ends_the_run_instead_of_every_job_twice():
    script = Script()
    full = OutOfDiskError("Local disk is full")
    with pytest.raises(StoreFull, match=r"no room left \(Local disk is full\); free memory, or"):
        work(script, [do(full, tag=i) for i in range(20)])
    assert len(script.submitted) <= 2 * len(script.actors) + 4


def test_what_fails_for_certain_is_not_tried_again():
    source = work(Script(), [do(NonFiniteLoss("task 3"), tag="nan"), *fine(3)])
    assert source.failures == {"nan": Failure("certain", "NonFiniteLoss: task 3")}
    assert source.retries == []
    assert set(source.results) == {0, 1, 2}


def big(tasks, room, tries):
    """A job over some tasks that finds memory for so many of them only."""

    def cut():
        middle = len(tasks) // 2
        return [big(tasks[:middle], room, tries), big(tasks[middle:], room, tries)]

    tries.append(len(tasks))
    what = "ok" if len(tasks) <= room else torch.OutOfMemoryError("CUDA")
    return do(what, tag=tasks, cut=cut if len(tasks) > 1 else None)


def test_a_block_without_memory_is_trained_in_smaller_parts():
    tries = []
    script = Script()
    source = work(script, [big(range(10), 3, tries), *fine(4)])
    learned = sorted(task for tag in source.results if isinstance(tag, range) for task in tag)
    assert learned == list(range(10))
    assert max(len(tag) for tag in source.results if isinstance(tag, range)) == 3
    assert not source.failures
    assert len(script.killed) >= len(source.retries) == 3  # each time, another worker


def test_a_task_without_memory_even_alone_is_reported():
    tries = []
    source = work(Script(), [big(range(4), 0, tries), *fine(2)])
    assert set(source.failures) == {range(i, i + 1) for i in range(4)}
    assert {(f.kind, f.tries) for f in source.failures.values()} == {("memory", 4)}
    assert {0, 1} <= set(source.results)


def test_a_hung_worker_is_replaced_and_its_job_done_elsewhere():
    script = Script()
    jobs = [*fine(8, 20.0), do("hang", tag="hang")]
    source = work(script, jobs)
    assert set(source.results) == set(range(8))
    failure = source.failures["hang"]
    assert (failure.kind, failure.tries) == ("hung", 2)
    assert "no result after 30" in failure.reason
    assert "300 s are far more than is usual" in failure.reason
    assert source.retries == [("hang", "hung")]
    assert script.now < 20 * 5 + 2 * 310


def test_a_slow_job_among_slow_ones_does_not_hang():
    source = work(Script(), [*fine(6, 100.0), do("ok", 900.0, tag="slow")])
    assert set(source.results) == {*range(6), "slow"}


def test_a_lost_node_is_not_waited_for():
    """Three of four workers die at 2.5 s and find no room again; the fourth does all the rest."""
    script = Script(space=4)
    script.at(2.5, lambda: script.resize(1))
    source = work(script, fine(20), size=4)
    assert set(source.results) == set(range(20))
    assert not source.failures
    assert script.now < 20


def test_a_node_that_comes_back_is_used_again():
    script = Script(space=4)
    script.at(2.5, lambda: script.resize(1))
    script.at(10.0, lambda: script.resize(4))
    source = work(script, fine(60), size=4)
    assert set(source.results) == set(range(60))
    assert len({number for number, _ in script.submitted}) >= 7
    assert script.now < 30


def test_an_added_node_is_used_where_the_number_of_workers_is_open():
    script = Script(space=2)
    script.open_room = True
    script.at(7.0, lambda: script.resize(6))
    source = work(script, fine(100), size=2)
    assert set(source.results) == set(range(100))
    assert len({number for number, _ in script.submitted}) == 6
    assert script.now < 35


def test_no_more_workers_are_started_than_there_is_use_for():
    script = Script(space=50)
    script.open_room = True
    work(script, fine(40, 3.0), size=2, most=4)
    assert len(script.actors) == 4


def test_workers_without_room_are_let_go_where_their_number_is_open():
    script = Script(space=4)
    script.open_room = True
    script.at(2.5, lambda: script.resize(2))
    source = work(script, fine(60), size=4)
    assert set(source.results) == set(range(60))
    assert len([actor for actor in script.actors if not actor.dead]) == 0
    assert len(script.killed) > 4


def test_nobody_at_all_is_waited_for_but_not_for_ever():
    script = Script(space=2)
    script.at(2.5, lambda: script.resize(0))
    with pytest.raises(PoolBroken, match=r"no worker came up in 5 minutes"):
        work(script, fine(20))
    assert script.now < 330
    script = Script(space=0)
    script.at(200.0, lambda: script.resize(2))
    assert len(work(script, fine(20)).results) == 20


def test_a_cluster_that_is_gone_ends_the_run():
    script = Script()
    script.at(20.0, lambda: setattr(script, "gone", "the head is gone"))
    with pytest.raises(ClusterFailed, match="the head is gone"):
        work(script, fine(100))
    assert script.now <= 26


def test_workers_that_die_and_die_stop_the_run():
    with pytest.raises(
        PoolBroken, match=r"13 workers died in a row, the last one because: .* killed$"
    ):
        work(Script(), [do("die", tag=i) for i in range(20)])


def test_deaths_between_results_stop_no_run():
    jobs = [job for i in range(5) for job in (do("die", tag=f"die{i}"), do("ok", tag=i))]
    source = work(Script(), jobs, size=1)
    assert set(source.results) == set(range(5))
    assert sum(failure.tries for failure in source.failures.values()) == 20


def queued_at_each_result(size, *jobs):
    """The jobs that each worker has, sorted, whenever the source takes a result."""
    script, source, seen = Script(), Source(*jobs), []
    made = WorkerPool(script, size, clock=script.clock)
    source.done = lambda job, result: seen.append(sorted(len(w.queue) for w in made._state.workers))
    made.run(source)
    return seen


def test_a_worker_has_its_next_job_while_its_result_is_taken():
    assert queued_at_each_result(1, *fine(4)) == [[1], [1], [1], [0]]


def test_the_last_job_waits_for_whoever_is_free():
    """Three jobs, two workers: the third is queued behind neither of the others."""
    assert queued_at_each_result(2, *fine(3)) == [[0, 1], [0, 1], [0, 0]]


def test_jobs_queued_behind_a_killer_are_run_again():
    """One worker, so that the killer always has one of the others behind it."""
    source = work(Script(), [do("die", tag="die"), *fine(2)], size=1)
    assert set(source.results) == {0, 1}
    assert set(source.failures) == {"die"}
    assert Counter(source.retries) == {("die", "died"): 3}


# --- on Ray ----------------------------------------------------------------------------------


class Moody:
    """A worker that does as it is told."""

    def act(self, what):
        if what == "die":
            os._exit(1)
        if what == "raise":
            raise ValueError("no")
        return what

    def pid(self):
        return os.getpid()


def act(what):
    return Job("act", (what,), tag=what)


@pytest.mark.slow
def test_a_bad_job_hurts_itself_alone_on_ray(cluster):
    made = WorkerPool(RayActors(ray.remote(Moody).options(num_cpus=1).remote), 2)
    source = Source(act("a"), act("raise"), act("die"), *(act(f"b{i}") for i in range(6)))
    made.run(source)
    made.close()
    assert set(source.results) == {"a", *(f"b{i}" for i in range(6))}
    assert source.failures["raise"] == Failure("raised", "ValueError: no", tries=2)
    assert source.failures["die"].kind == "died"
    assert source.failures["die"].tries == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bank(workers, cluster, quick, digits, bank, trained):
    assert run_on(cluster, workers, quick, digits, bank) == []
    assert (bank.read(range(8)).masks == trained.masks).all()


def run_on(cluster, workers, config, digits, bank, meanwhile=lambda pool: None):
    jobs = make_jobs(config, bank, Notes(), put=ray.put, workers=workers)
    setup = WorkerSetup(config=config, weights_sha256=bank.manifest.weights_sha256)
    data = ray.put(digits)
    made = WorkerPool(RayActors(lambda: cluster.start_worker(setup, data)), workers)
    meanwhile(made)
    made.run(jobs)
    made.close()
    return jobs.failures


def test_killed_workers_lose_nothing(cluster, quick, digits, bank, trained):
    """SIGKILL both workers as soon as they are up; their blocks are run again."""
    killed = []

    def kill(made):
        for actor in made.actors:
            pid = ray.get(actor.pid.remote())
            psutil.Process(pid).kill()
            killed.append(pid)
        time.sleep(0.5)

    assert run_on(cluster, 2, quick, digits, bank, kill) == []
    assert len(killed) == 2
    assert (bank.read(range(8)).masks == trained.masks).all()


@pytest.mark.slow
def test_a_stopped_worker_is_replaced(cluster, monkeypatch):
    """SIGSTOP: the process is there and does nothing, which Ray doesn't notice."""
    monkeypatch.setattr(jobs, "HUNG_SECONDS", 3.0)
    made = WorkerPool(RayActors(ray.remote(Moody).options(num_cpus=1).remote), 2)
    source = Source(*(act(f"b{i}") for i in range(6)))
    made.run(source)
    stopped = psutil.Process(ray.get(made.actors[0].pid.remote()))
    stopped.suspend()
    again = Source(*(act(f"c{i}") for i in range(6)))
    made.run(again)
    made.close()
    assert len(again.results) == 6
    assert {kind for _, kind in again.retries} == {"hung"}
    assert psutil.wait_procs([stopped], timeout=30)[0] == [stopped]
