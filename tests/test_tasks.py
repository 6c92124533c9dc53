import dataclasses

import numpy as np
import pytest

from supsup.config import RunConfig
from supsup.errors import ConfigError
from supsup.fields import with_values
from supsup.tasks import inverse, permutation, task_family


def family(data, **values):
    return task_family(with_values(RunConfig(dataset="digits", tasks=2), values), data)


def test_permuted_images_have_the_same_pixels_in_an_order_of_the_task(digits):
    tasks = family(digits, tasks=3)
    images, labels = tasks.test(2)
    order = permutation(0, 2, digits.pixels)
    assert (images[:, inverse(order)] == digits.test_images).all()
    assert (labels == digits.test_labels).all()
    some = np.array([[3, 0], [1, 3]])
    assert (tasks.test_images(2, some) == images[some]).all()
    assert (tasks.test_labels(2) == labels).all()
    assert (tasks.train(1)[0] != tasks.train(2)[0]).any()


def test_rotated_images_turn_by_the_angle(digits):
    tasks = family(digits, family="rotated", degrees=90, tasks=4)
    sides = digits.test_images.reshape(-1, 8, 8)
    for task in range(4):
        turned, labels = tasks.test(task)
        assert (turned.reshape(-1, 8, 8) == np.rot90(sides, task, axes=(1, 2))).all()
        assert (labels == digits.test_labels).all()
        some = np.array([[3, 0], [1, 3]])
        assert (tasks.test_images(task, some) == turned[some]).all()
        assert (tasks.test_labels(task) == labels).all()
    with pytest.raises(ConfigError, match="at most 4"):
        family(digits, family="rotated", degrees=90, tasks=5)


@pytest.mark.parametrize(("degrees", "tasks"), [(3.6, 100), (0.1, 3600), (7, 51), (180, 2)])
def test_a_turn_has_as_many_angles_as_fit(digits, degrees, tasks):
    assert family(digits, family="rotated", degrees=degrees, tasks=tasks).most == tasks


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_split_tasks_share_the_classes_out(digits, order):
    tasks = family(digits, family="split", classes_per_task=3, tasks=3, class_order=order)
    seen = [tasks.classes_of(task).tolist() for task in range(3)]
    assert len({*seen[0], *seen[1], *seen[2]}) == 9
    assert (seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]) == (order == "sorted")
    for task in range(3):
        images, labels = tasks.test(task)
        assert set(labels) == {0, 1, 2}
        assert (tasks.test_labels(task) == labels).all()
        some = np.array([[3, 0], [1, 3]])
        assert (tasks.test_images(task, some) == images[some]).all()
        train_images, train_labels = tasks.train(task)
        of_class = digits.train_images[digits.train_labels == seen[task][1]]
        assert (train_images[train_labels == 1] == of_class).all()
        original = digits.test_labels[np.isin(digits.test_labels, seen[task])]
        assert (np.array(seen[task])[labels] == original).all()


def test_split_refuses_more_than_there_is(digits):
    with pytest.raises(ConfigError, match="at most 3"):
        family(digits, family="split", classes_per_task=3, tasks=4)
    few = dataclasses.replace(digits, classes=2)
    with pytest.raises(ConfigError, match="classes_per_task is 3"):
        family(few, family="split", classes_per_task=3)
