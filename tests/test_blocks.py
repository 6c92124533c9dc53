import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.blocks import (
    LearnedPrefix,
    evaluation_jobs,
    learned_prefix,
    remaining,
    split,
)

done_blocks = st.lists(st.integers(0, 59), unique=True).map(
    lambda tasks: [range(task, task + 1) for task in tasks]
)


@given(st.integers(1, 60), st.integers(1, 13), done_blocks)
def test_what_remains_is_what_is_missing_on_the_grid(tasks, size, done):
    blocks = remaining(tasks, size, done)
    found = [task for block in blocks for task in block]
    missing = set(range(tasks)) - {task for block in done for task in block}
    assert found == sorted(missing)
    assert all(block[0] // size == block[-1] // size for block in blocks)


def test_a_bank_grows_by_its_missing_blocks():
    assert remaining(50, 10, []) == [range(i, i + 10) for i in range(0, 50, 10)]
    assert remaining(25, 10, [range(10)]) == [range(10, 20), range(20, 25)]
    assert remaining(10, 10, [range(3), range(7, 10)]) == [range(3, 7)]
    assert remaining(5, 10, [range(20)]) == []


def test_split_ends_at_multiples():
    assert list(split(range(3, 12), 5)) == [range(3, 5), range(5, 10), range(10, 12)]
    assert list(split(range(0), 5)) == []


def test_learned_prefix():
    assert learned_prefix([]) == 0
    assert learned_prefix([range(3, 6), range(3)]) == 6
    assert learned_prefix([range(3), range(4, 6)]) == 3
    assert learned_prefix([range(1, 3)]) == 0


@given(st.permutations(range(12)), st.integers(1, 4))
def test_the_prefix_grows_as_blocks_come_in_any_order(order, size):
    prefix, done = LearnedPrefix(), set()
    for block in order:
        prefix.add(range(block * size, (block + 1) * size))
        done |= set(range(block * size, (block + 1) * size))
        assert prefix.length == next(task for task in range(12 * size + 1) if task not in done)


@given(st.integers(1, 400), st.integers(1, 3000), st.integers(1, 9))
def test_evaluation_jobs_ask_about_every_task_once(count, decisions, workers):
    tasks = tuple(range(0, 3 * count, 3))
    jobs = evaluation_jobs(tasks, decisions, workers)
    assert [task for job in jobs for task in job] == list(tasks)
    assert all(len(job) == 1 or len(job) * decisions <= 1000 for job in jobs)
    assert len(jobs) >= min(count, 2 * workers)


@pytest.mark.parametrize(
    ("tasks", "decisions", "workers", "jobs", "size"),
    [
        (2500, 200, 2, 500, 5),
        (2500, 79, 2, 209, 12),
        (10, 200, 2, 5, 2),
        (500, 1, 2, 4, 125),
        (10, 10_000, 2, 10, 1),
        (3, 200, 40, 3, 1),
    ],
)
def test_evaluation_jobs_are_of_useful_sizes(tasks, decisions, workers, jobs, size):
    cut = evaluation_jobs(range(tasks), decisions, workers)
    assert (len(cut), len(cut[0])) == (jobs, size)
