"""Files that are either absent or complete, whatever stops the writer."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def publish(path: Path, content: bytes) -> bool:
    """Create a file with this content; return False, and change nothing, if it exists.

    When this returns the file survives a power cut: synced, linked under its name, and the
    folder synced.
    """
    with _temporary(path, content) as temporary:
        try:
            os.link(temporary, path)
            created = True
        except FileExistsError:
            created = False
    sync_folder(path.parent)
    return created


def write_atomically(path: Path, content: bytes) -> None:
    """Create or replace a file; a reader sees the old content or the new, never a part."""
    with _temporary(path, content) as temporary:
        Path(temporary).replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, unless it is there; it survives a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[str]:
    """Write a synced hidden file beside the path, and remove it afterwards if it is left."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        Path(name).unlink(missing_ok=True)
