import pytest

from sweeps.compare import arms, estimate
from sweeps.report import as_text
from sweeps.storage_picture import storage_picture
from sweeps.study import Record


def record(number, variant, seed, accuracy, stored):
    point = {"accuracy": accuracy}
    if stored is not None:
        point["bytes"] = stored
    return Record(
        number=number,
        state="done",
        values={"variant": variant},
        seed=seed,
        curve={2: {"accuracy": 0.1, "bytes": 1.0}, 5: point},
        objectives=(),
        fingerprint="",
        reason="",
        seconds=1.0,
    )


def found(*sizes):
    records = [
        record(2 * i + seed, f"arm-{i}", seed, 0.8 + seed / 100, size)
        for i, size in enumerate(sizes)
        for seed in (0, 1)
    ]
    return arms(records)


@pytest.mark.parametrize("sizes", [(1e6, 5e4, None), (1e6, 1e3, 2e6)])
def test_arms_that_take_different_bytes_are_a_picture(sizes):
    files = storage_picture("s", found(*sizes))
    assert list(files) == ["storage.png"]
    assert files["storage.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("sizes", [(1e6, 1.1e6), (1e6,), (None, None)])
def test_arms_that_take_as_much_are_none(sizes):
    assert storage_picture("s", found(*sizes)) == {}


def test_what_was_not_measured_is_blank_in_a_table():
    assert as_text(estimate([])) == ""
    assert as_text(estimate([0.5]), 100) == "50.00"
