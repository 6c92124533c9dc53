"""Task inference for any network: the gradient of the superposition by autograd.

As in supsup.inference, ``∂H/∂α_i = Σ_layers ⟨∂H/∂W̃ ⊙ W, M_i⟩`` with ``W̃ = W ⊙ Σ α_i M_i``; here
autograd gives ``∂H/∂W̃``, query by query, and the packed bits are summed as there. Batch norm in a
superposition takes the mean of its tasks' statistics, each times its α, and they are held fixed.

Shapes: T masks, K some of them, B bytes of a mask, W numbers per weight, Q queries (task
decisions), N images per query, P pixels, O outputs and I inputs of a layer, S output neurons.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.config import MLPS, RunConfig
from supsup.datasets import Dataset
from supsup.inference import OBJECTIVES, TaskInference
from supsup.masking import unpack
from supsup.material import as_tensor, net_of
from supsup.models import Layer
from supsup.nets import Net
from supsup.packed import MEMORY_BYTES, one_by_one

#: Images that go through one mask's network at once.
_IMAGES = 256


class NetInference(TaskInference):
    """Infers tasks among the masks of one bank, or of its beginning, over any network."""

    def __init__(
        self,
        packed_TB: Tensor,
        weights: Sequence[Tensor],
        layers: Sequence[Layer],
        classes: int,
        memory_bytes: int = MEMORY_BYTES,
        depth: int = 0,
        *,
        kernels: bool = True,
        net: Net,
        statistics_TS: Tensor,
    ) -> None:
        """Add up the superposition of the masks; see ``TaskInference``.

        Args:
            packed_TB: the packed masks, uint8; may be a view of a larger bank.
            weights: the fixed weights, one [O, I] per layer; their type is the precision.
            layers: the layers of the network.
            classes: the real classes, the first of the output neurons.
            memory_bytes: what inference may take above the packed masks.
            depth: layers, from the first on, whose α the gradient is taken of; 0: all.
            kernels: whether sums may be left to kernels, which round otherwise than torch.
            net: the network.
            statistics_TS: the tasks' statistics of batch norm, of no width without batch norm.
        """
        self._net, self._statistics_TS = net, statistics_TS.to(weights[0])
        super().__init__(packed_TB, weights, layers, classes, memory_bytes, depth, kernels=kernels)

    def logits(self, task: int, images: Tensor) -> Tensor:
        """Return the output [..., S] of one mask's network for images [..., P]."""
        masks = self.masks
        bits = unpack(masks.packed_TB[task : task + 1], masks.layers, masks.dtype)
        weights = [w_OI * m_1OI[0] for w_OI, m_1OI in zip(masks.weights, bits, strict=True)]
        statistics = self._net.by_norm(self._statistics_TS[task])
        parts = torch.split(images.reshape(-1, images.shape[-1]), _IMAGES)
        with torch.no_grad():
            logits = [self._net.logits(weights, statistics, x, training=False) for x in parts]
        return torch.cat(logits).view(*images.shape[:-1], -1)

    def runs(
        self, tasks_X: Tensor, rows_X: Tensor, images_QNP: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``PackedMasks.runs``."""
        return one_by_one(self.logits, tasks_X, rows_X, images_QNP)

    def _superposition(self, tasks_K: Tensor, alpha_K: Tensor) -> list[Tensor]:
        """Return ``W ⊙ Σ α_i M_i`` [O, I] per layer, and the statistics ``Σ α_i s_i`` last."""
        statistics = alpha_K.to(self.masks.dtype) @ self._statistics_TS[tasks_K]
        return [*super()._superposition(tasks_K, alpha_K), statistics]

    def _fill(
        self, room_QW: Tensor, superposition: Sequence[Tensor], images_QNP: Tensor, objective: str
    ) -> None:
        *superposed, statistics_S = superposition
        statistics = self._net.by_norm(statistics_S)
        room = self.asked.by_layer(room_QW)
        asked = [weight_OI.detach().requires_grad_() for weight_OI in superposed[: len(room)]]
        weights = [*asked, *superposed[len(room) :]]
        # Query by query: vmap over them takes longer on a CPU (docs/nets.md).
        for row, images_NP in enumerate(images_QNP):
            logits_NS = self._net.logits(weights, statistics, images_NP, training=False)
            delta_NS = OBJECTIVES[objective](logits_NS.detach(), self.classes) / len(images_NP)
            gradients = torch.autograd.grad(logits_NS, asked, delta_NS)
            for i, gradient_OI in enumerate(gradients):
                torch.mul(gradient_OI, self.asked.weights[i], out=room[i][row])


def make_inference(
    config: RunConfig,
    data: Dataset,
    packed_TB: Tensor,
    weights: Sequence[Tensor],
    layers: Sequence[Layer],
    classes: int,
    memory_bytes: int = MEMORY_BYTES,
    statistics_TS: npt.NDArray[np.float32] | None = None,
    depth: int = 0,
    *,
    kernels: bool = True,
) -> TaskInference:
    """Return what infers tasks for the run's network.

    Args:
        config: the configuration of the run.
        data: the data set of the run.
        packed_TB: the packed masks, uint8; may be a view of a larger bank.
        weights: the fixed weights, one [O, I] per layer; their type is the precision.
        layers: the layers of the network.
        classes: the real classes of a task, the first of the output neurons.
        memory_bytes: what inference may take above the packed masks.
        statistics_TS: the tasks' statistics of batch norm; None without batch norm.
        depth: layers, from the first on, whose α the gradient is taken of; 0: all (paper).
        kernels: whether sums may be left to kernels, which round otherwise than torch.
    """
    if config.model.name in MLPS:
        return TaskInference(
            packed_TB, weights, layers, classes, memory_bytes, depth, kernels=kernels
        )
    net = net_of(config, data)
    if statistics_TS is None:
        statistics_TS = np.empty((len(packed_TB), net.statistics), np.float32)
    if statistics_TS.shape != (len(packed_TB), net.statistics):
        raise ValueError(
            f"statistics are {statistics_TS.shape}, not {len(packed_TB)} x {net.statistics}"
        )
    return NetInference(
        packed_TB,
        weights,
        layers,
        classes,
        memory_bytes,
        depth,
        kernels=kernels,
        net=net,
        statistics_TS=as_tensor(statistics_TS),
    )
