"""How long a batch of a task takes on this machine, measured where no run has recorded it."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from orchestrator.worker import THREADS
from supsup.apprentice import LocalTrainer, initial_state
from supsup.baselines.asking import make_learner
from supsup.config import RunConfig
from supsup.fields import with_values
from supsup.identity import training_fields
from supsup.material import layers_of
from supsup.streams import Stream
from supsup.train import BlockTrainer
from sweeps.banks import Site
from sweeps.plan import cost_key

#: Steps before the clock starts, and the seconds that are timed at least.
_WARM_STEPS, _TIMED_SECONDS = 3, 0.5
#: Steps that another learner is timed for.
_LEARNER_STEPS = 20


def with_calibration(
    rates: Mapping[tuple[Any, ...], float], configs: Iterable[RunConfig], site: Site
) -> dict[tuple[Any, ...], float]:
    """Return the rates, and those of configurations that have none, measured now.

    Args:
        rates: seconds per batch of a task on one worker, by ``plan.cost_key``.
        configs: resolved configurations.
        site: this machine, with the data sets.
    """
    known = dict(rates)
    for config in configs:
        key = cost_key(training_fields(config))
        if key not in known:
            known[key] = _seconds_per_batch(config, site)
    return known


def _seconds_per_batch(config: RunConfig, site: Site) -> float:
    """Train some tasks for a moment, as a worker would."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        if config.learner != "supsup":
            return _seconds_of_a_learner(config, site)
        if config.scenario == "nns":
            return _seconds_of_one_mask(config, site)
        engine = BlockTrainer(config, site.data(config)).engine
        tasks = min(engine.tasks_at_once, config.block_size, config.tasks)
        group, batches = engine.begin(range(tasks)), config.train.batches
        for number in range(_WARM_STEPS):
            group.step(number % batches)
        _finish(config)
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < _TIMED_SECONDS:
            group.step(steps % batches)
            steps += 1
        _finish(config)
        return (time.perf_counter() - started) / steps / tasks
    finally:
        torch.set_num_threads(threads)


def _finish(config: RunConfig) -> None:
    """Wait until a GPU has done what it was told."""
    if config.train.device == "cuda":
        torch.cuda.synchronize()


def _seconds_of_one_mask(config: RunConfig, site: Site) -> float:
    """Train a mask on the beginning of its stream for a moment: masks of a stream go one by one."""
    data = site.data(config)
    trainer, stream = LocalTrainer(config, data), Stream(config, data)
    segment = stream.segment(0)
    batches = len(segment.labels_N) // segment.batch_size
    start = initial_state(config, layers_of(config, data), 0)
    trainer.train(0, stream.segment(0, _WARM_STEPS), start)
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < _TIMED_SECONDS:
        trainer.train(0, segment, start)
        rounds += 1
    return (time.perf_counter() - started) / rounds / min(batches, config.train.batches)


def _seconds_of_a_learner(config: RunConfig, site: Site) -> float:
    """Have another learner learn its first task, in few batches and more: the rest is testing."""
    data, seconds = site.data(config), {}
    for batches in (1, _WARM_STEPS, _WARM_STEPS + _LEARNER_STEPS):
        learner = make_learner(with_values(config, {"train.batches": batches}), data)
        seconds[batches] = learner.learn(0, None, look_back=False).seconds
    few, more = sorted(seconds)[1:]
    return max(0.0, seconds[more] - seconds[few]) / (more - few)
