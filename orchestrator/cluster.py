"""Ray: an embedded cluster for this run, or one that is running already."""

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.autoscaler.v2.utils import is_autoscaler_v2

from orchestrator.actors import RayActors, put
from orchestrator.pool import WorkerPool
from orchestrator.reach import check_reachable
from orchestrator.worker import THREADS, RemoteTaskWorker, WorkerSetup
from supsup.datasets import Dataset
from supsup.errors import ConfigError, RunFailed, UserError, one_line
from supsup.packed import lookup_kernels
from supsup.sparse import sparse_precisions
from supsup.train import native_bf16

#: Seconds in which an autoscaler must have added a node: a machine, an image, packages.
_NODE_SECONDS = 1800.0
#: Seconds in which a worker must have come up where there is room for it.
_START_SECONDS = 300.0
#: Workers of an embedded cluster that one core can be shared by: each takes about a gigabyte.
_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What workers of a cluster run on."""

    device: str
    native_bf16: bool
    sparse_precisions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster, and how many workers the run takes of it."""

    machine: Machine
    workers: int
    started: Callable[[], AbstractContextManager[None]]
    """Gives a context in which Ray runs; an embedded cluster runs in it alone."""
    follows: bool = False
    """Whether workers are started on nodes that are added while the run goes on."""
    elastic: bool = False
    """Whether nodes are added by an autoscaler, which takes its time."""

    def pool(self, start: Callable[[], Any], most: int | None = None) -> WorkerPool:
        """Return a pool of workers, of which ``most`` can ever be of use; ``start`` starts one."""
        actors = RayActors(start, self._room if self.follows else None)
        size = min(self.workers, most or self.workers)
        return WorkerPool(actors, size, most, nobody_seconds=self.start_seconds)

    @property
    def start_seconds(self) -> float:
        """Seconds in which a worker must come up, on a new node if need be."""
        return _NODE_SECONDS if self.elastic else _START_SECONDS

    def _room(self) -> int:
        return _capacity(self.machine.device)

    def start_worker(self, setup: WorkerSetup, data: Any) -> Any:
        """Start one worker actor; ``data`` is the object reference of the data set."""
        gpus = 1 if setup.config.train.device == "cuda" else 0
        options = RemoteTaskWorker.options(num_cpus=THREADS, num_gpus=gpus, max_restarts=0)
        return options.remote(setup, data)


def this_machine() -> Machine:
    """Say what a worker on this machine would run on; warns of what makes it slow."""
    lookup_kernels()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Machine(
        device=device, native_bf16=native_bf16(device), sparse_precisions=sparse_precisions()
    )


@contextlib.contextmanager
def connect(address: str | None, workers: int | None, device: str) -> Iterator[Cluster]:
    """Connect to a cluster, and leave it at the end; or prepare one on this machine.

    Args:
        address: "auto" or an address of a running cluster; None embeds one.
        workers: how many workers; None takes the GPUs, else the cores.
        device: "cpu", "cuda" or "auto".

    Raises:
        UserError: if there is no such cluster, or it lacks what the workers need.
    """
    if address is None:
        own = len(os.sched_getaffinity(0))
        if (workers or 0) > _SHARE * own:
            raise UserError(
                f"--workers {workers} needs as many cores; this machine has {own}, each of which "
                f"{_SHARE} workers can share at most; lower --workers, or give --address"
            )
        cores = max(own, (workers or 0) * THREADS)
        gpus = torch.cuda.device_count()
        started = functools.partial(_embedded, cores)
        yield _cluster(this_machine(), gpus, cores, workers, device, started)
        return
    with joined(address):
        elastic = is_elastic()
        if elastic:
            _await_first_node(workers, device)
        gpus, cores = _capacity("cuda"), _capacity("cpu") * THREADS
        machine = _probe(gpus)
        joined_as = contextlib.nullcontext
        yield _cluster(machine, gpus, cores, workers, device, joined_as, True, elastic)


def _cluster(
    machine: Machine,
    gpus: int,
    cores: int,
    workers: int | None,
    device: str,
    started: Callable[[], AbstractContextManager[None]],
    follows: bool = False,
    elastic: bool = False,
) -> Cluster:
    """Return the cluster, checked for what the workers need."""
    if device != "auto":
        machine = dataclasses.replace(machine, device=device)
    capacity = gpus if machine.device == "cuda" else cores // THREADS
    if capacity < (workers or 1) and not elastic:
        unit = "GPUs" if machine.device == "cuda" else "cores"
        raise UserError(
            f"--workers {workers or 1} needs as many {unit}, the cluster has {capacity}; "
            "lower --workers, add nodes, or choose another --train.device"
        )
    return Cluster(
        machine=machine,
        workers=workers or capacity,
        started=started,
        follows=follows and workers is None,
        elastic=elastic,
    )


def _capacity(device: str) -> int:
    """Return how many workers the nodes of the joined cluster have room for in all."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    return gpus if device == "cuda" else cores // THREADS


def put_data(data: Dataset) -> Any:
    """Put the data set into the object store, once for all workers."""
    return put(data)


@contextlib.contextmanager
def _embedded(cores: int) -> Iterator[None]:
    """Run a private cluster whose files vanish with it."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        # A token of its own; Ray would leave one in the home folder.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folders: list[Path] = []
    try:
        for last in (False, False, True):
            folders.append(Path(tempfile.mkdtemp(prefix="supsup-")))
            if _start_local(cores, folders[-1], last):
                break
        yield
    finally:
        ray.shutdown()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _start_local(cores: int, folder: Path, last: bool) -> bool:
    """Start Ray on this machine; return False if it was too busy for that.

    Raises:
        RunFailed: if so, and this is the last try.
    """
    try:
        with _own_signal_handler():
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
    # Ray has no class of its own for this.
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        _end_processes(folder)
        if last:
            raise RunFailed(
                "Ray did not start on this machine in three times 30 s; it may be too busy: give "
                "the command again once it is not"
            ) from None
        return False
    return True


def _end_processes(folder: Path) -> None:
    """End what was started of a Ray that keeps its files in a folder."""
    ray.shutdown()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(folder) in word for word in process.cmdline()):
                process.kill()


@contextlib.contextmanager
def joined(address: str) -> Iterator[str]:
    """Be a driver of a running cluster; gives its HOST:PORT.

    Raises:
        UserError: if there is none, or it doesn't let this process in.
    """
    place = check_reachable(address)
    try:
        with _own_signal_handler():
            ray.init(address=place, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the Ray cluster at {place} can't be used from here ({one_line(error)}); give the "
            "command on one of its nodes, or by ray job submit"
        ) from None
    try:
        yield place
    finally:
        ray.shutdown()


def _await_first_node(workers: int | None, device: str) -> None:
    """Have the autoscaler add a node that can train, unless there is one."""
    gpus = 1 if device == "cuda" else 0
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if resources.get("GPU" if gpus else "CPU", 0) >= 1:
        return
    if workers is None:
        raise UserError(
            "the cluster has no worker yet, and an autoscaler; say how many it is to add: "
            "--workers N"
        )
    ask = ray.remote(this_machine).options(num_cpus=THREADS, num_gpus=gpus)
    try:
        ray.get(ask.remote(), timeout=_NODE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"the autoscaler added no node in {_NODE_SECONDS / 60:.0f} minutes; see ray status, "
            "and whether the cloud has any"
        ) from None


def is_elastic() -> bool:
    """Say whether an autoscaler adds nodes to the joined cluster when they are asked for."""
    return is_autoscaler_v2(fetch_from_server=True)


@contextlib.contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep what SIGTERM does: Ray puts a handler of its own there, which ends in an abort."""
    stop = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, stop)


def _probe(gpus: int) -> Machine:
    """Ask a node of the cluster, with a GPU if there is one, what it is."""
    ask = ray.remote(this_machine).options(num_cpus=1, num_gpus=1 if gpus else 0)
    machine: Machine = ray.get(ask.remote())
    return machine


def check_device(device: str, machine: Machine) -> None:
    """Check that the workers have the device that a configuration names.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if device == "cuda" and machine.device != "cuda":
        raise ConfigError("train.device is cuda, but there is no GPU here; set it to cpu")
