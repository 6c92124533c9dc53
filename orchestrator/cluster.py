"""Ray: an embedded cluster for this run, or one that is running already."""

import contextlib
import dataclasses
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.actors import RayActors, put
from orchestrator.pool import WorkerPool
from orchestrator.reach import check_reachable
from orchestrator.starting import embedded, own_sigterm
from orchestrator.worker import THREADS, RemoteTaskWorker, WorkerSetup
from supsup.datasets import Dataset
from supsup.errors import ConfigError, UserError, one_line, redacted
from supsup.fused import fused_kernels_here
from supsup.packed import lookup_kernels
from supsup.sparse import sparse_precisions
from supsup.train import native_bf16

#: Seconds in which an autoscaler must have added a node: a machine, an image, packages.
_NODE_SECONDS = 1800.0
#: Seconds in which a worker must have come up where there is room for it.
_START_SECONDS = 300.0
#: Seconds in which a node must have said what it is; kernels are compiled at first.
_ANSWER_SECONDS = 120.0
#: Workers of an embedded cluster that one core can be shared by: each takes about a gigabyte.
_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What workers of a cluster run on."""

    device: str
    native_bf16: bool
    sparse_precisions: tuple[str, ...]
    fused: bool = False
    """Whether the fused engine can be had."""


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


def this_machine(asked: str = "auto") -> Machine:
    """Say what a worker on this machine would run on; warns of what makes it slow.

    Args:
        asked: "auto", or the device that it shall be if it is there.
    """
    lookup_kernels()
    device = "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
    return Machine(
        device=device,
        native_bf16=native_bf16(device),
        sparse_precisions=sparse_precisions(),
        fused=device == "cuda" and fused_kernels_here(),
    )


@contextlib.contextmanager
def connect(
    address: str | None, workers: int | None, device: str, *, look: bool = False
) -> Iterator[Cluster]:
    """Connect to a cluster, and leave it at the end; or prepare one on this machine.

    Args:
        address: "auto" or an address of a running cluster; None embeds one.
        workers: how many workers; None takes the GPUs, else the cores.
        device: "cpu", "cuda" or "auto".
        look: whether no worker will be started: no node is then waited for, nor added.

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
        started = functools.partial(embedded, cores)
        yield _cluster(this_machine(device), gpus, cores, workers, device, started)
        return
    with joined(address):
        elastic = is_elastic()
        machine = _machine(workers, device, elastic, look)
        gpus, cores = _capacity("cuda"), _capacity("cpu") * THREADS
        joined_as = contextlib.nullcontext
        cluster = _cluster(machine, gpus, cores, workers, device, joined_as, True, elastic)
        if not look:
            _say_if_full(cluster)
        yield cluster


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
    if not gpus and machine.device == "cuda" and not (workers or elastic):
        raise UserError(
            "train.device is cuda, but there is no GPU that torch can use; set it to auto, or give "
            "--address"
        )
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
def joined(address: str) -> Iterator[str]:
    """Be a driver of a running cluster; gives its HOST:PORT.

    Raises:
        UserError: if there is none, or it doesn't let this process in.
    """
    place = check_reachable(address)
    try:
        with own_sigterm():
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


def _machine(workers: int | None, device: str, elastic: bool, look: bool) -> Machine:
    """Say what workers of the joined cluster run on; an autoscaler may have to add one first."""
    if elastic and _capacity(device) < 1:
        if workers is None:
            raise UserError(
                "the cluster has no worker yet, and an autoscaler; say how many it is to add: "
                "--workers N"
            )
        if look:
            return _expected(device)
        _await_first_node(device)
    return _probe(device)


def _expected(device: str) -> Machine:
    """Guess what workers will run on that an autoscaler has yet to add, and say so."""
    device = "cuda" if device == "auto" else device
    unit = "GPUs" if device == "cuda" else "cores"
    warnings.warn(
        f"the cluster has no worker yet, so what they run on isn't known; this takes them for "
        f"{unit} that multiply bf16: see train.device, train.precision and train.engine",
        stacklevel=1,
    )
    sparse = () if device == "cuda" else ("bf16", "fp32")
    return Machine(
        device=device, native_bf16=True, sparse_precisions=sparse, fused=device == "cuda"
    )


def _await_first_node(device: str) -> None:
    """Have the autoscaler add a node that can train."""
    minutes = f"{_NODE_SECONDS / 60:.0f} minutes"
    warnings.warn(
        f"the cluster has no worker yet: its autoscaler adds a node, in {minutes} at most",
        stacklevel=1,
    )
    gpus = 1 if device == "cuda" else 0
    ask = ray.remote(this_machine).options(num_cpus=THREADS, num_gpus=gpus)
    try:
        ray.get(ask.remote(), timeout=_NODE_SECONDS)
    except GetTimeoutError:
        raise UserError(
            f"the autoscaler added no node in {minutes}; see ray status, and whether the cloud "
            "has any"
        ) from None


def _probe(device: str) -> Machine:
    """Ask a node that can train what it is. It answers, too, where others have all its cores.

    Raises:
        UserError: if there is none, or it doesn't answer.
    """
    node = _node_for(device)
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # Its process ends with it, which would keep some of a GPU's memory.
    ask: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(this_machine)
    try:
        machine: Machine = ray.get(
            ask.options(scheduling_strategy=there).remote(device), timeout=_ANSWER_SECONDS
        )
    except RayError as error:
        late = isinstance(error, GetTimeoutError)
        why = f"no answer in {_ANSWER_SECONDS:.0f} s" if late else last_line(error)
        raise UserError(
            f"node {node['NodeManagerAddress']} can't take workers ({why}); see supsup doctor "
            "--address, and ray status"
        ) from None
    return machine


def _node_for(device: str) -> dict[str, Any]:
    """Return a node that has the device; for "auto" one with a GPU, if there is any."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    for unit in {"cuda": ("GPU",), "cpu": ("CPU",)}.get(device, ("GPU", "CPU")):
        for node in nodes:
            if node["Alive"] and node["Resources"].get(unit, 0) >= 1:
                return node
    unit = "GPUs" if device == "cuda" else "cores"
    raise UserError(f"the cluster has no node with {unit}; add one, or choose another --address")


def last_line(error: BaseException) -> str:
    """Return the last line of a remote error: the one that names it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redacted(lines[-1])[:160] if lines else type(error).__name__


def _say_if_full(cluster: Cluster) -> None:
    """Warn that workers will have to wait, where others have all that they need."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    units = {"CPU": "cores"} | ({"GPU": "GPUs"} if cluster.machine.device == "cuda" else {})
    taken = [name for unit, name in units.items() if free.get(unit, 0) < 1]
    if taken:
        warnings.warn(
            f"others use all {' and '.join(taken)} of the cluster: this waits for room, "
            f"{cluster.start_seconds / 60:.0f} minutes at most; see ray status",
            stacklevel=1,
        )


def is_elastic() -> bool:
    """Say whether an autoscaler adds nodes to the joined cluster when they are asked for."""
    return is_autoscaler_v2(fetch_from_server=True)


def check_device(device: str, machine: Machine) -> None:
    """Check that the workers have the device that a configuration names.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if device == "cuda" and machine.device != "cuda":
        raise ConfigError("train.device is cuda, but there is no GPU here; set it to cpu")
