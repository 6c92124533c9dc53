"""Edge-popup: masks against a sort, budgets against their rule, gradients against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup.config import MaskConfig
from supsup.errors import ConfigError
from supsup.fields import with_values
from supsup.masking import budgets, largest, make_masks, unpack
from supsup.models import Layer
from supsup.train import BlockTrainer

LAYERS = (
    Layer("stem", 20, 27, (3, 3, 3)),
    Layer("deep", 160, 1440, (160, 3, 3)),
    Layer("head", 10, 160),
)


def by_sorting(scores, keep):
    """The definition: order by magnitude, equal ones by place."""
    order = sorted(range(len(scores)), key=lambda i: (-abs(scores[i]), i))
    return [i in set(order[:keep]) for i in range(len(scores))]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_the_largest_are_those_of_a_sort_ties_included(values, data):
    keep = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    found = largest(scores.view(1, 1, -1), keep)[0, 0]
    assert found.tolist() == by_sorting(values, keep)


def test_every_task_is_cut_by_itself():
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32))
    scores[1] *= 100
    masks = largest(scores, 7)
    for mask, own in zip(masks, scores, strict=True):
        assert mask.flatten().tolist() == by_sorting(own.flatten().tolist(), 7)


def test_scores_that_are_not_numbers_leave_as_many_bits():
    assert largest(torch.full((1, 2, 3), torch.nan), 2).sum() == 2


def test_a_uniform_budget_is_the_same_part_of_every_layer():
    mask = MaskConfig(algorithm="edge-popup", keep_fraction=0.1)
    assert budgets(mask, LAYERS) == [54, 23040, 160]


@pytest.mark.parametrize("keep_fraction", [0.005, 0.02, 0.1, 0.4, 0.5])
def test_an_erdos_renyi_budget_follows_its_rule(keep_fraction):
    mask = MaskConfig(algorithm="edge-popup", keep_fraction=keep_fraction, budget="erdos-renyi")
    found = budgets(mask, LAYERS)
    sizes = [layer.weights for layer in LAYERS]
    assert sum(found) == pytest.approx(keep_fraction * sum(sizes), abs=2)
    densities = [kept / size for kept, size in zip(found, sizes, strict=True)]
    ratios = [(20 + 3) / 540, (160 + 160) / 230400, (10 + 160) / 1600]
    assert max(densities) <= 0.5 + 1e-3
    scales = [d / r for d, r in zip(densities, ratios, strict=True) if d < 0.499]
    assert scales == pytest.approx([max(scales)] * len(scales), rel=0.02) if scales else True
    capped = [r for d, r in zip(densities, ratios, strict=True) if d >= 0.499]
    # Whatever is full would be fuller by the common scale.
    assert all(max(scales, default=np.inf) * r >= 0.49 for r in capped)


def test_half_is_the_most_that_erdos_renyi_keeps(quick):
    values = {"mask.algorithm": "edge-popup", "mask.budget": "erdos-renyi"}
    with_values(quick, {**values, "mask.keep_fraction": 0.5})
    with pytest.raises(ConfigError, match=r"mask.*keep_fraction is 0\.6, must be at most 0\.5"):
        with_values(quick, {**values, "mask.keep_fraction": 0.6})


class TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, keep):
        mask = torch.zeros_like(sizes).flatten()
        mask[sizes.flatten().sort(descending=True, stable=True).indices[:keep]] = 1
        return mask.view_as(sizes)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_step_is_that_of_autograd_through_the_magnitudes(quick, digits):
    """Ramanujan et al.: the mask of |score|, straight through the choice of the largest."""
    values = {"train.engine": "general", "mask.algorithm": "edge-popup", "mask.keep_fraction": 0.3}
    config = with_values(quick, {**values, "train.optimizer": "sgd", "train.learning_rate": 1.0})
    trainer = BlockTrainer(config, digits)
    material = trainer.material
    group = trainer.engine.begin(range(1, 2))
    before = [scores[0].clone() for scores in group.scores()]
    group.step(0)
    images, labels = material.family.train(1)
    chosen = material.order[0]
    hidden = material.normalised(torch.from_numpy(images)[chosen])
    free = [scores.clone().requires_grad_() for scores in before]
    for i, (weight, scores, layer) in enumerate(
        zip(material.weights, free, material.layers, strict=True)
    ):
        mask = TopK.apply(scores.abs(), round(0.3 * layer.weights))
        hidden = (hidden.relu() if i else hidden) @ (weight * mask).T
    torch.nn.functional.cross_entropy(hidden, torch.from_numpy(labels)[chosen]).backward()
    for found, old, scores in zip(group.scores(), before, free, strict=True):
        torch.testing.assert_close(found[0], old - scores.grad, rtol=1e-4, atol=1e-6)


def test_trained_masks_keep_their_budgets_and_learn(quick, digits):
    values = {
        "train.engine": "general",
        "mask.algorithm": "edge-popup",
        "mask.keep_fraction": 0.2,
        "mask.budget": "erdos-renyi",
        "train.batches": 60,
        "train.batch_size": 32,
    }
    config = with_values(quick, values)
    trainer = BlockTrainer(config, digits)
    block = trainer.train(range(1))
    masks = unpack(torch.from_numpy(block.masks), trainer.material.layers, torch.float32)
    kept = [int(mask.sum()) for mask in masks]
    assert kept == budgets(config.mask, trainer.material.layers)
    assert block.gg_correct[0] > 0.8 * len(digits.test_images)
    other = make_masks(MaskConfig(), trainer.material.layers, [torch.ones(1, 2, 2)])
    assert bool(other[0].all())
