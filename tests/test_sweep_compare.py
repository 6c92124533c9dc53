import dataclasses
import math

import pytest

from sweeps.compare import arm_labels, arms, differences, estimate, overall, paired
from sweeps.report import _panels, _styles, as_text, ranked, table, write
from sweeps.spec import spec_of
from sweeps.study import Record

GRID = {
    "name": "s", "recipe": "permuted-digits", "seeds": [0, 1, 2],
    "grid": {"train.batches": [5, 10], "train.schedule": ["linear"]},
}  # fmt: skip
#: Quantiles of t at 0.975 with 1, 2 and 4 degrees of freedom, from tables.
T1, T2, T4 = 12.7062, 4.3027, 2.7764


def record(number, batches, seed, accuracy, state="done"):
    curve = {4: {"accuracy": accuracy / 2, "bytes": 50.0}, 8: {"accuracy": accuracy, "bytes": 99.0}}
    return Record(
        number=number,
        state=state,
        values={"train.batches": batches, "train.schedule": "linear"},
        seed=seed,
        curve=curve if state == "done" else {},
        objectives=(accuracy,),
        reason="" if state == "done" else "out of luck",
        fingerprint="f" * 64,
        seconds=1.0,
    )


RECORDS = [
    record(0, 10, 0, 0.80), record(1, 10, 1, 0.84), record(2, 10, 2, 0.88),
    record(3, 5, 0, 0.75), record(4, 5, 1, 0.80), record(5, 5, 2, 0.0, "failed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([1.0, 3.0], 2.0, T1 * math.sqrt(2) / math.sqrt(2)),
        ([0.80, 0.84, 0.88], 0.84, T2 * 0.04 / math.sqrt(3)),
        ([1, 2, 3, 4, 5], 3.0, T4 * math.sqrt(2.5) / math.sqrt(5)),
        ([0.5, 0.5], 0.5, 0.0),
    ],
)
def test_intervals_are_those_of_the_t_distribution(values, mean, half_width):
    found = estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(half_width, rel=1e-4)


def test_one_seed_says_nothing_of_its_interval():
    assert math.isnan(estimate([0.5]).half_width)
    assert as_text(estimate([0.5]), 100) == "50.00"
    assert math.isnan(estimate([]).mean)


def test_arms_are_compared_over_the_seeds_that_both_have():
    found = arms(RECORDS)
    assert [(arm.label, sorted(arm.by_seed)) for arm in found] == [
        ("batches 10", [0, 1, 2]),
        ("batches 5", [0, 1]),
    ]
    assert overall(found[0], "accuracy").mean == pytest.approx(0.84)
    pair = paired(found[1], found[0], "accuracy")
    assert (pair.n, pair.mean) == (2, pytest.approx(-0.045))
    assert pair.half_width == pytest.approx(T1 * 0.005, rel=1e-4)
    (difference,) = differences(found, "accuracy")
    assert (difference.arm, difference.than) == ("batches 5", "batches 10")


def test_labels_show_only_what_differs():
    values = [
        {"train.batches": 5, "train.schedule": "linear", "eval.batch": 1},
        {"train.batches": 5, "train.schedule": "constant", "eval.batch": 1},
    ]
    assert arm_labels(values) == ["schedule linear", "schedule constant"]
    same = [{"model.name": "a", "other.name": "b"}, {"model.name": "c", "other.name": "d"}]
    assert arm_labels(same) == ["model.name a, other.name b", "model.name c, other.name d"]
    assert arm_labels([{"train.batches": 5}]) == ["batches 5"]


class NoStudy:
    def get_trials(self, **_):
        return []


def test_a_report_has_the_table_the_differences_and_what_failed(tmp_path):
    spec = spec_of(GRID)
    files = {path.name: path for path in write(spec, RECORDS, NoStudy(), tmp_path / "report")}
    text = files["comparison.md"].read_text()
    assert "| batches 10 | 3 | 84.00 ± 9.94 | 0.00 |" in text
    assert "| batches 5 | batches 10 | 2 | -4.50 ± 6.35 |" in text
    assert "trial 5, seed 2, failed: out of luck" in text
    assert text.index("batches 5") < text.index("batches 10")  # as the grid has them
    rows = files["trials.csv"].read_text().splitlines()
    assert len(rows) == 7
    assert rows[1].startswith("0,done,0,10,linear,0.800000")
    assert files["accuracy.png"].read_bytes().startswith(b"\x89PNG")
    assert table(spec, RECORDS).row_count == 2
    assert write(spec, [], NoStudy(), tmp_path / "none")  # nothing done yet is no error


def test_a_search_is_shown_from_the_best_on():
    space = {"train.batches": {"low": 5, "high": 10}}
    tree = {**GRID, "seeds": [0], "search": {"trials": 9, "space": space}}
    tree.pop("grid")
    found = arms([record(0, 5, 0, 0.7), record(1, 7, 0, 0.9), record(2, 9, 0, 0.8)])
    assert [arm.label for arm in ranked(spec_of(tree), found)] == [
        "batches 7",
        "batches 9",
        "batches 5",
    ]


def test_many_arms_have_a_panel_for_each_value_of_the_first_field():
    grid = {"train.batches": [5, 10], "train.learning_rate": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]}
    spec = spec_of({**GRID, "grid": grid})
    records = [
        dataclasses.replace(record(number, 5, 0, 0.8), values=arm)
        for number, arm in enumerate(spec.arms())
    ]
    found = ranked(spec, arms(records))
    panels = _panels(spec, found)
    assert list(panels) == ["batches 5", "batches 10"]
    assert [list(lines) for lines in panels.values()] == 2 * [
        [f"learning_rate 0.00{n}" for n in range(1, 6)]
    ]
    assert panels["batches 10"]["learning_rate 0.002"].values == {
        "train.batches": 10,
        "train.learning_rate": 2e-3,
    }
    styles = _styles([label for lines in panels.values() for label in lines])
    assert len({style["color"] for style in styles.values()}) == 5
    assert list(_panels(spec, found[:8])) == [""]
