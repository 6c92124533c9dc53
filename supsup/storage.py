"""What a learner's tasks take to store, as the paper counts it (Section 4.1, Figure 2).

The paper keeps the seed, each task's mask as ``scipy.sparse.csc`` with 16-bit integers, and the
statistics of batch norm. Here a layer's mask counts as bits, or as a sparse index where the mask
algorithm says how many weights it keeps and the index is smaller.

Shapes: O outputs and I inputs of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from supsup.config import MaskConfig
from supsup.masking import budgets
from supsup.models import Layer

#: The seed, from which the fixed weights come.
SEED_BYTES = 8
_POINTER_BYTES, _STATISTIC_BYTES = 4, 4


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes that a learner's tasks take."""

    shared: int
    """What all tasks share: the seed of random weights, or weights that were trained."""
    per_task: int
    """What each task has of its own."""
    what: str
    """What that is, in a few words."""

    def total(self, tasks: int) -> int:
        """Return the bytes of so many tasks."""
        return self.shared + tasks * self.per_task


def mask_storage(mask: MaskConfig, layers: Sequence[Layer], statistics: int) -> Storage:
    """Return what masks take, and the statistics of batch norm that belong to them.

    Args:
        mask: what makes the masks.
        layers: the masked layers.
        statistics: numbers of batch norm per task, of 4 bytes.
    """
    bits = [layer.mask_bytes for layer in layers]
    smallest = bits
    if mask.algorithm == "edge-popup":
        indices = [_index_bytes(*of) for of in zip(layers, budgets(mask, layers), strict=True)]
        smallest = [min(pair) for pair in zip(bits, indices, strict=True)]
    parts = ["mask bits" if smallest == bits else "sparse mask index"]
    parts += ["batch-norm statistics"] if statistics else []
    return Storage(
        shared=SEED_BYTES,
        per_task=sum(smallest) + _STATISTIC_BYTES * statistics,
        what=" and ".join(parts),
    )


def _index_bytes(layer: Layer, kept: int) -> int:
    """Return the bytes of where the kept weights are.

    A pointer for each row, and for each weight its column in 16 bits, or 32 if there are more.
    """
    column = 2 if layer.inputs <= 1 << 16 else 4
    return column * kept + _POINTER_BYTES * (layer.outputs + 1)
