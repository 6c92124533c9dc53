"""Optimisers of scores, each one pass over a layer: gradient, update, and the new masked weights.

They are elementwise, and what torch.optim does: RMSprop neither centred nor with momentum, Adam
with betas of 0.9 and 0.999, and gradient descent with momentum. Decay is an L2 penalty on scores.

Shapes: T tasks, W weights of a layer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supsup.compiling import compiled, square_root
from supsup.config import RunConfig
from supsup.material import learning_rates

_BETA1, _BETA2 = 0.9, 0.999

#: Updates scores [T, W] in place, given gradients, what is kept of each, and the settings.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float], None]


def rmsprop(
    gradient: Tensor, scores: Tensor, kept: Tensor, second: Tensor, rates: Tensor,
    alpha: float, epsilon: float,
) -> None:  # fmt: skip
    """Divide by the root of the gradients' mean square."""
    second.mul_(alpha).add_((1 - alpha) * gradient * gradient)
    scores.sub_(rates[0] * gradient / (square_root(second) + epsilon))


def adam(
    gradient: Tensor, scores: Tensor, kept: Tensor, second: Tensor, rates: Tensor,
    alpha: float, epsilon: float,
) -> None:  # fmt: skip
    """Divide the mean gradient by the root of the mean square, both without their bias."""
    kept.mul_(_BETA1).add_((1 - _BETA1) * gradient)
    second.mul_(_BETA2).add_((1 - _BETA2) * gradient * gradient)
    scores.sub_(rates[0] / rates[1] * kept / (square_root(second) / rates[2] + epsilon))


def sgd(
    gradient: Tensor, scores: Tensor, kept: Tensor, second: Tensor, rates: Tensor,
    alpha: float, epsilon: float,
) -> None:  # fmt: skip
    """Go along the gradients, of which those before count ``alpha`` times as much each step."""
    kept.mul_(alpha).add_(gradient)
    scores.sub_(rates[0] * kept)


OPTIMIZERS: Mapping[str, Rule] = {"rmsprop": rmsprop, "adam": adam, "sgd": sgd}
#: Which keep a mean of gradients, and which one of their squares.
_KEEPS = {"rmsprop": (False, True), "adam": (True, True), "sgd": (True, False)}


def rates(config: RunConfig) -> Tensor:
    """Return, for every batch, the rate and what Adam divides by: [batches, 3]."""
    count = config.train.batches
    first, second = (
        np.fromiter((1 - beta ** (number + 1) for number in range(count)), np.float64, count)
        for beta in (_BETA1, _BETA2)
    )
    biases = torch.from_numpy(first), torch.from_numpy(np.sqrt(second))
    return torch.stack([learning_rates(config), *biases], dim=1)


class ScoreUpdate:
    """Updates the scores of some tasks, and what they keep, layer by layer."""

    def __init__(
        self,
        config: RunConfig,
        weights: Sequence[Tensor],
        scores: Sequence[Tensor],
        rates_B3: Tensor,
    ) -> None:
        """Begin with nothing kept.

        Args:
            config: of the run.
            weights: fixed weights, [O, I] per layer.
            scores: of some tasks, [T, O, I] per layer; contiguous, updated in place.
            rates_B3: see ``rates``.
        """
        train, mask = config.train, config.mask
        self._weights = [weight_OI.flatten() for weight_OI in weights]
        self._scores = [scores_TOI.view(len(scores_TOI), -1) for scores_TOI in scores]
        self._rates_B3 = rates_B3.to(scores[0].device, scores[0].dtype)
        empty = torch.empty(0, device=scores[0].device)
        rooms = [
            [torch.zeros_like(scores_TW) if keeps else empty for scores_TW in self._scores]
            for keeps in _KEEPS[train.optimizer]
        ]
        self._kept, self._second = rooms
        alpha = train.momentum if train.optimizer == "sgd" else train.alpha
        self._settings = alpha, train.epsilon, train.weight_decay
        self._update = _make_update(
            train.optimizer, mask.algorithm == "edge-popup", scores[0].device
        )

    def __call__(
        self, gradients: Sequence[Tensor], masked: Sequence[Tensor], number_1: Tensor
    ) -> None:
        """Update all scores by the gradients of the masked weights, straight through the mask.

        Args:
            gradients: of the masked weights, [T, O, I] per layer, or [O, I] of one task.
            masked: the masked weights, [T, O, I] per layer; with thresholds, made anew.
            number_1: updates before this one [1], on the scores' device.
        """
        scores = self._scores
        rates_3 = self._rates_B3.index_select(0, number_1)[0]
        for i, (gradient_TOI, masked_TOI) in enumerate(zip(gradients, masked, strict=True)):
            tasks = len(scores[i])
            self._update(
                gradient_TOI.reshape(tasks, -1), self._weights[i], scores[i], self._kept[i],
                self._second[i], masked_TOI.view(tasks, -1), rates_3, *self._settings,
            )  # fmt: skip


Update = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, float, float], None
]


def update_scores(
    rule: Rule,
    edge_popup: bool,
    gradient: Tensor,
    weights: Tensor,
    scores: Tensor,
    kept: Tensor,
    second: Tensor,
    masked: Tensor,
    rates: Tensor,
    alpha: float,
    epsilon: float,
    decay: float,
) -> None:
    """Update the scores [T, W] of a layer in place, and with thresholds the masked weights.

    Edge-popup's mask is one of the scores' magnitudes; its masked weights wait for the order.
    """
    score_gradient = gradient.to(scores.dtype) * weights
    if edge_popup:
        score_gradient = score_gradient * scores.sign()
    rule(score_gradient + decay * scores, scores, kept, second, rates, alpha, epsilon)
    if not edge_popup:
        masked.copy_(torch.where(scores >= 0, weights, torch.zeros_like(weights)))


@functools.cache
def _make_update(optimizer: str, edge_popup: bool, device: torch.device) -> Update:
    """Return the update compiled to one pass, or as it is where there is no compiler."""
    rule = OPTIMIZERS[optimizer]

    def update(*args: Any) -> None:
        update_scores(rule, edge_popup, *args)

    buffers = torch.zeros(5, 1, 64, device=device)
    trial = (
        buffers[0], torch.zeros(64, device=device), *buffers[1:], torch.ones(3, device=device),
        0.9, 1e-8, 0.0,
    )  # fmt: skip
    return compiled(update, trial)
