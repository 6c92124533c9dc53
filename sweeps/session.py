"""One sweep command's work from start to end: check, lock, plan, work, report.

runs/sweeps/NAME/  sweep.json      what was asked for
                   study.journal   the study, unless it is in a database (sweeps.storage)
                   trials/NNNN/    what MLflow is to show of a trial
                   report/         tables and pictures
                   records.jsonl   what MLflow is to show of the sweep

Everything that a user can get wrong is checked before anything is written.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.cluster import Cluster, connect
from orchestrator.defaults import private_files
from orchestrator.runfolder import SWEEPS, check_name, check_runs_dir
from orchestrator.tracking import store_for
from supsup.bank import locked
from supsup.config import checkpoints
from supsup.errors import ConfigError, UserError
from supsup.files import write_atomically
from sweeps import plan as planning
from sweeps import report as reporting
from sweeps.banks import Banks, Site
from sweeps.calibrate import with_calibration
from sweeps.plan import Cell, Plan, pruning
from sweeps.presets import NAMES, preset
from sweeps.progress import SweepProgress, progress
from sweeps.remedies import naming_the_remedy
from sweeps.spec import SweepSpec, read_spec, spec_of, to_tree
from sweeps.storage import JOURNAL, check_storage, open_storage, public, repair
from sweeps.study import Record, SweepStudy, in_turn, latest, read_records
from sweeps.tracking import Deliveries
from sweeps.work import Options, Outcome, SweepWork, ending, outcome_of, parent_tracker, show

_MASKED = ":***@"


def spec_for(text: str, quick: bool = False) -> SweepSpec:
    """Return the sweep that a preset's name or a TOML file's path stands for.

    Raises:
        ConfigError: if it is neither, or the file is wrong.
    """
    if text in NAMES:
        return preset(text, quick)
    path = Path(text)
    if quick:
        raise ConfigError(f"--quick is for presets, {text} is none: {', '.join(NAMES)}")
    if path.suffix == ".toml" or path.exists():
        return read_spec(path)
    return preset(text)


def plan(spec: SweepSpec, options: Options) -> Table:
    """Return what a sweep would do. Writes nothing.

    Raises:
        UserError: if it can't be done.
    """
    store_for(options.tracking_uri, options.runs_dir)
    with _cluster(spec, options, look=True) as cluster:
        site = Site(cluster.machine, options.data_dir)
        records = _known_records(spec, options)
        rates = planning.recorded_rates(options.runs_dir)
        if spec.search is not None:
            ends = planning.search_ends(spec, site)
            if options.address is None:
                rates = with_calibration(rates, ends, site)
            seconds = planning.most_seconds(spec, ends, rates, cluster.workers)
            return planning.search_table(spec, records, seconds, cluster.workers)
        banks = Banks(options.runs_dir, spec.recipe)
        cells = planning.grid_cells(spec, site)
        planned = _plan(spec, cells, records, rates, banks)
        if options.address is None and planned.train:
            to_train = [item.cell.config for item in planned.cells if item.train]
            rates = with_calibration(rates, to_train, site)
            planned = _plan(spec, cells, records, rates, banks)
        return planning.table(planned, cluster.workers, cluster.machine.device)


def run(
    spec: SweepSpec | Mapping[str, Any] | str,
    *,
    quick: bool = False,
    options: Options | None = None,
    shown: SweepProgress | None = None,
) -> Outcome:
    """Run a sweep, or go on with it.

    Args:
        spec: a specification, its nested plain values, a preset's name or a TOML file's path.
        quick: a preset's small variant.
        options: where everything is; None: in ./runs, on this machine.
        shown: where progress goes; None: the error stream.

    Raises:
        UserError: if something is asked that can't be done; nothing is written then.
    """
    if isinstance(spec, str):
        spec = spec_for(spec, quick)
    elif not isinstance(spec, SweepSpec):
        spec = spec_of(spec)
    options = options or Options()
    check_runs_dir(options.runs_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(private_files())
        shown = shown or stack.enter_context(progress())
        cluster = stack.enter_context(_cluster(spec, options))
        return work(spec, options, cluster, shown)


def work(spec: SweepSpec, options: Options, cluster: Cluster, shown: SweepProgress) -> Outcome:
    """Run a sweep on a cluster: see ``run``."""
    started = time.time()
    store = store_for(options.tracking_uri, options.runs_dir)
    if options.storage:
        check_storage(options.storage)
    site = Site(cluster.machine, options.data_dir)
    cells = [] if spec.search else planning.grid_cells(spec, site)
    planning.search_ends(spec, site)
    folder = options.runs_dir / SWEEPS / spec.name
    if options.storage:
        # A database that can't be reached is said before anything is written.
        open_storage(options.storage, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        study = _study(spec, options, folder)
        _write_request(folder, spec, options)
        banks = Banks(options.runs_dir, spec.recipe)
        if cells:
            rates = planning.recorded_rates(options.runs_dir)
            planned = _plan(spec, cells, study.records(), rates, banks)
            shown.note(planning.line(planned, cluster.workers))
            shown.expect(planned.train)
            order = in_turn([cell.fingerprint for cell in cells])
            study.enqueue([cells[i].params for i in order])
        else:
            again = study.retry_failed()
            retried = f"; {again} that failed are tried again" if again else ""
            shown.note(f"sweep {spec.name}: a search, {pruning(spec)}{retried}")
        deliveries = Deliveries(store, shown.note)
        sweep = SweepWork(spec, options, cluster, site, banks, folder, study, deliveries, shown)
        with naming_the_remedy(spec.name, options.runs_dir):
            return sweep.work(started)


def resume(name: str, options: Options, shown: SweepProgress | None = None) -> Outcome:
    """Go on with a sweep that was begun.

    Raises:
        UserError: if there is no such sweep.
    """
    spec, options = request(name, options)
    return run(spec, options=options, shown=shown)


def status(name: str, options: Options) -> tuple[SweepSpec, list[Record], Table]:
    """Return a sweep's specification, trials and comparison. Writes nothing."""
    spec, options = request(name, options)
    records = latest(_known_records(spec, options))
    return spec, records, reporting.table(spec, records)


def report(name: str, options: Options) -> Outcome:
    """Write a sweep's report, and hand it to MLflow.

    Raises:
        UserError: if there is no such sweep, or it is running.
    """
    started = time.time()
    spec, options = request(name, options)
    folder = options.runs_dir / SWEEPS / name
    with locked(folder):
        study = _study(spec, options, folder)
        deliveries = Deliveries(store_for(options.tracking_uri, options.runs_dir))
        parent = parent_tracker(study, deliveries, folder, spec)
        files = show(spec, study, folder, parent)
        parent.close(ending(study.records()), {})
        return outcome_of(spec, study, files, 0, started, deliveries.close())


def _write_request(folder: Path, spec: SweepSpec, options: Options) -> None:
    body = {
        "spec": to_tree(spec),
        "data_dir": options.data_dir,
        "tracking_uri": options.tracking_uri,
        "storage": public(options.storage) if options.storage else None,
    }
    write_atomically(folder / "sweep.json", json.dumps(body, indent=1).encode())


def request(name: str, options: Options) -> tuple[SweepSpec, Options]:
    """Return the sweep of that name, and the options that it was begun with where none are given.

    Raises:
        UserError: if there is no such sweep, or its file is damaged.
    """
    check_name("sweep", name)
    file = options.runs_dir / SWEEPS / name / "sweep.json"
    try:
        body = json.loads(file.read_bytes())
        spec = spec_of(body["spec"])
        storage = options.storage or body["storage"]
        known = Options(
            runs_dir=options.runs_dir,
            data_dir=options.data_dir or body["data_dir"],
            tracking_uri=options.tracking_uri or body["tracking_uri"],
            storage=storage,
            workers=options.workers,
            address=options.address,
            concurrency=options.concurrency,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no sweep {name} in {options.runs_dir}; begin it with supsup sweep run"
        ) from None
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; give supsup sweep run with the sweep again") from None
    if storage and _MASKED in storage:
        raise ConfigError(
            f"the storage {storage} needs its password, which isn't kept; "
            "give --storage or $SUPSUP_STORAGE again"
        )
    return spec, known


def _known_records(spec: SweepSpec, options: Options) -> list[Record]:
    """Return the trials of a sweep that may not have begun. Writes nothing."""
    folder = options.runs_dir / SWEEPS / spec.name
    if options.storage is None and not (folder / JOURNAL).exists():
        return []
    return read_records(spec, open_storage(options.storage, folder))


def _study(spec: SweepSpec, options: Options, folder: Path) -> SweepStudy:
    """Open the study of a sweep whose folder is locked."""
    if options.storage is None:
        repair(folder)
    return SweepStudy(
        spec,
        open_storage(options.storage, folder),
        checkpoints(spec.first()),
        shared=options.storage is not None,
    )


def _plan(
    spec: SweepSpec,
    cells: list[Cell],
    records: list[Record],
    rates: Mapping[tuple[Any, ...], float],
    banks: Banks,
) -> Plan:
    states = planning.bank_states(banks, cells)
    return planning.plan(spec, cells, states, records, rates)


@contextmanager
def _cluster(spec: SweepSpec, options: Options, look: bool = False) -> Iterator[Cluster]:
    """Connect to the workers; all arms run on the same kind. ``look``: no worker is started."""
    device = "auto" if "train.device" in spec.varied else spec.first().train.device
    with connect(options.address, options.workers, device, look=look) as cluster:
        yield cluster
