"""What task inference asks of packed masks, without ever unpacking the bank.

A mask is a string of bits, and every bit belongs to a weight; numbers per weight lie in vectors of
as many entries, zero behind a layer's last weight. ``PackedMasks`` answers with torch on any device
and in any precision, tile by tile; ``LookupMasks`` with C++ kernels in fp32 on a CPU with AVX-512
(lookup.cpp) or AVX2 (lookup_avx2.cpp). Both are exact but for the order of additions. On a GPU
``DeviceMasks`` (supsup.device_masks) does, and ``packed_masks`` (supsup.answering) chooses.

Shapes: T masks, B bytes of a mask, W = 8 B bits, Q queries, N images, O outputs and I inputs of a
layer, C chunks of 1024 bits, G groups of 64 masks.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from supsup import native
from supsup.masking import layer_slices, mask_bytes, unpack_bits
from supsup.models import Layer

#: Bytes above the packed bank that a bank's answers may take, unless told otherwise.
MEMORY_BYTES = 512 << 20
_CHUNK_BITS, _GROUP, _WORD = 1024, 64, 32
#: Files of the same kernels, the fastest first.
KERNELS = ("lookup", "lookup_avx2")


def lookup_kernels() -> ctypes.CDLL | None:
    """Return the fastest kernels that this processor has, compiled at first; None without any."""
    return next((native.load(name) for name in KERNELS if native.supported(name)), None)


class PackedMasks:
    """Packed masks [T, B], answered by unpacking tiles of them."""

    def __init__(
        self,
        packed_TB: Tensor,
        weights: Sequence[Tensor],
        layers: Sequence[Layer],
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Keep a view of the masks.

        Args:
            packed_TB: the masks, uint8; may be a view of a larger bank.
            weights: the fixed weights [O, I] per layer; their type is the precision.
            layers: the layers that are asked about: those of the network, or its first ones.
            memory_bytes: what answers may take above the packed masks.
        """
        self.packed_TB, self.weights, self.layers = packed_TB, list(weights), tuple(layers)
        self.dtype = weights[0].dtype
        self.memory_bytes = memory_bytes
        self.bits = 8 * mask_bytes(self.layers)

    def first_layers(self, depth: int) -> Self:
        """Return the same masks, asked about their first layers alone; 0: about all of them."""
        if not 0 < depth < len(self.layers):
            return self
        weights, layers = self.weights[:depth], self.layers[:depth]
        return type(self)(self.packed_TB, weights, layers, self.memory_bytes)

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self.packed_TB)

    def vectors(self, count: int) -> Tensor:
        """Return room for that many vectors of numbers per weight, zero, [Q, W or more]."""
        return self.packed_TB.new_zeros(count, self._vector, dtype=self.dtype)

    def by_layer(self, vectors_QW: Tensor) -> list[Tensor]:
        """Return views [Q, O, I] of vectors, one per layer."""
        return [
            vectors_QW[:, 8 * part.start : 8 * part.start + layer.weights].view(
                -1, layer.outputs, layer.inputs
            )
            for layer, part in layer_slices(self.layers)
        ]

    def add_up(self, tasks_N: Tensor, weights_N: Tensor) -> Tensor:
        """Return the vector [1, W] of the sum of some masks, each times its weight."""
        total_1W = self.vectors(1)
        for part in torch.split(torch.arange(len(tasks_N)), self._tile()):
            bits = self._unpacked(self.packed_TB[tasks_N[part]])
            total_1W[0, : self.bits] += weights_N[part].to(self.dtype) @ bits
        return total_1W

    def changed(self, task: int) -> None:
        """Take notice that the bits of a mask are others now."""

    def sums(self, vectors_QW: Tensor) -> Tensor:
        """Return, for each vector and mask, the numbers [Q, T] of the bits that are set, added."""
        sums_QT = vectors_QW.new_empty(len(vectors_QW), len(self))
        for start in range(0, len(self), self._tile()):
            tile = slice(start, start + self._tile())
            bits = self._unpacked(self.packed_TB[tile])
            sums_QT[:, tile] = vectors_QW[:, : self.bits] @ bits.T
        return sums_QT

    def large_sums(self, vectors_QW: Tensor, least_Q: Tensor) -> Tensor:
        """Return ``sums`` of the numbers whose magnitude is above ``least_Q`` alone."""
        return self.sums(torch.where(vectors_QW.abs() > least_Q[:, None], vectors_QW, 0))

    def sums_of(self, vectors_QW: Tensor, tasks_QN: Tensor) -> Tensor:
        """Return what ``sums`` says of each vector and some masks of its own [Q, N]."""
        sums_QN = vectors_QW.new_empty(tasks_QN.shape)
        for start in range(0, tasks_QN.shape[1], self._tile()):
            tile = slice(start, start + self._tile())
            for query, tasks_N in enumerate(tasks_QN[:, tile]):
                bits = self._unpacked(self.packed_TB[tasks_N])
                sums_QN[query, tile] = bits @ vectors_QW[query, : self.bits]
        return sums_QN

    def logits(self, task: int, images_NP: Tensor) -> Tensor:
        """Return the output [N, S] of one mask's network."""
        masks = self.by_layer(self._unpacked(self.packed_TB[task : task + 1]))
        hidden = images_NP
        for i, (weight_OI, mask_1OI) in enumerate(zip(self.weights, masks, strict=True)):
            hidden = (hidden.relu() if i else hidden) @ (weight_OI * mask_1OI[0]).T
        return hidden

    def runs(
        self, tasks_X: Tensor, rows_X: Tensor, images_QNP: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run masks on images: yield some of the pairs, and their logits [Y, N, S], until all are.

        Args:
            tasks_X: the mask of each pair.
            rows_X: the query whose images it is run on.
            images_QNP: the images of the queries.
        """

        def logits(task: int, images_YNP: Tensor) -> Tensor:
            return self.logits(task, images_YNP.flatten(0, 1)).view(*images_YNP.shape[:-1], -1)

        yield from one_by_one(logits, tasks_X, rows_X, images_QNP)

    @property
    def _vector(self) -> int:
        """Entries of a vector: whole words."""
        return self.bits + -self.bits % _WORD

    def _check(self, vectors_QW: Tensor) -> None:
        """Raise ValueError where vectors have not the width of ``vectors``: kernels read it all."""
        if vectors_QW.shape[1] != self._vector:
            raise ValueError(f"vectors are {vectors_QW.shape[1]} wide, must be {self._vector}")

    def _tile(self) -> int:
        """Return how many masks are unpacked at once."""
        return max(1, self.memory_bytes // (4 * self.bits * self.dtype.itemsize))

    def _unpacked(self, packed_TB: Tensor) -> Tensor:
        return unpack_bits(packed_TB[:, : self.bits // 8], self.dtype)


class LookupMasks(PackedMasks):
    """Packed masks, answered by the kernels; on as many threads as torch has."""

    #: Above this number of images, products over an unpacked mask are faster.
    _FEW_IMAGES = 16

    def __init__(
        self,
        packed_TB: Tensor,
        weights: Sequence[Tensor],
        layers: Sequence[Layer],
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Keep a view of the masks; see ``PackedMasks``. Needs ``LookupMasks.fits``."""
        super().__init__(packed_TB.contiguous(), weights, layers, memory_bytes)
        kernels = lookup_kernels()
        if kernels is None:
            raise RuntimeError("this machine can't have the lookup kernels")
        self._kernels = kernels
        # A third of the memory for the masks in either order, the rest for vectors.
        per_mask = 128 * self._chunks
        self._at_once = max(_GROUP, memory_bytes // 3 // per_mask // _GROUP * _GROUP)

    @staticmethod
    def fits(packed_TB: Tensor, dtype: torch.dtype) -> bool:
        """Say whether the kernels can answer here; compiles them at first."""
        right = packed_TB.device.type == "cpu" and dtype == torch.float32
        return right and lookup_kernels() is not None

    def add_up(self, tasks_N: Tensor, weights_N: Tensor) -> Tensor:
        """See ``PackedMasks.add_up``."""
        total_1W = self.vectors(1)
        tasks, weights = tasks_N.contiguous(), weights_N.float().contiguous()
        self._kernels.add_masks(
            *self._masks, *map(native.pointer, (tasks, weights)), ctypes.c_int64(len(tasks)),
            native.pointer(total_1W),
        )  # fmt: skip
        return total_1W

    def sums(self, vectors_QW: Tensor) -> Tensor:
        """See ``PackedMasks.sums``."""
        self._check(vectors_QW)
        queries = len(vectors_QW)
        sums = []
        for words, masks in self._interleaved():
            groups = -(-masks // _GROUP)
            sums_QT = vectors_QW.new_zeros(queries, groups * _GROUP)

            def look_up(
                first: int, last: int, words: Tensor = words, sums_QT: Tensor = sums_QT,
                groups: int = groups,
            ) -> None:  # fmt: skip
                sizes = (queries, self._chunks, groups, first, last)
                self._kernels.lookup_sums(
                    *map(native.pointer, (words, vectors_QW)),
                    *map(ctypes.c_int64, sizes),
                    native.pointer(sums_QT),
                )

            _spread(look_up, groups)
            sums.append(sums_QT[:, :masks])
        return torch.cat(sums, dim=1)

    def large_sums(self, vectors_QW: Tensor, least_Q: Tensor) -> Tensor:
        """See ``PackedMasks.large_sums``."""
        self._check(vectors_QW)
        queries, width = vectors_QW.shape
        sums = []
        for columns_WG, masks in self._turned_over():
            sums_QT = vectors_QW.new_empty(queries, columns_WG.shape[1] * _GROUP)

            def add_up(
                first: int, last: int, columns_WG: Tensor = columns_WG, sums_QT: Tensor = sums_QT
            ) -> None:
                groups = columns_WG.shape[1]
                bounds = (first, last, 0, groups) if queries > 1 else (0, 1, first, last)
                self._kernels.column_sums(
                    *map(native.pointer, (columns_WG, vectors_QW, least_Q)),
                    *map(ctypes.c_int64, (width, self.bits, groups, *bounds)),
                    native.pointer(sums_QT),
                )

            _spread(add_up, queries if queries > 1 else columns_WG.shape[1])
            sums.append(sums_QT[:, :masks])
        return torch.cat(sums, dim=1)

    def sums_of(self, vectors_QW: Tensor, tasks_QN: Tensor) -> Tensor:
        """See ``PackedMasks.sums_of``."""
        self._check(vectors_QW)
        tasks_QN = tasks_QN.contiguous()
        sums_QN = vectors_QW.new_empty(tasks_QN.shape)
        width, count = vectors_QW.shape[1], tasks_QN.shape[1]

        def add_up(first: int, last: int) -> None:
            self._kernels.sums_of(
                *self._masks, native.pointer(tasks_QN), ctypes.c_int64(count),
                native.pointer(vectors_QW), *map(ctypes.c_int64, (width, first, last)),
                native.pointer(sums_QN),
            )  # fmt: skip

        _spread(add_up, len(vectors_QW))
        return sums_QN

    def logits(self, task: int, images_NP: Tensor) -> Tensor:
        """See ``PackedMasks.logits``."""
        if len(images_NP) > self._FEW_IMAGES:
            return super().logits(task, images_NP)
        mask = ctypes.c_void_p(self.packed_TB.data_ptr() + task * self.packed_TB.shape[1])
        hidden = images_NP.contiguous()
        for i, (layer, part) in enumerate(layer_slices(self.layers)):
            inputs = hidden.relu() if i else hidden
            hidden = hidden.new_empty(len(images_NP), layer.outputs)
            self._kernels.masked_layer(
                mask, ctypes.c_int64(self.bits // 8), ctypes.c_int64(part.start),
                *map(native.pointer, (self.weights[i], inputs)),
                *map(ctypes.c_int64, (len(inputs), layer.inputs, layer.outputs)),
                native.pointer(hidden),
            )  # fmt: skip
        return hidden

    @property
    def _vector(self) -> int:
        return self._chunks * _CHUNK_BITS

    @property
    def _chunks(self) -> int:
        return -(-self.bits // _CHUNK_BITS)

    @property
    def _masks(self) -> tuple[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]:
        stride = ctypes.c_int64(self.packed_TB.shape[1])
        return native.pointer(self.packed_TB), stride, ctypes.c_int64(self.bits // 8)

    def _interleaved(self) -> Iterator[tuple[Tensor, int]]:
        """Yield tiles of the masks in the kernel's order, with the number of masks in each."""
        if len(self) <= self._at_once:
            yield self._whole, len(self)
            return
        for packed_TB in torch.split(self.packed_TB, self._at_once):
            yield self._interleave(packed_TB), len(packed_TB)

    def changed(self, task: int) -> None:
        """See ``PackedMasks.changed``."""
        if "_whole" in self.__dict__:
            self._write(self._whole, self.packed_TB, range(task, task + 1))
        self.__dict__.pop("_columns", None)

    @cached_property
    def _whole(self) -> Tensor:
        return self._interleave(self.packed_TB)

    def _turned_over(self) -> Iterator[tuple[Tensor, int]]:
        """Yield tiles of the masks turned over [W, G], with the number of masks in each."""
        if len(self) <= self._at_once:
            yield self._columns, len(self)
            return
        for packed_TB in torch.split(self.packed_TB, self._at_once):
            yield self._turn_over(packed_TB), len(packed_TB)

    @cached_property
    def _columns(self) -> Tensor:
        return self._turn_over(self.packed_TB)

    def _turn_over(self, packed_TB: Tensor) -> Tensor:
        columns_WG = torch.empty(self.bits, -(-len(packed_TB) // _GROUP), dtype=torch.int64)
        self._kernels.turn_over(
            native.pointer(packed_TB),
            *map(ctypes.c_int64, (packed_TB.shape[1], len(packed_TB), self.bits // 8)),
            native.pointer(columns_WG),
        )
        return columns_WG

    def _interleave(self, packed_TB: Tensor) -> Tensor:
        groups = -(-len(packed_TB) // _GROUP)
        words = torch.zeros(self._chunks * groups * 32 * _GROUP + 1, dtype=torch.int32)
        self._write(words, packed_TB, range(len(packed_TB)))
        return words

    def _write(self, words: Tensor, packed_TB: Tensor, tasks: range) -> None:
        """Write some masks where they belong in the kernel's order."""
        sizes = (packed_TB.shape[1], len(packed_TB), self.bits // 8, tasks.start, tasks.stop)
        self._kernels.interleave(
            native.pointer(packed_TB), *map(ctypes.c_int64, sizes), native.pointer(words)
        )


def _spread(work: Callable[[int, int], None], parts: int) -> None:
    """Do parts ``first`` to ``last - 1`` of some work on every thread; kernels free the lock."""
    threads = min(torch.get_num_threads(), parts)
    if threads == 1:
        work(0, parts)
        return
    bounds = [parts * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def one_by_one(
    logits: Callable[[int, Tensor], Tensor], tasks_X: Tensor, rows_X: Tensor, images_QNP: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Do what ``PackedMasks.runs`` does, given what runs one mask on images [Y, N, P]."""
    for task, (pairs_Y,) in by_task(tasks_X):
        yield pairs_Y, logits(task, images_QNP[rows_X[pairs_Y]])


def by_task(tasks: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield every task in a tensor, ascending, with the places where it stands, per dimension."""
    flat = tasks.flatten()
    order = flat.argsort(stable=True)
    found, counts = torch.unique_consecutive(flat[order], return_counts=True)
    for task, places in zip(found.tolist(), torch.split(order, counts.tolist()), strict=True):
        yield task, torch.unravel_index(places, tasks.shape)
