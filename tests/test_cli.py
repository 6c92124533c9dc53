"""Every command's answer to bad input: one clear line, exit status 2, nothing written."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.runfolder import Launch, RunFolder
from supsup.fields import config_fields, with_values


@pytest.fixture
def supsup(monkeypatch, capsys, tmp_path):
    """Run a command line in this process; return its exit status, output and error output."""
    import os

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mask: 0)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["supsup", *words])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


RUN = ("run", "permuted-digits")
OPEN = ("run", "open-digits")
BAD = [
    ((*RUN, "--workers", "0"), "0 is not in the range"),
    ((*RUN, "--workers", "-1"), "-1 is not in the range"),
    ((*RUN, "--workers", "1000000000"), "1000000000 is not in the range"),
    ((*RUN, "--workers", "4096"), "--workers 4096 needs as many cores; this machine has"),
    ((*RUN, "--workers", "two"), "'two' is not a valid integer"),
    ((*RUN, "--tasks", "0"), "tasks is 0, must be at least 1"),
    ((*RUN, "--tasks", "99999999999999999999"), "must be at most 10000000"),
    ((*RUN, "--seed", "-1"), "seed is -1, must be at least 0"),
    ((*RUN, "--seed", "18446744073709551616"), "must be less than 18446744073709551616"),
    ((*RUN, "--train.learning_rate", "nan"), "must be a finite number"),
    ((*RUN, "--train.learning-rate", "inf"), "must be a finite number"),
    (("run", "permuted-minst"), "did you mean permuted-mnist?"),
    (("run",), "Missing argument 'RECIPE'"),
    ((*RUN, "--taks", "3"), "No such option"),
    ((*RUN, "--objective", "x"), "'x' is not one of 'h', 'g'"),
    ((*RUN, "--algorithm", "x"), "is not one of"),
    ((*RUN, "--scenario", "nnx"), "scenario is nnx, must be one of gg, gns, gnu, nns"),
    ((*RUN, "--protocol", "papr"), "is not one of"),
    ((*RUN, "--model", "resnet"), "model.name is resnet, must be one of"),
    ((*RUN, "--model.output_size", "9"), "model.output_size is 9, must be at least 10"),
    ((*RUN, "--model.output_size", "10"), "must be above 10"),
    ((*RUN, "--dataset", "images:/no/where"), "can't be read"),
    ((*RUN, "--dataset", ""), "dataset is '', must be one of"),
    ((*RUN, "--at", "x"), "eval.at is x, must be a whole number"),
    ((*RUN, "--name", "../x"), "must be 1 to 64 of"),
    ((*RUN, "--name", "a\nb"), "must be 1 to 64 of"),
    ((*RUN, "--name", "\x1b[2J"), "must be 1 to 64 of"),
    ((*RUN, "--name", "x" * 600), "must be 1 to 64 of"),
    ((*RUN, "--name", " "), "must be 1 to 64 of"),
    ((*RUN, "--name", ""), "must be 1 to 64 of"),
    ((*RUN, "--runs-dir", "/dev/null"), "is not a folder"),
    ((*RUN, "--runs-dir", "/proc/x"), "no permission to write"),
    ((*RUN, "--tracking-uri", "ftp://x"), "the tracking URI must be"),
    ((*OPEN, "--epsilon", "0"), "openset.epsilon is 0, must be greater than 0"),
    ((*OPEN, "--epsilon", "4"), "openset.epsilon is 4, must be less than 4"),
    ((*OPEN, "--budget", "0"), "openset.budget is 0, must be at least 1"),
    ((*OPEN, "--stream", "fuzz"), "must be one of paper, random-length, recurring, fuzzy, drift"),
    ((*OPEN, "--openset.decide-every", "6001"), "the stream has 6000 batches and a decision"),
    ((*OPEN, "--openset.chunks", "61"), "openset.chunks is 61, must be at most 60"),
    ((*RUN, "--train.device", "tpu"), "train.device is tpu, must be one of"),
    ((*RUN, "--address", "127.0.0.1:9"), "no Ray cluster at '127.0.0.1:9'"),
    ((*RUN, "--address", "127.0.0.1:99999999"), "no Ray cluster at"),
    (("resume", "nothing"), "there is no run nothing"),
    (("resume", "../x"), "must be 1 to 64 of"),
    (("eval", "nothing"), "there is no run nothing"),
    (("eval", "nothing", "--batch", "0"), "there is no run nothing"),
    (("bank", "info", "nothing"), "there is no run nothing"),
    (("bank", "verify", "../.."), "must be 1 to 64 of"),
    (("ui",), "has no MLflow store yet"),
    (("ui", "--port", "0"), "0 is not in the range"),
    (("sing",), "No such command 'sing'"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words)[:50] for words, _ in BAD])
def test_bad_input_is_one_clear_line(supsup, tmp_path, words, said):
    import os

    if "/proc/x" in words and os.access("/proc", os.W_OK):
        pytest.skip("this user may write anywhere")
    status, out, err = supsup(*words)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert err.startswith("supsup: ")
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def kept_run(tmp_path, full_bank, quick) -> str:
    """A finished run, made without the command line."""
    runs = tmp_path / "runs"
    runs.mkdir()
    full_bank.path.rename(runs / "kept")
    launch = Launch(recipe="permuted-digits", config=quick, data_dir="", tracking_uri=None)
    RunFolder(runs, "kept").write_launch(launch)
    return "kept"


def files(path: Path) -> set[Path]:
    return set(path.rglob("*"))


def test_a_changed_configuration_is_named(supsup, kept_run, tmp_path):
    before = files(tmp_path)
    status, _, err = supsup(*RUN, "--name", kept_run, "--train.device", "cpu",
                            "--train.precision", "fp32", "--seed", "5")  # fmt: skip
    assert status == 2
    assert "run kept exists and was trained differently" in err
    assert "seed 0 there, 5 here" in err
    assert "train.batches 12 there, 500 here" in err
    assert files(tmp_path) == before


def test_evaluating_more_tasks_than_there_are(supsup, kept_run, tmp_path):
    before = files(tmp_path)
    status, _, err = supsup("eval", kept_run, "--at", "3,9")
    assert status == 2
    assert "eval.at is 9, must be at most 8" in err
    assert "supsup run permuted-digits --name kept --tasks 9" in err
    assert files(tmp_path) == before


def test_evaluating_damaged_tasks_is_refused_and_moves_nothing(supsup, kept_run, tmp_path):
    block = min((tmp_path / "runs" / kept_run / "blocks").iterdir())
    block.write_bytes(block.read_bytes()[:-3])
    before = files(tmp_path)
    status, _, err = supsup("eval", kept_run, "--at", "4")
    assert status == 2
    assert block.name in err
    assert "repair with supsup resume kept" in err
    assert files(tmp_path) == before


def test_a_hole_in_a_bank_is_named(supsup, kept_run, tmp_path):
    blocks = sorted((tmp_path / "runs" / kept_run / "blocks").iterdir())
    assert len(blocks) > 2
    blocks[1].unlink()
    status, out, _ = supsup("bank", "verify", kept_run)
    assert status == 0
    assert "tasks 3 to 5 are missing, though later ones are there: supsup resume kept" in out
    assert "3 tasks, SHA-256 of their masks" in out


def test_a_finished_run_is_shown_without_starting_ray(supsup, kept_run, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", None)
    status, out, err = supsup("eval", kept_run, "--scenario", "gg", "--at", "4,8")
    assert status == 0
    assert "8 learned" in out
    assert "starting the workers" not in err


def test_a_second_run_on_a_bank_is_refused(supsup, kept_run, tmp_path):
    code = """
import sys
from pathlib import Path
from supsup.bank import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "runs" / kept_run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        status, _, err = supsup("eval", kept_run, "--at", "4")
    finally:
        holder.kill()
        holder.communicate()
    assert status == 2
    assert f"in use by process {holder.pid} on" in err


def test_bank_info_and_verify(supsup, kept_run, tmp_path):
    status, out, _ = supsup("bank", "info", kept_run)
    assert status == 0
    for part in ("8 in 3 blocks, 8 from task 0 on", "lenet-300-100", "linear0 300x64", "fp32"):
        assert part in out
    status, out, _ = supsup("bank", "verify", kept_run)
    assert status == 0
    assert "8 tasks, SHA-256 of their masks " in out
    block = sorted((tmp_path / "runs" / kept_run / "blocks").iterdir())[1]
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    status, out, _ = supsup("bank", "verify", kept_run)
    assert status == 1
    assert f"damaged: tasks 3 to 5 ({block.name})" in out
    assert "supsup resume kept" in out


def test_help_shows_every_field_and_both_spellings(supsup):
    status, out, _ = supsup("run", "--help")
    assert status == 0
    for info in config_fields():
        assert f"--{info.path.replace('_', '-')}" in out
    assert supsup("run", "--help")[0] == 0


def test_help_is_quick():
    command = [str(Path(sys.executable).with_name("supsup")), "--help"]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.7


@pytest.mark.parametrize(
    ("objective", "algorithm", "expected"),
    [
        (None, None, {}),
        ("g", None, {"eval.methods": "g-one-shot"}),
        ("h", None, {"eval.methods": "h-shortlist"}),
        (None, "shortlist", {"eval.methods": "h-shortlist"}),
        ("g", "shortlist", {"eval.methods": "g-shortlist"}),
        ("h", "one-shot", {"eval.methods": "h-one-shot"}),
    ],
)
def test_methods_are_narrowed(quick, objective, algorithm, expected):
    from orchestrator.options import methods

    config = with_values(quick, {"eval.methods": "h-shortlist,g-one-shot"})
    assert methods(config, objective, algorithm) == expected


def test_a_run_with_a_failed_block_exits_with_1_and_its_reason(supsup, monkeypatch, tmp_path):
    from orchestrator import session
    from orchestrator.tracking import local_store

    def failing(where, launch, name, reporter):
        return session.Outcome(
            folder=RunFolder(where.runs_dir, "bad"),
            table=None,
            failures=["tasks 0 to 9 failed, given up: NonFiniteLoss: task 3"],
            summary="0 learned",
            seconds=1.0,
            first_result_seconds=None,
            bank_bytes=0,
            files=[],
            store=local_store(where.runs_dir),
            delivered=False,
        )

    monkeypatch.setattr(session, "run", failing)
    status, _, err = supsup(*RUN)
    assert status == 1
    assert "NonFiniteLoss: task 3" in err
    assert "try again: supsup resume bad" in err
    assert "MLflow has not got all records" in err


def test_a_run_that_can_not_go_on_is_one_line_and_exits_with_1(supsup, monkeypatch):
    from orchestrator import session
    from supsup.errors import DeterminismFault

    def failing(*args: object) -> None:
        raise DeterminismFault("block 3 differs")

    monkeypatch.setattr(session, "run", failing)
    status, _, err = supsup(*RUN)
    assert status == 1
    assert err == "supsup: block 3 differs\n"
