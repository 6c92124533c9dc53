"""Ray of the run's own: started in a folder that vanishes with it; and what SIGTERM does then."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from supsup.errors import RunFailed, UserError, one_line

#: Bytes that the path of a socket can have, and what Ray and this module add to a folder's:
#: /supsup-12345678/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store
_SOCKET_BYTES, _ADDED_BYTES = 107, 80
#: The longest path of a folder that Ray's own can be made in.
LONGEST = _SOCKET_BYTES - _ADDED_BYTES


@contextlib.contextmanager
def embedded(cores: int) -> Iterator[None]:
    """Run a private cluster whose files vanish with it.

    Raises:
        RunFailed: if it doesn't start.
        UserError: if there is no folder for its files.
    """
    folders: list[Path] = []
    with _own_token():
        try:
            for last in (False, False, True):
                folders.append(_scratch())
                if _start_local(cores, folders[-1], last):
                    break
            yield
        finally:
            ray.shutdown()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Use a token made for this, where tokens are on; Ray would leave one in the home folder.

    Ray keeps the first token that it sees in a process, until it is told that there is another.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        yield
        return
    tokens: Any = ray._raylet.AuthenticationTokenLoader.instance()  # type: ignore[attr-defined]
    before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    tokens.reset_cache()
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_TOKEN")
        if before is not None:
            os.environ["RAY_AUTH_TOKEN"] = before
        tokens.reset_cache()


def _scratch() -> Path:
    """Make a folder for Ray's files, whose sockets take no long path."""
    try:
        place = tempfile.gettempdir()
        if len(os.fsencode(place)) > LONGEST:
            place = "/tmp"
        return Path(tempfile.mkdtemp(prefix="supsup-", dir=place))
    except OSError as error:
        raise UserError(
            f"no folder for Ray's files ({one_line(error)}); set TMPDIR to one that can be "
            f"written, with a path of at most {LONGEST} bytes"
        ) from None


def _start_local(cores: int, folder: Path, last: bool) -> bool:
    """Start Ray on this machine; return False if it was too busy for that.

    Raises:
        RunFailed: if so, and this is the last try.
    """
    try:
        with own_sigterm():
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
    except (KeyboardInterrupt, SystemExit):
        _end_processes(folder)
        raise
    # Ray has no class of its own for this.
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        _end_processes(folder)
        if last:
            raise RunFailed(
                "Ray did not start on this machine in three times 30 s; it may be too busy: give "
                "the command again once it is not"
            ) from None
        return False
    return True


def _end_processes(folder: Path) -> None:
    """End what was started of a Ray that keeps its files in a folder."""
    ray.shutdown()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(folder) in word for word in process.cmdline()):
                process.kill()


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep what SIGTERM does while Ray starts, and afterwards.

    Ray would put handlers of its own there, which end in an abort. And what a handler raises is
    lost where it interrupts a callback: it is then raised at the end.
    """
    handler = signal.getsignal(signal.SIGTERM)
    lost = False

    def take(number: int, frame: Any) -> None:
        nonlocal lost
        lost = True
        handler(number, frame)  # type: ignore[operator, misc]
        lost = False

    utils: Any = ray._private.utils
    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    if callable(handler):
        signal.signal(signal.SIGTERM, take)
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, handler)
        if lost:
            take(signal.SIGTERM, None)
