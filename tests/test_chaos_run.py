"""A real run under real faults: its processes are killed and stopped, its tracking is away."""

import random
import re

import pytest

from benchmarks.faults import Command, disturb, drawn, kill_head
from supsup.bank import Bank
from tests.chaos import MlflowServer, wait_until

QUICK = (
    "permuted-digits", "--tasks", "16", "--block-size", "2", "--workers", "2", "--at", "8,16",
    "--train.batches", "400", "--model.output-size", "30", "--eval.images", "20",
    "--train.precision", "fp32", "--train.device", "cpu",
)  # fmt: skip


def points(uri: str, name: str) -> tuple[str, dict[tuple[str, int], int]]:
    """Return the status of the one MLflow run, and how many points each key and step has."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("supsup").experiment_id
    (run,) = [run for run in client.search_runs([experiment]) if run.info.run_name == name]
    count: dict[tuple[str, int], int] = {}
    for key in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, key):
            count[key, point.step] = count.get((key, point.step), 0) + 1
    return run.info.status, count


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder / "runs", "whole", QUICK, folder / "log")
    assert command.wait(1000) == 0, command.said()
    return command


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_random_faults_leave_the_bank_equal(tmp_path, figures):
    words = ["3000" if word == "400" else word for word in QUICK]
    whole = Command(tmp_path / "runs", "whole", words, tmp_path / "whole-log")
    assert whole.wait(1000) == 0, whole.said()
    draw = random.Random(1)
    command = Command(tmp_path / "runs", "disturbed", words, tmp_path / "log")
    record = disturb(command, drawn(10, draw), draw, total=8, seconds=2200)
    assert record.faults.total() >= 5
    assert command.bank_sha256() == whole.bank_sha256()
    assert command.lost() == []
    assert "Traceback" not in command.said()
    status, count = points(f"sqlite:///{tmp_path}/runs/mlflow.db", "disturbed")
    _, expected = points(f"sqlite:///{tmp_path}/runs/mlflow.db", "whole")
    assert status == "FINISHED"
    # How fast a command trained is its own affair; one that only evaluates can't tell.
    assert {k for k in expected if not k[0].startswith("train/")} <= set(count) <= set(expected)
    assert set(count.values()) == {1}
    figures(
        f"{dict(record.faults)}: {command.tried_again()} jobs tried again, {record.commands} "
        f"commands, {record.seconds:.0f} s; recovery "
        + ", ".join(f"{k} {max(v):.1f} s" for k, v in record.recovery.items())
        + "; 0 blocks lost, 0 metric points missing or double, bank equal"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_head_that_is_gone_is_one_line_with_the_way_on(whole, tmp_path, figures):
    words = [{"16": "4000", "8,16": "4000"}.get(word, word) for word in QUICK]
    command = Command(tmp_path / "runs", "headless", words, tmp_path / "log")
    wait_until(lambda: command.blocks() >= 2, 900)
    assert kill_head(command, random.Random(0))
    assert command.wait(200) == 1
    said = command.said()
    found = re.search(r"^supsup: (the head of the Ray cluster is gone for (\d+) s.*)$", said, re.M)
    assert found, said
    assert "what is finished is safe, go on with supsup resume headless" in found[1]
    assert "Traceback" not in said
    assert "may have been killed" not in said
    before = command.blocks()
    command.resume()
    wait_until(lambda: command.blocks() > before, 600)
    command.kill()
    assert command.lost() == []
    equal = Bank.open(command.runs_dir / "headless").sha256(4)
    assert equal == Bank.open(whole.runs_dir / "whole").sha256(4)
    figures(f"head killed: noticed in {found[2]} s; {before} blocks then, 0 lost, and it goes on")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_server_that_comes_and_goes_gets_everything_once(tmp_path, free_port, figures):
    """Up at the beginning, killed in mid-run, away at the end; then `supsup sync`."""
    from click.testing import CliRunner

    from sweeps.cli import cli

    server = MlflowServer(tmp_path / "mlflow", free_port)
    server.start()
    try:
        words = (*QUICK, "--tracking-uri", server.uri)
        command = Command(tmp_path / "runs", "tracked", words, tmp_path / "log")
        wait_until(lambda: command.blocks() >= 2, 900)
        server.stop()
        assert command.wait(1000) == 0, command.said()
        assert "delivered by: supsup sync tracked" in command.said()
        away = CliRunner().invoke(cli, ["sync", "--runs-dir", str(tmp_path / "runs")])
        assert "records are left and kept" in str(away.exception)
        server.start()
        synced = CliRunner().invoke(cli, ["sync", "--runs-dir", str(tmp_path / "runs")])
        assert synced.exit_code == 0
        status, count = points(server.uri, "tracked")
    finally:
        server.stop()
    assert status == "FINISHED"
    assert {step for _, step in count} == {8, 16}
    assert set(count.values()) == {1}
    figures(f"MLflow killed in mid-run: {len(count)} metric points, 0 missing, 0 double")
