"""What the doctor finds: each check on its own, then the command on this machine."""

import dataclasses
import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator import doctor, reach, surroundings
from orchestrator.finding import Finding, works
from orchestrator.probe import Clustered, Node
from supsup.datasets import load_dataset
from supsup.errors import UserError

HERE = Node(
    host="here",
    python="3.11.7",
    versions={"ray": "2.60.0", "torch": "2.15.0", "supsup": "0.1.0"},
    cores=8,
    device="cpu",
    gpus=[],
    driver="",
    native_bf16=True,
    sparse=["bf16", "fp32"],
    fused=False,
    lookup=True,
    instructions=["avx2", "avx512_f"],
    compiler="/usr/bin/g++",
    warnings=[],
    data={"mnist": doctor.KNOWN["mnist"]},
)
CLUSTER = Clustered(address="h:1", resources={"CPU": 8.0}, elastic=False, nodes=[HERE])


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}


# --- versions, token, folders --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "level", "said"),
    [
        ({"ray": "2.60.0", "click": "8.2"}, "ok", "as in requirements.lock (2 packages)"),
        ({"ray": "2.60.0", "click": "8.3"}, "warn", "click 8.3 (locked ==8.2)"),
        ({"ray": "2.59.0", "click": "8.2"}, "fail", "must be ray==2.60.0"),
        ({"click": "8.2"}, "fail", "ray absent"),
    ],
)
def test_versions_are_compared_with_what_is_required_and_locked(installed, level, said):
    lock = ["ray==2.60.0 ; sys_platform == 'linux' \\", "    --hash=sha256:00", "click==8.2 \\",
            "win==1 ; sys_platform == 'win32'"]  # fmt: skip
    (found,) = surroundings.versions(lock, ["ray[default]==2.60.0", "x; extra == 'dev'"], installed)
    assert found.level == level
    assert said in found.text


def test_the_lock_file_is_read():
    lock = (Path(__file__).parents[1] / "requirements.lock").read_text().splitlines()
    (found,) = surroundings.versions(lock, [], {"ray": "0"})
    assert found.level == "warn"


@pytest.mark.parametrize(
    ("content", "mode", "level", "said"),
    [
        ("secret", 0o600, "ok", "mode 0600"),
        ("secret", 0o644, "warn", "chmod 600"),
        (" \n", 0o600, "fail", "is empty"),
        (None, 0o600, "fail", "ray get-auth-token --generate"),
    ],
)
def test_the_token_of_a_shared_cluster_must_be_there_and_private(
    tmp_path, content, mode, level, said
):
    path = tmp_path / ".ray" / "auth_token"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
        path.chmod(mode)
    for environ, home in (({}, tmp_path), ({"RAY_AUTH_TOKEN_PATH": str(path)}, Path("/none"))):
        found = surroundings.token(environ, home, shared=True)
        assert found.level == level
        assert said in found.text
        assert "secret" not in found.text
    assert surroundings.token({}, Path("/none"), shared=False).level == "ok"
    assert surroundings.token({"RAY_AUTH_MODE": "disabled"}, tmp_path, True).level == "warn"
    assert surroundings.token({"RAY_AUTH_TOKEN": "secret"}, Path("/none"), True).level == "ok"


def test_the_runs_folder_is_tried_and_left_as_it_was(tmp_path):
    (found,) = surroundings.runs_folder(tmp_path / "a" / "runs")
    assert found.level == "ok"
    assert "GB free" in found.text
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_is_said(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (found,) = surroundings.runs_folder(tmp_path)
    assert found.level == "fail"
    assert "hard-link" in found.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "level"), [(1e10, "ok"), (1e9, "warn"), (1e8, "fail")])
def test_free_space_is_weighed(tmp_path, monkeypatch, free, level):
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda _: Usage(free))
    assert surroundings.runs_folder(tmp_path)[0].level == level


@dataclasses.dataclass
class Usage:
    free: float


# --- MLflow --------------------------------------------------------------------------------------


def test_a_store_of_another_schema_or_none_at_all(tmp_path):
    assert surroundings.mlflow_store(None, tmp_path)[0].level == "ok"
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"<html>")
    assert surroundings.mlflow_store(None, tmp_path)[0].level == "fail"
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('older')")
        database.execute("create table experiments (experiment_id integer)")
        database.execute("insert into experiments values (0)")
    (found,) = surroundings.mlflow_store(None, tmp_path)
    assert found.level == "fail"
    assert "of another MLflow (older); back it up, then: mlflow db upgrade" in found.text
    assert surroundings.mlflow_store("ftp://x", tmp_path)[0].level == "fail"


@pytest.fixture
def server():
    """A server that answers with what it is told to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        answers: tuple[int, int] = (200, 403)

        def do_GET(self) -> None:
            foreign = self.headers["Host"] == surroundings._FOREIGN_HOST
            self.send_response(self.answers[foreign])
            self.end_headers()
            self.wfile.write(surroundings.importlib.metadata.version("mlflow").encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running, Handler
        running.shutdown()


@pytest.mark.parametrize(
    ("answers", "expected", "said"),
    [
        ((200, 403), ["ok"], "version"),
        ((200, 200), ["ok", "warn"], "answers a foreign Host"),
        ((401, 401), ["fail"], "MLFLOW_TRACKING_PASSWORD"),
        ((404, 404), ["fail"], "is no MLflow"),
    ],
)
def test_an_mlflow_server_is_asked(server, tmp_path, answers, expected, said):
    running, handler = server
    handler.answers = answers
    found = surroundings.mlflow_store(f"http://127.0.0.1:{running.server_port}/", tmp_path)
    assert [finding.level for finding in found] == expected
    assert said in found[-1].text


def test_an_mlflow_server_that_is_away_stops_no_run(tmp_path, free_port):
    found = surroundings.mlflow_store(f"http://127.0.0.1:{free_port}", tmp_path)
    assert works(found)
    assert "Connection refused" in found[0].text


def test_an_empty_store_is_filled_by_the_first_run(tmp_path):
    (tmp_path / "mlflow.db").touch()
    (found,) = surroundings.mlflow_store(None, tmp_path)
    assert found.level == "ok"
    assert "the next run makes it anew" in found.text


def test_what_speaks_no_http_is_one_finding_with_its_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=greet, args=(listening,), daemon=True).start()
        other = f"http://127.0.0.1:{listening.getsockname()[1]}"
        (found,) = surroundings.mlflow_store(other, tmp_path)
    assert "mend --tracking-uri" in found.text
    (found,) = surroundings.mlflow_store("http://localhost:abc", tmp_path)
    assert "must be http://HOST:PORT" in found.text


def greet(listening: socket.socket) -> None:
    """Answer as a server that waits for no request."""
    connection, _ = listening.accept()
    with connection:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        connection.recv(1000)


# --- ports ---------------------------------------------------------------------------------------


def test_ports_are_told_apart_by_who_can_reach_them():
    loopback, network = surroundings.ports(
        [
            ("gcs_server --x", "::", 6379),
            ("python -m mlflow server", "127.0.0.1", 5000),
            ("postgres", "::ffff:127.0.0.1", 5432),
            ("python ray/dashboard/dashboard.py", "0.0.0.0", 8265),
            ("sshd", "0.0.0.0", 22),
        ]
    )
    assert loopback.text == "this machine alone: MLflow 5000, PostgreSQL 5432"
    assert loopback.level == "ok"
    assert "open to the network: Ray's dashboard 8265, Ray's head 6379" in network.text
    assert network.level == "warn"
    assert surroundings.ports([])[0].level == "ok"


# --- machines and clusters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what", "level", "said"),
    [
        ({}, "engine", "ok", "sparse, bf16"),
        ({"native_bf16": False}, "engine", "ok", "sparse, fp32"),
        ({"sparse": []}, "engine", "ok", "dense, bf16"),
        (
            {"device": "cuda", "gpus": ["H100"] * 2, "driver": "9"},
            "GPU",
            "ok",
            "2 x H100, driver 9",
        ),
        ({"driver": "9"}, "GPU", "warn", "update the driver"),
        ({"compiler": ""}, "compiler", "warn", "install g++"),
        ({"lookup": False, "warnings": ["can't be compiled"]}, "compiler", "warn", "compiled"),
    ],
)
def test_what_a_machine_is(change, what, level, said):
    found = {x.what: x for x in doctor.machine(dataclasses.replace(HERE, **change))}
    assert found[what].level == level
    assert said in found[what].text


@pytest.mark.parametrize(
    ("content", "required", "level"),
    [
        (doctor.KNOWN["mnist"], None, "ok"),
        ("absent", None, "ok"),
        ("absent", "mnist", "fail"),
        ("0" * 64, None, "fail"),
        ("incomplete: no labels", None, "warn"),
        ("incomplete: no labels", "mnist", "fail"),
        ("mnist can't be loaded", None, "fail"),
    ],
)
def test_data_must_be_what_was_published(content, required, level):
    node = dataclasses.replace(HERE, data={"mnist": content})
    assert doctor.data(node, required)[0].level == level


@pytest.mark.parametrize("name", ["digits", "digits-16"])
def test_the_published_data_is_what_loads(name, tmp_path):
    assert load_dataset(name, tmp_path).sha256 == doctor.KNOWN[name]


@pytest.mark.parametrize(
    ("change", "good", "said"),
    [
        ({}, True, "1 nodes, 8 cores, 0 GPUs"),
        ({"resources": {}}, False, "no node takes workers"),
        ({"resources": {}, "elastic": True}, True, "--workers N"),
        ({"problems": ["10.0.0.1: no answer"]}, False, "10.0.0.1: no answer"),
    ],
)
def test_what_a_cluster_offers(change, good, said):
    found = doctor.clustered(dataclasses.replace(CLUSTER, **change), HERE)
    assert works(found) == good
    assert any(said in finding.text for finding in found)


@pytest.mark.parametrize(
    ("change", "good", "said"),
    [
        ({}, True, "same versions"),
        ({"python": "3.12.0"}, False, "python 3.12.0, here 3.11.7"),
        ({"data": {"mnist": "0" * 64}}, False, "has another mnist"),
        ({"data": {"mnist": "absent"}}, True, "the command sends it mnist"),
        ({"native_bf16": False}, True, "of several kinds"),
    ],
)
def test_nodes_are_compared_with_this_machine(change, good, said):
    other = dataclasses.replace(HERE, host="there", **change)
    found = doctor.clustered(dataclasses.replace(CLUSTER, nodes=[HERE, other]), HERE)
    assert works(found) == good
    assert any(said in finding.text for finding in found)


@pytest.mark.parametrize(
    "address", ["", "x", ":1", "a:0", "a:65536", "ray://h:1", "a b:1", "a\nb:1", "x" * 600]
)
def test_an_address_that_is_none_is_said_at_once(address):
    with pytest.raises(UserError, match="must be auto or HOST:PORT"):
        reach.check_reachable(address)


def test_a_port_where_no_ray_listens_is_said(server):
    # In a process of its own: Ray remembers the first token that it sees. The address is kept as it
    # is, where Ray makes the node's own of loopback.
    code = (
        "from orchestrator import reach; from supsup.errors import UserError\n"
        "reach._resolved = lambda address: address\n"
        f"try: reach.check_reachable('127.0.0.1:{server[0].server_port}')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_AUTH_TOKEN": "a" * 64},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("no Ray cluster at")


# --- storage, and the command --------------------------------------------------------------------


def test_a_storage_is_looked_at_and_never_made(tmp_path):
    from optuna.storages import RDBStorage

    from sweeps.doctor import storage

    path = tmp_path / "study.db"
    url = f"sqlite:///{path}"
    assert storage(None)[0].level == "ok"
    assert storage(url)[0].text.endswith("the first sweep makes it")
    assert not path.exists()
    RDBStorage(url)
    assert storage(url)[0].text.endswith("schema of this version")
    with sqlite3.connect(path) as database:
        database.execute("update alembic_version set version_num = 'v0'")
    assert storage(url)[0].level == "fail"
    path.write_bytes(b"SQLite but not really")
    assert storage(url)[0].level == "fail"
    found = storage("postgresql://me:s3cret@127.0.0.1:1/db")[0]
    assert found.level == "fail"
    assert "s3cret" not in found.text


@pytest.mark.slow
def test_the_command_says_whether_a_run_would_work(tmp_path):
    command = [str(Path(sys.executable).with_name("supsup")), "doctor", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    engine" in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run(
        [*command, "--dataset", "mnist", "--address", "127.0.0.1:1", "--tracking-uri", "x"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    for said in ("data: mnist", "no Ray cluster at '127.0.0.1:1'", "the tracking URI must be"):
        assert said in done.stdout
    assert "Traceback" not in done.stderr
