import dataclasses
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from supsup.errors import ConfigError, NonFiniteLoss
from supsup.fields import with_values
from supsup.masking import unpack
from supsup.material import batch_indices, layers_of, learning_rate
from supsup.tasks import permutation
from supsup.train import BlockTrainer
from tests.obvious import Obvious, check_steps, in_weight_order, loss_of, noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_step_is_the_obvious_one(quick, digits, dtype):
    check_steps(BlockTrainer(quick, noise(digits)), dtype)


def test_without_interference_the_fast_training_is_the_obvious_one(trainer, quick):
    """Twelve steps on their own: rounding may flip few masks, and the losses stay together."""
    reference = Obvious(trainer, 1)
    group = trainer.engine.begin(range(1, 2))
    for number in range(quick.train.batches):
        loss = loss_of(group, number)
        group.step(number)
        assert loss == pytest.approx(reference.step(number), rel=1e-1)
    found = in_weight_order(trainer, 1, group.scores(), 0)
    for mine, score in zip(found, reference.scores, strict=True):
        assert ((mine >= 0) == (score >= 0)).float().mean() > 0.97


def test_a_block_equals_its_tasks_alone(trainer, trained, quick):
    for tasks in (range(8), range(2, 7)):
        block = trainer.train(tasks)
        part = slice(tasks.start, tasks.stop)
        np.testing.assert_array_equal(block.masks, trained.masks[part])
        np.testing.assert_array_equal(block.gg_correct, trained.gg_correct[part])
        np.testing.assert_array_equal(block.loss, trained.loss[part])


def test_training_learns(quick, digits):
    config = with_values(quick, {"train.batches": 150})
    block = BlockTrainer(config, digits).train(range(2))
    assert (block.gg_correct / len(digits.test_images) > 0.9).all()


def test_masks_are_stored_in_the_order_of_the_weights(trainer, trained, digits):
    """The packed mask over the plain weights, fed permuted pixels, has the stored accuracy."""
    material = trainer.material
    for task in (0, 7):
        masks = unpack(
            torch.from_numpy(trained.masks[task : task + 1]), material.layers, torch.float32
        )
        order = torch.from_numpy(permutation(material.config.seed, task, digits.pixels))
        pixels, labels = map(torch.from_numpy, (digits.test_images, digits.test_labels))
        hidden = material.normalised(pixels)[:, order]
        for i, (weight, mask) in enumerate(zip(material.weights, masks, strict=True)):
            hidden = (hidden.relu() if i else hidden) @ (weight * mask[0]).T
        correct = (hidden[:, : digits.classes].argmax(1) == labels).sum()
        assert correct == trained.gg_correct[task]


def test_weights_do_not_depend_on_the_number_of_tasks(quick, digits, trainer):
    more = BlockTrainer(with_values(quick, {"tasks": 2500}), digits)
    for a, b in zip(trainer.material.weights, more.material.weights, strict=True):
        assert torch.equal(a, b)


def test_bf16_agrees_with_fp32(quick, digits):
    """Accuracies within half a point on real data, mean of four tasks."""
    accuracy = {}
    for precision in ("bf16", "fp32"):
        values = {"train.precision": precision, "train.batches": 300, "train.learning_rate": 1e-3}
        config = with_values(quick, values)
        block = BlockTrainer(config, digits).train(range(4))
        accuracy[precision] = block.gg_correct.mean() / len(digits.test_images)
    assert accuracy["fp32"] > 0.95
    assert abs(accuracy["bf16"] - accuracy["fp32"]) < 0.005


def test_the_fallback_gives_the_same_masks(quick, digits, trained, monkeypatch):
    from supsup import dense

    monkeypatch.setattr(dense, "_make_update", lambda device: dense.update_scores)
    block = BlockTrainer(quick, digits).train(range(3))
    np.testing.assert_array_equal(block.masks, trained.masks[:3])


def test_no_compiler_is_a_warning_and_works(tmp_path):
    code = """
import warnings
import torch
from supsup.dense import _make_update
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    update = _make_update(torch.device("cpu"))
print(update.__name__, [str(w.message) for w in caught if "uncompiled" in str(w.message)])
"""
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("update_scores ")
    assert "the score update runs uncompiled" in done.stdout
    assert "g++" in done.stdout


def test_diverging_is_an_error_that_names_the_task(quick, digits):
    config = with_values(quick, {"train.batches": 2})
    broken = dataclasses.replace(digits, std=1e-38)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteLoss, match=r"task 4: .*train\.learning_rate"):
            BlockTrainer(config, broken).train(range(4, 6))


def test_schedules(quick):
    linear = with_values(quick, {"train.batches": 4, "train.learning_rate": 1.0})
    assert [learning_rate(linear, i) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = with_values(linear, {"train.schedule": "constant"})
    assert [learning_rate(constant, i) for i in range(4)] == [1.0] * 4


def test_batches_are_epochs_end_to_end():
    order = batch_indices(0, images=10, batch=4, batches=5)
    assert order.shape == (5, 4)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:]) == list(range(10))
    assert not np.array_equal(order.ravel()[:10], order.ravel()[10:])
    np.testing.assert_array_equal(batch_indices(0, 10, 4, 2), order[:2])


def test_there_must_be_an_output_per_class(quick, digits):
    with pytest.raises(ConfigError, match=r"model\.output_size is 9, must be at least 10"):
        layers_of(with_values(quick, {"model.output_size": 9}), digits)
