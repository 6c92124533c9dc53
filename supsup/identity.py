"""What a configuration means on a machine, and the training fingerprint that tells banks apart."""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import Any

from supsup.config import RunConfig
from supsup.errors import ConfigError
from supsup.fields import with_values

#: Tasks per block where the user leaves it open, by device.
_BLOCK_SIZES = {"cpu": 10, "cuda": 250}


def resolve(
    config: RunConfig, *, device: str, native_bf16: bool, sparse: Collection[str]
) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what the workers are.

    Args:
        config: as the user gave it.
        device: what ``auto`` means here, "cpu" or "cuda".
        native_bf16: whether that device multiplies bf16 in hardware.
        sparse: the precisions in which the sparse engine can be had there; none if it doesn't pay
            for this data set.

    Raises:
        ConfigError: if the sparse engine is asked for with a device it isn't made for.
    """
    values: dict[str, Any] = {}
    if config.train.device == "auto":
        values["train.device"] = device
    if config.train.precision == "auto":
        values["train.precision"] = "bf16" if native_bf16 else "fp32"
    train = with_values(config, values).train
    if config.block_size == 0:
        values["block_size"] = _BLOCK_SIZES[train.device]
    fits = train.device == "cpu"
    if train.engine == "auto":
        values["train.engine"] = "sparse" if fits and train.precision in sparse else "dense"
    elif train.engine == "sparse" and not fits:
        raise ConfigError(
            f"train.engine is sparse, which is made for CPUs, not {train.device}; set it to auto "
            "or dense"
        )
    return with_values(config, values)


def is_auto(config: RunConfig) -> bool:
    """Say whether something still depends on the machine that trains."""
    train = config.train
    return "auto" in (train.device, train.precision, train.engine)


def training_fields(config: RunConfig) -> dict[str, Any]:
    """Return everything that shapes the masks and nothing else, by dotted field.

    The number of tasks is not among them: a bank of 50 tasks is the beginning of one of 100.
    Neither is ``block_size``: blocks of any size give the same masks (a test holds that). In
    scenario nns both count where they matter: a bank is what one whole stream left behind.
    """
    fields = {"family": "permuted", "dataset": config.dataset, "seed": config.seed}
    if config.dataset.startswith("images:"):
        fields |= {"dataset": "images", "image_size": config.image_size}
    groups = ["model", "train"]
    if config.scenario == "nns":
        fields |= {"scenario": "nns", "tasks": config.tasks}
        groups.append("openset")
    for group in groups:
        values = dataclasses.asdict(getattr(config, group))
        fields |= {f"{group}.{name}": value for name, value in values.items()}
    return fields


def fingerprint(config: RunConfig, dataset_sha256: str) -> str:
    """Return the training fingerprint, 64 hex digits: equal if and only if the masks are.

    Raises:
        ValueError: if precision, device or engine is still ``auto``.
    """
    if is_auto(config):
        raise ValueError("resolve the configuration before taking its fingerprint")
    identity = training_fields(config) | {"dataset_sha256": dataset_sha256}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
