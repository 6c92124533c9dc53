"""Where a study is kept: a journal in the sweep's folder, or a database that drivers may share."""

import os
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from supsup.errors import ConfigError, one_line
from sweeps.patient import PatientStorage

JOURNAL = "study.journal"


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open a database, or the journal in a sweep's folder.

    Raises:
        ConfigError: if the database can't be used; never shows a password.
    """
    if url is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    check_storage(url)
    pool = {} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return PatientStorage(url, pool)
    except ImportError as error:
        raise ConfigError(
            f"storage {public(url)} needs the driver {error.name or one_line(error)}, "
            "which isn't installed; install it beside supsup"
        ) from None
    except (SQLAlchemyError, UnicodeError, RuntimeError, ValueError) as error:
        secret = make_url(url).password
        said = one_line(error)
        said = said.replace(str(secret), "***") if secret else said
        raise ConfigError(f"storage {public(url)} can't be used: {said}") from None


def check_storage(url: str) -> None:
    """Check a storage's address, without connecting.

    Raises:
        ConfigError: naming what is wrong; never shows a password.
    """
    try:
        parsed = make_url(url)
        _ = parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise ConfigError(
            "the storage must be postgresql://USER@HOST:PORT/DATABASE or sqlite:////PATH, with "
            "@ and % in a password written as %40 and %25"
        ) from None
    except ImportError:
        return  # Said with its name when it is opened.
    if secret := next((name for name in parsed.query if "pass" in name), ""):
        raise ConfigError(
            f"the storage has {secret} among its parameters, which would be kept with the sweep; "
            "write the password as in postgresql://USER:PASSWORD@HOST, or give it in PGPASSWORD"
        )
    if parsed.get_backend_name() not in ("postgresql", "sqlite"):
        raise ConfigError(
            f"storage {public(url)} is {parsed.get_backend_name()}, must be postgresql or sqlite"
        )
    if parsed.get_backend_name() == "sqlite":
        _check_sqlite(Path(parsed.database or ""))


def _check_sqlite(path: Path) -> None:
    if not path.is_absolute():
        raise ConfigError(f"the storage's path is {str(path)!r}, must be absolute: sqlite:////PATH")
    if not path.parent.is_dir():
        raise ConfigError(f"the storage's folder {path.parent} doesn't exist; create it")
    if path.is_dir() or (path.exists() and not _looks_like_sqlite(path)):
        raise ConfigError(f"the storage's file {path} is no SQLite database; give another")


def _looks_like_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) in (b"", b"SQLite")


def public(url: str) -> str:
    """Return a storage's address without its password."""
    return make_url(url).render_as_string(hide_password=True)


def repair(folder: Path) -> None:
    """Cut off what a killed driver left: half a line, and the lock that it wrote under.

    Hold the sweep's lock.
    """
    journal = folder / JOURNAL
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        content = journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(journal, whole)
