import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from orchestrator.report import (
    Checkpoint,
    Results,
    axis_scale,
    label,
    metrics,
    spread_ticks,
    table,
    write,
)
from supsup.config import RunConfig
from supsup.evaluate import Evaluation
from supsup.fields import with_values

SETTINGS = with_values(RunConfig(), {"eval.methods": "h-shortlist,g-one-shot"}).eval


def checkpoint(learned: int, tasks: tuple[int, ...] | None = None) -> Checkpoint:
    """Twenty decisions about one image each in all tasks, or in some."""
    tasks = tuple(range(learned)) if tasks is None else tasks
    counts = np.zeros((2, len(tasks), 5), dtype=np.int64)
    counts[:] = [20, 19, 20, 18, 17]
    counts[1, :, 1:] -= 5
    counts[1, :, 2] = 20
    evaluation = Evaluation(learned=learned, tasks=tasks, methods=SETTINGS.methods, counts=counts)
    return Checkpoint(learned=learned, gg_accuracy=0.9567, evaluation=evaluation)


@pytest.fixture
def results() -> Results:
    return Results(
        name="one",
        dataset="mnist",
        scenario="gnu",
        settings=SETTINGS,
        checkpoints=(checkpoint(2), checkpoint(5)),
        gg_correct=np.array([16, 17, 18, 19, 20]),
        test_images=20,
    )


@pytest.fixture
def sampled(results) -> Results:
    """All of 2 tasks, then two of 5, of which the second was harder."""
    some = checkpoint(5, (1, 4))
    some.evaluation.counts[0, 1, 4] = 13
    return replace(results, checkpoints=(checkpoint(2), some))


def test_metrics_have_few_and_telling_keys():
    assert metrics(checkpoint(2), "gnu", SETTINGS, 20) == {
        "gg/accuracy": 0.9567,
        "gnu/accuracy": 17 / 20,
        "gnu/accuracy/h-shortlist": 17 / 20,
        "gnu/task_accuracy/h-shortlist": 19 / 20,
        "gnu/accuracy/g-one-shot": 12 / 20,
        "gnu/task_accuracy/g-one-shot": 14 / 20,
    }
    assert metrics(checkpoint(2), "gns", SETTINGS, 20)["gns/accuracy"] == 18 / 20


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "h-one-shot"),
        ({"eval.batch": 128}, "h-one-shot-b128"),
        ({"eval.group": 128}, "h-one-shot-g128"),
        ({"eval.batch": 2, "eval.group": 4}, "h-one-shot-b2-g4"),
    ],
)
def test_labels_tell_settings_apart(values, expected):
    assert label("h-one-shot", with_values(RunConfig(), values).eval) == expected


def test_the_table_fits_a_terminal(results):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(results))
    text = console.export_text()
    assert "…" not in text
    assert "±" not in text
    for part in ("H shortlist", "G one-shot", "95.67", "85.00 (95.00)", "60.00 (70.00)"):
        assert part in text


def test_the_files_say_what_was_measured(results, tmp_path):
    written = {path.name: path for path in write(results, tmp_path / "report")}
    with written["per_task.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[3]["gg_accuracy"] == "0.9500"
    assert rows[3]["gnu_accuracy h-shortlist"] == "0.8500"
    assert rows[3]["task_accuracy g-one-shot"] == "0.7000"
    with written["accuracy.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tasks_learned"] for row in rows] == ["2", "5"]
    assert rows[0]["gnu/accuracy"] == "0.850000"
    assert rows[1]["gnu/accuracy/h-shortlist ±95"] == "0.000000"
    with Image.open(written["accuracy.png"]) as image:
        assert image.size[0] > 600
        assert len(set(image.convert("L").tobytes())) > 10


def test_scenario_gg_has_no_inference(results, tmp_path):
    alone = replace(
        results,
        scenario="gg",
        checkpoints=(Checkpoint(learned=5, gg_accuracy=0.9, evaluation=None),),
    )
    assert metrics(alone.checkpoints[0], "gg", SETTINGS, 20) == {"gg/accuracy": 0.9}
    files = write(alone, tmp_path / "report")
    assert files[0].read_text().splitlines()[0] == "task,gg_accuracy"


#: Between tasks 0.85 and 0.65, all images asked: 1.96 sqrt((1 - 2/5) 0.02 / 2).
HALF_WIDTH = 1.96 * 0.006**0.5


def test_estimates_are_shown_with_their_interval_and_what_they_rest_on(sampled):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(sampled))
    text = " ".join(console.export_text().split())
    assert "85.00 (95.00)" in text  # the complete checkpoint
    assert f"75.00 ± {100 * HALF_WIDTH:.2f} (95.00)" in text
    assert "60.00 ± 0.00 (70.00)" in text
    assert "GNu at 5 tasks: estimate from 2 of 5 tasks, all 20 test images of each" in text


def test_an_unknown_interval_is_shown_as_unknown(results):
    unknown = replace(results, checkpoints=(checkpoint(5, (2,)),))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(unknown))
    assert "85.00 ± ? (95.00)" in console.export_text()
    assert "gnu/accuracy_ci95" not in metrics(unknown.checkpoints[0], "gnu", SETTINGS, 20)
    assert metrics(checkpoint(5, (2, 3)), "gnu", SETTINGS, 20)["gnu/accuracy_ci95"] == 0


def test_the_files_of_a_sample_leave_blank_what_was_not_asked(sampled, tmp_path):
    written = {path.name: path for path in write(sampled, tmp_path / "report")}
    with written["per_task.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["gnu_accuracy h-shortlist"] for row in rows] == ["", "0.8500", "", "", "0.6500"]
    assert all(row["gg_accuracy"] for row in rows)
    with written["accuracy.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["tasks_asked"], row["images_per_task"]) for row in rows] == [("2", "20")] * 2
    assert rows[1]["gnu/accuracy/h-shortlist ±95"] == f"{HALF_WIDTH:.6f}"
    assert rows[1]["gnu/task_accuracy/h-shortlist ±95"] == "0.000000"
    assert metrics(sampled.checkpoints[1], "gnu", SETTINGS, 20)[
        "gnu/accuracy_ci95"
    ] == pytest.approx(HALF_WIDTH)


@pytest.mark.parametrize(
    ("learned", "scale"),
    [
        ((10, 250, 500, 1000, 1500, 2000, 2500), "linear"),
        ((10, 25, 50, 100, 250, 500, 1000, 2500), "log"),
        ((10, 25, 50), "log"),
        ((25, 50), "linear"),
        ((7,), "linear"),
    ],
)
def test_the_axis_is_the_one_that_keeps_checkpoints_apart(learned, scale):
    assert axis_scale(learned) == scale


def test_labels_of_the_axis_have_room():
    few = [10, 250, 500, 1000, 1500, 2000, 2500]
    assert spread_ticks(few, "linear") == few
    many = list(range(250, 25001, 250))
    shown = spread_ticks(many, "linear")
    assert shown[-1] == 25_000
    assert len(shown) > 6
    assert np.diff(shown).min() >= 0.08 * (25_000 - 250)
    assert spread_ticks([7], "linear") == [7]
