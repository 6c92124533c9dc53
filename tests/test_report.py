import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from orchestrator.drawing import axis_scale, spread_ticks
from orchestrator.field_report import confusion_files, matrix_files
from orchestrator.report import table, write
from orchestrator.results import (
    Checkpoint,
    Results,
    field_metrics,
    folder_name,
    label,
    metrics,
    subject,
)
from supsup.config import RunConfig
from supsup.evaluate import Evaluation
from supsup.fields import with_values
from supsup.measures import AccuracyMatrix
from supsup.storage import Storage

STORAGE = Storage(shared=8, per_task=100, what="mask bits")
SETTINGS = with_values(RunConfig(), {"eval.methods": "h-shortlist,g-one-shot"}).eval


def checkpoint(learned: int, tasks: tuple[int, ...] | None = None) -> Checkpoint:
    """Twenty decisions about one image each in all tasks, or in some."""
    tasks = tuple(range(learned)) if tasks is None else tasks
    counts = np.zeros((2, len(tasks), 6), dtype=np.int64)
    counts[:] = [20, 19, 20, 18, 17, 20]
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
        sizes=np.full(5, 20),
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
        "gnu/top5_task_accuracy": 1.0,
        "gnu/accuracy/h-shortlist": 17 / 20,
        "gnu/task_accuracy/h-shortlist": 19 / 20,
        "gnu/accuracy/g-one-shot": 12 / 20,
        "gnu/task_accuracy/g-one-shot": 14 / 20,
    }
    assert metrics(checkpoint(2), "gns", SETTINGS, 20)["gns/accuracy"] == 18 / 20


def test_the_measures_of_the_field_are_those_of_the_scenario(results):
    """By hand: 17 of 20 at both checkpoints, but task 0 had 19 at the first, task 1 had 16."""
    first = checkpoint(2)
    first.evaluation.counts[0, :, 4] = [19, 16]
    changed = replace(results, checkpoints=(first, checkpoint(5)), storage=STORAGE)
    assert field_metrics(changed) == pytest.approx(
        {
            "average_accuracy": 17 / 20,
            "forgetting": (2 / 20 - 1 / 20) / 2,
            "backward_transfer": (-2 / 20 + 1 / 20) / 2,
            "bytes_per_task": 100,
        }
    )
    assert set(field_metrics(changed.until(2))) == {"average_accuracy", "bytes_per_task"}
    given = replace(changed, scenario="gg", checkpoints=(Checkpoint(
        learned=5, gg_accuracy=0.9, evaluation=None),))  # fmt: skip
    assert field_metrics(given)["average_accuracy"] == pytest.approx(18 / 20)
    assert field_metrics(given)["forgetting"] == 0
    rows = [(1, np.array([0.9])), (2, np.array([0.5, 0.8]))]
    forgets = replace(given, given=AccuracyMatrix.of_rows(rows))
    assert field_metrics(forgets)["forgetting"] == pytest.approx(0.4)
    assert "forgetting" not in field_metrics(forgets.until(1))


def test_the_table_says_what_tasks_take(results):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(replace(results, storage=STORAGE)))
    text = console.export_text()
    assert "stored per task: 100 bytes (mask bits); shared: 8; 5 tasks: 0.00 MB" in text
    assert "GNu, % points: forgetting 0.00, backward transfer 0.00" in text


def test_the_accuracy_matrix_is_a_table_and_a_picture_if_it_is_small(results, tmp_path):
    written = {path.name: path for path in write(results, tmp_path / "report")}
    lines = written["accuracy_matrix.csv"].read_text().splitlines()
    assert lines[0] == "tasks_learned,task 0,task 1,task 2,task 3,task 4"
    assert lines[1:] == ["2,0.8500,0.8500,,,", "5" + ",0.8500" * 5]
    table_of_tasks = written["task_confusion.csv"].read_text().splitlines()
    assert table_of_tasks[:3] == ["task,taken for,decisions,of", "0,0,19,20", "1,1,19,20"]
    assert {"accuracy_matrix.png", "task_confusion.png"} <= set(written)
    many = AccuracyMatrix.unchanging((1, 101), np.ones(101))
    assert set(matrix_files(many, "many")) == {"accuracy_matrix.csv"}


def test_the_confusion_of_tasks_names_what_they_were_taken_for():
    evaluation = replace(
        checkpoint(5).evaluation, tasks=(1, 4), confusions_X3=np.array([[1, 0, 1], [4, 2, 1]])
    )
    evaluation = replace(evaluation, counts=evaluation.counts[:, :2])
    lines = confusion_files(evaluation, "one")["task_confusion.csv"].decode().splitlines()
    assert lines[1:] == ["1,0,1,20", "1,1,19,20", "4,2,1,20", "4,4,19,20"]


def test_what_was_learned_is_said_as_people_read_it():
    def of(**values):
        return subject(with_values(RunConfig(), values))

    assert of() == "mnist"
    assert of(family="rotated", dataset="digits") == "rotated digits"
    assert of(family="split", dataset="images:/a/few-birds") == "split few-birds"


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


def test_many_methods_are_rows_of_the_table(results):
    names = ("h-shortlist", "h-one-shot", "g-one-shot", "h-gradient-descent", "max-logit")
    settings = with_values(RunConfig(), {"eval.methods": ",".join(names), "eval.batch": 128}).eval
    counts = np.repeat(checkpoint(5).evaluation.counts[:1], len(names), axis=0)
    evaluation = replace(checkpoint(5).evaluation, methods=names, counts=counts)
    last = replace(checkpoint(5), evaluation=evaluation)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(replace(results, settings=settings, checkpoints=(last,))))
    text = console.export_text()
    assert "…" not in text
    rows = [line for line in text.splitlines() if "85.00 (95.00)" in line]
    said = ("H shortlist", "H one-shot", "G one-shot", "gradient-descent, 128", "max-logit, 128")
    assert all(name in row for name, row in zip(said, rows, strict=True))
    assert folder_name(settings).startswith("h-shortlist-b128+4-more-")
    assert folder_name(SETTINGS) == "h-shortlist+g-one-shot"
    other = replace(SETTINGS, images=9, depth=1)
    assert folder_name(other) == "h-shortlist+g-one-shot-images9-depth1"


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
    assert files[0].read_text().splitlines()[0] == "task,test_images,gg_accuracy"
    assert not [path for path in files if "confusion" in path.name]


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
