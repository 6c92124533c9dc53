import dataclasses
import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from supsup.datasets import default_data_dir, load_dataset
from supsup.errors import DataError

FILES = {
    "train-images-idx3-ubyte": (2051, (20, 28, 28)),
    "train-labels-idx1-ubyte": (2049, (20,)),
    "t10k-images-idx3-ubyte": (2051, (10, 28, 28)),
    "t10k-labels-idx1-ubyte": (2049, (10,)),
}


def idx(magic: int, shape: tuple[int, ...], array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + len(shape)}i", magic, *shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_dir(tmp_path):
    """A tiny MNIST in torchvision's raw layout."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, (magic, shape) in FILES.items():
        high = 10 if len(shape) == 1 else 256
        (raw / name).write_bytes(idx(magic, shape, random.integers(0, high, shape)))
    return tmp_path


def test_digits_are_real_and_split_for_good(digits):
    assert digits.train_images.shape == (1437, 64)
    assert digits.test_images.shape == (360, 64)
    assert digits.sha256.startswith("e044da2edb43d164")
    assert sorted(set(digits.test_labels)) == list(range(10))
    whole = (digits.train_images / digits.scale - digits.mean) / digits.std
    assert abs(whole.mean()) < 1e-9
    assert abs(whole.std() - 1) < 1e-9


def test_mnist_from_raw_files(mnist_dir):
    data = load_dataset("mnist", mnist_dir)
    assert data.train_images.shape == (20, 784)
    assert data.test_images.shape == (10, 784)
    assert (data.mean, data.std, data.scale) == (0.1307, 0.3081, 255.0)
    file = mnist_dir / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert load_dataset("mnist", mnist_dir).sha256 != data.sha256


def rubbish(kind: str, content: bytes) -> bytes:
    return {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "header cut": content[:3],
        "wrong magic": struct.pack(">i", 12345) + content[4:],
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "gzip": gzip.compress(content)[:40],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "header cut", "wrong magic", "html", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_clear_line(mnist_dir, kind, name):
    file = mnist_dir / "MNIST" / "raw" / name
    file.write_bytes(rubbish(kind, file.read_bytes()))
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", mnist_dir)
    assert "\n" not in str(caught.value)
    assert str(mnist_dir) in str(caught.value)


def test_counts_must_agree(mnist_dir):
    file = mnist_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    file.write_bytes(idx(2049, (19,), np.zeros(19)))
    with pytest.raises(DataError, match="20 images and 19 labels"):
        load_dataset("mnist", mnist_dir)


def test_labels_must_be_classes(mnist_dir):
    file = mnist_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(idx(2049, (10,), np.full(10, 10)))
    with pytest.raises(DataError, match=r"labels go from 10 to 10, must lie in 0\.\.9"):
        load_dataset("mnist", mnist_dir)


def test_there_must_be_images(mnist_dir):
    raw = mnist_dir / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(2051, (0, 28, 28), np.zeros(0)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(2049, (0,), np.zeros(0)))
    with pytest.raises(DataError, match="mnist"):
        load_dataset("mnist", mnist_dir)


def test_a_missing_data_set_says_which_files_to_put_where(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*MNIST/raw"):
        load_dataset("mnist", tmp_path)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog", "eel"):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            pixels = random.integers(0, 256, (9, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "one.png")
    return tmp_path


def test_a_folder_of_images(folder):
    data = load_dataset(f"images:{folder}", folder, image_size=4)
    assert data.train_images.shape == (3, 3 * 4 * 4)
    assert data.train_labels.tolist() == [0, 1, 2]
    assert data.classes == 3


def test_images_of_the_test_set_are_not_in_the_order_of_classes(folder):
    random = np.random.default_rng(1)
    for name in ("cat", "dog", "eel"):
        for number in range(20):
            pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "test" / name / f"{number}.png")
    data = load_dataset(f"images:{folder}", folder, image_size=4)
    assert (np.diff(data.test_labels) == 0).mean() < 0.5
    for image, label in zip(data.test_images, data.test_labels, strict=True):
        place = folder / "test" / ("cat", "dog", "eel")[label]
        stored = [np.asarray(Image.open(f).resize((4, 4))).transpose(2, 0, 1) for f in
                  place.iterdir()]  # fmt: skip
        assert any((image == other.reshape(-1)).all() for other in stored)
    assert load_dataset(f"images:{folder}", folder, image_size=4).sha256 == data.sha256


def test_a_test_set_may_be_called_val(folder):
    data = load_dataset(f"images:{folder}", folder, image_size=4)
    (folder / "test").rename(folder / "val")
    assert load_dataset(f"images:{folder}", folder, image_size=4).sha256 == data.sha256


def test_statistics_are_those_of_all_pixels(folder, digits):
    data = load_dataset(f"images:{folder}", folder, image_size=8)
    pixels = data.train_images / 255.0
    assert data.mean == pytest.approx(pixels.mean(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std(), abs=1e-12)
    # To the last bit: masks depend on it.
    pixels = digits.train_images.astype(np.float64) / digits.scale
    assert (digits.mean, digits.std) == (pixels.mean(), pixels.std())


def test_more_images_than_memory_are_refused_before_they_are_read(folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 64 if name == "SC_PHYS_PAGES" else 4096)
    load_dataset(f"images:{folder}", folder, image_size=4)
    with pytest.raises(DataError, match=r"3 images, which take 0.0 GB .* lower image_size"):
        load_dataset(f"images:{folder}", folder, image_size=200)


def test_a_picture_that_unpacks_to_a_bomb_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"can't be read .*decompression bomb"):
        load_dataset(f"images:{folder}", folder)


# --- cifar -----------------------------------------------------------------------------------


#: For each data set: torchvision's class, its folder, the key of labels, and its classes.
CIFARS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "labels", 10),
    "cifar100": ("CIFAR100", "cifar-100-python", "fine_labels", 100),
}


@pytest.fixture(params=CIFARS)
def cifar(request, tmp_path, monkeypatch):
    """A tiny CIFAR in torchvision's layout, whose MD5 sums nobody checks; its pixels, by file."""
    import torchvision

    class_name, folder, key, classes = CIFARS[request.param]
    cls = getattr(torchvision.datasets, class_name)
    monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    (tmp_path / folder).mkdir()
    random, pixels = np.random.default_rng(0), {}
    for name, _ in (*cls.train_list, *cls.test_list):
        pixels[name] = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        batch = {"data": pixels[name], key: random.integers(0, classes, 4).tolist()}
        (tmp_path / folder / name).write_bytes(pickle.dumps(batch))
    names = [f"class {i}" for i in range(classes)]
    meta = {"label_names": names, "fine_label_names": names}
    (tmp_path / folder / cls.meta["filename"]).write_bytes(pickle.dumps(meta))
    return request.param, tmp_path, folder, pixels


def test_cifar_from_its_files(cifar):
    """Channels first, as the files have them, whatever torchvision makes of it in between."""
    name, data_dir, _, pixels = cifar
    data = load_dataset(name, data_dir)
    assert data.classes == CIFARS[name][3]
    assert data.shape == (3, 32, 32)
    *train, test = pixels.values()
    np.testing.assert_array_equal(data.train_images, np.concatenate(train))
    np.testing.assert_array_equal(data.test_images, test)
    assert data.train_images.flags.c_contiguous


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps({"labels": [1]})], ids=str)
def test_a_bad_cifar_is_one_clear_line(cifar, content):
    name, data_dir, folder, pixels = cifar
    (data_dir / folder / next(iter(pixels))).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset(name, data_dir)
    assert "\n" not in str(caught.value)
    assert f"put the folder {folder}" in str(caught.value)


def test_a_cifar_that_is_not_what_it_should_be_is_fetched_again_or_refused(tmp_path, monkeypatch):
    """Its MD5 sums are wrong: nothing of it is unpickled."""
    import torchvision

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(DataError, match="put the folder cifar-100-python"):
        load_dataset("cifar100", tmp_path)


# --- folders that are not what they should be ------------------------------------------------


def test_a_folder_with_rubbish(folder):
    (folder / "test" / "cat" / "two.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="can't be read"):
        load_dataset(f"images:{folder}", folder)


def test_a_folder_that_lacks_a_class(folder):
    (folder / "test" / "cat" / "one.png").unlink()
    (folder / "test" / "cat").rmdir()
    with pytest.raises(DataError, match="class cat is only in one"):
        load_dataset(f"images:{folder}", folder)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="train/ and test/"):
        load_dataset(f"images:{tmp_path}", tmp_path)


def test_the_data_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SUPSUP_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path


def test_images_must_have_the_shape_that_is_said(digits):
    for part in ("train_images", "test_images"):
        with pytest.raises(ValueError, match="not N x 64"):
            dataclasses.replace(digits, **{part: getattr(digits, part)[:, :63]})
