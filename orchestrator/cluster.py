"""Ray: an embedded cluster for this run, or one that is running already."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from orchestrator.worker import THREADS, RemoteTaskWorker, WorkerSetup
from supsup.datasets import Dataset
from supsup.errors import ConfigError, UserError, one_line
from supsup.train import native_bf16

_REACH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What workers of a cluster run on."""

    device: str
    native_bf16: bool


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connected cluster and how many workers the run takes of it."""

    machine: Machine
    workers: int

    def start_worker(self, setup: WorkerSetup, data: Any) -> Any:
        """Start one worker actor; ``data`` is the object reference of the data set."""
        gpus = 1 if setup.config.train.device == "cuda" else 0
        options = RemoteTaskWorker.options(num_cpus=THREADS, num_gpus=gpus, max_restarts=0)
        return options.remote(setup, data)


def this_machine() -> Machine:
    """Say what a worker on this machine would run on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Machine(device=device, native_bf16=native_bf16(device))


@contextlib.contextmanager
def connect(address: str | None, workers: int | None, device: str) -> Iterator[Cluster]:
    """Connect to a cluster, or start one on this machine, and leave it at the end.

    Args:
        address: "auto" or an address of a running cluster; None starts one.
        workers: how many workers; None takes the GPUs, else the cores.
        device: "cpu", "cuda" or "auto".

    Raises:
        UserError: if there is no such cluster, or it lacks what the workers need.
    """
    stop = signal.getsignal(signal.SIGTERM)
    with _embedded(workers) if address is None else _running(address):
        # Ray puts a handler of its own there, which ends in an abort.
        signal.signal(signal.SIGTERM, stop)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        machine = this_machine() if address is None else _probe(gpus)
        if device != "auto":
            machine = Machine(device=device, native_bf16=machine.native_bf16)
        capacity = gpus if machine.device == "cuda" else cores // THREADS
        if capacity < (workers or 1):
            unit = "GPUs" if machine.device == "cuda" else "cores"
            raise UserError(
                f"--workers {workers or 1} needs as many {unit}, the cluster has {capacity}; "
                "lower --workers, add nodes, or choose another --train.device"
            )
        yield Cluster(machine=machine, workers=workers or capacity)


def put_data(data: Dataset) -> Any:
    """Put the data set into the object store, once for all workers."""
    return ray.put(data)


@contextlib.contextmanager
def _embedded(workers: int | None) -> Iterator[None]:
    """Run a private cluster whose files vanish with it."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        # A token of its own; Ray would leave one in the home folder.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = Path(tempfile.mkdtemp(prefix="supsup-"))
    cores = len(os.sched_getaffinity(0))
    try:
        ray.init(
            address="local",
            num_cpus=max(cores, (workers or 0) * THREADS),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(address: str) -> Iterator[None]:
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at {address!r} ({one_line(error)}); start one with "
            "ray start --head, or leave --address out"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Fail at once where nobody listens: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at {address!r} ({one_line(error)}); start one with "
            "ray start --head, or leave --address out"
        ) from None


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
