"""The whole command line: that of runs, and the sweeps. Heavy modules load when a command runs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator import options
from orchestrator.cli import cli, main
from supsup.config import DATASETS
from supsup.errors import plain

if TYPE_CHECKING:
    from sweeps.work import Options, Outcome

__all__ = ["cli", "main"]

_storage = click.option(
    "--storage",
    metavar="URL",
    envvar="SUPSUP_STORAGE",
    help="database of the study, shared by several drivers: postgresql://... or sqlite:////PATH  "
    "[a journal file in the sweep's folder]",
)
_concurrency = click.option(
    "--concurrency",
    metavar="N",
    type=click.IntRange(1, options.MAX_WORKERS),
    help="trials at the same time, at most  [the workers, and one]",
)
_quick = click.option(
    "--quick", is_flag=True, help="a preset's small variant: on 8x8 digits, a minute or so"
)


@cli.group()
def sweep() -> None:
    """Plan, run and compare many runs: ablations and searches.

    \b
    SPEC is a TOML file (docs/sweeps.md) or a preset:
      fig2                      accuracy against bytes stored, the paper's Figure 2
      fig3-lenet, fig3-fc       H, G and baselines on 250 tasks, Figure 3
      fig4                      2500 tasks, Figure 4
      fig5-rotated, fig5-batche rotated tasks; BatchE with one-shot, Figure 5
      fig6-lenet, fig6-fc       output size by objective, Figure 6
      open-set                  stream, threshold, epsilon, ends looked at
      objective-algorithm, images-per-decision, learning-rate-schedule,
      inference-depth, shortlist-length, width, keep-fraction
    """  # noqa: D301


def _options(*names: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed((*names, options.runs_dir, _storage)):
            command = option(command)
        return command

    return decorate


_plan = (options.worker_options, options.tracking_uri, options.data_dir)
_work = (_concurrency, *_plan)


@sweep.command("plan")
@click.argument("spec", metavar="SPEC")
@_options(_quick, *_plan)
def plan(spec: str, quick: bool, **given: Any) -> None:
    """Say what a sweep would train, evaluate and skip. Nothing runs, nothing is written."""
    from sweeps import session

    _print(session.plan(session.spec_for(spec, quick), _given(given)))


@sweep.command("run")
@click.argument("spec", metavar="SPEC")
@_options(_quick, *_work)
def run(spec: str, quick: bool, **given: Any) -> None:
    """Run a sweep, or go on with it: what is done is not done again."""
    from sweeps import session

    asked, found = session.spec_for(spec, quick), _given(given)
    with _saying_how_to_go_on(asked.name, found.runs_dir):
        outcome = session.run(asked, options=found)
    _finish(outcome, found.runs_dir)


@sweep.command("resume")
@click.argument("name", metavar="NAME")
@_options(*_work)
def resume(name: str, **given: Any) -> None:
    """Go on with the sweep of that NAME, whatever stopped it."""
    from sweeps import session

    found = _given(given)
    with _saying_how_to_go_on(name, found.runs_dir):
        outcome = session.resume(name, found)
    _finish(outcome, found.runs_dir)


@sweep.command("status")
@click.argument("name", metavar="NAME")
@_options()
def status(name: str, **given: Any) -> None:
    """Say how far the sweep of that NAME is."""
    from sweeps import session
    from sweeps.plan import summary_counts

    _, records, table = session.status(name, _given(given))
    _print(table)
    click.echo(", ".join(f"{n} {state}" for state, n in summary_counts(records).items() if n))
    for record in records:
        if record.state == "failed":
            click.echo(f"trial {record.number} failed: {record.reason}")


@sweep.command("report")
@click.argument("name", metavar="NAME")
@_options(options.tracking_uri)
def report(name: str, **given: Any) -> None:
    """Write the tables and pictures of the sweep of that NAME again."""
    from sweeps import session

    found = _given(given)
    _finish(session.report(name, found), found.runs_dir)


@cli.command()
@click.option(
    "--address", metavar="RAY", help="running Ray cluster whose nodes to ask too, such as auto"
)
@options.runs_dir
@options.data_dir
@click.option(
    "--dataset",
    type=click.Choice(DATASETS),
    help="data set that must be there  [whichever are there must be right]",
)
@options.tracking_uri
@_storage
def doctor(storage: str | None, **given: Any) -> None:
    """Say what this machine and a cluster can and can't do, and how to mend it.

    The exit status is 0 if a run would work, else 1.
    """
    from orchestrator.doctor import Question, examine
    from orchestrator.finding import works
    from sweeps import doctor as studies

    given |= {"runs_dir": Path(given["runs_dir"]), "data_dir": given["data_dir"] or ""}
    findings = [*examine(Question(**given)), *studies.storage(storage)]
    marks = {"ok": "green", "warn": "yellow", "fail": "red"}
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = click.style(f"{finding.level:4}", fg=marks[finding.level])
        click.echo(f"{mark}  {finding.what:{width}}  {plain(finding.text)}")
    if not works(findings):
        sys.exit(1)


@contextmanager
def _saying_how_to_go_on(name: str, runs_dir: Path) -> Iterator[None]:
    from sweeps.remedies import again

    try:
        yield
    except KeyboardInterrupt:
        go_on = again("sweep resume", runs_dir, name)
        click.echo(f"stopped; finished blocks are safe, go on with {go_on}", err=True)
        raise


def _given(given: dict[str, Any]) -> "Options":
    from sweeps.work import Options

    data_dir = given.pop("data_dir", None)
    return Options(
        **{
            **given,
            "runs_dir": Path(given["runs_dir"]),
            "data_dir": str(Path(data_dir).absolute()) if data_dir else "",
        }
    )


def _print(table: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)


def _finish(outcome: "Outcome", runs_dir: Path) -> None:
    """Show what came out; exit with 1 if a trial failed."""
    from sweeps.remedies import again

    _print(outcome.table)
    states = ", ".join(f"{n} {state}" for state, n in outcome.counts.items() if n)
    click.echo(f"{states}; {outcome.trained} tasks trained now, {outcome.seconds:.0f} s in all")
    click.echo(f"report      {outcome.files[0].parent}")
    if not outcome.delivered:
        click.echo(
            "MLflow has not got all records; they are kept, and delivered by: "
            + again("sync", runs_dir),
            err=True,
        )
    for text in outcome.failures:
        click.echo(text, err=True)
    if outcome.failures:
        click.echo(f"try again: {again('sweep resume', runs_dir, outcome.name)}", err=True)
        sys.exit(1)
