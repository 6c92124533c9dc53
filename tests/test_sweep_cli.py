"""The sweep commands: bad input is one line, and a killed sweep goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

from sweeps import cli
from sweeps.study import Record
from sweeps.work import Outcome

SUPSUP = str(Path(sys.executable).with_name("supsup"))
GRID = """
recipe = "permuted-digits"
seeds = [0, 1]
[base]
tasks = 8
block_size = 2
train.batches = 300
train.precision = "fp32"
train.device = "cpu"
model.output_size = 30
eval.images = 10
eval.at = [4]
[grid]
"train.learning_rate" = [1e-3, 2e-3]
"eval.methods" = ["h-one-shot", "g-one-shot"]
"""


@pytest.fixture
def supsup(monkeypatch, capsys, tmp_path):
    """Run a command line in this process; return its exit status, output and error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    (tmp_path / "grid.toml").write_text(GRID)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["supsup", "sweep", *words])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "fig6"), "there is no preset 'fig6'; did you mean fig"),
        (("run", "none.toml"), "sweep file none.toml can't be read"),
        (("run", "grid.toml", "--quick"), "--quick is for presets"),
        (("run", "grid.toml", "--workers", "0"), "0 is not in the range"),
        (("run", "grid.toml", "--concurrency", "0"), "0 is not in the range"),
        (("run", "grid.toml", "--storage", "x"), "the storage must be postgresql://"),
        (
            ("run", "grid.toml", "--storage", "postgresql://me@h/db?password=s3cr3t"),
            "the storage has password among its parameters",
        ),
        (("run", "grid.toml", "--tracking-uri", "x"), "the tracking URI must be"),
        (("run", "grid.toml", "--address", "127.0.0.1:1"), "no Ray cluster at"),
        (("run", "bad.toml"), "did you mean train.learning_rate?"),
        (("run", "small.toml"), "output_size is 5"),
        (("plan", "bad.toml"), "did you mean train.learning_rate?"),
        (("resume", "none"), "there is no sweep none in runs"),
        (("resume", "../up"), "sweep name is '../up'"),
        (("status", "none"), "there is no sweep none in runs"),
        (("report", "none"), "there is no sweep none in runs"),
        (("status", "none", "--data-dir", "x"), "No such option"),
        (("report", "none", "--data-dir", "x"), "No such option"),
        (("plan", "grid.toml", "--concurrency", "2"), "No such option"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(supsup, tmp_path, words, said):
    (tmp_path / "bad.toml").write_text(GRID.replace("train.learning_rate", "train.learning_rat"))
    (tmp_path / "small.toml").write_text(GRID.replace("= 30", "= 5"))
    before = set(tmp_path.rglob("*"))
    status, _, err = supsup(*words)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("supsup: ")
    assert set(tmp_path.rglob("*")) == before


def test_a_plan_says_what_is_trained_and_writes_nothing(supsup, tmp_path):
    before = set(tmp_path.rglob("*"))
    status, out, _ = supsup("plan", "grid.toml")
    text = " ".join(out.split())
    assert status == 0
    assert "8 trials, 0 done; 32 tasks to train, 32 saved by sharing banks" in text
    assert re.search(r"training time about \d+\.\d min on \d+ workers", text)
    assert set(tmp_path.rglob("*")) == before


def test_a_plan_of_a_search_says_how_long_it_takes_at_most(supsup, tmp_path):
    (tmp_path / "search.toml").write_text(
        'recipe = "permuted-digits"\n[base]\ntasks = 4\n[search]\ntrials = 5\n'
        '[search.space."train.batches"]\nlow = 10\nhigh = 20\n'
    )
    status, out, _ = supsup("plan", "search.toml")
    text = " ".join(out.split())
    assert status == 0
    assert "5 trials of 4 tasks by tpe, 0 ended" in text
    assert re.search(r"at most about \d+\.\d min of training", text)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("runs_dir", "more"), [("runs", ""), ("my runs", " --runs-dir 'my runs'")])
def test_remedies_name_the_runs_folder(capsys, tmp_path, runs_dir, more):
    outcome = Outcome(
        name="grid", table=Table(), records=[failed()], counts={"failed": 1}, trained=0,
        seconds=1.0, files=[tmp_path / "report" / "trials.csv"], delivered=False,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        cli._finish(outcome, Path(runs_dir))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(f"delivered by: supsup sync{more}")
    assert lines[-1] == f"try again: supsup sweep resume grid{more}"
    with pytest.raises(KeyboardInterrupt), cli._saying_how_to_go_on("grid", Path(runs_dir)):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith(f"go on with supsup sweep resume grid{more}\n")


def failed():
    return Record(
        number=0, state="failed", values={}, seed=0, curve={}, objectives=(), reason="no luck",
        fingerprint="", seconds=None,
    )  # fmt: skip


def test_every_preset_is_in_the_help(supsup):
    from sweeps.presets import NAMES

    _, out, _ = supsup("--help")
    assert all(name in out for name in NAMES)


def sweep(folder: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [SUPSUP, "sweep", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def tasks_on_disk(folder: Path) -> int:
    return 2 * len(list((folder / "runs").glob("*/blocks/tasks-*")))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_goes_on_and_does_nothing_twice(tmp_path, how):
    (tmp_path / "grid.toml").write_text(GRID)
    command = subprocess.Popen(
        [SUPSUP, "sweep", "run", "grid.toml"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while tasks_on_disk(tmp_path) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == signal.SIGKILL:
        os.killpg(command.pid, how)
    else:
        command.send_signal(how)
    command.wait()
    before = tasks_on_disk(tmp_path)
    assert 6 <= before < 32
    assert "running" in sweep(tmp_path, "status", "grid")
    said = sweep(tmp_path, "resume", "grid")
    assert f"8 done; {32 - before} tasks trained now" in said
    assert tasks_on_disk(tmp_path) == 32
    again = sweep(tmp_path, "run", "grid.toml")
    assert "8 done; 0 tasks trained now" in again
    assert "starting the workers" not in again
    rows = (tmp_path / "runs/sweeps/grid/report/trials.csv").read_text().splitlines()
    assert len(rows) == 9
