"""MLflow's store on this machine is whole, whoever was stopped while making it."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import optuna
import pytest

from orchestrator.schema import half_made, make_whole
from orchestrator.surroundings import mlflow_store
from orchestrator.tracking import experiment_id, local_store

MAKE = """
import sys
from pathlib import Path
from orchestrator.tracking import experiment_id, local_store
print(experiment_id(local_store(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize(
    "left",
    [
        "",
        "create table alembic_version (version_num text)",
        "create table alembic_version (version_num text); insert into alembic_version values ('1');"
        "create table experiments (experiment_id integer); create table _alembic_tmp_jobs (a text)",
    ],
)
def test_a_store_that_was_left_half_made_is_moved_aside_and_made(tmp_path, left):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.executescript(left or "create table a (b text); drop table a")
    assert half_made(path)
    (finding,) = mlflow_store(None, tmp_path)
    assert finding.level == "ok"
    assert "half made" in finding.text
    assert experiment_id(local_store(tmp_path)) == experiment_id(local_store(tmp_path))
    assert not half_made(path)
    assert len(list(tmp_path.glob("mlflow.db.half-made-*"))) == 1


def test_a_store_with_something_in_it_and_what_is_none_are_left_alone(tmp_path):
    path = tmp_path / "mlflow.db"
    experiment_id(local_store(tmp_path))
    content = path.read_bytes()
    make_whole(local_store(tmp_path).uri)
    assert path.read_bytes() == content
    path.write_bytes(b"no database" * 100)
    make_whole(local_store(tmp_path).uri)
    assert path.read_bytes() == b"no database" * 100
    make_whole("http://127.0.0.1:5000")


def test_a_study_is_never_moved_aside(tmp_path):
    """Optuna's schema has a version of alembic's, too, and no experiments."""
    path = tmp_path / "mlflow.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    optuna.create_study(study_name="mine", storage=storage)
    storage.remove_session()
    storage.engine.dispose()
    assert not half_made(path)
    make_whole(f"sqlite:///{path}")
    assert path.exists()
    assert not list(tmp_path.glob("*half-made*"))


@pytest.mark.parametrize("rows", [0, 1])
def test_what_mlflow_left_is_half_made_until_it_has_experiments(tmp_path, rows):
    path = tmp_path / "mlflow.db"
    tables = "; ".join(f"create table {name} (id integer)" for name in ("experiments", "runs"))
    with closing(sqlite3.connect(path)) as database:
        database.executescript(f"{tables}; create table workspaces (name text)")
        database.execute("insert into workspaces values ('default')")
        database.executemany("insert into experiments values (?)", [(0,)] * rows)
        database.commit()
    assert half_made(path) == (not rows)


def test_two_first_commands_make_one_store_and_a_kill_none(tmp_path):
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "mlflow.db.making").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "mlflow.db").exists() or not half_made(tmp_path / "mlflow.db")
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert said[0] == said[1] == "1"
    assert sorted(path.name for path in tmp_path.glob("mlflow.db*")) == [
        "mlflow.db",
        "mlflow.db.lock",
    ]
