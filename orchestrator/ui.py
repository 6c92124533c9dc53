"""The MLflow page on the store of a runs folder."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click

from orchestrator.surroundings import mlflow_store
from orchestrator.tracking import experiment_id, local_store
from supsup.errors import RunFailed, UserError

#: Charts of training runs side by side; without it the page opens for language models.
_VIEW = "workflowType=machine_learning&compareRunsMode=CHART"


def serve(runs_dir: Path, port: int) -> None:
    """Serve the page on loopback until interrupted.

    Raises:
        UserError: if there is nothing to show, or the port is taken.
        RunFailed: if the server ends by itself.
    """
    if not (runs_dir / "mlflow.db").exists():
        raise UserError(f"{runs_dir} has no MLflow store yet; start one with supsup run")
    for finding in mlflow_store(None, runs_dir):
        if finding.level == "fail":
            raise UserError(finding.text)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; choose another --port") from None
    store = local_store(runs_dir)
    environment = os.environ | {
        # Not on the command line, where every user of the machine could read it.
        "MLFLOW_BACKEND_STORE_URI": store.uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    names = ("localhost", "127.0.0.1")
    hosts = ",".join([*names, *(f"{name}:{port}" for name in names)])
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--allowed-hosts": hosts,
        "--workers": "1",
        "--default-artifact-root": str(store.artifacts),
    }
    words = [word for option in options.items() for word in option]
    page = f"http://127.0.0.1:{port}/#/experiments/{experiment_id(store)}/runs?{_VIEW}"
    click.echo(f"the curves of all runs: {page} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", *words]
    # A session of its own: the server's children end with it, whoever ends this process.
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        try:
            ended = server.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
    raise RunFailed(f"the MLflow server ended with status {ended}; what it said is above")
