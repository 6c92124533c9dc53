"""The fused engine on the CPU, by Triton's interpreter; tests/test_gpu.py has it on a GPU."""

import dataclasses

import numpy as np
import pytest
import torch

from supsup.errors import ConfigError, NonFiniteLoss
from supsup.fields import with_values
from supsup.fused import FusedEngine
from supsup.identity import resolve
from supsup.train import BlockTrainer
from tests.obvious import check_steps, noise


@pytest.fixture
def fused():
    """Makes trainers with the fused engine, its kernels interpreted. Slow: few images."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here")

    def make(config, data) -> BlockTrainer:
        trainer = BlockTrainer(config, data)
        trainer.engine = FusedEngine(trainer.material)
        return trainer

    return make


@pytest.fixture
def small(quick):
    """Layers and batches that don't end with a tile, nor with a multiple of the padding."""
    return with_values(quick, {"train.batch_size": 50, "train.batches": 3})


def test_the_fused_step_is_the_obvious_one(fused, small, digits):
    check_steps(fused(small, noise(digits)), torch.float64, steps=2)


def test_a_task_does_not_depend_on_those_beside_it(fused, small, digits):
    trainer = fused(small, digits)
    both, alone = trainer.engine.begin(range(2)), trainer.engine.begin(range(1, 2))
    for number in range(2):
        both.step(number)
        alone.step(number)
    for ours, own in zip(both.scores(), alone.scores(), strict=True):
        assert torch.equal(ours[1:], own)


def test_training_goes_on_from_what_it_left(fused, small, digits):
    """As an open-set learner's does; behind the last batch the rate stays what it was there."""
    trainer = fused(small, digits)
    batch, last = trainer.engine.feed.training_batch(0), small.train.batches - 1
    straight, begun = (trainer.engine.begin(range(1)) for _ in range(2))
    straight.learn(batch, 0)
    straight.learn(batch, last)
    begun.learn(batch, 0)
    weights, _ = trainer.material.initial_state(range(1))
    going_on = trainer.engine.resume(weights, begun.scores(), begun.square_avgs())
    going_on.learn(batch, last + 4)
    for mine, expected in zip(going_on.scores(), straight.scores(), strict=True):
        assert torch.equal(mine, expected)
    with pytest.raises(ValueError, match="the batch has 7 images"):
        going_on.learn((batch[0][:7], batch[1][:7]), 0)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_finite_is_found(fused, small, digits):
    """Behind a ReLU too: a maximum with zero would make zero of it."""
    broken = dataclasses.replace(digits, std=1e-39)
    trainer = fused(with_values(small, {"train.batches": 2}), broken)
    group = trainer.engine.begin(range(4, 5))
    with pytest.raises(NonFiniteLoss, match="task 4"):
        trainer._train_group(range(4, 5), group)


def test_test_images_are_all_seen(fused, small, digits):
    group = fused(small, digits).engine.begin(range(2))
    plain = BlockTrainer(small, digits).engine.begin(range(2))
    for (mine, y_B), (expected, y_of_plain) in zip(
        group.test_logits(), plain.test_logits(), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(y_B, y_of_plain)


def test_the_fused_engine_is_for_gpus_that_can_have_it(quick):
    def engine(fused, **train):
        values = {f"train.{key}": value for key, value in {"engine": "auto", **train}.items()}
        config = with_values(quick, values)
        device = config.train.device
        return resolve(config, device=device, native_bf16=True, fused=fused).train.engine

    assert engine(True, device="cuda") == engine(True, device="cuda", engine="fused") == "fused"
    assert engine(False, device="cuda") == engine(True, device="cpu") == "dense"
    with pytest.raises(ConfigError, match=r"train\.engine is fused.*made for cuda, not cpu"):
        engine(True, device="cpu", engine="fused")
    with pytest.raises(ConfigError, match=r"train\.engine is fused.*install gcc"):
        engine(False, device="cuda", engine="fused")
