"""What surrounds a run on this machine: versions, the token, folders, MLflow, ports."""

import base64
import fcntl
import http.client
import importlib.metadata
import ipaddress
import os
import shutil
import sqlite3
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from orchestrator.finding import Finding, Level
from orchestrator.runfolder import check_runs_dir
from orchestrator.schema import half_made
from orchestrator.tracking import store_for
from supsup.errors import UserError, one_line, redacted

_SECONDS = 5.0
_LITTLE, _TOO_LITTLE = 2e9, 200e6
_FOREIGN_HOST = "foreign-host.example"

# --- versions ----------------------------------------------------------------------------------


def versions(
    lock: Iterable[str], required: Iterable[str], installed: Mapping[str, str]
) -> list[Finding]:
    """Compare what is installed with what the project needs, and with what it locked.

    Args:
        lock: lines of requirements.lock.
        required: what the project's own metadata requires.
        installed: version by normalised name.
    """
    needs = [need for need in map(_requirement, required) if need]
    unmet = [need for need in needs if not _met(need, installed)]
    if unmet:
        lacking = ", ".join(f"{n.name} {installed.get(_plain(n.name), 'absent')}" for n in unmet)
        wanted = ", ".join(f"{n.name}{n.specifier}" for n in unmet)
        return [Finding("fail", "versions", lacking, f"must be {wanted}: make env")]
    locked = [need for need in map(_requirement, lock) if need]
    other = [
        f"{need.name} {installed[_plain(need.name)]} (locked {need.specifier})"
        for need in locked
        if _plain(need.name) in installed and not _met(need, installed)
    ]
    if other:
        shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        return [Finding("warn", "versions", shown, "install what is locked: make env")]
    what = f"as in requirements.lock ({len(locked)} packages)" if locked else "as required"
    return [Finding("ok", "versions", what)]


def installed_versions() -> dict[str, str]:
    """Return the version of every installed package by its normalised name."""
    return {_plain(d.name): d.version for d in importlib.metadata.distributions() if d.name}


def _requirement(line: str) -> Requirement | None:
    try:
        need = Requirement(line.partition("\\")[0].strip())
    except InvalidRequirement:
        return None
    return need if need.marker is None or need.marker.evaluate({"extra": ""}) else None


def _met(need: Requirement, installed: Mapping[str, str]) -> bool:
    found = installed.get(_plain(need.name))
    return found is not None and need.specifier.contains(found, prereleases=True)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


# --- token -------------------------------------------------------------------------------------


def token(environ: Mapping[str, str], home: Path, shared: bool) -> Finding:
    """Look at the token of Ray: whether it is asked for, set, and private.

    Args:
        environ: the environment.
        home: the user's home folder.
        shared: whether a running cluster is to be used, not one of the run's own.
    """
    what = "Ray token"
    if environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        remedy = "whoever reaches the ports can run code: set RAY_AUTH_MODE=token"
        return Finding("warn", what, f"RAY_AUTH_MODE is {environ['RAY_AUTH_MODE']}", remedy)
    if not shared:
        return Finding("ok", what, "each run's own cluster makes one of its own")
    if environ.get("RAY_AUTH_TOKEN"):
        return Finding("ok", what, "in RAY_AUTH_TOKEN")
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    try:
        mode = path.stat().st_mode
        empty = not path.read_text().strip()
    except (OSError, UnicodeError) as error:
        remedy = "bring the cluster's token there, or make one: ray get-auth-token --generate"
        return Finding("fail", what, f"{path} can't be read ({one_line(error, 80)})", remedy)
    if empty:
        return Finding("fail", what, f"{path} is empty", "bring the cluster's token there")
    if mode & 0o077:
        return Finding("warn", what, f"{path}: others may read it", f"chmod 600 {path}")
    return Finding("ok", what, f"{path}, mode {stat.S_IMODE(mode):04o}")


# --- folders -----------------------------------------------------------------------------------


def runs_folder(runs_dir: Path) -> list[Finding]:
    """Try in the runs folder, or where it would be, all that a bank asks of a file system."""
    what = "runs folder"
    try:
        check_runs_dir(runs_dir)
        folder = next(p for p in (runs_dir, *runs_dir.absolute().parents) if p.is_dir())
        _try_files(folder)
        free = shutil.disk_usage(folder).free
    except (UserError, OSError) as error:
        said = str(error) if isinstance(error, UserError) else one_line(error)
        remedy = "a bank needs to write, sync, lock and hard-link files: give another --runs-dir"
        return [Finding("fail", what, f"{runs_dir}: {said}", remedy)]
    value = f"{runs_dir}: writes, syncs, links and locks; {free / 1e9:.1f} GB free"
    if free < _LITTLE:
        level: Level = "fail" if free < _TOO_LITTLE else "warn"
        return [Finding(level, what, value, "2500 masks of LeNet take 0.1 GB: free some space")]
    if runs_dir.is_dir() and runs_dir.stat().st_mode & 0o022:
        return [Finding("warn", what, f"{runs_dir}: others may write", f"chmod go-w {runs_dir}")]
    return [Finding("ok", what, value)]


def _try_files(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".supsup-doctor-", dir=folder) as scratch:
        path = Path(scratch) / "file"
        with path.open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(path, Path(scratch) / "link")


# --- MLflow ------------------------------------------------------------------------------------


def mlflow_store(tracking_uri: str | None, runs_dir: Path) -> list[Finding]:
    """Look whether runs can be recorded. Writes nothing."""
    try:
        store = store_for(tracking_uri, runs_dir)
    except UserError as error:
        return [Finding("fail", "MLflow", str(error))]
    if store.uri.startswith("http"):
        return _mlflow_server(store.uri.rstrip("/"))
    path = Path(store.uri.removeprefix("sqlite:///"))
    if not path.exists():
        return [Finding("ok", "MLflow", f"{path}: none yet, the first run makes it")]
    if half_made(path):
        return [Finding("ok", "MLflow", f"{path}: was left half made, the next run makes it anew")]
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_SECONDS) as database:
            found = database.execute("select version_num from alembic_version").fetchone()
    except sqlite3.Error as error:
        remedy = "it is no store of MLflow, or it is damaged: move it away"
        return [Finding("fail", "MLflow", f"{path}: {one_line(error)}", remedy)]
    from mlflow.store.db.utils import _get_latest_schema_revision

    if found != (_get_latest_schema_revision(),):  # type: ignore[no-untyped-call]
        remedy = f"back it up, then: mlflow db upgrade {store.uri}"
        version = found[0] if found else "none"
        return [Finding("fail", "MLflow", f"{path}: of another MLflow ({version})", remedy)]
    if path.stat().st_mode & 0o077:
        return [Finding("warn", "MLflow", f"{path}: others may read it", f"chmod 600 {path}")]
    return [Finding("ok", "MLflow", f"{path}, schema of this version")]


def _mlflow_server(uri: str) -> list[Finding]:
    shown = redacted(uri)
    try:
        status, version = _get(f"{uri}/version")
        foreign, _ = _get(f"{uri}/version", host=_FOREIGN_HOST)
    except (OSError, ValueError, http.client.HTTPException) as error:
        remedy = "start it or mend --tracking-uri; a run would go on, and keep its records"
        return [Finding("warn", "MLflow", f"{shown}: {redacted(one_line(error))}", remedy)]
    if status in (401, 403):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; see --allowed-hosts"
        return [Finding("fail", "MLflow", f"{shown} refuses: HTTP {status}", remedy)]
    if status != 200:
        return [Finding("fail", "MLflow", f"{shown} is no MLflow: HTTP {status}", "mend the URI")]
    here = importlib.metadata.version("mlflow")
    findings = [Finding("ok", "MLflow", f"{shown}, version {version}")]
    if version != here:
        remedy = "give server and clients the locked version"
        findings = [Finding("warn", "MLflow", f"{shown} has {version}, here is {here}", remedy)]
    if foreign == 200:
        remedy = "any web page can ask it (DNS rebinding): start it with --allowed-hosts"
        findings.append(Finding("warn", "MLflow", f"{shown} answers a foreign Host", remedy))
    return findings


def _get(uri: str, host: str | None = None) -> tuple[int, str]:
    """Return the status and the first line that a server answers."""
    headers = {"Host": host} if host else {}
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{x}") for x in ("USERNAME", "PASSWORD"))
    if name and password:
        login = base64.b64encode(f"{name}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {login}"
    request = urllib.request.Request(uri, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return int(answer.status), answer.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        return error.code, ""


# --- ports -------------------------------------------------------------------------------------

_PORTS_SHOWN = 3
#: Programs whose ports matter, by what their name or command line has in it.
_PROGRAMS = {
    "gcs_server": "Ray's head",
    "raylet": "Ray's node",
    "ray::": "Ray's workers",
    "ray/dashboard": "Ray's dashboard",
    "ray.util.client": "Ray's client server",
    "ray/autoscaler": "Ray's autoscaler",
    "mlflow": "MLflow",
    "postgres": "PostgreSQL",
}


def ports(listeners: Iterable[tuple[str, str, int]]) -> list[Finding]:
    """Say which ports listen, and to whom they are open.

    Args:
        listeners: a program's name and command line, its address and its port.
    """
    found: dict[bool, dict[str, set[int]]] = {True: {}, False: {}}
    for program, address, port in listeners:
        name = next((shown for part, shown in _PROGRAMS.items() if part in program), None)
        if name:
            place: Any = ipaddress.ip_address(address.partition("%")[0])
            place = getattr(place, "ipv4_mapped", None) or place
            found[place.is_loopback].setdefault(name, set()).add(port)
    findings = []
    if found[True]:
        findings.append(Finding("ok", "ports", f"this machine alone: {_numbers(found[True])}"))
    if found[False]:
        value = f"open to the network: {_numbers(found[False])}"
        remedy = "let a firewall leave them to the cluster's machines"
        findings.append(Finding("warn", "ports", value, remedy))
    return findings or [Finding("ok", "ports", "nothing of Ray, MLflow or PostgreSQL listens")]


def _numbers(found: Mapping[str, set[int]]) -> str:
    parts = []
    for name, numbers in sorted(found.items()):
        more = " ..." if len(numbers) > _PORTS_SHOWN else ""
        some = sorted(numbers)[:_PORTS_SHOWN]
        parts.append(f"{name} {' '.join(map(str, some))}{more}")
    return ", ".join(parts)


def listeners() -> list[tuple[str, str, int]]:
    """Return what listens on this machine: program, address, port."""
    import psutil

    found = []
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        try:
            process = psutil.Process(connection.pid)
            program = " ".join([process.name(), *process.cmdline()])
        except psutil.Error:
            continue
        found.append((program, connection.laddr.ip, connection.laddr.port))
    return found
