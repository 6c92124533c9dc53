"""The fastest way to answer about packed masks where they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from supsup.device_masks import DeviceMasks
from supsup.models import Layer
from supsup.packed import MEMORY_BYTES, LookupMasks, PackedMasks


def packed_masks(
    packed_TB: Tensor,
    weights: Sequence[Tensor],
    layers: Sequence[Layer],
    memory_bytes: int = MEMORY_BYTES,
) -> PackedMasks:
    """Return what answers about packed masks; see ``PackedMasks``."""
    dtype = weights[0].dtype
    if LookupMasks.fits(packed_TB, dtype):
        return LookupMasks(packed_TB, weights, layers, memory_bytes)
    made = DeviceMasks if packed_TB.is_cuda and dtype == torch.float32 else PackedMasks
    return made(packed_TB, weights, layers, memory_bytes)
