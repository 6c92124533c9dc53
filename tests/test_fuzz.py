"""Rubbish in every place where a user can put some: it works, or one line says what is wrong."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supsup.fields import config_fields
from sweeps.spec import _CHOICES
from tests.fuzz import targets

ROOT = Path(__file__).parents[1]
MORE = bool(os.environ.get("SUPSUP_FUZZ_EXAMPLES"))
EXAMPLES = int(os.environ.get("SUPSUP_FUZZ_EXAMPLES", "60"))
quickly = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=not MORE,
)

FIELDS = [info.path for info in config_fields()]
CHOICES = sorted({choice for info in config_fields() for choice in info.choices})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 600),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(CHOICES),
    st.sampled_from(["", "nan", "inf", "-0", "1e400", "1_0", "0x1", "\x00", "\x1b[2J", "9" * 5000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@quickly
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_configuration_is_taken_or_refused_in_a_line(values):
    targets.field_values(values)


@quickly
@given(st.text(max_size=80) | st.from_regex(r"[\w./\\-]{0,70}"))
def test_any_name_is_refused_or_stays_inside(tmp_path, name):
    targets.run_name(name, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../x", "a/b", "/etc", "a\x00", "a\nb", "\x1b]0;x\x07", "a" * 65, "", " ", ".a",
     "é", "a\u202eb", "sweeps"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    assert targets.run_name(name, tmp_path)


# --- sweep files -----------------------------------------------------------------------------


def toml(value: object) -> str:
    """Write a value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value))


DIMENSIONS = st.fixed_dictionaries(
    {},
    optional={
        "low": SCALARS,
        "high": SCALARS,
        "log": st.booleans(),
        "step": SCALARS,
        "choices": st.lists(SCALARS, max_size=3),
    },
)
SEARCHES = st.fixed_dictionaries(
    {"trials": SCALARS, "space": st.dictionaries(st.sampled_from(FIELDS), DIMENSIONS, max_size=2)},
    optional={
        "hours": SCALARS,
        "sampler": SCALARS | st.just("tpe"),
        "pruner": SCALARS | st.just("asha"),
        "objectives": st.lists(st.sampled_from(["accuracy", "bytes", "x"]), max_size=3),
    },
)
SPECS = st.fixed_dictionaries(
    {"recipe": st.sampled_from(["permuted-digits", "permuted-mnist", "open-digits", "x"])},
    optional={
        "name": SCALARS,
        "protocol": st.sampled_from(["paper", "default", "x"]),
        "seeds": st.lists(SCALARS, max_size=3) | SCALARS,
        "base": st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2) | SCALARS,
        "grid": st.dictionaries(st.sampled_from(FIELDS), st.lists(VALUES, max_size=3), max_size=2),
        "search": SEARCHES | SCALARS,
        "variants": st.dictionaries(
            st.sampled_from(["a", "b c", ""]),
            st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2) | SCALARS,
            max_size=2,
        ),
        "taks": SCALARS,
    },
)


@quickly
@given(SPECS)
def test_any_sweep_is_taken_or_refused_in_a_line(tmp_path, tree):
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in tree.items())
    targets.spec_text(text.encode(), tmp_path / "sweep.toml")


GRID = {
    "recipe": "permuted-digits",
    "protocol": "paper",
    "seeds": [0, 1],
    "base": {"tasks": 8, "eval.at": [4, 8], "train.batches": 12, "train.precision": "fp32"},
    "grid": {"model.output_size": [30, 50], "eval.methods": ["h-one-shot", "g-one-shot"]},
}
SEARCH = {
    "recipe": "permuted-mnist",
    "seeds": [3],
    "base": {"tasks": 8},
    "search": {
        "trials": 5,
        "hours": 1.5,
        "sampler": "random",
        "pruner": "median",
        "objectives": ["accuracy", "bytes"],
        "space": {
            "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "train.batches": {"low": 10, "high": 50, "step": 10},
            "model.output_size": {"choices": [100, 200]},
        },
    },
}


def places(tree: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Return the place of everything in a tree."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [at, *(place for key, value in items for place in places(value, (*at, key)))]


@quickly
@given(st.data())
def test_a_sweep_with_one_thing_changed_is_taken_or_refused_in_a_line(tmp_path, data):
    tree = copy.deepcopy(data.draw(st.sampled_from([GRID, SEARCH])))
    *path, last = data.draw(st.sampled_from(places(tree)[1:]))
    part = functools.reduce(lambda inner, key: inner[key], path, tree)
    part[last] = data.draw(VALUES)
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in tree.items())
    targets.spec_text(text.encode(), tmp_path / "sweep.toml")


@pytest.mark.parametrize("tree", [GRID, SEARCH])
def test_what_is_changed_is_right_before(tmp_path, tree):
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in tree.items())
    assert targets.spec_text(text.encode(), tmp_path / "sweep.toml") is None


@quickly
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_no_sweep(tmp_path, content):
    line = targets.spec_text(content, tmp_path / "sweep.toml")
    assert line
    if not targets.is_toml(content):
        assert "is no TOML" in line or "is empty" in line


def test_the_keys_of_a_sweep_are_all_drawn():
    drawn = {"name", "recipe", "protocol", "base", "seeds", "grid", "search", "variants"}
    assert drawn == {key for key in _CHOICES if "." not in key}


# --- banks -----------------------------------------------------------------------------------


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Change, cut, repeat or replace a piece of a file."""
    start = draw(st.integers(0, len(content)))
    length = draw(st.integers(0, min(64, len(content) - start)))
    piece = draw(st.one_of(st.binary(max_size=64), st.just(b""), st.just(content[:40])))
    return content[:start] + piece + content[start + length :]


@quickly
@given(st.data())
def test_a_spoilt_block_is_named_and_the_others_are_read(full_bank, data):
    _, block = full_bank.blocks()[1]
    whole = block.read_bytes()
    content = data.draw(st.one_of(spoilt(whole), spoilt(whole[:400]), st.binary(max_size=300)))
    try:
        assert (targets.block_bytes(content, full_bank, block) is None) == (content == whole)
    finally:
        block.write_bytes(whole)


@quickly
@given(st.data())
def test_a_spoilt_manifest_is_said(full_bank, data):
    whole = (full_bank.path / "manifest.json").read_bytes()
    body = json.loads(whole)
    key = data.draw(st.sampled_from(sorted(body)))
    changed = json.dumps({**body, key: data.draw(VALUES)}, default=str).encode()
    content = data.draw(st.one_of(spoilt(whole), st.just(changed), st.binary(max_size=200)))
    if targets.manifest_bytes(content) is None:
        assert json.loads(content) == body


@quickly
@given(st.data())
def test_a_manifest_with_a_right_checksum_and_wrong_content_is_said(full_bank, data):
    from supsup.manifest import _checksum

    body = json.loads((full_bank.path / "manifest.json").read_bytes())
    body.pop("sha256")
    place = data.draw(st.sampled_from(["", "config", "layers"]))
    part = body if not place else body[place] if place == "config" else body["layers"][0]
    key = data.draw(st.sampled_from(sorted(part)))
    if data.draw(st.booleans()):
        part.pop(key)
    else:
        part[key] = data.draw(VALUES)
    content = json.dumps({**body, "sha256": _checksum(body)}).encode()
    targets.manifest_bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_more():
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    environment = os.environ | {"SUPSUP_FUZZ_EXAMPLES": "1000"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["spec", "manifest", "block"])
def test_what_coverage_leads_to(target):
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.fuzz", target, "5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 5000" in done.stderr
