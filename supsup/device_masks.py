"""Packed masks on a GPU, answered by large matrix products.

The numbers of a query are split into two of bf16 each, which together have 16 bits of the 24; zeros
and ones are bf16 as they are. The sums of such products, added up in fp32, are as near to the exact
ones as those of fp32, at several times the speed.

Shapes: T masks, K some of them, B bytes of a mask, W bits, Q queries, N images of each, X pairs of
a mask and a query, P pixels, S output neurons.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from supsup.masking import unpack
from supsup.packed import PackedMasks

#: Masks that are run together, at most.
_TOGETHER = 256


class DeviceMasks(PackedMasks):
    """Packed masks [T, B], answered by products of their bits; made for a GPU."""

    def sums(self, vectors_QW: Tensor) -> Tensor:
        """See ``PackedMasks.sums``."""
        halves_XW = _halves(vectors_QW[:, : self.bits])
        sums_XT = torch.cat([_product(halves_XW, bits_KW.T) for bits_KW in self._tiles()], dim=1)
        high_QT, low_QT = sums_XT.chunk(2)
        return high_QT + low_QT

    def sums_of(self, vectors_QW: Tensor, tasks_QN: Tensor) -> Tensor:
        """See ``PackedMasks.sums_of``."""
        masks = min(self._tile(), tasks_QN.shape[1])
        queries = max(1, self._tile() // masks)
        rows = []
        for part_QW, part_QN in zip(
            torch.split(vectors_QW[:, : self.bits, None], queries),
            torch.split(tasks_QN, queries),
            strict=True,
        ):
            sums = [
                torch.bmm(self._unpacked(self.packed_TB[few_QK].flatten(0, 1)).view(
                    *few_QK.shape, -1), part_QW)[..., 0]
                for few_QK in torch.split(part_QN, masks, dim=1)
            ]  # fmt: skip
            rows.append(torch.cat(sums, dim=1))
        return torch.cat(rows)

    def runs(
        self, tasks_X: Tensor, rows_X: Tensor, images_QNP: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``PackedMasks.runs``. Masks that are asked about often go together."""
        order_X = tasks_X.argsort(stable=True)
        tasks_K, counts_K = torch.unique_consecutive(tasks_X[order_X], return_counts=True)
        starts_K = counts_K.cumsum(0) - counts_K
        counts_K, often_K = counts_K.sort(descending=True, stable=True)
        tasks_K, starts_K = tasks_K[often_K], starts_K[often_K]
        counts = counts_K.tolist()
        first = 0
        while first < len(counts):
            most = counts[first]
            part = slice(first, first + self._runs_together(most * images_QNP.shape[1]))
            places = torch.arange(most, device=tasks_X.device)
            inside_KC = places < counts_K[part, None]
            pairs_KC = order_X[(starts_K[part, None] + places).clamp(max=len(order_X) - 1)]
            images_KMP = images_QNP[rows_X[pairs_KC]].flatten(1, 2)
            logits = self._logits(tasks_K[part], images_KMP)
            logits_KCNS = logits.view(*pairs_KC.shape, *images_QNP.shape[1:-1], -1)
            yield pairs_KC[inside_KC], logits_KCNS[inside_KC]
            first = part.stop

    def _logits(self, tasks_K: Tensor, images_KMP: Tensor) -> Tensor:
        """Return the outputs [K, M, S] of some masks' networks for images of their own."""
        hidden = images_KMP
        bits = unpack(self.packed_TB[tasks_K], self.layers, self.dtype)
        for i, (weight_OI, bits_KOI) in enumerate(zip(self.weights, bits, strict=True)):
            inputs = hidden.relu() if i else hidden
            hidden = torch.bmm(inputs, (weight_OI * bits_KOI).transpose(1, 2))
        return hidden

    def _runs_together(self, images: int) -> int:
        """Return how many masks to run together, of so many images each."""
        neurons = self.layers[0].inputs + sum(layer.outputs for layer in self.layers)
        bytes_each = self.dtype.itemsize * (3 * self.bits + images * neurons)
        return max(1, min(_TOGETHER, self.memory_bytes // 2 // bytes_each))

    def _tiles(self) -> Iterator[Tensor]:
        """Yield the bits [K, W] of all masks, in order, as bf16."""
        if len(self) * self.bits * torch.bfloat16.itemsize <= self.memory_bytes // 2:
            yield self._whole
            return
        for packed_KB in torch.split(self.packed_TB, self._tile()):
            yield self._bits(packed_KB)

    @cached_property
    def _whole(self) -> Tensor:
        bits_TW = self.packed_TB.new_empty(len(self), self.bits, dtype=torch.bfloat16)
        for start in range(0, len(self), self._tile()):
            tile = slice(start, start + self._tile())
            bits_TW[tile] = self._bits(self.packed_TB[tile])
        return bits_TW

    def changed(self, task: int) -> None:
        """See ``PackedMasks.changed``."""
        self.__dict__.pop("_whole", None)

    def _bits(self, packed_KB: Tensor) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8, device=packed_KB.device)
        bits = (packed_KB[:, : self.bits // 8, None] >> places) & 1
        return bits.to(torch.bfloat16).flatten(1)


def _halves(vectors_QW: Tensor) -> Tensor:
    """Return the larger halves of numbers, and the smaller ones behind them: bf16 [2 Q, W]."""
    queries, width = vectors_QW.shape
    halves_XW = vectors_QW.new_empty(2 * queries, width, dtype=torch.bfloat16)
    high_QW, low_QW = halves_XW[:queries], halves_XW[queries:]
    high_QW.copy_(vectors_QW)
    torch.sub(vectors_QW, high_QW, out=low_QW)
    return halves_XW


def _product(a_XW: Tensor, b_WT: Tensor) -> Tensor:
    """Return the product of two matrices of bf16, added up and returned in fp32."""
    if a_XW.is_cuda:
        return torch.mm(a_XW, b_WT, out_dtype=torch.float32)
    return a_XW.float() @ b_WT.float()
