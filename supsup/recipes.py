"""Recipes, functions that return a configuration, and protocols, which fix some of its values."""

from collections.abc import Callable, Mapping
from typing import Any

from supsup.config import EvalConfig, ModelConfig, RunConfig, TrainConfig


def permuted_digits() -> RunConfig:
    """SupSup on permuted 8x8 digits: embedded data, about a minute on a laptop."""
    return RunConfig(
        tasks=100,
        dataset="digits",
        model=ModelConfig(output_size=500),
        train=TrainConfig(batches=500, learning_rate=1e-3),
        # With 64 pixels a wrong mask is often surer of an image than the right one: no shortlist.
        eval=EvalConfig(methods=("h-one-shot", "g-one-shot")),
    )


def open_digits() -> RunConfig:
    """Open set (NNs) on permuted digits: no task is ever named. Embedded data, a minute or so."""
    return RunConfig(
        tasks=20,
        scenario="nns",
        # Of 64 pixels, two permutations have too many in common to tell new data from known.
        dataset="digits-16",
        model=ModelConfig(output_size=500),
        train=TrainConfig(batches=300, learning_rate=1e-3),
        eval=EvalConfig(methods=("h-one-shot", "g-one-shot")),
    )


def permuted_mnist() -> RunConfig:
    """SupSup on PermutedMNIST with LeNet-300-100, s = 100."""
    return RunConfig(tasks=50, dataset="mnist", model=ModelConfig(output_size=100))


RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    "permuted-digits": permuted_digits,
    "permuted-mnist": permuted_mnist,
    "open-digits": open_digits,
}
_PAPER: Mapping[str, Any] = {
    "train.batches": 1000,
    "train.batch_size": 128,
    "train.learning_rate": 1e-4,
    "train.schedule": "constant",
    "train.alpha": 0.99,
    "train.epsilon": 1e-8,
    "eval.methods": ("h-one-shot", "g-one-shot"),
    "eval.batch": 1,
    "eval.group": 128,
    "eval.images": 0,
    "openset.epsilon": 0.125,
    "openset.threshold": "fixed",
    "openset.decide_every": 100,
    "openset.look": "first",
    "openset.boundaries": "hidden",
}
#: Values that a protocol fixes, by dotted field. "paper": Sections 4.2 and 4.3 and Appendix C.
#: "paper-code": what the paper's code does beyond that, where nns learns of task boundaries.
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    "paper-code": {**_PAPER, "openset.boundaries": "told"},
}
