"""Who runs a trial, and whether they still live."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Seconds without a sign of a driver on another host, after which its trials are adopted.
_SILENT_SECONDS = 3600.0


def my_lease() -> dict[str, Any]:
    """Return what says who runs a trial."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": _process_start(os.getpid())}


def is_alive(lease: Mapping[str, Any], host: str, last_sign: float, now: float) -> bool:
    """Say whether a driver still runs: by its process here, by its signs elsewhere."""
    if lease.get("host") == host:
        return _process_start(int(lease["pid"])) == str(lease["began"])
    return now - last_sign < _SILENT_SECONDS


def _process_start(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def lease_name(lease: Mapping[str, Any]) -> str:
    """Return under which name a driver leaves its signs."""
    return f"driver {lease['host']} {lease['pid']} {lease['began']}"
