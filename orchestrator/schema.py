"""MLflow's SQLite store is made whole or not at all: its schema is dozens of migrations."""

import os
import sqlite3
from pathlib import Path

from filelock import FileLock

from supsup.files import sync_folder

_SQLITE = "sqlite:///"


def make_whole(uri: str) -> None:
    """Make the store of an address, if it is a SQLite file that isn't there, or was half made.

    The file comes to its name when it is complete; one that an earlier version left half made,
    which holds nothing, is moved aside.
    """
    if not uri.startswith(_SQLITE):
        return
    path = Path(uri.removeprefix(_SQLITE))
    if path.exists() and not half_made(path):
        return
    with FileLock(path.with_name(f"{path.name}.lock")):
        if path.exists() and not half_made(path):
            return
        if path.exists():
            path.rename(path.with_name(f"{path.name}.half-made-{path.stat().st_mtime_ns}"))
        making = path.with_name(f"{path.name}.making")
        making.unlink(missing_ok=True)
        making.with_name(f"{making.name}-journal").unlink(missing_ok=True)
        _fill(making)
        making.rename(path)
        sync_folder(path.parent)


def half_made(path: Path) -> bool:
    """Say whether a SQLite file is MLflow's, and was left before the first experiment was in it."""
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master")}
            if not tables:
                return True
            if "experiments" not in tables:
                # Alembic's table, and those of a migration under way, may be there alone.
                return "alembic_version" in tables
            return database.execute("select 1 from experiments").fetchone() is None
    except sqlite3.Error:
        return False


def _fill(path: Path) -> None:
    import mlflow

    # The first question brings the schema.
    mlflow.MlflowClient(tracking_uri=f"{_SQLITE}{path}").search_experiments()
    with path.open("rb") as file:
        os.fsync(file.fileno())
