"""What the fuzzers call: each takes rubbish, and either works or raises a UserError of one line."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

from orchestrator.runfolder import RunFolder
from supsup.bank import Bank, Damage
from supsup.errors import UserError, plain
from supsup.fields import with_values
from supsup.manifest import parse_manifest
from supsup.recipes import RECIPES
from sweeps.spec import read_spec, spec_of, to_tree


def tolerated(action: Callable[[], object]) -> str | None:
    """Return the line that a user would see, or None if it worked; check that it is one line."""
    try:
        action()
    except UserError as error:
        line = plain(str(error))
        assert line.strip()
        assert line.isprintable()
        assert "\n" not in str(error)
        return line
    return None


def files(folder: Path) -> dict[Path, bytes]:
    """Return all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spec_text(content: bytes, path: Path) -> str | None:
    """Read bytes as a sweep file; what is accepted must mean the same when it is read again."""
    path.write_bytes(content)

    def read() -> None:
        spec = read_spec(path)
        assert spec_of(json.loads(json.dumps(to_tree(spec)))) == spec

    return tolerated(read)


def manifest_bytes(content: bytes) -> str | None:
    """Read bytes as a bank's manifest."""
    return tolerated(lambda: parse_manifest(Path("manifest.json"), content))


def block_bytes(content: bytes, bank: Bank, block: Path) -> str | None:
    """Put bytes in the place of a block: it is damaged and named, and the others are read."""
    block.write_bytes(content)
    found = dict(bank.verify())
    damaged = [one for one in found.values() if isinstance(one, Damage)]
    assert all(one.path == block for one in damaged)
    stock = bank.stock()
    assert len(stock.tasks) + len(stock.damaged) == len(found)
    for one in damaged:
        tolerated(lambda one=one: bank.read(one.tasks))
    return str(damaged[0]) if damaged else None


def run_name(name: str, runs: Path) -> str | None:
    """Take any text as the name of a run: what is accepted stays inside the runs folder."""

    def take() -> None:
        folder = RunFolder(runs, name)
        assert folder.path.resolve().parent == runs.resolve()
        assert len(name) <= 64

    return tolerated(take)


def field_values(values: dict[str, object]) -> str | None:
    """Take any values of configuration fields."""
    return tolerated(lambda: with_values(RECIPES["permuted-digits"](), values))


def is_toml(content: bytes) -> bool:
    """Say whether bytes are TOML at all."""
    try:
        tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return True
