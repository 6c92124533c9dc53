"""Task inference: which of the masks in a bank some unlabelled images belong to.

The superposition of all k masks, ``f(x, W ⊙ Σ α_i M_i)`` with ``α_i = 1/k``, is run once forward
and once backward; the task is the one whose ``α_i`` lowers the objective fastest (paper, Section
3.3, Equations 2 to 4). No gradient with respect to the α is ever built by autograd:

    ∂H/∂α_i = Σ_layers ⟨δ xᵀ ⊙ W, M_i⟩

with ``x`` a layer's input and ``δ`` the gradient of the objective at its output. The left factor
belongs to the query and is one number per weight; what is left is to add, for every mask, the
numbers of the bits that are set (supsup.packed).

Shapes: T masks, K some of them, W numbers per weight, Q queries (task decisions), N images per
query, P pixels, O outputs and I inputs of a layer, S output neurons, R tasks of a ranking.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from supsup.answering import packed_masks
from supsup.config import method_parts
from supsup.errors import ConfigError
from supsup.models import Layer
from supsup.packed import MEMORY_BYTES, PackedMasks

#: Steps of the gradient descent on α, and its rate in standard deviations of the first gradient.
_DESCENT_STEPS, _DESCENT_RATE = 8, 1.0
#: Numbers of a vector that tell how large its largest are.
_SAMPLE = 4096
#: Tasks that an algorithm ranks, at most.
RANKED = 5


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
        memory_bytes: int = MEMORY_BYTES,
        depth: int = 0,
        *,
        kernels: bool = True,
    ) -> None:
        """Add up the superposition of the masks.

        Args:
            packed_TB: the packed masks, uint8; may be a view of a larger bank.
            weights: the fixed weights, one [O, I] per layer; their type is the precision.
            layers: the layers of the network.
            classes: the real classes, the first of the output neurons.
            memory_bytes: what inference may take above the packed masks.
            depth: layers, from the first on, whose α the gradient is taken of; 0: all (paper).
            kernels: whether sums may be left to kernels, which round otherwise than torch.
        """
        made = packed_masks if kernels else PackedMasks
        self.masks = made(packed_TB, weights, layers, memory_bytes)
        self.asked = self.masks.first_layers(depth)
        self.classes = classes
        self.device = packed_TB.device
        k = len(packed_TB)
        all_T = torch.arange(k, device=self.device)
        self._superposed = self._superposition(all_T, self._uniform(k))

    def factors(self, images_QNP: Tensor, objective: str) -> Iterator[Tensor]:
        """Yield tiles of ``δ xᵀ ⊙ W`` [Q, W], the objective's mean over N images, at ``α = 1/k``.

        The gradient with respect to ``α_i`` is their sum over the bits of mask i, those of the
        layers that are ``asked``. A tile is good until the next one.
        """
        bytes_each = self.asked.vectors(1).nbytes
        tile = max(1, self.asked.memory_bytes // 4 // bytes_each)
        room_QW = self.asked.vectors(min(tile, len(images_QNP)))
        for part_QNP in torch.split(images_QNP, tile):
            part_QW = room_QW[: len(part_QNP)]
            self._fill(part_QW, self._superposed, part_QNP, objective)
            yield part_QW

    def alpha_gradients(self, images_QNP: Tensor, objective: str) -> Tensor:
        """Return ``∂objective/∂α`` at ``α = 1/k`` [Q, T], the objective's mean over N images."""
        return torch.cat([self.asked.sums(tile) for tile in self.factors(images_QNP, objective)])

    def gradient_at(
        self, images_NP: Tensor, objective: str, tasks_K: Tensor, alpha_K: Tensor | None = None
    ) -> Tensor:
        """Return ``∂objective/∂α`` [K] of some masks, at α or ``1/K``, the others' α being zero."""
        if alpha_K is None:
            alpha_K = self._uniform(len(tasks_K))
        factor_1W = self.asked.vectors(1)
        self._fill(factor_1W, self._superposition(tasks_K, alpha_K), images_NP[None], objective)
        if len(tasks_K) == len(self.masks):
            return self.asked.sums(factor_1W)[0, tasks_K]
        return self.asked.sums_of(factor_1W, tasks_K[None])[0]

    def logits(self, task: int, images: Tensor) -> Tensor:
        """Return the output [..., S] of one mask's network for images [..., P]."""
        logits = self.masks.logits(task, images.reshape(-1, images.shape[-1]))
        return logits.view(*images.shape[:-1], -1)

    def predict(self, tasks_Q: Tensor, images_QNP: Tensor) -> Tensor:
        """Return the class [Q, N] that each query's images have under its task's mask."""
        classes_QN = torch.empty(images_QNP.shape[:2], dtype=torch.int64, device=self.device)
        rows_Q = torch.arange(len(tasks_Q), device=self.device)
        for chosen, logits in self.runs(tasks_Q, rows_Q, images_QNP):
            classes_QN[chosen] = logits[..., : self.classes].argmax(-1)
        return classes_QN

    def runs(
        self, tasks_X: Tensor, rows_X: Tensor, images_QNP: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run masks on queries' images: see ``PackedMasks.runs``."""
        return self.masks.runs(tasks_X, rows_X, images_QNP)

    def _uniform(self, k: int) -> Tensor:
        return torch.full((k,), 1 / k, dtype=self.masks.dtype, device=self.device)

    def _superposition(self, tasks_K: Tensor, alpha_K: Tensor) -> list[Tensor]:
        """Return ``W ⊙ Σ α_i M_i`` [O, I] per layer."""
        return superposed(self.masks, self.masks.add_up(tasks_K, alpha_K))

    def _fill(
        self, room_QW: Tensor, superposition: Sequence[Tensor], images_QNP: Tensor, objective: str
    ) -> None:
        fill_factors(self.asked, room_QW, superposition, images_QNP, objective, self.classes)


def superposed(masks: PackedMasks, alpha_masks_1W: Tensor) -> list[Tensor]:
    """Return ``W ⊙ Σ α_i M_i`` [O, I] per layer, given the sum as a vector."""
    sums = masks.by_layer(alpha_masks_1W)
    return [w_OI * s_1OI[0] for w_OI, s_1OI in zip(masks.weights, sums, strict=True)]


def fill_factors(
    masks: PackedMasks,
    room_QW: Tensor,
    superposition: Sequence[Tensor],
    images_QNP: Tensor,
    objective: str,
    classes: int,
) -> None:
    """Write ``δ xᵀ ⊙ W`` of a superposition into room for it, the objective's mean over N images.

    The gradient of the objective with respect to ``α_i`` is its sum over the bits of mask i.

    Args:
        masks: the masks, asked about all layers or the first of them.
        room_QW: where to write; see ``PackedMasks.vectors``.
        superposition: ``W ⊙ Σ α_i M_i`` [O, I] of all layers.
        images_QNP: N images per query.
        objective: "h" or "g".
        classes: the real classes, the first of the output neurons.
    """
    inputs = [images_QNP]
    for i, weight_OI in enumerate(superposition):
        if i:
            inputs[-1] = inputs[-1].relu()
        inputs.append(inputs[-1] @ weight_OI.T)
    delta = OBJECTIVES[objective](inputs.pop(), classes) / images_QNP.shape[1]
    room = masks.by_layer(room_QW)
    for i in reversed(range(len(superposition))):
        if i < len(room):
            if images_QNP.shape[1] == 1:
                torch.mul(delta.transpose(1, 2), inputs[i], out=room[i])
            else:
                room[i].copy_(torch.bmm(delta.transpose(1, 2), inputs[i]))
            room[i].mul_(masks.weights[i])
        if i:
            delta = (delta @ superposition[i]) * (inputs[i] > 0)


# --- algorithms ------------------------------------------------------------------------------


class Queries:
    """Decisions to take about images [Q, N, P]; what several methods need is computed once."""

    def __init__(
        self, engine: TaskInference, images_QNP: Tensor, shortlist: int = 16, sketch: float = 0.05
    ) -> None:
        """Ask about some images.

        Args:
            engine: the masks.
            images_QNP: N images per decision.
            shortlist: masks that "shortlist" runs, and that "sketch" looks at in full.
            sketch: part of the weights that "sketch" looks at for every mask.
        """
        self.engine, self.images_QNP = engine, images_QNP
        self.shortlist, self.sketch = shortlist, sketch
        self._gradients: dict[str, Tensor] = {}

    def gradients(self, objective: str) -> Tensor:
        """Return ``∂objective/∂α`` [Q, T] at ``α = 1/k``."""
        if objective not in self._gradients:
            self._gradients[objective] = self.engine.alpha_gradients(self.images_QNP, objective)
        return self._gradients[objective]


def one_shot(queries: Queries, objective: str) -> Tensor:
    """Rank the tasks [Q, R] by the descent of the objective, the steepest first (paper, eq. 4)."""
    return _lowest(queries.gradients(objective))


def shortlist(queries: Queries, objective: str) -> Tensor:
    """Run the masks with the steepest descent; rank them [Q, R] by the lowest mean entropy."""
    gradients_QT = queries.gradients(objective)
    size = min(queries.shortlist, gradients_QT.shape[1])
    candidates_QK = gradients_QT.topk(size, dim=1, largest=False).indices.sort(1).values
    entropy_X = queries.images_QNP.new_empty(candidates_QK.numel())
    rows_X = torch.arange(len(candidates_QK), device=entropy_X.device).repeat_interleave(size)
    for pairs_Y, logits_YNS in queries.engine.runs(
        candidates_QK.flatten(), rows_X, queries.images_QNP
    ):
        entropy_X[pairs_Y] = entropy(logits_YNS).mean(1)
    return candidates_QK.gather(1, _lowest(entropy_X.view(candidates_QK.shape)))


def sketch(queries: Queries, objective: str) -> Tensor:
    """One-shot in two passes: all masks on a few weights, then a few masks on all weights.

    The first pass looks at the weights where the gradient is largest, query by query; the second at
    the masks that lead then, and ranks them [Q, R]. Of one-shot's work it does the part ``sketch``
    and ``shortlist / k``.
    """
    masks = queries.engine.asked
    size = min(queries.shortlist, len(masks))
    found = []
    for factors_QW in queries.engine.factors(queries.images_QNP, objective):
        sums_QT = masks.large_sums(factors_QW, least_of_largest(factors_QW, queries.sketch))
        leading_QK = sums_QT.topk(size, dim=1, largest=False).indices
        found.append(leading_QK.gather(1, _lowest(masks.sums_of(factors_QW, leading_QK))))
    return torch.cat(found)


def least_of_largest(vectors_QW: Tensor, part: float) -> Tensor:
    """Return what about so large a part of a vector's numbers exceed in magnitude [Q].

    Estimated from some thousands of them, evenly spread.
    """
    sample_QN = vectors_QW[:, :: max(1, vectors_QW.shape[1] // _SAMPLE) | 1].abs()
    count = sample_QN.shape[1]
    kept = round(part * count)
    if kept == count:
        return sample_QN.new_full((len(sample_QN),), -1)
    return sample_QN.kthvalue(count - kept, dim=1).values


def binary(queries: Queries, objective: str) -> Tensor:
    """Halve the superposition, keeping the steeper half, until one mask is left (paper, 3.3).

    Ranks the tasks [Q, R] by how long they were kept, those of one half by their descent.
    """
    found = []
    first_QT = queries.gradients(objective)
    for images_NP, gradient_K in zip(queries.images_QNP, first_QT, strict=True):
        ranking_T = gradient_K.argsort()
        while (count := (len(gradient_K) + 1) // 2) > 1:
            left_K = ranking_T[:count].sort().values
            gradient_K = queries.engine.gradient_at(images_NP, objective, left_K)
            ranking_T[:count] = left_K[gradient_K.argsort()]
        found.append(ranking_T[:RANKED])
    return torch.stack(found)


def gradient_descent(queries: Queries, objective: str) -> Tensor:
    """Descend on α within the simplex; rank the tasks [Q, R] by the largest α.

    Exponentiated gradient from ``α = 1/k``, its rate in units of the first gradient's standard
    deviation; the first step alone ranks the tasks as one-shot does.
    """
    first_QT = queries.gradients(objective)
    tasks_T = torch.arange(first_QT.shape[1], device=first_QT.device)
    found = []
    for images_NP, gradient_T in zip(queries.images_QNP, first_QT, strict=True):
        scale = gradient_T.std(correction=0).clamp_min(torch.finfo(gradient_T.dtype).tiny)
        logits_T = -_DESCENT_RATE * gradient_T / scale
        for _ in range(_DESCENT_STEPS - 1):
            alpha_T = logits_T.softmax(0)
            step_T = queries.engine.gradient_at(images_NP, objective, tasks_T, alpha_T)
            logits_T = logits_T - _DESCENT_RATE * step_T / scale
        found.append(_lowest(-logits_T))
    return torch.stack(found)


def all_masks(queries: Queries, objective: str) -> Tensor:
    """Run every mask; rank the tasks [Q, R] by the lowest mean entropy: the plain baseline."""
    return _run_all(queries, lambda logits_QNS: entropy(logits_QNS).mean(1))


def max_logit(queries: Queries, objective: str) -> Tensor:
    """Run every mask; rank the tasks [Q, R] by their largest logit of a real class.

    From one image, this is the maximum over the concatenated logits of all tasks; from several,
    the mean of their maxima decides.
    """
    classes = queries.engine.classes
    return _run_all(queries, lambda logits_QNS: -logits_QNS[..., :classes].amax(-1).mean(1))


def _run_all(queries: Queries, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tasks [Q, R] whose logits cost least, after all masks were run."""
    images_QNP = queries.images_QNP
    costs_QR = images_QNP.new_empty(len(images_QNP), 0)
    tasks_QR = torch.empty(costs_QR.shape, dtype=torch.int64, device=costs_QR.device)
    for task in range(len(queries.engine.masks)):
        cost_Q1 = cost(queries.engine.logits(task, images_QNP))[:, None]
        costs_QR = torch.cat([costs_QR, cost_Q1], 1)
        tasks_QR = torch.cat([tasks_QR, torch.full_like(cost_Q1, task, dtype=torch.int64)], 1)
        best_QR = _lowest(costs_QR)
        costs_QR, tasks_QR = costs_QR.gather(1, best_QR), tasks_QR.gather(1, best_QR)
    return tasks_QR


def _lowest(values: Tensor) -> Tensor:
    """Return where the lowest values [..., T] are, [..., R], the lowest first."""
    return values.topk(min(RANKED, values.shape[-1]), dim=-1, largest=False).indices


ALGORITHMS: Mapping[str, Callable[[Queries, str], Tensor]] = {
    "one-shot": one_shot,
    "shortlist": shortlist,
    "sketch": sketch,
    "binary": binary,
    "gradient-descent": gradient_descent,
    "all-masks": all_masks,
    "max-logit": max_logit,
}


def ranked(queries: Queries, method: str) -> Tensor:
    """Return the tasks [Q, R] that a method ranks first for each query, 5 of them or all."""
    objective, algorithm = method_parts(method)
    return ALGORITHMS[algorithm](queries, objective)


def infer(queries: Queries, method: str) -> Tensor:
    """Return the task [Q] that a method, such as ``h-one-shot``, finds for each query."""
    return ranked(queries, method)[:, 0]
