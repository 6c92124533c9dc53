"""What each learner is trained by, as the paper and its code have it, unless the user says more."""

from collections.abc import Mapping
from typing import Any

_ADAM: Mapping[str, Any] = {"train.optimizer": "adam", "mask.transfer": "none"}
_GIVEN: Mapping[str, Any] = {"scenario": "gg"}
#: Values by dotted field that a learner puts in the place of a recipe's.
_VALUES: Mapping[str, Mapping[str, Any]] = {
    "supsup": {},
    "hopsupsup": {
        "model.name": "bnnet",
        "train.optimizer": "sgd",
        "train.learning_rate": 0.1,
        "train.momentum": 0.9,
        "train.weight_decay": 1e-4,
        "train.schedule": "constant",
        "eval.methods": "h-gradient-descent",
        "eval.batch": 64,
        "eval.group": 0,
        "eval.images": 0,
    },
    "batche": {
        **_ADAM,
        "train.learning_rate": 1e-2,
        "train.trunk_learning_rate": 1e-4,
        "train.schedule": "constant",
        "eval.methods": "h-one-shot,h-all-masks",
    },
    "batche-random": {
        **_ADAM,
        "train.learning_rate": 1e-2,
        "train.schedule": "constant",
        "eval.methods": "h-one-shot,h-all-masks",
    },
    "psp": {
        **_GIVEN,
        "mask.transfer": "none",
        "train.optimizer": "rmsprop",
        "train.learning_rate": 1e-4,
        "train.schedule": "constant",
    },
    "heads": {
        **_ADAM,
        **_GIVEN,
        "train.learning_rate": 1e-2,
        "train.trunk_learning_rate": 1e-3,
    },
    "heads-random": {**_ADAM, **_GIVEN, "train.learning_rate": 1e-2},
    "upper-bound": {**_ADAM, **_GIVEN, "train.learning_rate": 1e-3},
    "lower-bound": {**_ADAM, **_GIVEN, "train.learning_rate": 1e-3},
}


def learner_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a learner that was asked for by name puts in the place of a recipe's values.

    Args:
        values: what was asked for, by dotted field.
    """
    return _VALUES.get(str(values.get("learner", "supsup")), {})
