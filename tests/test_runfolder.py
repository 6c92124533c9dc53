import dataclasses
import json

import numpy as np
import pytest

from orchestrator.runfolder import Launch, RunFolder, check_runs_dir, find_run, no_such
from supsup.config import RunConfig
from supsup.errors import ConfigError, UserError
from supsup.evaluate import Evaluation
from supsup.fields import with_values


@pytest.mark.parametrize("name", ["a", "permuted-mnist-0123abcd", "A_b.c-9", "x" * 64, "_"])
def test_good_names(tmp_path, name):
    assert RunFolder(tmp_path, name).path == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        ".hidden",
        "-dash",
        "a\nb",
        "a\0b",
        "\x1b[31m",
        "x" * 65,
        "é",
    ],
)
def test_bad_names_are_one_printable_line(tmp_path, name):
    with pytest.raises(ConfigError, match="must be 1 to 64") as caught:
        RunFolder(tmp_path, name)
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_link_outside_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "link").symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link that leaves"):
        RunFolder(runs, "link")


def test_the_runs_folder_must_be_a_folder(tmp_path):
    check_runs_dir(tmp_path / "not" / "there" / "yet")
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "runs"):
        with pytest.raises(ConfigError, match=f"{file} is not a folder"):
            check_runs_dir(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not a folder"):
        check_runs_dir(tmp_path / "dangling")
    assert not (tmp_path / "not").exists()


def test_a_launch_is_kept(tmp_path):
    folder = RunFolder(tmp_path, "a")
    folder.path.mkdir()
    launch = Launch(recipe="r", config=RunConfig(tasks=7), data_dir="/d", tracking_uri=None)
    folder.write_launch(launch)
    assert folder.read_launch() == launch
    assert folder.identity() == launch.identity
    assert Launch(recipe="r", config=RunConfig(), data_dir="", tracking_uri=None) != launch


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"config": {"tasks": 0}}', b"\xff"])
def test_a_damaged_launch_is_a_clear_error(tmp_path, content):
    folder = RunFolder(tmp_path, "a")
    folder.path.mkdir()
    (folder.path / "launch.json").write_bytes(content)
    with pytest.raises(UserError, match=r"launch\.json is damaged; give the run command again"):
        folder.read_launch()
    assert folder.identity() is None


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="there is no run a in"):
        RunFolder(tmp_path, "a").read_launch()


def test_a_run_that_is_not_there_is_told_from_one_that_is_meant(tmp_path):
    (tmp_path / "digits-2").mkdir()
    assert "did you mean digits-2?" in str(no_such("run", "digit-2", tmp_path))
    assert str(no_such("run", "zzz", tmp_path)).endswith("see its names, or give --runs-dir")


def test_evaluations_are_kept_by_setting(tmp_path):
    folder = RunFolder(tmp_path, "a")
    folder.path.mkdir()
    settings = with_values(RunConfig(), {"eval.methods": "h-one-shot"}).eval
    counts, confusions = np.arange(12).reshape(1, 2, 6), np.array([[0, 1, 4]])
    tasks, methods = (0, 2), ("h-one-shot",)
    evaluation = Evaluation(
        learned=3, tasks=tasks, methods=methods, counts=counts, confusions_X3=confusions
    )
    folder.write_evaluation(settings, evaluation)
    found = folder.read_evaluation(settings, 3, tasks)
    arrays = {"counts": 0, "confusions_X3": 0}
    assert dataclasses.replace(found, **arrays) == dataclasses.replace(evaluation, **arrays)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.confusions_X3, confusions)
    elsewhere = dataclasses.replace(settings, at=(1, 2), memory_mb=64, shortlist=3, sketch=0.5)
    assert folder.read_evaluation(elsewhere, 3, tasks) is not None
    assert folder.read_evaluation(dataclasses.replace(settings, images=7), 3, tasks) is None
    assert folder.read_evaluation(dataclasses.replace(settings, depth=1), 3, tasks) is None
    assert folder.read_evaluation(settings, 2, tasks) is None
    assert folder.read_evaluation(settings, 3, (0, 1)) is None
    assert folder.read_evaluation(settings, 3, (0, 1, 2)) is None
    file = next((folder.path / "evaluations").iterdir())
    for rubbish in (
        b"",
        b"{}",
        b"[]",
        b'{"counts": [[1]], "tasks": [0, 2]}',
        json.dumps({"counts": counts.tolist()}).encode(),
        json.dumps({"counts": "x", "tasks": [0, 2]}).encode(),
        json.dumps({"counts": counts.tolist(), "tasks": [0, 2]}).encode(),
    ):
        file.write_bytes(rubbish)
        assert folder.read_evaluation(settings, 3, tasks) is None


def test_a_run_is_found_by_its_fingerprint(full_bank):
    runs = full_bank.path.parent
    (runs / "rubbish").mkdir()
    (runs / "rubbish" / "manifest.json").write_text("{")
    assert find_run(runs, full_bank.manifest.fingerprint) == "bank"
    assert find_run(runs, "0" * 64) is None
    assert find_run(runs / "nowhere", "0" * 64) is None
