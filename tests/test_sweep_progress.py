"""The progress of a sweep: what it counts, and how long it says that it takes."""

import io
from collections import Counter

import pytest
from rich.console import Console

from sweeps import progress
from sweeps.progress import SweepProgress


@pytest.fixture
def shown(monkeypatch):
    """Give a progress, and set its clock."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    made = SweepProgress(Console(file=io.StringIO(), width=200))

    def at(seconds):
        now[0] = 1000.0 + seconds

    made.at = at
    made.last = lambda: made._console.file.getvalue().splitlines()[-1]
    return made


def test_the_time_left_is_by_tasks_and_then_by_trials(shown):
    shown.expect(40)
    shown.start(4, Counter())
    assert shown.last() == "trials: 0/4 (none begun), 0/40 tasks trained, ? left"
    shown.began()
    shown.at(100)
    shown.trained(10)
    assert shown.last() == "trials: 0/4 (1 running), 10/40 tasks trained, 5 min left"
    shown.ended("done", "", "")
    shown.at(400)
    shown.trained(30)
    assert shown.last() == "trials: 1/4 (1 done), 40/40 tasks trained, 20 min left"


def test_of_a_search_nobody_knows_how_many_tasks(shown):
    shown.start(4, Counter(done=1))
    shown.began()
    shown.at(60)
    shown.trained(3)
    assert shown.last() == "trials: 1/4 (1 done, 1 running), 3 tasks trained, ? left"
    shown.ended("pruned", "", "")
    shown.at(80)
    shown.trained(1)
    assert shown.last() == "trials: 2/4 (1 done, 1 pruned), 4 tasks trained, 3 min left"


def test_the_best_is_known_before_a_trial_ends(shown):
    shown.start(4, Counter(done=1), "trial 0, 97.00 %")
    assert shown._table().caption == "best so far: trial 0, 97.00 %"
