"""Training as everybody would write it, which every engine is held against."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from supsup.datasets import Dataset
from supsup.masking import initial_scores
from supsup.material import batch_indices, learning_rate
from supsup.tasks import permutation
from supsup.train import BlockTrainer


class Threshold(torch.autograd.Function):
    """A mask in the forward pass, straight through in the backward pass (paper, 3.1)."""

    @staticmethod
    def forward(ctx, scores):
        return (scores >= 0).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Obvious:
    """One task trained as everybody would write it: permuted pixels, autograd, torch's RMSprop."""

    def __init__(self, trainer: BlockTrainer, task: int, dtype=torch.float32):
        material = trainer.material
        config, data = material.config, material.data
        self.config = config
        self.weights = [weight.to(dtype) for weight in material.weights]
        self.scores = [
            torch.from_numpy(initial_scores(config.seed, task, x)).to(dtype).requires_grad_()
            for x in material.layers
        ]
        train = config.train
        self.optimizer = torch.optim.RMSprop(
            self.scores, train.learning_rate, train.alpha, train.epsilon
        )
        order = torch.from_numpy(permutation(config.seed, task, data.pixels))
        pixels = torch.from_numpy(data.train_images).to(dtype)
        self.images = ((pixels / data.scale - data.mean) / data.std)[:, order]
        self.labels = torch.from_numpy(data.train_labels)
        batches = batch_indices(config.seed, len(pixels), train.batch_size, train.batches)
        self.batches = torch.from_numpy(batches)

    def step(self, number: int) -> float:
        hidden = self.images[self.batches[number]]
        for i, (weight, score) in enumerate(zip(self.weights, self.scores, strict=True)):
            hidden = (hidden.relu() if i else hidden) @ (weight * Threshold.apply(score)).T
        loss = cross_entropy(hidden, self.labels[self.batches[number]])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, number)
        self.optimizer.step()
        return loss.item()


def in_weight_order(trainer, task, layers_TOI, row) -> list[torch.Tensor]:
    """One task's part [O, I] of every layer, columns as the fixed weights have them."""
    first, *rest = [layer_TOI[row].clone() for layer_TOI in layers_TOI]
    order = permutation(trainer.material.config.seed, task, first.shape[1])
    return [first[:, torch.from_numpy(order)], *rest]


def loss_of(group, number, row=0) -> float:
    logits, labels = group.logits(number)
    return cross_entropy(logits[row].float(), labels).item()


def noise(digits: Dataset) -> Dataset:
    """Noise, not digits: hidden units seldom add up to exactly zero."""
    shape = digits.train_images.shape
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return dataclasses.replace(digits, train_images=images, scale=255.0)


def check_steps(
    trainer: BlockTrainer, dtype: torch.dtype, steps: int = 5, rough: float = 1
) -> None:
    """Step by step from the same state: losses, and how far each score moved.

    Args:
        trainer: of the engine to check, over ``noise``.
        dtype: of the obvious one.
        steps: how many.
        rough: by how much more losses and moves may differ.
    """
    tasks = range(2, 4)
    group = trainer.engine.begin(tasks)
    references = [Obvious(trainer, task, dtype) for task in tasks]

    def state(layers):
        on_cpu = [layer_TOI.cpu() for layer_TOI in layers]
        return [in_weight_order(trainer, task, on_cpu, row) for row, task in enumerate(tasks)]

    for number in range(steps):
        before, squares = state(group.scores()), state(group.square_avgs())
        losses = [loss_of(group, number, row) for row in range(len(tasks))]
        group.step(number)
        after = state(group.scores())
        for row, reference in enumerate(references):
            for score, old, square in zip(reference.scores, before[row], squares[row], strict=True):
                score.data.copy_(old)
                if number:
                    reference.optimizer.state[score]["square_avg"].copy_(square)
            assert losses[row] == pytest.approx(reference.step(number), rel=1e-5 * rough)
            for i, (score, mine, old) in enumerate(
                zip(reference.scores, after[row], before[row], strict=True)
            ):
                # RMSprop divides by the root of the mean square, so a gradient that is nothing
                # but rounding moves its score by a whole step, of either sign.
                real = score.grad.abs() > 1e-3 * rough * score.grad.abs().max()
                moved, expected = (mine - old)[real], (score.detach() - old)[real].float()
                close = torch.isclose(moved, expected, rtol=1e-2 * rough, atol=1e-6).float().mean()
                # A first hidden unit adds up whole numbers times one size of weight: some are
                # exactly zero, and rounding decides whether their gradient is there.
                assert close >= (0.98 if i == 0 else 1)
