"""What tests of open-set learning share: a plain loop, and runs on Ray with their files at hand."""

import hashlib
from contextlib import contextmanager

import numpy as np
import torch

from orchestrator.chunks import ChunkedRun
from orchestrator.cluster import put_data
from orchestrator.crew import Crew
from orchestrator.runfolder import RunFolder
from orchestrator.stream import StreamRun
from orchestrator.stream_book import StreamBook
from orchestrator.stream_report import metrics
from orchestrator.worker import WorkerSetup
from supsup.apprentice import LocalTrainer, MaskState
from supsup.bank import Bank
from supsup.manifest import make_manifest
from supsup.material import layers_of
from supsup.members import LocalMembers
from supsup.models import fixed_weights
from supsup.openset import OpenSetLearner, Step
from supsup.streams import Segment


class Recorder:
    """A learner with its states, as a plain loop would hold them."""

    def __init__(
        self, config, data, states: dict[int, MaskState | None] | None = None, first_mask: int = 0
    ) -> None:
        self.states = {} if states is None else states
        layers = layers_of(config, data)
        weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, layers)]
        members, trainer = (
            LocalMembers(layers, weights, config.openset.depth),
            LocalTrainer(config, data),
        )
        self.learner = OpenSetLearner(config, data, members, trainer, self.states.get, first_mask)
        self.steps: list[Step] = []

    def learn(self, segment: Segment) -> Step:
        step = self.learner.learn(segment)
        if step.mask is not None and step.packed_B is not None:
            self.states[step.mask] = step.state
        self.steps.append(step)
        return step


class Killed(BaseException):
    """What a SIGKILL is to the files: the process is gone between two instructions."""


class Silent:
    """A reporter and a sink for metrics that keep what they are told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.values: dict[int, dict[str, float]] = {}

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def advance(self, what: str, by: int) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.values[step] = values


def stream_run(path, config, data, sink: Silent) -> StreamRun | ChunkedRun:
    folder = RunFolder(path, "open")
    exists = folder.has_bank
    bank = (
        Bank.open(folder.path) if exists else Bank.create(folder.path, make_manifest(config, data))
    )
    parts = {"config": config, "data": data, "bank": bank, "folder": folder}
    if config.openset.chunks > 1:
        return ChunkedRun(**parts, tracker=sink, reporter=sink)
    return StreamRun(StreamBook(**parts, checkpoints=(2, 4), tracker=sink, reporter=sink))


@contextmanager
def crew_of(cluster, config, data, workers: int, sink: Silent):
    weights = fixed_weights(config.seed, layers_of(config, data))
    manifest = make_manifest(config, data)
    assert len(weights) == 3
    setup = WorkerSetup(config=config, weights_sha256=manifest.weights_sha256)
    reference = put_data(data)
    crew = Crew(lambda: cluster.start_worker(setup, reference), workers, sink.note)
    try:
        yield crew
    finally:
        crew.close()


def sha256(masks: np.ndarray) -> str:
    return hashlib.sha256(masks.tobytes()).hexdigest()


def values_of(results) -> list[dict[str, float]]:
    return [metrics(checkpoint, results.config.eval) for checkpoint in results.checkpoints]
