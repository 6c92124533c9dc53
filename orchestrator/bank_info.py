"""What the bank of a run holds, in words."""

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.blocks import learned_prefix
from supsup.bank import Bank
from supsup.baselines.asking import rule_of
from supsup.baselines.asking import storage as learner_storage
from supsup.baselines.shelf import Shelf
from supsup.config import RunConfig
from supsup.models import Layer
from supsup.storage import Storage, mask_storage

#: Layers that are shown one by one.
_FEW_LAYERS = 6


def bank_info(bank: Bank) -> Iterator[tuple[str, Any]]:
    """Yield what there is to say of a bank: what about, and what."""
    manifest, config = bank.manifest, bank.manifest.config
    yield "bank", bank.path
    if config.learner == "supsup":
        yield from _masks(bank)
    else:
        yield from _learned(bank)
    yield "family", f"{config.family}, tasks of {manifest.classes} classes"
    yield "model", f"{config.model.name}: {_layers(manifest.layers)}"
    yield "data set", f"{config.dataset}, SHA-256 {manifest.dataset_sha256[:16]}"
    yield "seed", config.seed
    yield "weights", f"SHA-256 {manifest.weights_sha256[:16]}"
    yield "trained", _training(config) + f" on {manifest.device}"
    yield "versions", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())
    yield "fingerprint", manifest.fingerprint


def _masks(bank: Bank) -> Iterator[tuple[str, Any]]:
    blocks, manifest = bank.blocks(), bank.manifest
    tasks = [tasks for tasks, _ in blocks]
    yield (
        "tasks",
        f"{sum(map(len, tasks))} in {len(blocks)} blocks, {learned_prefix(tasks)} from task 0 on "
        "without a gap",
    )
    yield "size", f"{bank.size():,} bytes, {manifest.mask_bytes:,} per mask"
    yield (
        "stored",
        _stored(mask_storage(manifest.config.mask, manifest.layers, manifest.statistics)),
    )


def _learned(bank: Bank) -> Iterator[tuple[str, Any]]:
    learner = bank.manifest.config.learner
    forgets = rule_of(learner).forgets
    shelf = Shelf(bank.path, bank.manifest.fingerprint, forgets=forgets)
    tasks = shelf.tasks()
    yield "learner", learner
    yield "tasks", len(tasks)
    yield "size", f"{shelf.size():,} bytes"
    if tasks:
        own = shelf.read(tasks[0]).own
        yield "stored", _stored(learner_storage(learner, own, shelf.shared()))


def _stored(storage: Storage) -> str:
    return f"{storage.per_task:,} bytes per task ({storage.what}), {storage.shared:,} shared"


def _layers(layers: Sequence[Layer]) -> str:
    if len(layers) <= _FEW_LAYERS:
        return ", ".join(f"{x.name} {x.outputs}x{x.inputs}" for x in layers)
    return f"{len(layers)} layers, {sum(layer.weights for layer in layers):,} weights"


def _training(config: RunConfig) -> str:
    train = config.train
    return (
        f"{train.batches} batches of {train.batch_size}, {train.optimizer}, rate "
        f"{train.learning_rate:g} {train.schedule}, {train.precision}"
    )
