"""The page: the real server, asked over HTTP."""

import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from orchestrator import ui
from orchestrator.tracking import Tracker, local_store
from supsup.errors import RunFailed, UserError
from tests.test_run import SUPSUP, wait_for


def status(address: str, host: str | None = None) -> int:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"<html>" * 100), "file is not a database"),
        (lambda path: sqlite3.connect(path).execute("create table x (y)"), "move it away"),
    ],
)
def test_a_store_that_is_none_is_one_line(tmp_path, free_port, make, said):
    make(tmp_path / "mlflow.db")
    with pytest.raises(UserError, match=said):
        ui.serve(tmp_path, free_port)


@pytest.mark.parametrize(("program", "status"), [("false", 1), ("true", 0)])
def test_a_server_that_ends_by_itself_is_a_failure(
    tmp_path, free_port, monkeypatch, program, status
):
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(ui, "experiment_id", lambda _: "1")
    monkeypatch.setattr(sys, "executable", shutil.which(program))
    with pytest.raises(RunFailed, match=f"the MLflow server ended with status {status};"):
        ui.serve(tmp_path, free_port)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_printed_address_opens_the_curves_and_no_other_host_does(
    tmp_path: Path, free_port, how
):
    tracker = Tracker(tmp_path, local_store(tmp_path), "run", "identity")
    tracker.metrics({"gg/accuracy": 0.9}, step=10)
    assert tracker.close("FINISHED")
    command = [SUPSUP, "ui", "--runs-dir", str(tmp_path), "--port", str(free_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            page = re.search(r"http://127\.0\.0\.1:\d+/#/experiments/(\d+)/runs\?\S+", line)
            assert page, line
            root = f"http://127.0.0.1:{free_port}"
            wait_for(lambda: status(root) == 200, 60)
            api = f"{root}/api/2.0/mlflow/experiments/get?experiment_id={page[1]}"
            with urllib.request.urlopen(api, timeout=5) as answer:
                assert b'"supsup"' in answer.read()
            assert status(root, host="elsewhere.example") == 403
        finally:
            server.send_signal(how)
    assert server.returncode == 128 + how
    wait_for(lambda: status(root) == 0, 10)
