"""What a configuration means on a machine, and the training fingerprint that tells banks apart."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from supsup.config import MLPS, RunConfig
from supsup.errors import ConfigError
from supsup.fields import with_values

#: Tasks per block where the user leaves it open, by device.
_BLOCK_SIZES = {"cpu": 10, "cuda": 250}
#: The same with the general engine, where tasks go through ``vmap`` together; elsewhere 1.
TOGETHER = 32


def resolve(
    config: RunConfig,
    *,
    device: str,
    native_bf16: bool,
    sparse: Collection[str] = (),
    fused: bool = False,
) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what the workers are.

    Args:
        config: as the user gave it.
        device: what ``auto`` means here, "cpu" or "cuda".
        native_bf16: whether that device multiplies bf16 in hardware.
        sparse: the precisions in which the sparse engine can be had there; none if it doesn't pay
            for this data set.
        fused: whether the fused engine can be had there.

    Raises:
        ConfigError: if an engine is asked for with a device it isn't made for.
    """
    values: dict[str, Any] = {}
    if config.train.device == "auto":
        values["train.device"] = device
    if config.train.precision == "auto":
        values["train.precision"] = "bf16" if native_bf16 else "fp32"
    train = with_values(config, values).train
    on_cpu = train.device == "cpu"
    special = needs_general(config)
    if train.engine == "auto" and special:
        values["train.engine"] = "general"
    elif train.engine == "auto":
        fast = "sparse" if train.precision in sparse else "dense"
        values["train.engine"] = fast if on_cpu else "fused" if fused else "dense"
    elif train.engine != "general" and special:
        raise ConfigError(
            f"train.engine is {train.engine}, which is not made for {special}; set it to auto or "
            "general"
        )
    elif train.engine in _MADE_FOR and train.device != _MADE_FOR[train.engine]:
        raise ConfigError(
            f"train.engine is {train.engine}, which is made for {_MADE_FOR[train.engine]}, not "
            f"{train.device}; set it to auto or dense"
        )
    elif train.engine == "fused" and not fused:
        raise ConfigError(
            "train.engine is fused, but the workers lack Triton, a C compiler, or a GPU of compute "
            "capability 8.0; install gcc there, or set it to auto"
        )
    if config.block_size == 0:
        values["block_size"] = _BLOCK_SIZES[train.device]
        if values.get("train.engine", train.engine) == "general":
            values["block_size"] = 1 if trained_alone(with_values(config, values)) else TOGETHER
    return with_values(config, values)


def trained_alone(config: RunConfig) -> bool:
    """Say whether the general engine trains tasks one by one.

    On a CPU they gain nothing together, convolutions not even on a GPU; and with transfer they
    start from those before.
    """
    together = config.train.device == "cuda" and config.model.name in (*MLPS, "bnnet")
    return not together or config.mask.transfer != "none"


def needs_general(config: RunConfig) -> str:
    """Return the setting that the dense and sparse engines are not made for, "" if there is none.

    They train permuted tasks of an MLP without batch norm: RMSprop, thresholds, random scores.
    """
    special = {
        f"learner {config.learner}": config.learner != "supsup",
        f"family {config.family}": config.family != "permuted",
        f"model.name {config.model.name}": config.model.name not in MLPS,
        f"mask.algorithm {config.mask.algorithm}": config.mask.algorithm != "threshold",
        f"mask.transfer {config.mask.transfer}": config.mask.transfer != "none",
        f"train.optimizer {config.train.optimizer}": config.train.optimizer != "rmsprop",
        "train.weight_decay": config.train.weight_decay > 0,
        "train.schedule cosine": config.train.schedule == "cosine",
    }
    return next((name for name, true in special.items() if true), "")


#: The device that an engine is made for, if it is made for one.
_MADE_FOR = {"sparse": "cpu", "fused": "cuda"}


def is_auto(config: RunConfig) -> bool:
    """Say whether something still depends on the machine that trains."""
    train = config.train
    return "auto" in (train.device, train.precision, train.engine)


def training_fields(config: RunConfig) -> dict[str, Any]:
    """Return everything that shapes the masks and nothing else, by dotted field.

    The number of tasks is not among them: a bank of 50 tasks is the beginning of one of 100.
    Neither is ``block_size``: blocks of any size give the same masks (a test holds that). In
    scenario nns the number of tasks counts: a bank is what one whole stream left behind.
    """
    fields: dict[str, Any] = {"dataset": config.dataset, "seed": config.seed}
    fields |= {name: getattr(config, name) for name in ("learner", "family", *_OF_FAMILY)}
    if config.dataset.startswith("images:"):
        fields |= {"dataset": "images", "image_size": config.image_size}
    groups = ["model", "mask", "train"]
    if config.scenario == "nns":
        fields |= {"scenario": "nns", "tasks": config.tasks}
        groups.append("openset")
    for group in groups:
        values = dataclasses.asdict(getattr(config, group))
        fields |= {f"{group}.{name}": value for name, value in values.items()}
    return {name: value for name, value in fields.items() if _counts(config, name)}


#: Fields that count only where another has a certain value.
_OF_FAMILY = {"degrees": "rotated", "classes_per_task": "split", "class_order": "split"}
_OF_OPTIMIZER = {
    "train.alpha": ("rmsprop",),
    "train.epsilon": ("rmsprop", "adam"),
    "train.momentum": ("sgd",),
}
#: Fields that came after the first banks, and what those banks were trained with: left out of the
#: fingerprint at that value, so that old banks go on.
_BEFORE: Mapping[str, Any] = {
    "learner": "supsup",
    "mask.algorithm": "threshold",
    "mask.transfer": "none",
    "train.optimizer": "rmsprop",
    "train.weight_decay": 0.0,
    "openset.depth": 0,
}
_OF_EDGE_POPUP = ("mask.keep_fraction", "mask.budget")
_OF_TRUNK = ("batche", "heads")


def _counts(config: RunConfig, name: str) -> bool:
    """Say whether a field means anything beside the others."""
    if name in _OF_FAMILY:
        return config.family == _OF_FAMILY[name]
    if name in _OF_OPTIMIZER:
        return config.train.optimizer in _OF_OPTIMIZER[name]
    if name == "train.trunk_learning_rate":
        return config.learner in _OF_TRUNK
    if name.startswith("mask.") and config.learner != "supsup":
        return False
    return name not in _OF_EDGE_POPUP or config.mask.algorithm == "edge-popup"


def fingerprint(config: RunConfig, dataset_sha256: str) -> str:
    """Return the training fingerprint, 64 hex digits: equal if and only if the masks are.

    Raises:
        ValueError: if precision, device or engine is still ``auto``.
    """
    if is_auto(config):
        raise ValueError("resolve the configuration before taking its fingerprint")
    fields = training_fields(config)
    identity = {name: value for name, value in fields.items() if _BEFORE.get(name) != value}
    identity["dataset_sha256"] = dataset_sha256
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
