"""Options of the command line, most of them made from the fields of the configuration."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import click

from orchestrator.tracking import refuse_password
from supsup.config import ALGORITHMS, OBJECTIVES, RunConfig, method_parts
from supsup.fields import FieldInfo, as_text, config_fields, get_field
from supsup.recipes import RECIPES

MAX_WORKERS = 4096
#: Recipes that differ in a field's default, as many as its help names.
_FEW = 1
#: Short names of often used fields.
_ALIASES = {
    "model.name": "--model",
    "eval.batch": "--batch",
    "eval.at": "--at",
    "openset.stream": "--stream",
    "openset.epsilon": "--epsilon",
    "openset.budget": "--budget",
}


def dashes(token: str) -> str:
    """Let options be written with underscores, too."""
    return token.replace("_", "-")


def _defaults(info: FieldInfo) -> str:
    """Return a field's default, and what recipes have instead if few do."""
    default = as_text(get_field(RunConfig(), info.path))
    values = {name: as_text(get_field(recipe(), info.path)) for name, recipe in RECIPES.items()}
    others = [f"{name}: {value}" for name, value in values.items() if value != default]
    if len(others) > _FEW:
        others = ["recipes differ: see supsup recipes NAME"]
    return "; ".join([default, *others])


def _field_option(info: FieldInfo) -> Callable[[Any], Any]:
    names = [f"--{info.path.replace('_', '-')}", info.path.replace(".", "__")]
    if info.path in _ALIASES:
        names.insert(0, _ALIASES[info.path])
    choices = f" ({', '.join(info.choices)})" if info.choices else ""
    return click.option(*names, metavar="VALUE", help=f"{info.help}{choices}  [{_defaults(info)}]")


def field_options(prefixes: tuple[str, ...]) -> Callable[[Any], Any]:
    """Add an option for every field whose dotted path starts with a prefix."""

    def decorate(command: Any) -> Any:
        for info in reversed(config_fields()):
            if info.path.startswith(prefixes):
                command = _field_option(info)(command)
        return command

    return decorate


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


runs_dir = click.option(
    "--runs-dir",
    metavar="DIR",
    envvar="SUPSUP_RUNS",
    default="runs",
    show_default=True,
    help="folder of all runs, and of the MLflow store beside them",
)
data_dir = click.option(
    "--data-dir", metavar="DIR", help="folder of the data sets  [$SUPSUP_DATA, else a cache folder]"
)


def _without_password(_context: Any, _option: Any, uri: str | None) -> str | None:
    if uri:
        refuse_password(uri)
    return uri


tracking_uri = click.option(
    "--tracking-uri",
    metavar="URI",
    envvar="SUPSUP_TRACKING_URI",
    callback=_without_password,
    help="MLflow server or store  [SQLite in the runs folder]",
)
worker_options = _options(
    click.option(
        "--workers",
        metavar="N",
        type=click.IntRange(1, MAX_WORKERS),
        help="Ray workers  [the GPUs, else the cores]",
    ),
    click.option(
        "--address",
        metavar="RAY",
        help="running Ray cluster, such as auto  [starts one on this machine]",
    ),
)
method_options = _options(
    click.option("--objective", type=click.Choice(OBJECTIVES), help="evaluate by H or by G alone"),
    click.option(
        "--algorithm", type=click.Choice(ALGORITHMS), help="evaluate by one algorithm alone"
    ),
)


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that were given, by dotted path."""
    return {name.replace("__", "."): value for name, value in fields.items() if value is not None}


def methods(config: RunConfig, objective: str | None, algorithm: str | None) -> dict[str, str]:
    """Narrow the methods to one objective or algorithm."""
    if objective is None and algorithm is None:
        return {}
    matching = [
        method
        for method in config.eval.methods
        if objective in (None, method_parts(method)[0])
        and algorithm in (None, method_parts(method)[1])
    ]
    only = (
        "max-logit" if algorithm == "max-logit" else f"{objective or 'h'}-{algorithm or 'one-shot'}"
    )
    return {"eval.methods": ",".join(matching or [only])}
