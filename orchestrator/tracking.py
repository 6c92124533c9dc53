"""MLflow tracking behind a durable outbox: the run never waits for a server, and loses nothing.

Records are appended to the outbox in the run folder (orchestrator.outbox). A thread delivers them
to MLflow in order; a resumed run, or ``supsup sync``, delivers what is left.
"""

import os
import re
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.outbox import RECORDS, Address, Outbox, cannot_reach, deliver
from orchestrator.schema import make_whole
from supsup.errors import ConfigError, one_line, shown

EXPERIMENT = "supsup"
IDENTITY_TAG = "supsup.identity"
#: Opens the experiment in the page's view for training runs, not in the one for language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_RETRY_SECONDS = 20.0
#: Seconds without a delivered record after which a command's end waits no longer: for a server,
#: which may be away, and for a store on this machine, which may have to be made first.
_SERVER_SECONDS, _LOCAL_SECONDS = 20.0, 60.0
#: Seconds after which it is said that the end of a command waits.
_SAY_SECONDS = 5.0
#: No retries within a request: one that arrived without its answer would make a run twice.
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where MLflow keeps runs."""

    uri: str
    artifacts: Path | None
    """Folder of the artifacts of a local store; None leaves it to the server."""
    given: str | None = None
    """The tracking URI that names it; None: it is the store of the runs folder."""


def local_store(runs_dir: Path) -> Store:
    """Return the embedded store beside the runs: SQLite, by absolute path."""
    root = runs_dir.resolve()
    return Store(uri=f"sqlite:///{root / 'mlflow.db'}", artifacts=root / "mlflow-artifacts")


def store_for(tracking_uri: str | None, runs_dir: Path) -> Store:
    """Return the store that a tracking URI names; without one, the local store.

    Raises:
        ConfigError: if the URI is no ``http(s)://`` or ``sqlite:///`` address, or has a password.
    """
    if tracking_uri is None:
        return local_store(runs_dir)
    refuse_password(tracking_uri)
    scheme, colon, rest = tracking_uri.partition("://")
    known = bool(colon and rest.strip("/")) and scheme in ("http", "https", "sqlite")
    if not known or (scheme != "sqlite" and not _is_place(tracking_uri)):
        raise ConfigError(
            "the tracking URI must be http://HOST:PORT, https://HOST or sqlite:////PATH"
        )
    if scheme == "sqlite":
        path = Path(rest.removeprefix("/"))
        if not path.is_absolute():
            raise ConfigError("the tracking URI's path must be absolute: sqlite:////PATH")
        if not path.parent.is_dir():
            raise ConfigError(f"the tracking URI's folder {path.parent} doesn't exist; create it")
        _check_sqlite(path)
        artifacts = path.parent / "mlflow-artifacts"
        return Store(uri=tracking_uri, artifacts=artifacts, given=tracking_uri)
    return Store(uri=tracking_uri, artifacts=None, given=tracking_uri)


def refuse_password(tracking_uri: str) -> None:
    """Check that a tracking URI has no password.

    Raises:
        ConfigError: if it has one; says where to give it.
    """
    if re.search(r"://[^/]*:[^/]*@", tracking_uri):
        raise ConfigError(
            "the tracking URI has a password in it, which would be kept with the run; give it in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def _is_place(uri: str) -> bool:
    """Say whether an address has a host, and a port that is one if any."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _check_sqlite(path: Path) -> None:
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        connection.execute("select 1 from sqlite_master").fetchone()
        connection.close()
    except sqlite3.Error:
        raise ConfigError(f"the tracking URI's file {path} is no SQLite database") from None


def experiment_id(store: Store) -> str:
    """Return the id of this platform's experiment in a store, created at first."""
    import mlflow

    make_whole(store.uri)
    client = mlflow.MlflowClient(tracking_uri=store.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = store.artifacts.as_uri() if store.artifacts else None
    return str(client.create_experiment(EXPERIMENT, location, tags=_EXPERIMENT_TAGS))


#: What the records of each kind hold.
_SHAPES: Mapping[str, Mapping[str, type]] = {
    "status": {"status": str},
    "params": {"values": dict},
    "tags": {"values": dict},
    "metrics": {"values": dict, "timestamp": int, "step": int},
    "artifact": {"path": str},
}
#: Of any other kind: nothing is of this type.
_UNKNOWN: Mapping[str, type] = {"kind": type(None)}


class Tracker:
    """The one writer of a run's MLflow run. Warns; never stops the run."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        name: str,
        identity: str,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Start to deliver what the outbox holds.

        Args:
            folder: the run's folder.
            store: where MLflow keeps runs.
            name: the run's name, as it is shown.
            identity: finds this run's MLflow run again.
            note: told when the end of the run waits for MLflow.
        """
        self._folder, self._store, self._note = folder, store, note
        self._outbox = Outbox(folder)
        self._outbox.send_to(Address(name=name, identity=identity, tracking_uri=store.given))
        self._sink = MlflowSink(store, name, identity)
        self._wake = threading.Event()
        self._closing = False
        self._warned = False
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._deliver_all, name="tracking", daemon=True)
        self._thread.start()

    def begin(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record that the run goes on, with its parameters and tags."""
        self._outbox.extend(
            {"kind": "status", "status": "RUNNING"},
            {"kind": "params", "values": {key: str(value) for key, value in params.items()}},
            {"kind": "tags", "values": dict(tags)},
        )
        self._wake.set()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics; the step is the number of tasks learned."""
        self._outbox.metrics(values, step)
        self._wake.set()

    def artifact(self, path: Path) -> None:
        """Record that a file in the run's folder is to be shown."""
        self._outbox.append("artifact", path=str(path.relative_to(self._folder)))

    def close(self, status: str | None) -> bool:
        """Record the end, wait as long as records get through, and say whether all did.

        Args:
            status: what the MLflow run ends with; None: it has ended before.
        """
        if status is not None:
            self._outbox.append("status", status=status)
        self._closing, self._moved = True, time.monotonic()
        self._wake.set()
        wait_for(self._thread, self._store, lambda: self._moved, self._note)
        return not self._outbox.pending()

    def _moves(self) -> None:
        self._moved = time.monotonic()

    def _deliver_all(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            last = self._closing
            delivered = self._deliver()
            if last:
                return
            if not delivered:
                self._wake.wait(_RETRY_SECONDS)
                self._wake.set()

    def _deliver(self) -> bool:
        try:
            deliver(self._outbox, self._sink, self._moves)
        # Whatever a server, a database or a network does, the run goes on.
        except Exception as error:  # noqa: BLE001
            if not self._warned:
                warnings.warn(cannot_reach(error, "the run's folder"), stacklevel=1)
                self._warned = True
            return False
        self._warned = False
        return True


def patience(store: Store) -> float:
    """Return the seconds without a delivered record after which a command waits no longer."""
    return _SERVER_SECONDS if store.artifacts is None else _LOCAL_SECONDS


def wait_for(
    thread: threading.Thread,
    store: Store,
    moved: Callable[[], float],
    note: Callable[[str], None],
) -> None:
    """Wait for a delivering thread as long as records get through.

    Args:
        thread: what delivers.
        store: where to.
        moved: when a record last got through, by the monotonic clock.
        note: told that the command waits, once it does.
    """
    said, started = False, time.monotonic()
    while thread.is_alive() and time.monotonic() - moved() < patience(store):
        thread.join(0.2)
        if not said and time.monotonic() - started > _SAY_SECONDS:
            said = True
            note(f"waiting for MLflow, until nothing gets through for {patience(store):.0f} s")


class MlflowSink:
    """Applies records to one MLflow run, which it finds or creates at the first record."""

    def __init__(
        self, store: Store, name: str, identity: str, parent: "MlflowSink | None" = None
    ) -> None:
        """Name the MLflow run, and that which it is shown under."""
        self._store, self._parent = store, parent
        self.name, self.identity = name, identity
        self._client: Any = None
        self._run_id = ""

    @property
    def run_id(self) -> str:
        """The id of the MLflow run, found or created now if need be."""
        if self._client is None:
            self._connect()
        return self._run_id

    def apply(self, record: Mapping[str, Any], folder: Path) -> None:
        """Send a record of the outbox in that folder. Warns of one that MLflow will never take."""
        if self._client is None:
            self._connect()
        from mlflow.exceptions import MlflowException

        kind = record["kind"]
        if any(not isinstance(record.get(k), x) for k, x in _SHAPES.get(kind, _UNKNOWN).items()):
            self._leave_out(record, folder, "it isn't one that this version writes")
            return
        try:
            getattr(self, f"_{kind}")(record, folder)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._leave_out(record, folder, f"MLflow refuses it: {one_line(error)}")

    def _leave_out(self, record: Mapping[str, Any], folder: Path, why: str) -> None:
        warnings.warn(
            f"a record ({shown(record['kind'])}) of {self.name} is left out, and kept in "
            f"{folder / RECORDS} ({why})",
            stacklevel=1,
        )

    def _connect(self) -> None:
        for name, value in _HTTP_LIMITS.items():
            os.environ.setdefault(name, value)
        import mlflow

        experiment = experiment_id(self._store)
        client = mlflow.MlflowClient(tracking_uri=self._store.uri)
        found = client.search_runs(
            [experiment], f"tags.`{IDENTITY_TAG}` = '{self.identity}'", max_results=1
        )
        if found:
            self._run_id = found[0].info.run_id
        else:
            tags = {IDENTITY_TAG: self.identity}
            if self._parent is not None:
                tags["mlflow.parentRunId"] = self._parent.run_id
            created = client.create_run(experiment, tags=tags, run_name=self.name)
            self._run_id = created.info.run_id
        self._client = client

    def _status(self, record: Mapping[str, Any], folder: Path) -> None:
        status = record["status"]
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status=status)

    def _params(self, record: Mapping[str, Any], folder: Path) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in record["values"].items()]
        self._client.log_batch(self._run_id, params=params)

    def _tags(self, record: Mapping[str, Any], folder: Path) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in record["values"].items()]
        self._client.log_batch(self._run_id, tags=tags)

    def _metrics(self, record: Mapping[str, Any], folder: Path) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["timestamp"], record["step"])
            for key, value in record["values"].items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _artifact(self, record: Mapping[str, Any], folder: Path) -> None:
        path = folder / record["path"]
        # A folder may be somebody else's: nothing outside it is sent anywhere.
        if not path.resolve().is_relative_to(folder.resolve()):
            self._leave_out(record, folder, "its file is outside the folder")
        elif path.exists():
            self._client.log_artifact(self._run_id, str(path))
