"""What to type to go on."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.jobs import ClusterFailed


def again(command: str, runs_dir: Path, *names: str) -> str:
    """Return a command line, with the runs folder if it isn't the default one."""
    folder = () if runs_dir == Path("runs") else ("--runs-dir", str(runs_dir))
    return f"supsup {command} {shlex.join((*names, *folder))}".rstrip()


@contextmanager
def naming_the_remedy(name: str, runs_dir: Path) -> Iterator[None]:
    """Say how a sweep goes on when there is nobody left to work."""
    try:
        yield
    except ClusterFailed as error:
        go_on = again("sweep resume", runs_dir, name)
        raise type(error)(f"{error}; what is finished is safe, go on with {go_on}") from error
