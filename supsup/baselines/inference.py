"""Task inference among rank-one weights, by their superposition (paper, Figure 5 right).

BatchE's task i has the weights ``W ⊙ r_i s_iᵀ``; the superposition of k tasks is
``W ⊙ Σ α_i r_i s_iᵀ``. As with masks, the task is the one whose α lowers the objective fastest. All
algorithms of supsup.inference but the sketch work with it.

Batch norm, where a network has it, normalises a superposition by the mean of its tasks' statistics,
weighted by α.

Shapes: T tasks, K some of them, Q decisions, N images per decision, P pixels, O outputs and I
inputs of a layer, S output neurons.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap

from supsup.baselines.network import Arrays, Network
from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.inference import entropy
from supsup.packed import one_by_one

#: Bytes of per-decision weight gradients at once.
_GRADIENT_BYTES = 256 << 20


def objective_value(logits_NS: Tensor, objective: str, classes: int) -> Tensor:
    """Return the mean over images of H, or of G (paper, equations 3 and 6), for autograd."""
    if objective == "h":
        return entropy(logits_NS).mean()
    real = torch.arange(logits_NS.shape[1], device=logits_NS.device) < classes
    return torch.where(real, logits_NS.detach(), logits_NS).logsumexp(-1).mean()


class RankOneInference:
    """Infers tasks among the first k of a BatchE run; an engine of supsup.inference."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        classes: int,
        trunk: Arrays,
        own: Sequence[Arrays],
        depth: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Stack the factors.

        Args:
            config: the run's configuration.
            data: its data set.
            classes: the real classes, the first of the output neurons.
            trunk: the shared weights.
            own: what each of the tasks has of its own.
            depth: layers, from the first on, whose α the gradient is taken of; 0: all (paper).
            device: where images are; None: the CPU.
        """
        self._depth, self.device = depth, device or torch.device("cpu")
        self._plain = Network(config, data, "plain")
        self._shape, self.classes = data.shape, classes
        self._trunk = {
            name: torch.tensor(array, device=self.device) for name, array in trunk.items()
        }
        names = own[0] if own else ()
        self._own = {
            name: torch.stack([torch.tensor(arrays[name]) for arrays in own]).to(self.device)
            for name in names
        }
        self.masks: Sequence[int] = range(len(own))
        """The tasks: what supsup.inference counts."""

    def alpha_gradients(self, images_QNP: Tensor, objective: str) -> Tensor:
        """Return ``∂objective/∂α`` at ``α = 1/k`` [Q, T], the objective's mean over N images."""
        all_K = torch.arange(len(self.masks), device=self.device)
        return self._gradients(images_QNP, objective, all_K, self._uniform(len(self.masks)))

    def gradient_at(
        self, images_NP: Tensor, objective: str, tasks_K: Tensor, alpha_K: Tensor | None = None
    ) -> Tensor:
        """Return ``∂objective/∂α`` [K] of some tasks, at α or ``1/K``, the others' α being zero."""
        if alpha_K is None:
            alpha_K = self._uniform(len(tasks_K))
        return self._gradients(images_NP[None], objective, tasks_K, alpha_K)[0]

    def logits(self, task: int, images: Tensor) -> Tensor:
        """Return the output [..., S] of one task's network for images [..., P]."""
        tensors = self._superposed(torch.tensor([task], device=self.device), self._uniform(1))
        with torch.no_grad():
            flat = images.reshape(-1, images.shape[-1])
            logits = self._plain.logits(tensors, flat, training=False)
        return logits.view(*images.shape[:-1], -1)

    def predict(self, tasks_Q: Tensor, images_QNP: Tensor) -> Tensor:
        """Return the class [Q, N] that each decision's images have as its task."""
        classes_QN = torch.empty(images_QNP.shape[:2], dtype=torch.int64, device=self.device)
        rows_Q = torch.arange(len(tasks_Q), device=self.device)
        for chosen, logits in self.runs(tasks_Q, rows_Q, images_QNP):
            classes_QN[chosen] = logits[..., : self.classes].argmax(-1)
        return classes_QN

    def runs(
        self, tasks_X: Tensor, rows_X: Tensor, images_QNP: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run tasks' networks on decisions' images: see ``PackedMasks.runs``."""
        return one_by_one(self.logits, tasks_X, rows_X, images_QNP)

    def _uniform(self, tasks: int) -> Tensor:
        return torch.full((tasks,), 1 / tasks, device=self.device)

    def _gradients(
        self, images_QNP: Tensor, objective: str, tasks_K: Tensor, alpha_K: Tensor
    ) -> Tensor:
        """Return the gradient [Q, K] of each decision's objective."""

        def of_one(alpha_K: Tensor, images_NP: Tensor) -> Tensor:
            tensors = self._superposed(tasks_K, alpha_K)
            logits_NS = self._plain.logits(tensors, images_NP, training=False)
            return objective_value(logits_NS, objective, self.classes)

        weights = sum(layer.weights for layer in self._plain.layers)
        size = max(1, _GRADIENT_BYTES // (4 * weights))
        gradients_QK: Tensor = vmap(grad(of_one), in_dims=(None, 0), chunk_size=size)(
            alpha_K, images_QNP
        )
        return gradients_QK

    def _superposed(self, tasks_K: Tensor, alpha_K: Tensor) -> Mapping[str, Tensor]:
        """Return ``W ⊙ Σ α_i r_i s_iᵀ`` by the names of the weights, and the mean statistics."""
        tensors = {}
        for i, layer in enumerate(self._plain.layers):
            r_KO, s_KI = (self._own[f"{layer.name}.{name}"][tasks_K] for name in ("r", "s"))
            asked = not self._depth or i < self._depth
            own_alpha_K = alpha_K if asked else alpha_K.detach()
            sum_OI = (own_alpha_K[:, None] * r_KO).T @ s_KI
            weight = self._trunk[f"{layer.name}.weight"]
            tensors[f"{layer.name}.weight"] = weight * sum_OI.view(
                *sum_OI.shape, *[1] * (weight.dim() - 2)
            )
        for name, values_TC in self._own.items():
            if ".running_" in name:
                tensors[name] = alpha_K @ values_TC[tasks_K]
        return tensors
