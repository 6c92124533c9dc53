"""A sweep whose PostgreSQL restarts, and whose MLflow goes away, while its trials run."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.chaos import SUPSUP, MlflowServer, wait_until
from tests.test_sweep_cli import GRID, tasks_on_disk

NOBODY = 65534


class Postgres:
    """A private instance on loopback; as nobody where the tests are root's."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        folder.chmod(0o755)
        self._as = {}
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
            self._as = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        self._do("initdb", "-D", str(folder / "data"), "-U", "me", "--auth=trust", "-N")
        self.url = f"postgresql://me@127.0.0.1:{port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        log = str(self.folder / "log")
        self._do("pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        """Stop at once: every connection breaks, and the next start recovers."""
        self._do("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")

    def _do(self, name: str, *words: str) -> None:
        program = shutil.which(name)
        subprocess.run(
            [program, *words], check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self._as
        )


@pytest.fixture
def postgres(free_port):
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("there is no PostgreSQL here")
    folder = Path(tempfile.mkdtemp(prefix="supsup-postgres-"))
    server = Postgres(folder, free_port)
    server.start()
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop()
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_restart_of_postgresql_stops_no_sweep(postgres, tmp_path, figures):
    from optuna import load_study
    from optuna.storages import RDBStorage
    from optuna.trial import TrialState

    (tmp_path / "grid.toml").write_text(GRID)
    log = (tmp_path / "log").open("w+")
    words = ["sweep", "run", "grid.toml", "--storage", postgres.url]
    command = subprocess.Popen([SUPSUP, *words], cwd=tmp_path, stdout=log, stderr=log)
    restarts = 0
    try:
        for tasks in (4, 10):
            wait_until(
                lambda n=tasks: tasks_on_disk(tmp_path) >= n or command.poll() is not None, 900
            )
            assert command.poll() is None, (tmp_path / "log").read_text()
            postgres.stop()
            wait_until(lambda: "database is away" in (tmp_path / "log").read_text(), 300)
            postgres.start()
            restarts += 1
        assert command.wait(1200) == 0, (tmp_path / "log").read_text()
    finally:
        command.kill()
        command.wait()
        log.close()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert "8 done; 32 tasks trained now" in said
    storage = RDBStorage(postgres.url)
    study = load_study(study_name=None, storage=storage)
    states = [trial.state for trial in study.get_trials()]
    storage.remove_session()
    storage.engine.dispose()
    assert states == [TrialState.COMPLETE] * 8
    figures(f"{restarts} immediate restarts of PostgreSQL: 8 of 8 trials done, 0 lost, 0 RUNNING")


def children(uri: str) -> dict[str, tuple[str, dict[tuple[str, int], int]]]:
    """Return every trial's status, and how many points each key and step has, by its run's name."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    found = {}
    for run in client.search_runs(experiments):
        if "mlflow.parentRunId" in run.data.tags:
            points: dict[tuple[str, int], int] = {}
            for key in run.data.metrics:
                for point in client.get_metric_history(run.info.run_id, key):
                    points[key, point.step] = points.get((key, point.step), 0) + 1
            assert run.info.run_name not in found
            found[run.info.run_name] = run.info.status, points
    return found


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_restart_of_mlflow_loses_and_doubles_nothing(tmp_path, free_port, figures):
    (tmp_path / "grid.toml").write_text(GRID)
    server = MlflowServer(tmp_path / "mlflow", free_port)
    server.start()
    log = (tmp_path / "log").open("w+")
    words = ["sweep", "run", "grid.toml", "--tracking-uri", server.uri]
    command = subprocess.Popen([SUPSUP, *words], cwd=tmp_path, stdout=log, stderr=log)
    try:
        for down, up in ((4, 8), (14, 20)):
            wait_until(
                lambda n=down: tasks_on_disk(tmp_path) >= n or command.poll() is not None, 900
            )
            server.stop()
            wait_until(lambda n=up: tasks_on_disk(tmp_path) >= n or command.poll() is not None, 900)
            assert command.poll() is None, (tmp_path / "log").read_text()
            server.start()
        assert command.wait(1200) == 0, (tmp_path / "log").read_text()
        synced = subprocess.run([SUPSUP, "sync"], cwd=tmp_path, capture_output=True, check=False)
        assert synced.returncode == 0, synced.stderr
        told = children(server.uri)
    finally:
        command.kill()
        command.wait()
        log.close()
        server.stop()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert "8 done; 32 tasks trained now" in said
    assert len(told) == 8
    for status, points in told.values():
        assert status == "FINISHED"
        assert {step for key, step in points if key == "gnu/accuracy"} == {4, 8}
        assert set(points.values()) == {1}
    total = sum(len(points) for _, points in told.values())
    figures(
        f"MLflow killed and started twice in mid-sweep: 8 of 8 trials FINISHED, {total} metric "
        "points, 0 missing, 0 double"
    )
