"""Task families: what each task of a run is trained and tested on.

*Permuted*: task t sees every image with its pixels in an order of its own. *Rotated*: task t sees
every image turned by t times an angle. *Split*: task t has some of the classes, numbered from 0.

Shapes: N images, P pixels.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from supsup.config import MAX_TASKS, RunConfig
from supsup.datasets import Dataset, Images, Labels
from supsup.errors import ConfigError
from supsup.seeding import generator

#: Indices of images, of any shape.
Places = npt.NDArray[np.int64]


class Labelled(NamedTuple):
    """Images, uint8 [N, P], and their labels, int64 [N], in ``0..classes-1`` of the task."""

    images_NP: Images
    labels_N: Labels


class TaskFamily(Protocol):
    """The tasks of a run."""

    @property
    def classes(self) -> int:
        """Classes of every task."""

    @property
    def most(self) -> int:
        """Tasks that there can be at most."""

    def train(self, task: int) -> Labelled:
        """Return what a task is trained on; not to be written to."""

    def test(self, task: int) -> Labelled:
        """Return what a task is tested on; not to be written to."""

    def test_labels(self, task: int) -> Labels:
        """Return the labels of what a task is tested on; not to be written to."""

    def test_images(self, task: int, places: Places) -> Images:
        """Return some of what a task is tested on, uint8 [..., P], by places in its labels."""


def test_sizes(config: RunConfig, data: Dataset) -> tuple[int, ...]:
    """Return how many test images each task has that can be; one number if all have as many."""
    family = task_family(config, data)
    if not isinstance(family, Split):
        return (len(data.test_labels),)
    sizes = tuple(len(family.test_labels(task)) for task in range(family.most))
    return sizes[:1] if len(set(sizes)) == 1 else sizes


def permutation(root: int, task: int, pixels: int) -> npt.NDArray[np.int64]:
    """Return the pixel order of a task, int64 [P]: pixel ``p`` of its image is ``x[order[p]]``."""
    return generator(root, "permutation", task).permutation(pixels)


def inverse(order_P: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the permutation that undoes another."""
    return np.argsort(order_P)


class Permuted:
    """Every image with its pixels in an order of the task's own (paper, 4.2)."""

    most = MAX_TASKS

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Take the tasks of a run from a data set."""
        self._seed, self._data, self.classes = config.seed, data, data.classes

    def train(self, task: int) -> Labelled:
        """Return the training images, permuted."""
        return Labelled(self._data.train_images[:, self._order(task)], self._data.train_labels)

    def test(self, task: int) -> Labelled:
        """Return the test images, permuted."""
        return Labelled(self._data.test_images[:, self._order(task)], self._data.test_labels)

    def test_labels(self, task: int) -> Labels:
        """Return the labels of the test set."""
        return self._data.test_labels

    def test_images(self, task: int, places: Places) -> Images:
        """Return some test images, permuted."""
        return self._data.test_images[places][..., self._order(task)]

    def _order(self, task: int) -> npt.NDArray[np.int64]:
        return permutation(self._seed, task, self._data.pixels)


class Rotated:
    """Every image turned counter-clockwise by ``task * degrees``, bilinear (paper, 4.2)."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Take the tasks of a run from a data set."""
        self._degrees, self._data, self.classes = config.degrees, data, data.classes
        # As it was written: 360 / 3.6 is a little less than 100 in binary.
        self.most = max(1, 360 // Fraction(str(config.degrees)))

    def train(self, task: int) -> Labelled:
        """Return the training images, turned."""
        return Labelled(self._turned(self._data.train_images, task), self._data.train_labels)

    def test(self, task: int) -> Labelled:
        """Return the test images, turned."""
        return Labelled(self._turned(self._data.test_images, task), self._data.test_labels)

    def test_labels(self, task: int) -> Labels:
        """Return the labels of the test set."""
        return self._data.test_labels

    def test_images(self, task: int, places: Places) -> Images:
        """Return some test images, turned."""
        return self._turned(self._data.test_images[places], task)

    def _turned(self, images: Images, task: int) -> Images:
        """Return images [..., P], turned."""
        flat = torch.from_numpy(np.array(images)).view(-1, *self._data.shape)
        angle = task * self._degrees
        turned = transforms.rotate(flat, angle, interpolation=InterpolationMode.BILINEAR)
        return np.asarray(turned.numpy().reshape(images.shape))


class Split:
    """Some of the classes each, drawn by seed or in order; labels count from 0 (paper, 4.1)."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Partition the classes of a data set.

        Raises:
            ConfigError: if it has fewer classes than a task takes.
        """
        self._data, self.classes = data, config.classes_per_task
        self.most = data.classes // self.classes
        if not self.most:
            raise ConfigError(
                f"classes_per_task is {self.classes}, must be at most {data.classes}, the classes "
                f"of {data.name}"
            )
        order = np.arange(data.classes)
        if config.class_order == "random":
            order = generator(config.seed, "class order").permutation(data.classes)
        self._order = order
        self._task_of_class = np.full(data.classes, -1)
        self._label_of_class = np.zeros(data.classes, dtype=np.int64)
        for task in range(self.most):
            self._task_of_class[self.classes_of(task)] = task
            self._label_of_class[self.classes_of(task)] = np.arange(self.classes)

    def classes_of(self, task: int) -> npt.NDArray[np.int64]:
        """Return the data set's classes that a task has, in the order of its labels."""
        return self._order[task * self.classes : (task + 1) * self.classes]

    def train(self, task: int) -> Labelled:
        """Return the training images of the task's classes."""
        places_N = self._places(task, self._data.train_labels)
        labels_N = self._label_of_class[self._data.train_labels[places_N]]
        return Labelled(self._data.train_images[places_N], labels_N)

    def test(self, task: int) -> Labelled:
        """Return the test images of the task's classes."""
        places_N = self._places(task, self._data.test_labels)
        return Labelled(self._data.test_images[places_N], self.test_labels(task))

    def test_labels(self, task: int) -> Labels:
        """Return the labels of the test images of the task's classes."""
        labels_N = self._data.test_labels
        return self._label_of_class[labels_N[self._places(task, labels_N)]]

    def test_images(self, task: int, places: Places) -> Images:
        """Return some test images of the task's classes."""
        return self._data.test_images[self._places(task, self._data.test_labels)[places]]

    def _places(self, task: int, labels_N: Labels) -> Places:
        """Return where the images of the task's classes are."""
        return np.flatnonzero(self._task_of_class[labels_N] == task)


FAMILIES: Mapping[str, Callable[[RunConfig, Dataset], TaskFamily]] = {
    "permuted": Permuted,
    "rotated": Rotated,
    "split": Split,
}


def task_family(config: RunConfig, data: Dataset) -> TaskFamily:
    """Return the tasks of a run.

    Raises:
        ConfigError: if the data set doesn't have as many tasks.
    """
    family = FAMILIES[config.family](config, data)
    if config.tasks > family.most:
        raise ConfigError(
            f"tasks is {config.tasks}, must be at most {family.most}: family {config.family} has "
            f"no more of {data.name}"
        )
    return family
