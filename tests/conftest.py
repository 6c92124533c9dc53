"""Shared small things: real digits, configurations that train in a moment, one Ray."""

import os

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

import torch

if not torch.cuda.is_available():
    # Before Triton is imported, by torch.compile too: its interpreter runs the GPU's kernels.
    os.environ["TRITON_INTERPRET"] = "1"

import socket
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from orchestrator.cluster import Cluster, connect
from supsup.bank import Bank
from supsup.config import RunConfig
from supsup.datasets import Dataset, load_dataset
from supsup.fields import with_values
from supsup.manifest import make_manifest
from supsup.streams import Stream
from supsup.train import BlockTrainer, TrainedBlock
from tests.streaming import Recorder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def figures(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows what a test measured, whatever pytest does with its output."""

    def show(text: str) -> None:
        with capfd.disabled():
            sys.stderr.write(f"\n[figures] {text}\n")

    return show


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", None)


@pytest.fixture(scope="session")
def digits_16() -> Dataset:
    return load_dataset("digits-16", None)


@pytest.fixture(scope="session")
def quick() -> RunConfig:
    """Eight tasks of digits that take milliseconds each; resolved, fp32 on every machine."""
    values = {
        "tasks": 8,
        "dataset": "digits",
        "block_size": 3,
        "model.output_size": 30,
        "train.batches": 12,
        "train.learning_rate": 5e-3,
        "train.precision": "fp32",
        "train.device": "cpu",
        "train.engine": "dense",
        "eval.images": 20,
        "eval.at": "4",
        "eval.methods": "h-shortlist,g-one-shot",
        "eval.shortlist": 3,
    }
    return with_values(RunConfig(), values)


@pytest.fixture(scope="session")
def open_config(quick):
    """Four tasks of 16x16 digits, 60 batches each, a decision every 20."""
    values = {
        "scenario": "nns",
        "openset.depth": 1,
        "dataset": "digits-16",
        "tasks": 4,
        "train.batches": 60,
        "train.learning_rate": 1e-3,
        "model.output_size": 500,
        "openset.decide_every": 20,
        "openset.budget": 50,
        "eval.at": "4",
    }
    return with_values(quick, values)


@pytest.fixture(scope="session")
def learned(open_config, digits_16) -> Recorder:
    """The stream of four tasks, learned in a plain loop: the truth of the equality tests."""
    recorder = Recorder(open_config, digits_16)
    for segment in Stream(open_config, digits_16):
        recorder.learn(segment)
    return recorder


@pytest.fixture(scope="session")
def trainer(quick, digits) -> BlockTrainer:
    return BlockTrainer(quick, digits)


@pytest.fixture(scope="session")
def trained(trainer, quick) -> TrainedBlock:
    """All tasks of the quick configuration, trained one by one: the truth of the equality tests."""
    blocks = [trainer.train(range(task, task + 1)) for task in range(quick.tasks)]
    return TrainedBlock(
        first=0,
        masks=np.concatenate([block.masks for block in blocks]),
        gg_correct=np.concatenate([block.gg_correct for block in blocks]),
        loss=np.concatenate([block.loss for block in blocks]),
        seconds=0.0,
    )


def rows(trained: TrainedBlock, tasks: range) -> TrainedBlock:
    """Cut a block out of a larger one."""
    part = slice(tasks.start - trained.first, tasks.stop - trained.first)
    return TrainedBlock(
        first=tasks.start,
        masks=trained.masks[part],
        gg_correct=trained.gg_correct[part],
        loss=trained.loss[part],
        seconds=0.0,
    )


@pytest.fixture
def bank(tmp_path, quick, digits) -> Bank:
    return Bank.create(tmp_path / "bank", make_manifest(quick, digits))


@pytest.fixture
def full_bank(bank, trained, quick) -> Bank:
    for tasks in (range(3), range(3, 6), range(6, 8)):
        bank.commit(rows(trained, tasks))
    return bank


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with connect(None, 2, "cpu") as connected, connected.started():
        yield connected
