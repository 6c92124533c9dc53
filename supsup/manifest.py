"""A bank's manifest: everything that its masks depend on, and how they are laid out."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter, ValidationError

import supsup
from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.errors import BankError, ConfigError, one_line, shown
from supsup.fields import from_dict, to_dict
from supsup.identity import fingerprint
from supsup.masking import BIT_ORDER, layer_slices, mask_bytes
from supsup.material import layers_of, statistics_of
from supsup.models import Layer, fixed_weights, weights_sha256
from supsup.tasks import task_family, test_sizes

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bank is: everything that its masks depend on, and how they are laid out."""

    format_version: int
    fingerprint: str
    config: RunConfig
    layers: tuple[Layer, ...]
    classes: int
    test_images: int
    """Test images of a task; the most, if tasks differ in that."""
    weights_sha256: str
    dataset_sha256: str
    versions: dict[str, str]
    device: str
    statistics: int = 0
    """Statistics of batch norm per task; 0 without batch norm."""
    test_sizes: tuple[int, ...] = ()
    """Test images of each task that there can be, if tasks differ in that."""

    def sizes(self, tasks: int) -> npt.NDArray[np.int64]:
        """Return how many test images each of the first tasks has, int64 [T]."""
        if self.test_sizes:
            return np.array(self.test_sizes[:tasks], dtype=np.int64)
        return np.full(tasks, self.test_images)

    @property
    def mask_bytes(self) -> int:
        """Bytes of one packed mask."""
        return mask_bytes(self.layers)


def make_manifest(config: RunConfig, data: Dataset) -> Manifest:
    """Describe the bank that a resolved configuration and a data set lead to."""
    layers, sizes = layers_of(config, data), test_sizes(config, data)
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint(config, data.sha256),
        config=config,
        layers=layers,
        classes=task_family(config, data).classes,
        test_images=max(sizes),
        test_sizes=sizes if len(sizes) > 1 else (),
        weights_sha256=weights_sha256(fixed_weights(config.seed, layers)),
        dataset_sha256=data.sha256,
        versions={
            "supsup": supsup.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        device=_device_name(config.train.device),
        statistics=statistics_of(config, data),
    )


def _device_name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()}"


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as the JSON text that a bank keeps."""
    body: dict[str, Any] = {
        **{field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)},
        "config": to_dict(manifest.config),
        "layers": _layer_table(manifest.layers),
        "mask_bytes": manifest.mask_bytes,
        "bit_order": BIT_ORDER,
    }
    return json.dumps({**body, "sha256": _checksum(body)}, indent=1).encode()


def _layer_table(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    return [
        {**dataclasses.asdict(layer), "first_byte": part.start, "bytes": layer.mask_bytes}
        for layer, part in layer_slices(layers)
    ]


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_manifest(file: Path, text: bytes) -> Manifest:
    """Return the manifest that was dumped into a file.

    Raises:
        BankError: if it is damaged or of a later format; names the file.
    """
    try:
        body = json.loads(text)
        stored = body.pop("sha256")
        version = body["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BankError(
            f"{file} is damaged: it is no manifest; remove it, and supsup resume writes it again"
        ) from None
    if version != FORMAT_VERSION:
        raise BankError(
            f"{file} has format version {version}, this supsup reads {FORMAT_VERSION}; "
            "use the supsup that wrote it"
        )
    if stored != _checksum(body):
        raise BankError(f"{file} is damaged: its checksum doesn't match")
    names = [field.name for field in dataclasses.fields(Manifest)]
    # Banks of before there was batch norm don't say that they have no statistics.
    values = {name: body[name] for name in names if name in body}
    try:
        manifest: Manifest = _MANIFEST.validate_python(
            {**values, "config": from_dict(body["config"])}
        )
        fits = manifest.mask_bytes == body["mask_bytes"] > 0
    except (ValidationError, ConfigError, KeyError, TypeError) as error:
        raise BankError(f"{file} is damaged: {_said(error)}") from None
    if not fits:
        raise BankError(f"{file} is damaged: its layers don't fill a mask")
    return manifest


def _said(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} is {shown(first['input'])}"


_MANIFEST = TypeAdapter(Manifest)
