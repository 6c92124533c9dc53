"""Task inference: which of the masks in a bank some unlabelled images belong to.

The superposition of all k masks, ``f(x, W ⊙ Σ α_i M_i)`` with ``α_i = 1/k``, is run once forward
and once backward; the task is the one whose ``α_i`` lowers the objective fastest (paper, Section
3.3, Equations 2 to 4). No gradient with respect to the α is ever built by autograd:

    ∂H/∂α_i = Σ_layers ⟨δ xᵀ ⊙ W, M_i⟩

with ``x`` a layer's input and ``δ`` the gradient of the objective at its output. The left factor
belongs to the query, so the gradients of all queries and all masks are one matrix product per
layer, over masks unpacked tile by tile.

Shapes: T masks, B bytes of a packed mask, Q queries (task decisions), N images per query, P
pixels, O outputs and I inputs of a layer, S output neurons.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from supsup.errors import ConfigError
from supsup.masking import layer_slices, unpack, unpack_layer
from supsup.models import Layer

#: Bytes that a tile of queries, and a tile of unpacked masks, may each take.
_TILE_BYTES = 128 << 20


# --- objectives ------------------------------------------------------------------------------


def entropy(logits_QNS: Tensor) -> Tensor:
    """Return the entropy H of the softmax [Q, N], in nats."""
    log_p = logits_QNS.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_gradient(logits_QNS: Tensor, classes: int) -> Tensor:
    """Return ``∂H/∂logits = -p (log p + H)``, shaped as the logits."""
    log_p = logits_QNS.log_softmax(-1)
    p = log_p.exp()
    return -p * (log_p - (p * log_p).sum(-1, keepdim=True))


def superfluous_gradient(logits_QNS: Tensor, classes: int) -> Tensor:
    """Return the gradient of G, logsumexp with the real classes' gradient masked out (eq. 6).

    Only the superfluous neurons, those from ``classes`` on, pass it: their softmax.
    """
    delta = logits_QNS.softmax(-1)
    delta[..., :classes] = 0
    return delta


OBJECTIVES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "h": entropy_gradient,
    "g": superfluous_gradient,
}


def check_methods(methods: Sequence[str], output_size: int, classes: int) -> None:
    """Check that the network has the superfluous neurons that objective G lives on.

    Raises:
        ConfigError: if a method with objective G is asked of a network without any.
    """
    for method in methods:
        if method.startswith("g-") and output_size <= classes:
            raise ConfigError(
                f"eval.methods has {method}, which needs superfluous output neurons: "
                f"model.output_size is {output_size}, must be above {classes}, the classes"
            )


# --- the engine ------------------------------------------------------------------------------


class TaskInference:
    """Infers tasks among the masks of one bank, or of its beginning."""

    def __init__(
        self,
        packed_TB: Tensor,
        weights: Sequence[Tensor],
        layers: Sequence[Layer],
        classes: int,
    ) -> None:
        """Add up the superposition of the masks.

        Args:
            packed_TB: the packed masks, uint8; may be a view of a larger bank.
            weights: the fixed weights, one [O, I] per layer; their type is the precision.
            layers: the layers of the network.
            classes: the real classes, the first of the output neurons.
        """
        self.packed_TB = packed_TB
        self.weights = list(weights)
        self.layers = tuple(layers)
        self.classes = classes
        self._superposed = [
            weight * self._sum_of_masks(layer, part) / len(packed_TB)
            for weight, (layer, part) in zip(self.weights, layer_slices(layers), strict=True)
        ]

    def alpha_gradients(self, images_QNP: Tensor, objective: str) -> Tensor:
        """Return ``∂objective/∂α`` at ``α = 1/k`` [Q, T], the objective's mean over N images."""
        largest = max(layer.weights for layer in self.layers)
        tile = max(1, _TILE_BYTES // (largest * images_QNP.element_size()))
        return torch.cat([self._gradients(q, objective) for q in torch.split(images_QNP, tile)])

    def logits(self, task: int, images: Tensor) -> Tensor:
        """Return the output [..., S] of one mask's network for images [..., P]."""
        masks = unpack(self.packed_TB[task : task + 1], self.layers, images.dtype)
        return self._forward(
            [weight * mask[0] for weight, mask in zip(self.weights, masks, strict=True)], images
        )[-1]

    def predict(self, tasks_Q: Tensor, images_QNP: Tensor) -> Tensor:
        """Return the class [Q, N] that each query's images have under its task's mask."""
        classes_QN = torch.empty(images_QNP.shape[:2], dtype=torch.int64)
        for task in torch.unique(tasks_Q).tolist():
            chosen_Q = tasks_Q == task
            logits = self.logits(task, images_QNP[chosen_Q])
            classes_QN[chosen_Q] = logits[..., : self.classes].argmax(-1)
        return classes_QN

    def _sum_of_masks(self, layer: Layer, part: slice) -> Tensor:
        total = torch.zeros(layer.outputs, layer.inputs, dtype=self.weights[0].dtype)
        for _, mask_TOI in self._unpacked(layer, part):
            total += mask_TOI.sum(0)
        return total

    def _unpacked(self, layer: Layer, part: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield tiles of unpacked masks [T, O, I] of one layer, with the tasks they are of."""
        dtype = self.weights[0].dtype
        tile = max(1, _TILE_BYTES // (layer.weights * dtype.itemsize))
        for start in range(0, len(self.packed_TB), tile):
            tasks = slice(start, start + tile)
            yield tasks, unpack_layer(self.packed_TB[tasks, part], layer, dtype)

    def _gradients(self, images_QNP: Tensor, objective: str) -> Tensor:
        *inputs, logits_QNS = self._forward(self._superposed, images_QNP)
        delta = OBJECTIVES[objective](logits_QNS, self.classes) / images_QNP.shape[1]
        gradients_QT = images_QNP.new_zeros(len(images_QNP), len(self.packed_TB))
        slices = list(layer_slices(self.layers))
        for i in reversed(range(len(self.layers))):
            factor_QOI = torch.bmm(delta.transpose(1, 2), inputs[i]) * self.weights[i]
            for tasks, mask_TOI in self._unpacked(*slices[i]):
                gradients_QT[:, tasks] += factor_QOI.flatten(1) @ mask_TOI.flatten(1).T
            if i:
                delta = (delta @ self._superposed[i]) * (inputs[i] > 0)
        return gradients_QT

    @staticmethod
    def _forward(masked: Sequence[Tensor], images: Tensor) -> list[Tensor]:
        """Return the input of every layer, and the logits last."""
        acts = [images]
        for i, weight_OI in enumerate(masked):
            if i:
                acts[-1] = acts[-1].relu()
            acts.append(acts[-1] @ weight_OI.T)
        return acts


# --- algorithms ------------------------------------------------------------------------------


def one_shot(
    engine: TaskInference, images_QNP: Tensor, objective: str, shortlist: int = 0
) -> Tensor:
    """Return the task [Q] with the steepest descent of the objective (paper, eq. 4)."""
    return engine.alpha_gradients(images_QNP, objective).argmin(1)


def shortlist(
    engine: TaskInference, images_QNP: Tensor, objective: str, shortlist: int = 16
) -> Tensor:
    """Run the masks with the steepest descent; return the task [Q] of the lowest mean entropy."""
    gradients_QT = engine.alpha_gradients(images_QNP, objective)
    size = min(shortlist, gradients_QT.shape[1])
    candidates_QC = gradients_QT.topk(size, dim=1, largest=False).indices.sort(1).values
    entropy_QC = torch.empty(candidates_QC.shape, dtype=images_QNP.dtype)
    for task in torch.unique(candidates_QC).tolist():
        queries, columns = (candidates_QC == task).nonzero(as_tuple=True)
        logits_QNS = engine.logits(task, images_QNP[queries])
        entropy_QC[queries, columns] = entropy(logits_QNS).mean(1)
    return candidates_QC.gather(1, entropy_QC.argmin(1, keepdim=True)).squeeze(1)


ALGORITHMS: Mapping[str, Callable[[TaskInference, Tensor, str, int], Tensor]] = {
    "one-shot": one_shot,
    "shortlist": shortlist,
}


def infer(
    engine: TaskInference, images_QNP: Tensor, method: str, shortlist_size: int = 16
) -> Tensor:
    """Return the task [Q] that a method, such as ``h-one-shot``, finds for each query."""
    objective, algorithm = method.split("-", 1)
    return ALGORITHMS[algorithm](engine, images_QNP, objective, shortlist_size)
