"""The worker of a sweep: serves the runs of many configurations. Ray wraps it in one line."""

import dataclasses
from collections import OrderedDict
from typing import Any

import ray

from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset


def setup_for(config: RunConfig, weights_sha256: str) -> WorkerSetup:
    """Return what a worker must know of a run: equal for all runs of one bank."""
    shaping = dataclasses.replace(config, block_size=1, eval=EvalConfig())
    if config.scenario != "nns":  # where the number of tasks is part of the stream
        shaping = dataclasses.replace(shaping, tasks=1, scenario="gg")
    return WorkerSetup(config=shaping, weights_sha256=weights_sha256)


class SweepWorker:
    """Keeps a few of the runs' workers, those that were used last."""

    def __init__(self, keep: int) -> None:
        """Begin with none; keep at most so many."""
        self._keep = keep
        self._workers: OrderedDict[WorkerSetup, TaskWorker] = OrderedDict()

    def call(self, setup: WorkerSetup, data: Dataset, method: str, *args: Any) -> Any:
        """Call a method of a run's ``TaskWorker``."""
        return getattr(self._worker(setup, data), method)(*args)

    def _worker(self, setup: WorkerSetup, data: Dataset) -> TaskWorker:
        if setup not in self._workers:
            self._workers[setup] = TaskWorker(setup, data)
        self._workers.move_to_end(setup)
        if len(self._workers) > self._keep:
            self._workers.popitem(last=False)
        return self._workers[setup]


RemoteSweepWorker = ray.remote(SweepWorker)
