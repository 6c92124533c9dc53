"""The masks that take part in open-set decisions, and their superposition.

Shapes: K masks that take part, W numbers per weight, B images of a batch or bytes of a packed mask,
P pixels.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.answering import packed_masks
from supsup.inference import fill_factors, superposed
from supsup.masking import mask_bytes
from supsup.models import Layer
from supsup.packed import PackedMasks

#: Masks whose gradients are computed together; shards of a bank consist of whole pages.
PAGE = 256

Packed = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]


class Members(Protocol):
    """The masks that take part in decisions."""

    def put(self, mask: int, packed_B: Packed) -> None:
        """Add the next mask, or replace one."""

    def scores(self, factor_W: Tensor) -> Scores:
        """Return, for each mask, minus the sum of the numbers of the bits that are set [K]."""


class LocalMembers:
    """Masks in this process, in pages of ``PAGE``: a bank's, or a shard of one."""

    def __init__(self, layers: Sequence[Layer], weights: Sequence[Tensor], depth: int = 0) -> None:
        """Begin empty; see ``TaskInference``."""
        self._layers, self._weights, self._depth = layers, weights, depth
        self._pages: list[PackedMasks] = []
        self._count = 0

    def put(self, mask: int, packed_B: Packed) -> None:
        """See ``Members``."""
        page, row = divmod(mask, PAGE)
        if page == len(self._pages):
            empty = torch.zeros(PAGE, mask_bytes(self._layers), dtype=torch.uint8)
            masks = packed_masks(empty, self._weights, self._layers)
            self._pages.append(masks.first_layers(self._depth))
        self._pages[page].packed_TB.numpy()[row] = packed_B
        self._pages[page].changed(row)
        self._count = max(self._count, mask + 1)

    def scores(self, factor_W: Tensor) -> Scores:
        """See ``Members``. A page is always computed whole, so that any sharding gives equal bits.

        Args:
            factor_W: numbers per weight, padded as ``packed_masks`` wants them.
        """
        sums = [page.sums(factor_W[None])[0] for page in self._pages]
        scores_K: Scores = -torch.cat(sums)[: self._count].numpy()
        return scores_K


class Superposition:
    """The sum of the masks that take part, kept up to date mask by mask; exact, for it counts."""

    def __init__(
        self, layers: Sequence[Layer], weights: Sequence[Tensor], classes: int, depth: int = 0
    ) -> None:
        """Begin empty; see ``TaskInference``."""
        # Any packed mask tells how vectors of numbers per weight are laid out.
        none = torch.zeros(1, mask_bytes(layers), dtype=torch.uint8)
        self._masks = packed_masks(none, weights, layers)
        self._asked = self._masks.first_layers(depth)
        self._classes = classes
        self._counts_1W = self._masks.vectors(1)
        self._factor_1W = self._asked.vectors(1)
        self._bits = self._masks.bits

    def add(self, packed_B: Packed, times: int = 1) -> None:
        """Add a mask, or take one away."""
        bits = np.unpackbits(packed_B, bitorder="little")
        self._counts_1W[0, : self._bits].add_(torch.from_numpy(bits), alpha=times)

    def factor(self, images_BP: Tensor, masks: int) -> Tensor:
        """Return ``δ xᵀ ⊙ W`` [W] of entropy over a batch at ``α = 1 / masks``.

        The gradient with respect to ``α_i`` is its sum over the bits of mask i. Good until the
        next call.
        """
        weights = superposed(self._masks, self._counts_1W / masks)
        fill_factors(self._asked, self._factor_1W, weights, images_BP[None], "h", self._classes)
        return self._factor_1W[0]
