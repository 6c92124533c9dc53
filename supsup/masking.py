"""Supermasks: their initial scores, their threshold, and their packed form.

Shapes: T tasks, O outputs and I inputs of a layer, B bytes of a packed mask.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.models import Layer
from supsup.seeding import generator

BIT_ORDER: Final = "little"


def initial_scores(root: int, task: int, layer: Layer) -> npt.NDArray[np.float32]:
    """Return the scores [O, I] that training starts from, uniform in ``±1/sqrt(fan_in)``."""
    bound = np.float32(layer.inputs**-0.5)
    stream = generator(root, "scores", task, layer.name)
    uniform = stream.random((layer.outputs, layer.inputs), dtype=np.float32)
    return (2 * uniform - 1) * bound


def mask_bytes(layers: Sequence[Layer]) -> int:
    """Return the bytes of one packed mask."""
    return sum(layer.mask_bytes for layer in layers)


def pack(masks: Sequence[Tensor]) -> npt.NDArray[np.uint8]:
    """Pack one boolean [T, O, I] per layer into uint8 [T, B], each layer from a fresh byte."""
    rows = [
        np.packbits(mask_TOI.flatten(1).cpu().numpy(), axis=1, bitorder=BIT_ORDER)
        for mask_TOI in masks
    ]
    return np.concatenate(rows, axis=1)


def layer_slices(layers: Sequence[Layer]) -> Iterator[tuple[Layer, slice]]:
    """Yield each layer with the bytes that it takes in a packed mask."""
    start = 0
    for layer in layers:
        yield layer, slice(start, start + layer.mask_bytes)
        start += layer.mask_bytes


def unpack(packed_TB: Tensor, layers: Sequence[Layer], dtype: torch.dtype) -> list[Tensor]:
    """Unpack uint8 [T, B] into one [T, O, I] of zeros and ones per layer."""
    return [unpack_layer(packed_TB[:, part], layer, dtype) for layer, part in layer_slices(layers)]


def unpack_layer(packed_TB: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """Unpack the bytes of one layer, uint8 [T, B], into [T, O, I] of zeros and ones."""
    bits = unpack_bits(packed_TB, dtype)[:, : layer.weights]
    return bits.reshape(-1, layer.outputs, layer.inputs)


def unpack_bits(packed_TB: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack bytes, uint8 [T, B], into their bits [T, 8 B], zeros and ones."""
    return _bit_table(packed_TB.device, dtype)[packed_TB.int()].flatten(1)


def padding_is_zero(packed_TB: npt.NDArray[np.uint8], layers: Sequence[Layer]) -> bool:
    """Say whether the bits behind each layer's last weight are zero, as ``pack`` leaves them."""
    return all(
        not (packed_TB[:, part.stop - 1] >> (layer.weights % 8)).any()
        for layer, part in layer_slices(layers)
        if layer.weights % 8
    )


_tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _bit_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return [256, 8]: the bits of every byte."""
    if (device, dtype) not in _tables:
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder=BIT_ORDER)
        _tables[device, dtype] = torch.from_numpy(bits).to(device, dtype)
    return _tables[device, dtype]
