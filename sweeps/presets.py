"""Ready-made sweeps: the figures of the paper that these nets cover, and ablations."""

from collections.abc import Mapping
from typing import Any

from supsup.errors import ConfigError, near
from sweeps.spec import SweepSpec, spec_of

_H_AND_G = ["h-one-shot", "g-one-shot"]
_FC = {"model.name": "fc-1024-1024"}
#: SupSup with the task inferred; and baselines that are told the task, as in the paper's figures.
_SUPSUP_H_AND_G = {
    "supsup-h": {"eval.methods": "h-one-shot"},
    "supsup-g": {"eval.methods": "g-one-shot"},
}
_GIVEN = {
    "psp": {"learner": "psp", "model.output_size": 10},
    "batche": {"learner": "batche", "scenario": "gg", "model.output_size": 10},
}

#: By name: what the full sweep is. A figure is drawn as the paper's protocol has it, but one image
#: per decision of a sample of test images, instead of one decision per batch of all of them.
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fig2": {
        "recipe": "split-cifar100",
        "seeds": [0, 1, 2, 3, 4],
        "variants": {
            **{f"supsup-{k}": {"mask.keep_fraction": k} for k in (0.005, 0.01, 0.02, 0.035, 0.075)},
            "supsup-transfer": {"mask.transfer": "running-mean"},
            "batche": {
                "learner": "batche", "train.batches": 4883, "train.trunk_learning_rate": 1e-3,
            },
            "batche-random": {"learner": "batche-random", "train.learning_rate": 0.1},
            "heads": {"learner": "heads"},
            "heads-random": {"learner": "heads-random"},
            "upper-bound": {"learner": "upper-bound"},
        },
    },
    "fig3-lenet": {
        "protocol": "paper",
        "base": {"tasks": 250, "model.output_size": 100, "eval.group": 0, "eval.images": 100},
        "seeds": [0, 1, 2],
        "variants": {**_SUPSUP_H_AND_G, **_GIVEN},
    },
    "fig3-fc": {
        "protocol": "paper",
        "base": {
            "tasks": 250, "model.output_size": 500, "eval.group": 0, "eval.images": 100, **_FC,
        },
        "seeds": [0, 1, 2],
        "variants": {**_SUPSUP_H_AND_G, **_GIVEN},
    },
    "fig4": {
        "protocol": "paper",
        "base": {
            "tasks": 2500, "model.output_size": 500, "eval.group": 0, "eval.images": 8,
        },
        "seeds": [0],
        "grid": {"eval.methods": _H_AND_G, "scenario": ["gnu", "gns"]},
    },
    "fig5-rotated": {
        "recipe": "rotated-mnist",
        "seeds": [0],
        "variants": {
            "supsup-h": {"eval.methods": "h-binary"},
            "supsup-g": {"eval.methods": "g-binary"},
            **_GIVEN,
        },
    },
    "fig5-batche": {
        "protocol": "paper",
        "base": {
            "tasks": 50, "model.output_size": 500, "eval.group": 0, "eval.images": 100,
            "eval.at": [2, 5, 10, 25], **_FC,
        },
        "seeds": [0, 1, 2],
        "variants": {
            "batche-given": {"learner": "batche", "scenario": "gg"},
            "batche-one-shot": {"learner": "batche", "eval.methods": "h-one-shot"},
            "batche-one-shot-g": {"learner": "batche", "eval.methods": "g-one-shot"},
            "batche-one-shot-128": {
                "learner": "batche", "eval.methods": "h-one-shot", "eval.batch": 128,
                "eval.images": 512,
            },
            "batche-first-layer": {
                "learner": "batche", "eval.methods": "h-one-shot", "eval.depth": 1,
            },
            "batche-all": {"learner": "batche", "eval.methods": "h-all-masks"},
            "batche-all-128": {
                "learner": "batche", "eval.methods": "h-all-masks", "eval.batch": 128,
                "eval.images": 512,
            },
            "supsup-one-shot": {"eval.methods": "h-one-shot"},
        },
    },
    "fig6-lenet": {
        "protocol": "paper",
        "base": {"tasks": 250, "eval.group": 0, "eval.images": 100},
        "seeds": [0, 1],
        "grid": {"model.output_size": [25, 100, 200, 500], "eval.methods": _H_AND_G},
    },
    "fig6-fc": {
        "protocol": "paper",
        "base": {"tasks": 250, "eval.group": 0, "eval.images": 100, **_FC},
        "seeds": [0, 1],
        "grid": {"model.output_size": [25, 100, 200, 500], "eval.methods": _H_AND_G},
    },
    "objective-algorithm": {
        "base": {"tasks": 250, "model.output_size": 500, "eval.images": 20, "eval.tasks": 100},
        "seeds": [0, 1],
        "grid": {
            "eval.methods": [
                "h-one-shot", "g-one-shot", "h-shortlist", "g-shortlist", "h-sketch", "g-sketch",
                "h-binary", "g-binary", "h-gradient-descent", "h-all-masks",
            ]
        },
    },
    "inference-depth": {
        "base": {"tasks": 250, "model.output_size": 500, "eval.images": 20, "eval.tasks": 100},
        "seeds": [0, 1],
        "grid": {
            "eval.depth": [0, 1, 2],
            "eval.methods": ["h-one-shot", "g-one-shot", "h-shortlist", "g-shortlist"],
        },
    },
    "images-per-decision": {
        "base": {"tasks": 250, "model.output_size": 100, "eval.images": 128, "eval.tasks": 100},
        "seeds": [0, 1],
        "grid": {
            "eval.batch": [1, 2, 4, 8, 16, 128],
            "eval.methods": _H_AND_G,
        },
    },
    "learning-rate-schedule": {
        "base": {"tasks": 50, "model.output_size": 500, "eval.images": 100},
        "seeds": [0, 1],
        "grid": {
            "train.learning_rate": [1e-4, 2e-4, 5e-4, 1e-3, 2e-3],
            "train.schedule": ["constant", "linear"],
        },
    },
    "keep-fraction": {
        "recipe": "split-mnist",
        "base": {"mask.algorithm": "edge-popup", "eval.methods": "h-one-shot"},
        "seeds": [0, 1],
        "grid": {
            "mask.keep_fraction": [0.02, 0.05, 0.1, 0.2, 0.3, 0.5],
            "mask.budget": ["uniform", "erdos-renyi"],
        },
    },
    "shortlist-length": {
        "base": {
            "tasks": 250, "model.output_size": 500, "eval.methods": "h-shortlist",
            "eval.images": 20, "eval.tasks": 100,
        },
        "seeds": [0, 1],
        "grid": {"eval.shortlist": [1, 2, 4, 8, 16, 32, 64]},
    },
    "width": {
        "base": {"tasks": 50, "eval.images": 100},
        "seeds": [0, 1],
        "grid": {
            "model.name": ["lenet-300-100", "fc-1024-1024"],
            "model.output_size": [100, 500],
        },
    },
    "open-set": {
        "base": {"scenario": "nns", "tasks": 50, "model.output_size": 500, "eval.images": 50},
        "seeds": [0, 1],
        "grid": {
            "openset.stream": ["paper", "random-length", "recurring", "fuzzy", "drift"],
            "openset.threshold": ["fixed", "calibrated"],
            "openset.epsilon": [0.0625, 0.125, 0.25],
            "openset.look": ["first", "both"],
        },
    },
}  # fmt: skip
NAMES = tuple(_PRESETS)

#: What ``--quick`` puts in the place of the full size.
_QUICK: Mapping[str, Any] = {
    "tasks": 20,
    "train.batches": 100,
    "train.learning_rate": 2e-3,
    "eval.images": 16,
    "eval.tasks": 0,
}
_QUICK_VALUES: Mapping[str, list[Any]] = {
    "model.output_size": [25, 100],
    "model.name": ["lenet-300-100"],
    "train.learning_rate": [5e-4, 2e-3],
    "eval.batch": [1, 4, 16],
    "eval.shortlist": [1, 4, 16],
    "openset.stream": ["paper", "random-length"],
    "openset.epsilon": [0.125, 0.25],
}
#: What else ``--quick`` changes of a preset. Where no task is named, 64 pixels are too few.
_QUICK_OF: Mapping[str, Mapping[str, Any]] = {
    "fig2": {
        "recipe": "split-mnist",
        "base": {
            "dataset": "digits-16",
            "tasks": 5,
            "scenario": "gg",
            "model.name": "gem-resnet18",
            "model.output_size": 2,
            "train.batches": 20,
            "train.learning_rate": 1e-3,
            "train.optimizer": "adam",
            "mask.algorithm": "edge-popup",
            "mask.budget": "erdos-renyi",
            "mask.keep_fraction": 0.075,
        },
        "variants": {"batche": {"train.batches": 20}},
        "seeds": [0],
    },
    "fig5-rotated": {
        "recipe": "rotated-mnist",
        "base": {
            "dataset": "digits-16",
            "tasks": 12,
            "degrees": 30,
            "eval.at": [2, 5, 10],
            "model.name": "lenet-300-100",
        },
    },
    "fig5-batche": {"base": {"eval.at": [2, 5, 10]}},
    "keep-fraction": {
        "recipe": "split-mnist",
        "base": {"dataset": "digits", "tasks": 5},
        "seeds": [0],
    },
    "open-set": {
        "recipe": "open-digits",
        "base": {
            "train.batches": 60,
            "train.learning_rate": 1e-3,
            "openset.decide_every": 20,
        },
        "seeds": [0],
    },
}


def preset(name: str, quick: bool = False) -> SweepSpec:
    """Return a preset; ``quick``: on the embedded digits, in a minute or so.

    Raises:
        ConfigError: if there is none of this name.
    """
    if name not in _PRESETS:
        raise ConfigError(
            f"there is no preset {name!r}{near(name, _PRESETS)} (presets: {', '.join(_PRESETS)})"
        )
    tree = {"name": name, "recipe": "permuted-mnist", **_PRESETS[name]}
    return spec_of(_quick(name, tree) if quick else tree)


def _quick(name: str, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a preset in small."""
    grid = {path: _QUICK_VALUES.get(path, x) for path, x in tree.get("grid", {}).items()}
    settings = {path: value for path, value in _QUICK.items() if path not in grid}
    own = _QUICK_OF.get(name, {})
    variants = {
        variant: {**values, **own.get("variants", {}).get(variant, {})}
        for variant, values in tree.get("variants", {}).items()
    }
    return {
        **tree,
        "name": f"{name}-quick",
        "recipe": own.get("recipe", "permuted-digits"),
        "base": {**tree.get("base", {}), **settings, **own.get("base", {})},
        "seeds": own.get("seeds", tree["seeds"][:2]),
        "grid": grid,
        "variants": variants,
    }
