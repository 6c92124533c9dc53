import numpy as np
import pytest
import torch

from supsup.errors import ConfigError
from supsup.fields import with_values
from supsup.hopfield import (
    HopLearner,
    Memory,
    check_hopfield,
    energy,
    passing,
    settled,
    storkey,
)


def patterns(count, size, seed=0):
    draws = np.random.default_rng(seed).integers(0, 2, (count, size))
    return torch.from_numpy(2.0 * draws - 1)


def by_the_formula(stored_KD):
    """Storkey's rule as it is printed, element by element."""
    count = stored_KD.shape[1]
    w = np.zeros((count, count))
    for x in stored_KD.numpy():
        new = w.copy()
        for i in range(count):
            for j in range(count):
                if i == j:
                    continue
                rest = [k for k in range(count) if k not in (i, j)]
                h_ij = sum(w[i, k] * x[k] for k in rest)
                h_ji = sum(w[j, k] * x[k] for k in rest)
                new[i, j] += (x[i] * x[j] - x[i] * h_ji - x[j] * h_ij) / count
        w = new
    return torch.from_numpy(w)


def test_storkey_against_the_formula_in_float64():
    stored_KD = patterns(4, 9)
    w = torch.zeros(9, 9, dtype=torch.float64)
    for pattern_D in stored_KD:
        w = storkey(w, pattern_D)
    assert torch.allclose(w, by_the_formula(stored_KD), atol=1e-14)
    assert torch.equal(w, w.T)


def test_stored_patterns_are_minima_that_descent_finds():
    stored_KD = patterns(6, 120, seed=1)
    memory = Memory([120])
    for pattern_D in stored_KD:
        memory.store([pattern_D > 0])
    w, mean_D = memory.weights[0].double(), memory.means[0].double()
    assert torch.allclose(mean_D, stored_KD.mean(0), atol=1e-6)
    for pattern_D in stored_KD:
        assert torch.equal((w @ pattern_D).sign(), pattern_D)
        for unit in range(0, 120, 7):
            other_D = pattern_D.clone()
            other_D[unit] *= -1
            assert energy(w, other_D) > energy(w, pattern_D)
        state_D = pattern_D.clone()
        state_D[:15] *= -1
        for _ in range(10):
            state_D = (w @ state_D).sign()
        assert torch.equal(state_D, pattern_D)


def test_the_memory_has_a_fixed_size():
    memory = Memory([30, 20])
    empty = memory.bytes
    for pattern_D in patterns(3, 30):
        memory.store([pattern_D > 0, pattern_D[:20] > 0])
    assert memory.bytes == empty == 4 * (30 * 30 + 20 * 20 + 30 + 20)


def test_gradients_pass_straight_through_masks():
    score_D = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    mask_D = passing(score_D)
    assert mask_D.tolist() == [0, 1, 1]
    (mask_D * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert score_D.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "steps"),
    [([5, 2, 0, 0], 3), ([0, 0], 1), ([3, 0, 1, 0], 4), ([3, 0, 1], -1), ([], -1)],
)
def test_steps_count_until_the_mask_is_right_for_good(wrong, steps):
    assert settled(wrong) == steps


@pytest.fixture(scope="module")
def hop_config(quick):
    values = {
        "learner": "hopsupsup", "family": "split", "class_order": "sorted", "tasks": 3,
        "model.name": "bnnet", "model.output_size": 10, "scenario": "gnu",
        "train.optimizer": "sgd", "train.learning_rate": 0.1, "train.schedule": "constant",
        "train.batches": 20, "train.batch_size": 64, "train.engine": "general",
        "eval.methods": "h-gradient-descent", "eval.batch": 4, "eval.images": 0,
        "eval.shortlist": 16,
    }  # fmt: skip
    return with_values(quick, values)


def test_masks_are_learned_and_found_again(hop_config, digits):
    learner = HopLearner(hop_config, digits)
    assert [learner.first_neuron(task) for task in (0, 1, 4, 5)] == [0, 2, 8, 0]
    learned = [learner.learn(task) for task in range(3)]
    units_KB = np.stack([part.own["units"] for part in learned])
    assert units_KB.shape == (3, 2 * 2048 // 8)
    for task, part in enumerate(learned):
        size = len(learner.family.test_labels(task))
        assert part.correct[0] > 0.85 * size
        found = learner.recover(hop_config.eval, units_KB, task)
        assert found.task == found.found == task
        assert found.images == size
        assert found.distance < 400
        # What is found is nearly the mask, and so is as good.
        assert found.correct > part.correct[0] - 0.1 * size
    again = learner.learn(1)
    assert np.array_equal(again.own["units"], learned[1].own["units"])


def test_a_memory_that_goes_on_is_the_one_that_began_anew(hop_config, digits):
    units_KB = np.random.default_rng(0).integers(0, 256, (4, 2 * 2048 // 8), dtype=np.uint8)
    kept, fresh = HopLearner(hop_config, digits), HopLearner(hop_config, digits)
    kept.memory(units_KB[:2])
    for chosen_KB in (units_KB, units_KB[::-1], units_KB[:1]):
        memory, expected = kept.memory(chosen_KB), Memory(fresh.sizes)
        for units_B in chosen_KB:
            expected.store(fresh._unpacked(units_B))
        assert memory.stored == len(chosen_KB)
        for ours, theirs in zip(memory.weights, expected.weights, strict=True):
            assert torch.equal(ours, theirs)


def test_recovery_of_the_only_mask_begins_at_it(hop_config, digits):
    """The mean of one mask is that mask: every step must leave it where it is, or return to it."""
    learner = HopLearner(hop_config, digits)
    units_KB = learner.learn(0).own["units"][None]
    found = learner.recover(hop_config.eval, units_KB, 0)
    assert found.distance == 0
    assert found.steps > 0
    assert found.correct == learner.learn(0).correct[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.name": "lenet-300-100"}, "must be bnnet"),
        ({"scenario": "nns"}, "isn't made for"),
        ({"eval.methods": "h-one-shot"}, "must be h-gradient-descent"),
        ({"eval.batch": "1"}, "must be at least 2"),
    ],
)
def test_what_cannot_be_asked_is_one_line(hop_config, values, message):
    check_hopfield(hop_config)
    with pytest.raises(ConfigError, match=message):
        check_hopfield(with_values(hop_config, values))
