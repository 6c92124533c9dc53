"""The real thing: the command, its own Ray, its MLflow store; killed and resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from orchestrator.runfolder import Launch, RunFolder
from supsup.bank import Bank
from supsup.fields import with_values
from supsup.manifest import make_manifest

SUPSUP = str(Path(sys.executable).with_name("supsup"))
QUICK = (
    "--train.batches=400", "--model.output-size=30", "--block-size=2", "--eval.images=20",
    "--train.precision=fp32", "--train.device=cpu",
)  # fmt: skip


def supsup(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SUPSUP, *words], cwd=folder, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def sha256(folder: Path, name: str) -> str:
    out = supsup(folder, "bank", "verify", name).stdout
    return re.search(r"SHA-256 of their masks ([0-9a-f]{64})", out)[1]


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def blocks(folder: Path, name: str) -> int:
    return len(list((folder / "runs" / name / "blocks").glob("tasks-*")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with an undisturbed run of 14 tasks by one worker."""
    folder = tmp_path_factory.mktemp("whole")
    words = ("--name", "whole", "--tasks", "14", "--workers", "1", "--at", "5,14")
    done = supsup(folder, "run", "permuted-digits", *words, *QUICK)
    for part in ("learned", "H one-shot", "G one-shot", "accuracy.png", "supsup ui"):
        assert part in done.stdout
    assert "tasks trained: 14/14" in done.stderr
    return folder


def test_the_run_is_in_mlflow_for_someone_who_was_told_nothing(whole):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{whole}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("supsup")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batches"] == "400"
    assert run.data.tags["tasks"] == "14"
    assert "number of tasks learned" in run.data.tags["mlflow.note.content"]
    kind = client.get_experiment_by_name("supsup").tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    history = client.get_metric_history(run.info.run_id, "gnu/accuracy")
    assert [point.step for point in history] == [5, 14]
    assert run.data.metrics["gg/accuracy"] > 0.85
    assert run.data.metrics["gnu/task_accuracy/h-one-shot"] > 0.5
    assert run.data.metrics["bank/bytes"] > 14 * 4000
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {
        f"{name}.{kind}"
        for name in ("accuracy", "accuracy_matrix", "task_confusion")
        for kind in ("png", "csv")
    } | {"per_task.csv"}


def test_everything_written_is_the_users_alone(whole):
    modes = {path: path.stat().st_mode & 0o077 for path in (whole / "runs").rglob("*")}
    assert not any(modes.values()), {path: oct(mode) for path, mode in modes.items() if mode}


def test_killed_and_resumed_gives_the_same_bank(whole, tmp_path):
    """SIGKILL of the command with two workers; the resumed run ends with the same SHA-256."""
    words = ("--name", "killed", "--tasks", "14", "--workers", "2", "--at", "5,14")
    command = subprocess.Popen(
        [SUPSUP, "run", "permuted-digits", *words, *QUICK],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: blocks(tmp_path, "killed") >= 2)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    committed = blocks(tmp_path, "killed")
    assert 2 <= committed < 7
    done = supsup(tmp_path, "resume", "killed")
    assert f"{14 - 2 * committed} tasks trained now, 14 learned" in done.stdout
    assert sha256(tmp_path, "killed") == sha256(whole, "whole")


@pytest.mark.slow
def test_stopped_says_how_to_go_on(tmp_path):
    """Two runs side by side: Ctrl-C stops one, SIGTERM the other."""
    commands = {}
    for how in (signal.SIGINT, signal.SIGTERM):
        words = ("--name", how.name, "--tasks", "1000", "--workers", "1")
        commands[how] = subprocess.Popen(
            [SUPSUP, "run", "permuted-digits", *words, *QUICK],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that put the tests into the background made them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    for how, command in commands.items():
        wait_for(lambda name=how.name: blocks(tmp_path, name) >= 1)
        command.send_signal(how)
    for how, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        _, err = commands[how].communicate(timeout=60)
        assert commands[how].returncode == status
        assert f"go on with supsup resume {how.name}" in err
        assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is taken")
def test_a_bank_of_a_gpu_is_evaluated_on_the_cores(tmp_path, quick, digits, trained):
    values = {"train.device": "cuda", "train.engine": "fused", "train.precision": "bf16"}
    config = with_values(quick, values)
    (tmp_path / "runs").mkdir()
    folder = RunFolder(tmp_path / "runs", "gpu")
    Bank.create(folder.path, make_manifest(config, digits)).commit(trained)
    folder.write_launch(
        Launch(recipe="permuted-digits", config=config, data_dir="", tracking_uri=None)
    )
    done = supsup(tmp_path, "eval", "gpu", "--eval.methods=h-one-shot", "--workers=1", "--at=8")
    assert "8 tasks on 1 workers (cpu, fp32)" in done.stderr
    assert "8 learned" in done.stdout
    done = supsup(tmp_path, "resume", "gpu", status=2)
    assert "no GPU that torch can use; these masks are trained on GPUs" in done.stderr


@pytest.mark.slow
def test_more_tasks_train_the_others_alone_and_evaluation_trains_nothing(whole):
    """Continues the module's run; needs no name, for its fingerprint is known."""
    before = sha256(whole, "whole")
    done = supsup(whole, "run", "permuted-digits", "--tasks", "16", "--at", "5,14", *QUICK)
    assert "2 tasks trained now, 16 learned" in done.stdout
    assert sha256(whole, "whole") != before
    done = supsup(whole, "eval", "whole", "--objective", "g", "--batch", "10", "--at", "3,16")
    assert "trained now" not in done.stdout
    assert "G one-shot, 10 images" in done.stdout
    report = whole / "runs" / "whole" / "report"
    assert (report / "gnu-g-one-shot-b10-images20-depth1" / "accuracy.png").exists()
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{whole}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("supsup").experiment_id])
    assert run.data.metrics["gnu/task_accuracy/g-one-shot-b10"] > 0.9
    # The figures of the run stay those of its own evaluation, and its end is its training's.
    assert run.data.metrics["gnu/accuracy"] == run.data.metrics["gnu/accuracy/h-one-shot"]
    assert run.info.status == "FINISHED"
    records = (whole / "runs" / "whole" / "records.jsonl").read_text().splitlines()
    assert records.count('{"kind": "status", "status": "FINISHED"}') == 2
    assert run.data.tags["tasks"] == "16"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chunks", ["1", "2"])
def test_a_killed_open_set_run_loses_the_segment_in_hand_alone(tmp_path, chunks):
    """SIGKILL of the command and its workers; resumed, it ends with the undisturbed SHA-256."""
    words = (
        "run", "open-digits", "--tasks", "6", "--train.batches", "100", "--workers", "2",
        "--openset.decide-every", "20", "--openset.chunks", chunks,
    )  # fmt: skip
    whole = supsup(tmp_path, *words, "--name", "whole", "--seed", "3")
    masks = re.search(r"learned now, (\d+ masks for 6 tasks)", whole.stdout)[1]
    runs = tmp_path / "runs"
    command = subprocess.Popen(
        [SUPSUP, *words, "--seed", "3", "--name", "killed"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def steps() -> int:
        files = (runs / "killed" / "stream").rglob("steps.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in files)

    wait_for(lambda: steps() >= 9)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    committed = steps()
    assert 9 <= committed < 30
    done = supsup(tmp_path, "resume", "killed")
    assert f"{30 - committed} segments learned now, {masks}" in done.stdout
    assert sha256(tmp_path, "killed") == sha256(tmp_path, "whole")
    done = supsup(tmp_path, "eval", "killed", "--algorithm", "shortlist", "--objective", "h")
    assert "report/nns-h-shortlist-depth1/accuracy.png" in done.stdout
