"""Safe defaults of a process that runs SupSup: of the command, and of a notebook."""

import contextlib
import os
from collections.abc import Iterator

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Of workers and nodes that die, the run tells in its own words; many workers are meant.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "has been marked dead|Raylet is terminated|died or was killed"
    "|killed due to|processes have been started|IO worker",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
#: Runs, tokens and databases are the user's alone.
UMASK = 0o077


def quiet_and_closed() -> None:
    """Let nobody in and nothing out: tokens on, usage reports off. What is set already counts."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Create files that the user alone can read, as long as this goes on."""
    before = os.umask(UMASK)
    try:
        yield
    finally:
        os.umask(before)
