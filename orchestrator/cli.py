"""The command line. Heavy modules are imported when a command runs, so that help is quick."""

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import supsup
from orchestrator import options
from orchestrator.defaults import UMASK, quiet_and_closed
from supsup.baselines.settings import learner_values
from supsup.config import RunConfig
from supsup.errors import ConfigError, RunFailed, UserError, near, plain, redacted, shown
from supsup.fields import as_text, get_field, with_values
from supsup.recipes import ANY_FOLDER, PROTOCOLS, RECIPES, protocol_values
from supsup.recipes import quick as quick_values

if TYPE_CHECKING:
    from orchestrator.runfolder import Launch
    from orchestrator.session import Where
    from orchestrator.work import Outcome

_INTERRUPTED, _TERMINATED = 130, 143
#: What a full or broken disk says, and what to say then.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_SAFE = "what is finished is safe, mend the disk and go on with supsup resume"


# --- commands --------------------------------------------------------------------------------


@click.group(context_settings={"max_content_width": 110, "token_normalize_func": options.dashes})
@click.version_option(supsup.__version__)
def cli() -> None:
    """Run SupSup (Supermasks in Superposition) on a laptop or a Ray cluster."""
    os.umask(UMASK)
    warnings.formatwarning = lambda text, *_args, **_names: f"warning: {redacted(str(text))}\n"
    quiet_and_closed()


@cli.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--name", help="name of the run  [recipe and fingerprint]")
@click.option(
    "--quick",
    is_flag=True,
    help="fewer tasks, batches and test images: minutes on 2 cores; says what it changes",
)
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOLS)),
    default="default",
    show_default=True,
    help="paper: train and decide as the paper does in its experiments of this kind",
)
@options.method_options
@options.worker_options
@options.runs_dir
@options.data_dir
@options.tracking_uri
@options.field_options(("",))
def run(
    recipe: str,
    name: str | None,
    quick: bool,
    protocol: str,
    objective: str | None,
    algorithm: str | None,
    workers: int | None,
    address: str | None,
    runs_dir: str,
    data_dir: str | None,
    tracking_uri: str | None,
    **fields: str | None,
) -> None:
    """Train the masks of a RECIPE and evaluate them; go on if they are partly trained.

    What RECIPEs there are, and their settings, is said by: supsup recipes

    A run with the same training settings as an existing one continues it: asking for 100 tasks
    after 50 trains the other 50.
    """
    given = options.given(fields)
    made = _recipe(recipe)
    config = with_values(made(), {**protocol_values(protocol, recipe), **learner_values(given)})
    if quick:
        config = _quick(config, given)
    config = with_values(config, given)
    config = with_values(config, options.methods(config, objective, algorithm))
    if config.dataset == ANY_FOLDER:
        raise ConfigError(
            f"recipe {recipe} needs a data set: give --dataset images:DIR, a folder with train/ "
            "and test/, and in them a folder of images per class"
        )
    launch = _launch(recipe, config, data_dir, tracking_uri)
    _run(_where(runs_dir, workers, address), launch, name)


@cli.command()
@click.argument("name", metavar="[NAME]", required=False)
def recipes(name: str | None) -> None:
    """List the recipes, or say all that the recipe NAME sets."""
    from orchestrator.recipe_list import all_recipes, one_recipe

    click.echo(one_recipe(name, _recipe(name)) if name else all_recipes())


@cli.command()
@click.argument("name", metavar="RUN")
@options.worker_options
@options.runs_dir
@options.data_dir
@options.tracking_uri
def resume(
    name: str,
    workers: int | None,
    address: str | None,
    runs_dir: str,
    data_dir: str | None,
    tracking_uri: str | None,
) -> None:
    """Go on where a RUN stopped, whatever stopped it."""
    import dataclasses

    from orchestrator.runfolder import RunFolder

    launch = RunFolder(Path(runs_dir), name).read_launch()
    launch = dataclasses.replace(
        launch,
        data_dir=_absolute(data_dir) or launch.data_dir,
        tracking_uri=tracking_uri or launch.tracking_uri,
    )
    _run(_where(runs_dir, workers, address), launch, name)


@cli.command("eval")
@click.argument("name", metavar="RUN")
@options.method_options
@click.option("--scenario", metavar="VALUE", help="gns or gnu  [the run's]")
@options.worker_options
@options.runs_dir
@options.data_dir
@options.tracking_uri
@options.field_options(("eval.",))
def evaluate(
    name: str,
    objective: str | None,
    algorithm: str | None,
    workers: int | None,
    address: str | None,
    runs_dir: str,
    data_dir: str | None,
    tracking_uri: str | None,
    **fields: str | None,
) -> None:
    """Evaluate the masks of a RUN again, without training. Settings not given are the run's."""
    from orchestrator import session
    from orchestrator.progress import reporter
    from orchestrator.runfolder import RunFolder

    where = _where(runs_dir, workers, address)
    launch = RunFolder(where.runs_dir, name).read_launch()
    given = options.given(fields)
    config = with_values(launch.config, given)
    settings = given | options.methods(config, objective, algorithm)
    with _saying_how_to_go_on(None), reporter() as report:
        outcome = session.evaluate(where, name, settings, _absolute(data_dir), tracking_uri, report)
    _finish(outcome, runs_dir)


@cli.group()
def bank() -> None:
    """Look into the mask bank of a run."""


@bank.command("info")
@click.argument("name", metavar="RUN")
@options.runs_dir
def bank_info(name: str, runs_dir: str) -> None:
    """Say what the bank of a RUN holds."""
    from orchestrator.bank_info import bank_info as said

    for key, value in said(_open_bank(runs_dir, name)):
        click.echo(f"{key:12} {value}")


@bank.command("verify")
@click.argument("name", metavar="RUN")
@options.runs_dir
def bank_verify(name: str, runs_dir: str) -> None:
    """Read every mask of a RUN, check it, and print the SHA-256 over all masks."""
    from orchestrator.blocks import learned_prefix
    from orchestrator.progress import reporter
    from supsup.bank import Damage

    opened = _open_bank(runs_dir, name)
    if opened.manifest.config.learner != "supsup":
        _verify_learned(opened, name, runs_dir)
        return
    damaged = []
    with reporter() as report:
        report.start("tasks read", sum(len(tasks) for tasks, _ in opened.blocks()))
        for tasks, found in opened.verify():
            report.advance("tasks read", len(tasks))
            damaged += [found] if isinstance(found, Damage) else []
    for damage in damaged:
        click.echo(f"damaged: {damage}")
    if damaged:
        again = f"repair with: {_again('resume', name, runs_dir)}"
        if opened.manifest.config.scenario == "nns":
            again = "a mask of an open-set run can't be trained again alone"
        click.echo(f"the other tasks are readable; {again}")
        sys.exit(1)
    blocks = [tasks for tasks, _ in opened.blocks()]
    learned = learned_prefix(blocks)
    behind = [tasks.start for tasks in blocks if tasks.start > learned]
    if behind:
        click.echo(
            f"tasks {learned} to {min(behind) - 1} are missing, though later ones are there: "
            f"{_again('resume', name, runs_dir)}"
        )
    if learned:
        click.echo(f"{learned} tasks, SHA-256 of their masks {opened.sha256(learned)}")
    else:
        click.echo("no tasks yet")


def _verify_learned(opened: Any, name: str, runs_dir: str) -> None:
    from orchestrator.work import shelf_of

    problems = [problem for _, problem in shelf_of(opened).stock()]
    damaged = [problem for problem in problems if problem]
    for problem in damaged:
        click.echo(f"damaged: {problem}")
    if damaged:
        click.echo(f"repair with: {_again('resume', name, runs_dir)}")
        sys.exit(1)
    click.echo(f"{len(problems)} tasks, all sound" if problems else "no tasks yet")


@cli.command()
@options.runs_dir
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(runs_dir: str, port: int) -> None:
    """Open the MLflow page on the store of the runs folder (this machine alone can see it)."""
    from orchestrator.ui import serve

    serve(Path(runs_dir), port)


@cli.command()
@click.argument("names", metavar="[RUN...|all]", nargs=-1)
@options.runs_dir
@options.tracking_uri
def sync(names: tuple[str, ...], runs_dir: str, tracking_uri: str | None) -> None:
    """Deliver to MLflow what it has not got yet of some runs and sweeps, or of all.

    Runs that a kill left RUNNING there are KILLED afterwards; those at work are left alone.
    """
    from orchestrator.sync import sync

    nothing = True
    for delivery in sync(Path(runs_dir), names, tracking_uri):
        nothing = False
        click.echo(plain(str(delivery)))
    if nothing:
        click.echo("MLflow has everything already")


# --- what the commands share -----------------------------------------------------------------


def _recipe(name: str) -> Callable[[], RunConfig]:
    if name not in RECIPES:
        raise ConfigError(
            f"recipe is {shown(name)}, must be one of {', '.join(RECIPES)}{near(name, RECIPES)}"
        )
    return RECIPES[name]


def _quick(config: RunConfig, given: dict[str, Any]) -> RunConfig:
    """Shrink a configuration in all that was not given; say how."""
    changes = {name: value for name, value in quick_values(config).items() if name not in given}
    small = with_values(config, changes)
    said = ", ".join(
        f"{name} {as_text(get_field(small, name))} instead of {as_text(get_field(config, name))}"
        for name in changes
    )
    click.echo(f"quick: {said or 'nothing to shrink'}", err=True)
    return small


def _where(runs_dir: str, workers: int | None, address: str | None) -> "Where":
    from orchestrator.session import Where

    return Where(runs_dir=Path(runs_dir), workers=workers, address=address)


def _absolute(data_dir: str | None) -> str | None:
    """Return the folder in a form that a later resume understands from anywhere."""
    return str(Path(data_dir).absolute()) if data_dir else None


def _launch(
    recipe: str, config: RunConfig, data_dir: str | None, tracking_uri: str | None
) -> "Launch":
    from orchestrator.runfolder import Launch

    return Launch(
        recipe=recipe,
        config=config,
        data_dir=_absolute(data_dir) or "",
        tracking_uri=tracking_uri,
    )


def _run(where: "Where", launch: "Launch", name: str | None) -> None:
    from orchestrator import session
    from orchestrator.progress import reporter

    with _saying_how_to_go_on(name), reporter() as report:
        outcome = session.run(where, launch, name, report)
    _finish(outcome, str(where.runs_dir))


def _finish(outcome: "Outcome", runs_dir: str) -> None:
    """Show what came out; exit with 1 if something failed."""
    from rich.console import Console

    if outcome.table:
        Console(highlight=False).print(outcome.table)
    first = outcome.first_result_seconds
    after = f" (first result after {first:.0f} s)" if first else ""
    click.echo(f"{outcome.summary}, {outcome.seconds:.0f} s in all{after}")
    for path in outcome.files:
        if path.suffix == ".png":
            click.echo(f"picture     {path}")
    click.echo(f"mask bank   {outcome.folder.path} ({outcome.bank_bytes / 1e6:.1f} MB)")
    elsewhere = outcome.store.given
    click.echo(f"results     {redacted(elsewhere) if elsewhere else _again('ui', '', runs_dir)}")
    if not outcome.delivered:
        click.echo(
            "MLflow has not got all records; they are kept, and delivered by: "
            + _again("sync", outcome.folder.name, runs_dir),
            err=True,
        )
    if outcome.failures:
        for text in outcome.failures:
            click.echo(text, err=True)
        click.echo(f"try again: {_again('resume', outcome.folder.name, runs_dir)}", err=True)
        sys.exit(1)


def _again(command: str, name: str, runs_dir: str) -> str:
    words = ["supsup", command, name] if name else ["supsup", command]
    return " ".join(words if runs_dir == "runs" else [*words, "--runs-dir", runs_dir])


def _open_bank(runs_dir: str, name: str) -> Any:
    from orchestrator.runfolder import RunFolder, no_such
    from supsup.bank import Bank

    folder = RunFolder(Path(runs_dir), name)
    if not folder.path.is_dir():
        raise no_such("run", name, Path(runs_dir))
    return Bank.open(folder.path)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, taken the way that Ctrl-C is."""

    arrived = False
    """Whether it ever came: on its way up it may become a plain KeyboardInterrupt."""


def _terminate(*_: object) -> None:
    _Terminated.arrived = True
    raise _Terminated


@contextmanager
def _saying_how_to_go_on(name: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        go_on = f"supsup resume {name}" if name else "the same command"
        click.echo(f"stopped; finished blocks are safe, go on with {go_on}", err=True)
        raise


def main() -> None:
    """Run the command line; errors of the user are one line and exit status 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(standalone_mode=False)
    except RunFailed as error:
        _fail(str(error), status=1)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = f"{error.filename} can't be written" if error.filename else "a disk fails"
        _fail(f"{place}: {error.strerror}; {_SAFE}", status=1)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        sys.exit(_TERMINATED if _Terminated.arrived else _INTERRUPTED)


def _fail(message: str, status: int = 2) -> None:
    click.echo(f"supsup: {plain(message)}", err=True)
    sys.exit(status)
