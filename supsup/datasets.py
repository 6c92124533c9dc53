"""Data sets as plain arrays, checked and hashed when they are loaded.

Shapes: N images, P pixels (channels, rows and columns flattened).
"""

import hashlib
import math
import os
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs
import torch
from torch.nn import functional

from supsup.errors import DataError, one_line
from supsup.seeding import generator

#: Images that are looked at together.
_CHUNK = 1000
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test images. Pixels enter the network as ``(x / scale - mean) / std``."""

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: int
    scale: float
    mean: float
    std: float
    sha256: str
    shape: tuple[int, int, int]
    """Channels, rows and columns of an image."""

    def __post_init__(self) -> None:
        """Check that images are as large as their shape says: kernels rely on it."""
        for images in (self.train_images, self.test_images):
            if images.shape[1:] != (self.pixels,):
                raise ValueError(f"images are {images.shape}, not N x {self.pixels}")

    @property
    def pixels(self) -> int:
        """Pixels per image, all channels counted."""
        return math.prod(self.shape)


def default_data_dir() -> Path:
    """Return ``$SUPSUP_DATA``, else the user's cache folder."""
    named = os.environ.get("SUPSUP_DATA")
    return Path(named) if named else platformdirs.user_cache_path("supsup") / "data"


def load_dataset(name: str, data_dir: Path, image_size: int = 32) -> Dataset:
    """Load a data set of ``config.DATASETS``, or ``images:DIR``.

    Raises:
        DataError: if it is missing or not what it should be; says which files to put where.
    """
    if name in _DIGITS:
        return _digits(name)
    if name.startswith("images:"):
        return _image_folder(Path(name.removeprefix("images:")), image_size)
    return _cifar(name, data_dir) if name in _CIFARS else _mnist(name, data_dir)


def _dataset(
    name: str,
    train: tuple[Images, Labels],
    test: tuple[Images, Labels],
    classes: int,
    shape: tuple[int, int, int],
    scale: float = 255.0,
    statistics: tuple[float, float] | None = None,
) -> Dataset:
    for part, (images, labels) in {"train": train, "test": test}.items():
        if len(images) == 0:
            raise DataError(f"{name}: the {part} set has no images; give at least one")
        if len(images) != len(labels):
            raise DataError(
                f"{name}: the {part} set has {len(images)} images and {len(labels)} labels, "
                "must be as many of each; fetch the files again"
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"{name}: {part} labels go from {labels.min()} to {labels.max()}, "
                f"must lie in 0..{classes - 1}; fetch the files again"
            )
    if statistics is None:
        statistics = _statistics(train[0], scale)
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return Dataset(
        name=name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=classes,
        scale=scale,
        mean=statistics[0],
        std=statistics[1],
        sha256=digest.hexdigest(),
        shape=shape,
    )


def _statistics(images_NP: Images, scale: float) -> tuple[float, float]:
    """Return mean and standard deviation of the pixels, over all channels alike."""
    counts = np.zeros(256)
    for start in range(0, len(images_NP), _CHUNK):
        counts += np.bincount(images_NP[start : start + _CHUNK].ravel(), minlength=256)
    values, shares = np.arange(256) / scale, counts / counts.sum()
    mean = float(values @ counts / counts.sum())
    return mean, float(np.sqrt((values - mean) ** 2 @ shares)) or 1.0


#: How many times the 8x8 digits are enlarged.
_DIGITS = {"digits": 1, "digits-16": 2}


def _digits(name: str) -> Dataset:
    """scikit-learn's 1797 real digits of 8x8 pixels; a fixed fifth of them is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = _enlarged(bunch.data.astype(np.uint8), 8, _DIGITS[name])
    labels = bunch.target.astype(np.int64)
    order = generator(0, "digits split").permutation(len(images))
    test, train = order[:360], order[360:]
    side = 8 * _DIGITS[name]
    parts = (images[train], labels[train]), (images[test], labels[test])
    return _dataset(name, *parts, 10, (1, side, side), scale=16.0)


def _enlarged(images_NP: Images, side: int, times: int) -> Images:
    """Return square images with their sides so many times as long, bilinear."""
    if times == 1:
        return images_NP
    images = torch.from_numpy(images_NP).view(-1, 1, side, side).float()
    large = functional.interpolate(images, scale_factor=times, mode="bilinear")
    return large.round().to(torch.uint8).flatten(1).numpy()


#: What torchvision and PIL raise for a bad file depends on where the file is bad.
_BAD_FILE = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, IndexError, AssertionError,
    SyntaxError, struct.error, zlib.error,
)  # fmt: skip
#: torchvision's class and the statistics that the paper's code normalises with.
_MNISTS = {
    "mnist": ("MNIST", (0.1307, 0.3081)),
    "fashion-mnist": ("FashionMNIST", (0.2860, 0.3530)),
}


def _mnist(name: str, data_dir: Path) -> Dataset:
    import torchvision

    class_name, statistics = _MNISTS[name]
    raw = data_dir / class_name / "raw"
    files = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    files += "t10k-labels-idx1-ubyte (or the same with .gz)"
    cls = getattr(torchvision.datasets, class_name)
    parts = []
    try:
        for train in (True, False):
            part = cls(str(data_dir), train=train, download=True)
            parts.append((part.data.numpy(), part.targets.numpy().astype(np.int64)))
    except _BAD_FILE as error:
        raise DataError(
            f"{name} can't be loaded from {data_dir} ({one_line(error)}); put {files} into {raw}"
        ) from None
    for images, _ in parts:
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise DataError(
                f"{name}: images in {raw} have shape {images.shape}, must be N x 28 x 28; "
                f"put {files} there"
            )
    flat = [(images.reshape(len(images), -1), labels) for images, labels in parts]
    return _dataset(name, flat[0], flat[1], 10, (1, 28, 28), statistics=statistics)


#: torchvision's class, the folder that it wants, and the number of classes.
_CIFARS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", 10),
    "cifar100": ("CIFAR100", "cifar-100-python", 100),
}


def _cifar(name: str, data_dir: Path) -> Dataset:
    """Load a CIFAR. torchvision unpickles its files, after it has checked their MD5 sums."""
    import torchvision

    class_name, folder, classes = _CIFARS[name]
    cls = getattr(torchvision.datasets, class_name)
    parts = []
    try:
        for train in (True, False):
            part = cls(str(data_dir), train=train, download=True)
            images = part.data.transpose(0, 3, 1, 2).reshape(len(part.data), -1)
            labels = np.array(part.targets, dtype=np.int64)
            parts.append((np.ascontiguousarray(images), labels))
    except (*_BAD_FILE, KeyError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{name} can't be loaded from {data_dir} ({one_line(error)}); put the folder {folder} "
            f"of its python version into {data_dir}"
        ) from None
    return _dataset(name, parts[0], parts[1], classes, (3, 32, 32))


def _image_folder(folder: Path, image_size: int) -> Dataset:
    """Load folders of images, resized, all of them into memory.

    Test images are in an order drawn once and for all: neighbours must not be of one class.
    """
    name = f"images:{folder}"
    train, train_classes = _read_folder(name, folder / "train", image_size)
    test_folder = next(
        (folder / part for part in _TESTS if (folder / part).is_dir()), folder / "test"
    )
    test, test_classes = _read_folder(name, test_folder, image_size)
    if train_classes != test_classes:
        odd = min(set(train_classes) ^ set(test_classes))
        raise DataError(f"{name}: class {odd} is only in one of train/ and {test_folder.name}/")
    order = generator(0, "images order").permutation(len(test[1]))
    shape = (3, image_size, image_size)
    return _dataset("images", train, (test[0][order], test[1][order]), len(train_classes), shape)


#: Folders that the test images may be in.
_TESTS = ("test", "val")


def _read_folder(
    name: str, folder: Path, image_size: int
) -> tuple[tuple[Images, Labels], list[str]]:
    """Return the images and labels of a folder, and the names of its classes."""
    import torchvision
    from PIL import Image

    def resized(sample: tuple[str, int]) -> Images:
        with Image.open(sample[0]) as image:
            picture = image.convert("RGB").resize((image_size, image_size))
        return np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1).reshape(-1)

    try:
        found = torchvision.datasets.ImageFolder(str(folder))
        _check_memory(name, len(found.samples), image_size)
        images_NP = np.empty((len(found.samples), 3 * image_size**2), dtype=np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for row, image_P in zip(images_NP, threads.map(resized, found.samples), strict=True):
                row[:] = image_P
    except (*_BAD_FILE, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name} can't be read ({one_line(error)}); it must hold train/ and test/ (or val/) "
            "with a folder of images per class"
        ) from None
    return (images_NP, np.array(found.targets, dtype=np.int64)), list(found.classes)


def _check_memory(name: str, images: int, image_size: int) -> None:
    needed = images * 3 * image_size**2
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise DataError(
            f"{name} has {images:,} images, which take {needed / 1e9:,.1f} GB of memory at "
            f"{image_size} x {image_size} pixels, more than the {there / 1e9:,.1f} GB of this "
            "machine; lower image_size"
        )
