"""What is left is delivered later: `supsup sync`, over runs and sweeps, with and without MLflow."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from orchestrator import sync as syncing
from orchestrator.outbox import ELSEWHERE, Address, Outbox
from orchestrator.sync import sync
from orchestrator.tracking import EXPERIMENT
from supsup.bank import locked
from supsup.errors import RunFailed, UserError


class Store:
    """What a server got; those of some addresses are away, or dislike a record."""

    def __init__(self, monkeypatch, away=(), picky=()):
        self.got, self.away, self.picky, self.tries = {}, away, picky, 0
        monkeypatch.setattr(syncing, "_sink", self.sink)
        monkeypatch.setattr(syncing, "_answers", lambda store: store.uri not in self.away)

    def sink(self, store, address):
        outer = self

        class Sink:
            def apply(self, record, folder):
                outer.tries += 1
                if store.uri in outer.away or address.name in outer.picky:
                    raise ConnectionError("refused")
                outer.got.setdefault(address.name, []).append(record)

        return Sink()


def fill(folder, name, *statuses, uri=None, parent=None):
    folder.mkdir(parents=True)
    outbox = Outbox(folder)
    outbox.send_to(Address(name=name, identity=f"id-{name}", tracking_uri=uri, parent=parent))
    for status in statuses:
        outbox.append("status", status=status)
    return outbox


def statuses(store, name):
    return [record["status"] for record in store.got[name]]


def test_what_is_left_of_runs_and_sweeps_arrives_once(tmp_path, monkeypatch):
    store = Store(monkeypatch)
    fill(tmp_path / "one", "one", "RUNNING", "FINISHED")
    fill(tmp_path / "two", "two", "RUNNING")
    fill(tmp_path / "sweeps" / "s", "s", "RUNNING")
    trial = tmp_path / "sweeps" / "s" / "trials" / "0000"
    fill(trial, "s-0000", "RUNNING", "FINISHED", parent=("s", "id-s"))
    said = [str(found) for found in sync(tmp_path, ())]
    assert said == [
        "one: 2 records delivered",
        "two: 2 records delivered, 1 left RUNNING by a kill, now KILLED",
        "sweep s: 4 records delivered, 1 left RUNNING by a kill, now KILLED",
    ]
    assert statuses(store, "one") == statuses(store, "s-0000") == ["RUNNING", "FINISHED"]
    assert statuses(store, "two") == statuses(store, "s") == ["RUNNING", "KILLED"]
    assert list(sync(tmp_path, ())) == []
    assert store.tries == 8


def test_only_what_is_named_is_delivered(tmp_path, monkeypatch):
    store = Store(monkeypatch)
    for name in ("one", "two"):
        fill(tmp_path / name, name, "FINISHED")
    assert [found.name for found in sync(tmp_path, ["two"])] == ["two"]
    assert [found.name for found in sync(tmp_path, ["two", "all"])] == ["one"]
    assert set(store.got) == {"one", "two"}
    for name, said in (("three", "there is no run or sweep three"), ("../x", "must be 1 to 64")):
        with pytest.raises(UserError, match=said):
            list(sync(tmp_path, [name]))
    with pytest.raises(UserError, match="no runs folder"):
        list(sync(tmp_path / "elsewhere", ()))
    with pytest.raises(UserError, match="the tracking URI must be"):
        list(sync(tmp_path, (), "ftp://x"))


def test_a_server_that_is_away_is_asked_once_and_nothing_is_lost(tmp_path, monkeypatch):
    store = Store(monkeypatch, away=("http://away:1",))
    for name in ("a", "b", "c"):
        fill(tmp_path / name, name, "RUNNING", uri="http://away:1" if name < "c" else None)
    with pytest.raises(RunFailed, match=r"4 records are left and kept: MLflow at http://away:1"):
        list(sync(tmp_path, ()))
    assert store.tries == 1 + 2
    assert set(store.got) == {"c"}
    store.away = ()
    assert [found.delivered for found in sync(tmp_path, ())] == [2, 2]
    assert statuses(store, "a") == ["RUNNING", "KILLED"]


def test_a_run_that_its_server_dislikes_hides_no_other(tmp_path, monkeypatch):
    store = Store(monkeypatch, picky=("a",))
    for name in ("a", "b"):
        fill(tmp_path / name, name, "FINISHED")
    found = []
    with pytest.raises(RunFailed, match="1 records are left"):
        found.extend(sync(tmp_path, ()))
    assert set(store.got) == {"b"}


def test_a_run_at_work_is_left_alone(tmp_path, monkeypatch):
    store = Store(monkeypatch)
    fill(tmp_path / "one", "one", "RUNNING")
    with locked(tmp_path / "one"):
        (found,) = sync(tmp_path, ())
    assert f"is in use by process {os.getpid()}" in str(found)
    assert store.tries == found.left == found.put_right == 0
    assert Outbox(tmp_path / "one").last_status() == "RUNNING"


def test_a_run_that_ends_between_two_looks_keeps_its_last_records(tmp_path, monkeypatch):
    """Its command appends, and lets go of the lock, after sync has looked and before it locks."""
    store = Store(monkeypatch)
    own = fill(tmp_path / "one", "one", "RUNNING")

    @contextlib.contextmanager
    def late(folder):
        own.append("status", status="FINISHED")
        with locked(folder):
            yield

    monkeypatch.setattr(syncing, "locked", late)
    (found,) = sync(tmp_path, ())
    assert (found.put_right, found.left) == (0, 0)
    assert statuses(store, "one") == ["RUNNING", "FINISHED"]
    assert Outbox(tmp_path / "one").last_status() == "FINISHED"


@pytest.mark.slow
def test_a_run_killed_in_the_middle_is_put_right_in_mlflow(tmp_path):
    """The real thing, on SQLite: SIGKILL between a delivered RUNNING and the end."""
    code = """
import sys, time
from pathlib import Path
from orchestrator.tracking import Tracker, local_store
from supsup.bank import locked
folder = Path(sys.argv[1])
with locked(folder):
    tracker = Tracker(folder, local_store(folder.parent), "one", "identity-1")
    tracker.begin({"seed": 0}, {})
    while tracker._outbox.pending():
        time.sleep(0.05)
    tracker.metrics({"gg/accuracy": 0.9}, 10)
    print("ready", flush=True)
    time.sleep(600)
"""
    import mlflow

    folder = tmp_path / "one"
    folder.mkdir()
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == b"ready\n"
        (found,) = sync(tmp_path, ())
        assert "left to its own command" in str(found)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "RUNNING"
    (found,) = sync(tmp_path, ("one",))
    assert found.put_right == 1
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    history = client.get_metric_history(run.info.run_id, "gg/accuracy")
    assert [(point.step, point.value) for point in history] == [(10, 0.9)]


@pytest.mark.parametrize("order", [("mine", "other"), ("other", "mine")])
def test_a_run_that_another_driver_ends_is_left_as_it_is(tmp_path, order):
    """Two drivers of a sweep have an outbox each for the same MLflow run."""
    import mlflow

    for name, end in (("other", "FINISHED"), ("mine", ELSEWHERE)):
        (tmp_path / name).mkdir()
        outbox = Outbox(tmp_path / name)
        outbox.send_to(Address(name="trial", identity="id-trial", tracking_uri=None))
        outbox.append("status", status="RUNNING")
        outbox.append("tags", values={f"of {name}": "yes"})
        outbox.append("status", status=end)
    for name in order:
        list(sync(tmp_path, (name,)))
    assert list(sync(tmp_path, ())) == []
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert {"of mine", "of other"} <= set(run.data.tags)
