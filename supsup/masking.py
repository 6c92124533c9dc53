"""Supermasks: their initial scores, what makes a mask of scores, and their packed form.

Shapes: T tasks, O outputs and I inputs of a layer, B bytes of a packed mask.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.config import MaskConfig
from supsup.models import Layer
from supsup.seeding import generator

BIT_ORDER: Final = "little"
#: The part of a layer that an Erdős-Rényi budget keeps at most.
ERDOS_RENYI_MOST = 0.5


def initial_scores(root: int, task: int, layer: Layer) -> npt.NDArray[np.float32]:
    """Return the scores [O, I] that training starts from, uniform in ``±1/sqrt(fan_in)``."""
    scores_OI = np.empty((layer.outputs, layer.inputs), np.float32)
    draw_scores(root, task, layer, scores_OI)
    return scores_OI


def draw_scores(root: int, task: int, layer: Layer, out_OI: npt.NDArray[np.float32]) -> None:
    """Write ``initial_scores`` where they belong."""
    generator(root, "scores", task, layer.name).random(dtype=np.float32, out=out_OI)
    out_OI *= 2
    out_OI -= 1
    out_OI *= np.float32(layer.inputs**-0.5)


def budgets(mask: MaskConfig, layers: Sequence[Layer]) -> list[int]:
    """Return how many weights of each layer an edge-popup mask keeps, one at least.

    Uniform: the part ``keep_fraction`` of each. Erdős-Rényi: a part of each in proportion to
    ``(outputs + inputs) / weights``, inputs counted in channels, at most half of it, so that they
    add up to ``keep_fraction`` of all (paper, Section 4.1; Mocanu et al. 2018).
    """
    parts = [mask.keep_fraction] * len(layers)
    if mask.budget == "erdos-renyi":
        parts = _erdos_renyi(mask.keep_fraction, layers)
    return [max(1, round(part * layer.weights)) for part, layer in zip(parts, layers, strict=True)]


def _erdos_renyi(keep_fraction: float, layers: Sequence[Layer]) -> list[float]:
    """Return the part that is kept of each layer: one scale for all that aren't full by it."""
    ratios = [(x.outputs + (x.kernel[0] if x.kernel else x.inputs)) / x.weights for x in layers]
    order = sorted(range(len(layers)), key=lambda i: -ratios[i])
    left = keep_fraction * sum(layer.weights for layer in layers)
    parts = [0.0] * len(layers)
    for place, i in enumerate(order):
        # Those before are full; if the densest of the others isn't, all of them share one scale.
        scale = left / sum(ratios[j] * layers[j].weights for j in order[place:])
        parts[i] = min(ERDOS_RENYI_MOST, scale * ratios[i])
        left -= parts[i] * layers[i].weights
    return parts


def make_masks(mask: MaskConfig, layers: Sequence[Layer], scores: Sequence[Tensor]) -> list[Tensor]:
    """Return the masks, boolean [T, O, I] per layer, that scores [T, O, I] stand for."""
    if mask.algorithm == "threshold":
        return [scores_TOI >= 0 for scores_TOI in scores]
    return [
        largest(scores_TOI, keep)
        for scores_TOI, keep in zip(scores, budgets(mask, layers), strict=True)
    ]


def largest(scores_TOI: Tensor, keep: int) -> Tensor:
    """Return where the ``keep`` largest of each task's |scores| are; of equal ones, the first.

    Scores that are not a number count as the largest.
    """
    sizes_TW = scores_TOI.detach().abs().flatten(1).nan_to_num(math.inf)
    if sizes_TW.is_cuda:
        # All of the GPU looks for it; kthvalue has one multiprocessor do so.
        least_T1 = sizes_TW.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        least_T1 = sizes_TW.kthvalue(sizes_TW.shape[1] - keep + 1, dim=1, keepdim=True).values
    above_TW = sizes_TW > least_T1
    equal_TW = sizes_TW == least_T1
    wanted_T1 = keep - above_TW.sum(1, keepdim=True)
    # Whether some are equal too many is seldom worth a GPU's wait for the answer.
    if sizes_TW.is_cuda or bool((equal_TW.sum(1, keepdim=True) > wanted_T1).any()):
        equal_TW &= equal_TW.cumsum(1) <= wanted_T1
    return (above_TW | equal_TW).view(scores_TOI.shape)


def mask_bytes(layers: Sequence[Layer]) -> int:
    """Return the bytes of one packed mask."""
    return sum(layer.mask_bytes for layer in layers)


def pack(masks: Sequence[Tensor]) -> npt.NDArray[np.uint8]:
    """Pack one boolean [T, O, I] per layer into uint8 [T, B], each layer from a fresh byte."""
    if masks[0].is_cuda:
        return torch.cat([pack_bits(mask_TOI.flatten(1)) for mask_TOI in masks], 1).cpu().numpy()
    rows = [
        np.packbits(mask_TOI.flatten(1).numpy(), axis=1, bitorder=BIT_ORDER) for mask_TOI in masks
    ]
    return np.concatenate(rows, axis=1)


def pack_bits(bits_TW: Tensor) -> Tensor:
    """Pack booleans [T, W] into uint8 [T, B] on their device."""
    whole = torch.nn.functional.pad(bits_TW.byte(), (0, -bits_TW.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=bits_TW.device)
    return (whole.view(len(whole), -1, 8) << places).sum(-1, dtype=torch.uint8)


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
