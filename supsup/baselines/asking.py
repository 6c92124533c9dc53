"""What every learner but SupSup itself can be asked: to learn, to be evaluated, what it stores."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np

from supsup.baselines.inference import RankOneInference
from supsup.baselines.learner import BaselineLearner, Learned
from supsup.baselines.network import Arrays
from supsup.baselines.rules import RULES, Rule, check_baseline
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.evaluate import Evaluation, Evaluator
from supsup.hopfield import HIDDEN_LAYERS, HopLearner, Recovery, check_hopfield
from supsup.inference import TaskInference
from supsup.storage import SEED_BYTES, Storage

_HOPFIELD = Rule(own="units", trunk="never", infers=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An evaluation of some tasks; of HopSupSup with what became of each of them."""

    evaluation: Evaluation
    recoveries: tuple[Recovery, ...] = ()


class Learner(Protocol):
    """What a worker does for a baseline."""

    def learn(self, task: int, trunk: Arrays | None, look_back: bool) -> Learned:
        """Learn a task from the shared weights that the task that it needs left.

        See ``BaselineLearner``.
        """

    def evaluate(
        self,
        settings: EvalConfig,
        trunk: Arrays | None,
        own: Sequence[Arrays],
        tasks: Sequence[int],
    ) -> Answer:
        """Evaluate task inference about some tasks, among those that ``own`` is of."""


def rule_of(learner: str) -> Rule:
    """Return how a learner learns."""
    return _HOPFIELD if learner == "hopsupsup" else RULES[learner]


def check_learner(config: RunConfig) -> None:
    """Check that a learner other than SupSup can do what it is asked.

    Raises:
        ConfigError: if it can't.
    """
    if config.learner == "hopsupsup":
        check_hopfield(config)
    else:
        check_baseline(config)


def make_learner(config: RunConfig, data: Dataset) -> Learner:
    """Return the run's learner, one other than SupSup.

    Raises:
        ConfigError: if its network isn't made for the data or the learner.
    """
    return _Hopfield(config, data) if config.learner == "hopsupsup" else _Baseline(config, data)


def storage(learner: str, own: Arrays, trunk: Arrays | None) -> Storage:
    """Return what a learner's tasks take.

    Args:
        learner: its name.
        own: what one of the tasks has of its own.
        trunk: the shared weights; None: they come from the seed.
    """
    bytes_own = sum(array.nbytes for array in own.values())
    shared = SEED_BYTES if trunk is None else sum(array.nbytes for array in trunk.values())
    what = {
        "factors": "rank-one factors",
        "head": "last layer",
        "network": "all weights",
        "nothing": "nothing",
        "units": "nothing: one Hopfield network",
    }[rule_of(learner).own]
    if any(".running_" in name for name in own):
        what += " and batch-norm statistics"
    if learner == "hopsupsup":
        units = own["units"].size * 8 // HIDDEN_LAYERS
        of_a_layer = 4 * (units * units + units)
        return Storage(shared=SEED_BYTES + HIDDEN_LAYERS * of_a_layer, per_task=0, what=what)
    return Storage(shared=shared, per_task=bytes_own, what=what)


class _Baseline:
    def __init__(self, config: RunConfig, data: Dataset) -> None:
        self._config, self._data = config, data
        self._learner = BaselineLearner(config, data)

    def learn(self, task: int, trunk: Arrays | None, look_back: bool) -> Learned:
        return self._learner.learn(task, trunk, look_back)

    def evaluate(
        self,
        settings: EvalConfig,
        trunk: Arrays | None,
        own: Sequence[Arrays],
        tasks: Sequence[int],
    ) -> Answer:
        trunk = self._learner.initial_trunk() if trunk is None else trunk
        classes = self._learner.family.classes
        evaluator = _RankOneEvaluator(self._config, self._data)
        evaluator.weights = RankOneInference(
            self._config, self._data, classes, trunk, own, settings.depth, evaluator.device
        )
        nothing = np.zeros((len(own), 0), dtype=np.uint8)
        return Answer(evaluation=evaluator.evaluate(settings, nothing, len(own), tasks))


class _RankOneEvaluator(Evaluator):
    """Evaluates the rank-one weights that it is given in the place of masks."""

    weights: RankOneInference

    def _engine(self, *_: Any) -> TaskInference:
        return cast(TaskInference, self.weights)


class _Hopfield:
    def __init__(self, config: RunConfig, data: Dataset) -> None:
        self._learner = HopLearner(config, data)

    def learn(self, task: int, trunk: Arrays | None, look_back: bool) -> Learned:
        return self._learner.learn(task)

    def evaluate(
        self,
        settings: EvalConfig,
        trunk: Arrays | None,
        own: Sequence[Arrays],
        tasks: Sequence[int],
    ) -> Answer:
        units_KB = np.stack([arrays["units"] for arrays in own])
        found = tuple(self._learner.recover(settings, units_KB, task) for task in tasks)
        return Answer(evaluation=as_evaluation(len(own), found, settings), recoveries=found)


def as_evaluation(learned: int, found: Sequence[Recovery], settings: EvalConfig) -> Evaluation:
    """Return recoveries as an evaluation: one decision per task, about all of its images."""
    rows = []
    for recovery in found:
        hit = int(recovery.found == recovery.task)
        right = recovery.correct
        rows.append([1, hit, recovery.images, right, right * hit, hit])
    wrong = [[r.task, r.found, 1] for r in found if r.found != r.task]
    return Evaluation(
        learned=learned,
        tasks=tuple(r.task for r in found),
        methods=settings.methods,
        counts=np.array([rows], dtype=np.int64),
        confusions_X3=np.array(wrong, dtype=np.int64).reshape(-1, 3),
    )
