"""The safe defaults that SECURITY.md promises."""

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from orchestrator import cli, defaults
from supsup.errors import UserError, one_line, plain, redacted

ROOT = Path(__file__).parents[1]
SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://me:{SECRET}@host:5432/db refused",
        f"postgresql://me:{SECRET}@x@host/db",
        f"postgresql://me:{SECRET}/x@host/db",
        f"https://me:{SECRET}@host/api?x=1",
        f"password={SECRET} host=h",
        f"RAY_AUTH_TOKEN: {SECRET}",
    ],
)
def test_passwords_never_show(text):
    for shown in (redacted(text), plain(text), one_line(ValueError(text)), str(UserError(text))):
        assert SECRET not in shown
        assert "***" in shown


def test_addresses_without_a_password_are_shown_whole():
    for text in ("sqlite:////folder/a@b.db", "http://127.0.0.1:5000/#/x", "me@host.example"):
        assert redacted(text) == text


def test_warnings_of_the_command_line_show_no_password(capsys, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    cli.cli.callback()
    shown = warnings.formatwarning(f"http://me:{SECRET}@host is away", UserWarning, "x", 1)
    assert shown == "warning: http://***@host is away\n"


def test_what_an_error_quotes_moves_no_cursor():
    line = str(UserError("name is \x1b[2J\x07\r\n\u202e\x00"))
    assert line.isprintable()
    assert "\\x1b[2J" in line


@pytest.mark.parametrize("words", [("run", "permuted-digits"), ("resume", "x"), ("doctor",)])
@pytest.mark.parametrize("place", ["option", "environment"])
def test_a_tracking_uri_with_a_password_is_refused(monkeypatch, capsys, tmp_path, words, place):
    from sweeps.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    uri = f"http://me:{SECRET}@127.0.0.1:1"
    given = ["--tracking-uri", uri] if place == "option" else []
    if not given:
        monkeypatch.setenv("SUPSUP_TRACKING_URI", uri)
    monkeypatch.setattr(sys, "argv", ["supsup", *words, *given])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert SECRET not in said
    assert list(tmp_path.iterdir()) == []


def test_every_command_writes_for_its_user_alone_and_asks_for_a_token(monkeypatch):
    masks = []
    monkeypatch.setattr(os, "umask", masks.append)
    for name in defaults._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    cli.cli.callback()
    assert masks == [0o077]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_notebook_has_the_same_defaults_before_ray_is_imported():
    program = (
        "import os, sys, sweeps; sweeps.run; "
        "print(os.environ['RAY_AUTH_MODE'], os.environ['RAY_USAGE_STATS_ENABLED'], "
        "os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in defaults._ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["token", "0", "true"]


def test_private_files_are_private_and_the_umask_comes_back(tmp_path):
    before = os.umask(0o022)
    try:
        with defaults.private_files():
            (tmp_path / "own").touch()
        (tmp_path / "shared").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644


def test_nothing_unpickles_and_no_yaml_is_read():
    # The exceptions of pickle may be caught where torchvision reads CIFAR.
    unsafe = {"cloudpickle", "dill", "shelve", "marshal", "yaml", "joblib"}
    for package in ("supsup", "orchestrator", "sweeps"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                names = [
                    alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")
                ]
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not unsafe & {name.partition(".")[0] for name in names}, path
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert not called.startswith("pickle."), path
                assert called not in ("torch.load", "np.load", "numpy.load", "eval", "exec"), path


def test_the_lock_has_a_hash_for_every_package_and_names_no_registry():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if line and line[0] not in " #-"]
    assert len(heads) > 100
    assert all("--hash=sha256:" in lines[i + 1] for i in heads)
    assert not any("://" in line for line in lines)


def test_a_sweep_keeps_no_password(tmp_path):
    from sweeps.session import _write_request
    from sweeps.spec import spec_of
    from sweeps.work import Options

    spec = spec_of({"name": "x", "recipe": "permuted-digits", "grid": {"tasks": [1, 2]}})
    options = Options(runs_dir=tmp_path, storage=f"postgresql://me:{SECRET}@host/db")
    _write_request(tmp_path, spec, options)
    text = (tmp_path / "sweep.json").read_text()
    assert SECRET not in text
    assert json.loads(text)["storage"] == "postgresql://me:***@host/db"
