import csv
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from orchestrator.report import Checkpoint, Results, label, metrics, table, write
from supsup.config import RunConfig, with_values
from supsup.evaluate import Evaluation

SETTINGS = with_values(RunConfig(), {"eval.methods": "h-shortlist,g-one-shot"}).eval


def checkpoint(learned: int) -> Checkpoint:
    counts = np.zeros((2, learned, 5), dtype=np.int64)
    counts[:] = [20, 19, 20, 18, 17]
    counts[1, :, 1:] -= 5
    counts[1, :, 2] = 20
    evaluation = Evaluation(learned=learned, first=0, methods=SETTINGS.methods, counts=counts)
    return Checkpoint(learned=learned, gg_accuracy=0.9567, evaluation=evaluation)


@pytest.fixture
def results() -> Results:
    return Results(
        name="one",
        dataset="mnist",
        scenario="gnu",
        settings=SETTINGS,
        checkpoints=(checkpoint(2), checkpoint(5)),
        gg_correct=np.array([90, 91, 92, 93, 94]),
        test_images=100,
    )


def test_metrics_have_few_and_telling_keys():
    assert metrics(checkpoint(2), "gnu", SETTINGS) == {
        "gg/accuracy": 0.9567,
        "gnu/accuracy": 17 / 20,
        "gnu/accuracy/h-shortlist": 17 / 20,
        "gnu/task_accuracy/h-shortlist": 19 / 20,
        "gnu/accuracy/g-one-shot": 12 / 20,
        "gnu/task_accuracy/g-one-shot": 14 / 20,
    }
    assert metrics(checkpoint(2), "gns", SETTINGS)["gns/accuracy"] == 18 / 20


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
    for part in ("H shortlist", "G one-shot", "95.67", "85.00 (95.00)", "60.00 (70.00)"):
        assert part in text


def test_the_files_say_what_was_measured(results, tmp_path):
    written = {path.name: path for path in write(results, tmp_path / "report")}
    with written["per_task.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[3]["gg_accuracy"] == "0.9300"
    assert rows[3]["gnu_accuracy h-shortlist"] == "0.8500"
    assert rows[3]["task_accuracy g-one-shot"] == "0.7000"
    with written["accuracy.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tasks_learned"] for row in rows] == ["2", "5"]
    assert rows[0]["gnu/accuracy"] == "0.850000"
    with Image.open(written["accuracy.png"]) as image:
        assert image.size[0] > 600
        assert len(set(image.convert("L").tobytes())) > 10


def test_scenario_gg_has_no_inference(results, tmp_path):
    from dataclasses import replace

    alone = replace(
        results,
        scenario="gg",
        checkpoints=(Checkpoint(learned=5, gg_accuracy=0.9, evaluation=None),),
    )
    assert metrics(alone.checkpoints[0], "gg", SETTINGS) == {"gg/accuracy": 0.9}
    files = write(alone, tmp_path / "report")
    assert files[0].read_text().splitlines()[0] == "task,gg_accuracy"
