"""Tracking against a real SQLite store and a real MLflow server."""

import os
import subprocess
import sys
import time
import urllib.request

import pytest

from orchestrator import tracking
from orchestrator.outbox import Outbox
from orchestrator.tracking import (
    EXPERIMENT,
    IDENTITY_TAG,
    MlflowSink,
    Tracker,
    local_store,
    store_for,
)
from supsup.errors import ConfigError


def runs_in(store):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=store.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "one"
    (path / "report").mkdir(parents=True)
    return path


def record_all(folder, store):
    tracker = Tracker(folder, store, "one", "identity-1")
    tracker.begin({"seed": 0}, {"device": "cpu"})
    tracker.metrics({"gg/accuracy": 0.9}, 10)
    tracker.metrics({"gg/accuracy": 0.8}, 25)
    (folder / "report" / "accuracy.csv").write_text("a,b\n")
    tracker.artifact(folder / "report" / "accuracy.csv")
    return tracker


def check_all(client, run):
    assert run.info.run_name == "one"
    assert run.data.params == {"seed": "0"}
    assert run.data.tags["device"] == "cpu"
    assert run.data.tags[IDENTITY_TAG] == "identity-1"
    history = client.get_metric_history(run.info.run_id, "gg/accuracy")
    assert [(m.step, m.value) for m in history] == [(10, 0.9), (25, 0.8)]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["accuracy.csv"]


def test_everything_arrives_in_the_local_store(folder):
    store = local_store(folder.parent)
    assert record_all(folder, store).close("FINISHED")
    client, (run,) = runs_in(store)
    check_all(client, run)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith((folder.parent / "mlflow-artifacts").as_uri())


def test_a_resumed_run_continues_its_mlflow_run_and_doubles_nothing(folder):
    store = local_store(folder.parent)
    assert record_all(folder, store).close("KILLED")
    # Killed before it could note what it had delivered: everything is delivered again.
    (folder / "records-delivered.json").unlink()
    tracker = Tracker(folder, store, "one", "identity-1")
    tracker.begin({"seed": 0}, {"device": "cpu"})
    # The checkpoints are told again by every command of the run.
    tracker.metrics({"gg/accuracy": 0.8}, 25)
    assert tracker.close("FINISHED")
    client, (run,) = runs_in(store)
    check_all(client, run)
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MLflow can't be reached")
def test_a_server_that_comes_late_gets_everything_once(folder, tmp_path, monkeypatch, free_port):
    monkeypatch.setattr(tracking, "_SERVER_SECONDS", 30.0)
    store = store_for(f"http://127.0.0.1:{free_port}", folder.parent)
    tracker = record_all(folder, store)
    assert not tracker.close("FINISHED")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(free_port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/server.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = subprocess.Popen(
        [*command, "--artifacts-destination", str(tmp_path / "artifacts")], env=environment
    )
    try:
        wait_for(f"http://127.0.0.1:{free_port}/health")
        again = Tracker(folder, store, "one", "identity-1")
        assert again.close("FINISHED")
        client, (run,) = runs_in(store)
        check_all(client, run)
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} didn't come up")


class BlackHole:
    """A sink of a server that takes connections and never answers."""

    def __init__(self, *_args):
        pass

    def apply(self, record, folder):
        time.sleep(60)


def test_the_end_of_a_command_does_not_wait_long_for_a_silent_server(folder, monkeypatch):
    monkeypatch.setattr(tracking, "_SERVER_SECONDS", 0.6)
    monkeypatch.setattr(tracking, "_SAY_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "MlflowSink", BlackHole)
    said = []
    store = store_for("http://127.0.0.1:1", folder.parent)
    tracker = Tracker(folder, store, "one", "identity-1", said.append)
    tracker.begin({}, {})
    started = time.monotonic()
    assert not tracker.close("FINISHED")
    assert time.monotonic() - started < 5
    assert said == ["waiting for MLflow, until nothing gets through for 1 s"]
    assert len(Outbox(folder).pending()) == 4


def test_a_slow_server_is_waited_for_as_long_as_records_get_through(folder, monkeypatch):
    class Slow(BlackHole):
        def apply(self, record, folder):
            time.sleep(0.2)

    monkeypatch.setattr(tracking, "_SERVER_SECONDS", 0.8)
    monkeypatch.setattr(tracking, "MlflowSink", Slow)
    tracker = Tracker(folder, store_for("http://127.0.0.1:1", folder.parent), "one", "identity-1")
    for step in range(8):
        tracker.metrics({"a": 1.0}, step)
    assert tracker.close("FINISHED")


@pytest.mark.slow
def test_what_mlflow_will_never_take_keeps_nothing_else_from_it(folder):
    store = local_store(folder.parent)
    tracker = record_all(folder, store)
    assert tracker.close("KILLED")
    again = Tracker(folder, store, "one", "identity-1")
    again._outbox.append("params", values={"seed": "1"})
    again._outbox.append("tags", values={"device": "gpu"})
    with pytest.warns(UserWarning, match=r"\(params\) of one is left out, .*MLflow refuses it"):
        delivered = again.close("FINISHED")
    assert delivered
    _, (run,) = runs_in(store)
    assert run.data.params == {"seed": "0"}
    assert run.data.tags["device"] == "gpu"


class Client:
    """What MLflow is asked to do."""

    def __init__(self):
        self.sent = []

    def log_artifact(self, run_id, path):
        self.sent.append(path)

    def update_run(self, run_id, status):
        self.sent.append(status)


@pytest.fixture
def sink(tmp_path):
    made = MlflowSink(local_store(tmp_path), "one", "identity-1")
    made._client = Client()
    return made


def test_no_file_from_outside_a_folder_is_sent(sink, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "own.png").touch()
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret", str(tmp_path / "secret"), "link"):
        with pytest.warns(UserWarning, match="its file is outside the folder"):
            sink.apply({"kind": "artifact", "path": path}, folder)
    sink.apply({"kind": "artifact", "path": "own.png"}, folder)
    assert sink._client.sent == [str(folder / "own.png")]


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "connect"},
        {"kind": "leave_out"},
        {"kind": "later"},
        {"kind": "metrics", "values": [1], "timestamp": 1, "step": 1},
        {"kind": "artifact"},
    ],
)
def test_a_record_that_no_version_writes_blocks_none_behind_it(sink, tmp_path, record):
    with pytest.warns(UserWarning, match="it isn't one that this version writes"):
        sink.apply(record, tmp_path)
    sink.apply({"kind": "status", "status": "RUNNING"}, tmp_path)
    assert sink._client.sent == ["RUNNING"]


def test_a_password_is_refused_wherever_the_uri_comes_from(tmp_path):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        store_for("http://me:s3cr3t@host:5000", tmp_path)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "mlruns",
        "file:///tmp/x",
        "ftp://host",
        "http://",
        "postgres:5432",
        "http://localhost:abc",
        "http://localhost:99999",
        "http://:5000",
        "sqlite:///relative.db",
        "sqlite:////no/such/folder/mlflow.db",
    ],
)
def test_a_bad_tracking_uri_is_one_clear_line(tmp_path, uri):
    with pytest.raises(ConfigError, match="tracking URI"):
        store_for(uri, tmp_path)


def test_a_file_that_is_no_database(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("hello, I am no database at all, and long enough to have a header" * 20)
    with pytest.raises(ConfigError, match="is no SQLite database"):
        store_for(f"sqlite:////{file}", tmp_path)


def test_passwords_are_not_shown(tmp_path):
    with pytest.raises(ConfigError) as caught:
        store_for("postgresql://me:s3cret@host/db", tmp_path)
    assert "s3cret" not in str(caught.value)


def test_the_local_store_is_beside_the_runs_whatever_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = store_for(None, (tmp_path / "runs").relative_to(tmp_path))
    assert store.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert store.artifacts == tmp_path / "runs" / "mlflow-artifacts"
