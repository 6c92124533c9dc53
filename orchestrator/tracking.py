"""MLflow tracking behind a durable outbox: the run never waits for a server, and loses nothing.

Records are appended to ``records.jsonl`` in the run folder and synced. A thread delivers them to
MLflow in order and remembers how far it got; a resumed run delivers what is left. A record that
was delivered just before a crash is delivered again: MLflow stores a metric with equal key, step,
time and value once, and everything else is set, not added.
"""

import json
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supsup.errors import ConfigError, one_line
from supsup.files import write_atomically

EXPERIMENT = "supsup"
IDENTITY_TAG = "supsup.identity"
#: Opens the experiment in the page's view for training runs, not in the one for language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_RETRY_SECONDS = 20.0
_CLOSE_SECONDS = 60.0
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where MLflow keeps runs."""

    uri: str
    artifacts: Path | None
    """Folder of the artifacts of a local store; None leaves it to the server."""


def local_store(runs_dir: Path) -> Store:
    """Return the embedded store beside the runs: SQLite, by absolute path."""
    root = runs_dir.resolve()
    return Store(uri=f"sqlite:///{root / 'mlflow.db'}", artifacts=root / "mlflow-artifacts")


def store_for(tracking_uri: str | None, runs_dir: Path) -> Store:
    """Return the store that a tracking URI names; without one, the local store.

    Raises:
        ConfigError: if the URI is no ``http(s)://`` or ``sqlite:///`` address.
    """
    if tracking_uri is None:
        return local_store(runs_dir)
    scheme, colon, rest = tracking_uri.partition("://")
    if not colon or not rest.strip("/") or scheme not in ("http", "https", "sqlite"):
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
        return Store(uri=tracking_uri, artifacts=path.parent / "mlflow-artifacts")
    return Store(uri=tracking_uri, artifacts=None)


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

    client = mlflow.MlflowClient(tracking_uri=store.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = store.artifacts.as_uri() if store.artifacts else None
    return str(client.create_experiment(EXPERIMENT, location, tags=_EXPERIMENT_TAGS))


class Outbox:
    """The records of one run, on disk, and how many of them were delivered."""

    def __init__(self, folder: Path) -> None:
        """Open the outbox in a run's folder, or begin one."""
        self._records = folder / "records.jsonl"
        self._position = folder / "records-delivered.json"
        self._lock = threading.Lock()
        if self._records.exists():
            self._drop_torn_line()

    def append(self, kind: str, **body: Any) -> None:
        """Add a record; it survives a power cut when this returns."""
        self.extend({"kind": kind, **body})

    def extend(self, *records: Mapping[str, Any]) -> None:
        """Add records, each with its ``kind``; they survive a power cut when this returns."""
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        with self._lock, self._records.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def pending(self) -> tuple[list[dict[str, Any]], int]:
        """Return the records not delivered yet, and the position behind them."""
        start = self._delivered()
        with self._lock:
            if not self._records.exists():
                return [], start
            with self._records.open("rb") as file:
                file.seek(start)
                content = file.read()
        return [json.loads(line) for line in content.splitlines()], start + len(content)

    def mark_delivered(self, position: int) -> None:
        """Remember that everything before the position was delivered."""
        write_atomically(self._position, json.dumps({"position": position}).encode())

    def _delivered(self) -> int:
        try:
            return int(json.loads(self._position.read_bytes())["position"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _drop_torn_line(self) -> None:
        content = self._records.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._records, whole)


class Tracker:
    """The one writer of a run's MLflow run. Warns; never stops the run."""

    def __init__(self, folder: Path, store: Store, name: str, identity: str) -> None:
        """Start to deliver what the outbox holds.

        Args:
            folder: the run's folder.
            store: where MLflow keeps runs.
            name: the run's name, as it is shown.
            identity: finds this run's MLflow run again.
        """
        self._folder = folder
        self._outbox = Outbox(folder)
        self._sink = MlflowSink(store, name, identity)
        self._wake = threading.Event()
        self._closing = False
        self._warned = False
        self._thread = threading.Thread(target=self._deliver_all, name="tracking", daemon=True)
        self._thread.start()

    def begin(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record that the run goes on, with its parameters and tags."""
        self._outbox.append("status", status="RUNNING")
        self._outbox.append("params", values={key: str(value) for key, value in params.items()})
        self._outbox.append("tags", values=dict(tags))
        self._wake.set()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics; the step is the number of tasks learned."""
        self._outbox.append(
            "metrics", values=dict(values), step=step, timestamp=int(time.time() * 1000)
        )
        self._wake.set()

    def artifact(self, path: Path) -> None:
        """Record that a file in the run's folder is to be shown."""
        self._outbox.append("artifact", path=str(path.relative_to(self._folder)))

    def close(self, status: str) -> bool:
        """Record the end, wait a while for delivery, and say whether all was delivered."""
        self._outbox.append("status", status=status)
        self._closing = True
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)
        return not self._outbox.pending()[0]

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
        records, position = self._outbox.pending()
        try:
            for record in records:
                self._sink.apply(record, self._folder)
        # Whatever a server, a database or a network does, the run goes on.
        except Exception as error:  # noqa: BLE001
            if not self._warned:
                warnings.warn(
                    f"MLflow can't be reached ({type(error).__name__}: {one_line(error)}); "
                    "records are kept in the run folder and delivered later",
                    stacklevel=1,
                )
                self._warned = True
            return False
        if records:
            self._outbox.mark_delivered(position)
        self._warned = False
        return True


class MlflowSink:
    """Applies records to one MLflow run, which it finds or creates at the first record."""

    def __init__(
        self, store: Store, name: str, identity: str, parent: "MlflowSink | None" = None
    ) -> None:
        """Name the MLflow run, and that which it is shown under."""
        self._store, self._name, self._identity = store, name, identity
        self._parent = parent
        self._client: Any = None
        self._run_id = ""

    @property
    def run_id(self) -> str:
        """The id of the MLflow run, found or created now if need be."""
        if self._client is None:
            self._connect()
        return self._run_id

    def apply(self, record: Mapping[str, Any], folder: Path) -> None:
        """Send a record of the outbox in that folder."""
        if self._client is None:
            self._connect()
        getattr(self, f"_{record['kind']}")(record, folder)

    def _connect(self) -> None:
        for name, value in _HTTP_LIMITS.items():
            os.environ.setdefault(name, value)
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=self._store.uri)
        experiment = experiment_id(self._store)
        found = client.search_runs(
            [experiment], f"tags.`{IDENTITY_TAG}` = '{self._identity}'", max_results=1
        )
        if found:
            self._run_id = found[0].info.run_id
        else:
            tags = {IDENTITY_TAG: self._identity}
            if self._parent is not None:
                tags["mlflow.parentRunId"] = self._parent.run_id
            created = client.create_run(experiment, tags=tags, run_name=self._name)
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
        if path.exists():
            self._client.log_artifact(self._run_id, str(path))
