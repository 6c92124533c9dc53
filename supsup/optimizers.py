"""Optimisers of scores, as torch has them; what they keep of a score lies beside it.

They are elementwise: a score's way depends on its own gradients alone.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from supsup.config import TrainConfig

#: What takes the gradients of all scores, and the rate.
Update = Callable[[Sequence[Tensor], float], None]


def _torch_update(optimizer: torch.optim.Optimizer, scores: Sequence[Tensor]) -> Update:
    def update(gradients: Sequence[Tensor], rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        for score, gradient in zip(scores, gradients, strict=True):
            score.grad = gradient
        optimizer.step()

    return update


def rmsprop(train: TrainConfig, scores: Sequence[Tensor]) -> Update:
    """Return an update by RMSprop, not centred and without momentum."""
    optimizer = torch.optim.RMSprop(
        scores,
        alpha=train.alpha,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    return _torch_update(optimizer, scores)


def adam(train: TrainConfig, scores: Sequence[Tensor]) -> Update:
    """Return an update by Adam, with its usual betas of 0.9 and 0.999."""
    optimizer = torch.optim.Adam(scores, eps=train.epsilon, weight_decay=train.weight_decay)
    return _torch_update(optimizer, scores)


def sgd(train: TrainConfig, scores: Sequence[Tensor]) -> Update:
    """Return an update by gradient descent with momentum."""
    optimizer = torch.optim.SGD(
        scores, lr=1.0, momentum=train.momentum, weight_decay=train.weight_decay
    )
    return _torch_update(optimizer, scores)


OPTIMIZERS: Mapping[str, Callable[[TrainConfig, Sequence[Tensor]], Update]] = {
    "rmsprop": rmsprop,
    "adam": adam,
    "sgd": sgd,
}
