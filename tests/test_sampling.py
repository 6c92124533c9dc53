import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supsup.sampling import half_width, sampled_images, sampled_tasks
from supsup.seeding import generator


@given(st.integers(0, 99), st.integers(1, 300), st.integers(0, 400))
def test_one_task_is_drawn_from_each_stratum(root, learned, count):
    tasks = sampled_tasks(root, learned, count)
    if count == 0 or count >= learned:
        assert tasks == tuple(range(learned))
        return
    bounds = [i * learned // count for i in range(count + 1)]
    assert len(tasks) == count
    for task, start, stop in zip(tasks, bounds[:-1], bounds[1:], strict=True):
        assert start <= task < stop
    assert tasks == sampled_tasks(root, learned, count)


def test_every_task_has_the_same_chance():
    drawn = [task for root in range(4000) for task in sampled_tasks(root, 20, 5)]
    expected, deviation = 4000 * 5 / 20, (4000 * 0.25 * 0.75) ** 0.5
    assert abs(np.bincount(drawn, minlength=20) - expected).max() < 4 * deviation


def test_samples_differ_by_root_and_by_tasks_learned():
    assert sampled_tasks(0, 1000, 50) != sampled_tasks(1, 1000, 50)
    assert sampled_tasks(0, 1000, 50) != sampled_tasks(0, 1001, 50)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(0, 90), st.integers(0, 9))
def test_classes_are_as_frequent_as_in_the_test_set(labels, count, root):
    labels = np.array(labels)
    chosen = sampled_images(labels, count, generator(root, "a"))
    if count == 0 or count >= len(labels):
        assert chosen.tolist() == list(range(len(labels)))
        return
    assert len(set(chosen.tolist())) == len(chosen) == count
    for label in range(7):
        share = (labels == label).sum() * count / len(labels)
        assert abs((labels[chosen] == label).sum() - share) < 1


def test_images_are_in_random_order():
    """Groups of neighbours must not be of one class."""
    labels = np.arange(1000) // 100
    chosen = sampled_images(labels, 200, generator(0, "a"))
    assert (np.diff(labels[chosen]) == 0).mean() < 0.25
    assert not np.array_equal(chosen, sampled_images(labels, 200, generator(1, "a")))


@pytest.fixture(scope="module")
def population() -> np.ndarray:
    """Right and wrong answers of 60 tasks x 120 images; tasks differ in their rates."""
    stream = np.random.default_rng(0)
    return stream.random((60, 120)) < stream.beta(40, 4, size=(60, 1))


@pytest.mark.parametrize(("asked", "images"), [(40, 30), (40, 0), (0, 60)], ids=str)
def test_the_interval_holds_the_truth_95_times_of_100(population, asked, images):
    """Draw tasks and images again and again; without either finite-population factor it's 99."""
    tasks, test_set = population.shape
    labels = np.arange(test_set) % 2
    held, draws = 0, 600
    for root in range(draws):
        drawn = sampled_tasks(root, tasks, asked)
        chosen = [sampled_images(labels, images, generator(root, "b", task)) for task in drawn]
        rates = np.array([population[t, c].mean() for t, c in zip(drawn, chosen, strict=True)])
        decisions = np.full(len(drawn), len(chosen[0]))
        width = half_width(rates, decisions, tasks, len(chosen[0]) / test_set)
        held += abs(rates.mean() - population.mean()) <= width
    assert 0.92 <= held / draws <= 0.98


def test_an_interval_of_zero_is_for_a_complete_question(population):
    rates = population.mean(1)
    decisions = np.full(60, 120)
    assert half_width(rates, decisions, 60, 1.0) == 0
    assert half_width(rates[:1], decisions[:1], 1, 1.0) == 0
    assert half_width(rates, decisions, 60, 0.5) > 0
    assert half_width(rates[:30], decisions[:30], 60, 1.0) > 0


def test_all_right_in_a_sample_may_be_chance():
    """The rule of three: 3 in n. Among n draws, none is wrong by chance in 5 of 100 cases."""
    decisions = np.full(20, 5)
    assert half_width(np.ones(20), decisions, 2500, 5e-4) == pytest.approx(0.03)
    assert half_width(np.zeros(20), decisions, 2500, 5e-4) == pytest.approx(0.03)
    assert pytest.approx(0.05, abs=0.003) == (1 - 0.03) ** 100
    assert half_width(np.ones(20), decisions, 20, 1.0) == 0
    assert half_width(np.ones(20), decisions, 2500, 1.0) == pytest.approx(3 / 20)


def test_one_task_says_nothing_of_many():
    assert math.isnan(half_width(np.array([0.9]), np.array([100]), 2, 1.0))


def test_groups_that_share_a_decision_widen_the_interval():
    """Images of a group are right together. The unit is the decision: never too narrow."""
    stream = np.random.default_rng(1)
    truth, held = 0.8, 0
    for _ in range(2000):
        right = stream.random((30, 5)) < truth  # 30 tasks, 5 decisions, each for 20 images
        rates = right.mean(1)
        width = half_width(rates, np.full(30, 5), 30, 0.0)
        held += abs(rates.mean() - truth) <= width
        as_images = half_width(rates, np.full(30, 100), 30, 0.0)
        assert as_images < width
    assert held / 2000 >= 0.94


def test_a_single_decision_has_the_largest_variance():
    found = half_width(np.ones(100), np.ones(100), 100, 0.0)
    assert found == pytest.approx(1.96 * (0.25 / 100) ** 0.5)
