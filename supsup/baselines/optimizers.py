"""Optimisers of whatever a learner trains: those of torch, by the run's settings."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from supsup.config import TrainConfig

#: What takes the gradients of all that is trained, and the rate.
Update = Callable[[Sequence[Tensor], float], None]


def make_update(train: TrainConfig, trained: Sequence[Tensor]) -> Update:
    """Return what updates tensors in place: RMSprop, Adam or SGD with momentum."""
    optimizer = _optimizer(train, trained)

    def update(gradients: Sequence[Tensor], rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()

    return update


def _optimizer(train: TrainConfig, trained: Sequence[Tensor]) -> torch.optim.Optimizer:
    decay = train.weight_decay
    if train.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            trained, alpha=train.alpha, eps=train.epsilon, weight_decay=decay
        )
    if train.optimizer == "adam":
        return torch.optim.Adam(trained, eps=train.epsilon, weight_decay=decay)
    return torch.optim.SGD(trained, momentum=train.momentum, weight_decay=decay)
