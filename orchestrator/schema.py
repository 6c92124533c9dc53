"""MLflow's SQLite store is made whole or not at all: its schema is dozens of migrations."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from filelock import FileLock

from supsup.files import sync_folder

_SQLITE = "sqlite:///"
#: Tables of MLflow's that have rows as soon as it is of use.
_MLFLOWS = {"experiments", "runs"}


def make_whole(uri: str) -> None:
    """Make the store of an address, if it is a SQLite file that isn't there, or was half made.

    The file comes to its name when it is complete; one that was left half made, which holds
    nothing, is moved aside.
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
    """Say whether a SQLite file was left before anything was in it: by MLflow, or by nobody.

    What holds rows of another program's, such as a study's, is not.
    """
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            named = database.execute("select name from sqlite_master where type = 'table'")
            tables = {name for (name,) in named if not name.startswith("sqlite_")}
            filled = {name for name in tables - {"alembic_version"} if _has_rows(database, name)}
    except sqlite3.Error:
        return False
    # Some of MLflow's migrations fill tables of theirs.
    if tables >= _MLFLOWS:
        return not filled & _MLFLOWS
    return not filled and (not tables or "alembic_version" in tables)


def _has_rows(database: sqlite3.Connection, table: str) -> bool:
    quoted = table.replace('"', '""')
    return database.execute(f'select 1 from "{quoted}" limit 1').fetchone() is not None


def _fill(path: Path) -> None:
    import mlflow

    # The first question brings the schema.
    mlflow.MlflowClient(tracking_uri=f"{_SQLITE}{path}").search_experiments()
    with path.open("rb") as file:
        os.fsync(file.fileno())
