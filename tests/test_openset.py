"""The open-set learner: its rule, its arithmetic against autograd, its training, its memory."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from supsup.answering import packed_masks
from supsup.apprentice import LocalTrainer, MaskState, initial_state, packed_mask
from supsup.config import OpenSetConfig
from supsup.fields import with_values
from supsup.inference import entropy
from supsup.masking import pack, unpack
from supsup.material import layers_of
from supsup.members import PAGE, LocalMembers, Superposition
from supsup.models import fixed_weights, make_layers
from supsup.openset import Existing, New, Step, Threshold, decide, margin
from supsup.packed import PackedMasks
from supsup.streams import Segment, Stream
from tests.streaming import Recorder

LAYERS = make_layers("lenet-300-100", 21, 17)
WEIGHTS = [torch.from_numpy(w) for w in fixed_weights(0, LAYERS)]


def random_bank(k: int) -> np.ndarray:
    random = np.random.default_rng(k)
    masks = [torch.from_numpy(random.random((k, x.outputs, x.inputs)) < 0.4) for x in LAYERS]
    return pack(masks)


def as_scores(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


# --- the rule --------------------------------------------------------------------------------


def test_the_margin_is_one_where_all_are_equal_and_k_where_one_stands_out():
    assert margin(as_scores(2, 2, 2, 2)) == pytest.approx(1)
    assert margin(as_scores(0, 500, 0)) == pytest.approx(3)
    scores = as_scores(0.3, -1.2, 0.7, 0.1)
    expected = 4 * torch.from_numpy(scores).double().softmax(0).max()
    assert margin(scores) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("scores", "allocated", "epsilon", "choice"),
    [
        ((0, 5, 0, 0, 0), 5, 0.125, Existing(1)),
        ((0, 0.01, 0, 0, 0), 5, 0.125, New()),  # about uniform: nobody knows it
        ((0, 0.01, 0, 0, 0), 5, 0.001, Existing(1)),
        ((0, 5, 0, 0, 0), 1, 0.125, New()),  # the best is a mask that was never trained
        ((5, 0, 0, 0, 0), 1, 0.125, Existing(0)),
        ((0, 0, 0, 0, 0), 0, 0.125, New()),
    ],
)
def test_decisions(scores, allocated, epsilon, choice):
    assert decide(as_scores(*scores), allocated, epsilon) == choice


def normal(centre: float, width: float, count: int) -> list[float]:
    """Values spread as a normal distribution's are, without chance."""
    law = statistics.NormalDist(centre, width)
    return [law.inv_cdf((i + 0.5) / count) for i in range(count)]


def feed(threshold: Threshold, known: int, new: int) -> None:
    for value in normal(math.log(0.5), 0.2, known):
        threshold.observe(1 + math.exp(value), new=False)
    for value in normal(math.log(0.08), 0.1, new):
        threshold.observe(1 + math.exp(value), new=True)


def test_a_calibrated_threshold_makes_both_errors_equally_likely():
    threshold = Threshold(OpenSetConfig(threshold="calibrated", epsilon=0.3))
    feed(threshold, known=256, new=7)
    assert threshold.epsilon == 0.3  # not enough of both yet
    feed(threshold, known=0, new=64)
    ideal = (math.log(0.08) * 0.2 + math.log(0.5) * 0.1) / 0.3
    assert math.log(threshold.epsilon) == pytest.approx(ideal, abs=0.01)
    known, new = (
        statistics.NormalDist(math.log(0.5), 0.2),
        statistics.NormalDist(math.log(0.08), 0.1),
    )
    assert known.cdf(ideal) == pytest.approx(1 - new.cdf(ideal), rel=0.01)
    assert threshold.false_alarm == pytest.approx(known.cdf(ideal), rel=0.5)
    for _ in range(12):  # some decisions that were wrong
        threshold.observe(1.9, new=True)
        threshold.observe(1.05, new=False)
    assert math.log(threshold.epsilon) == pytest.approx(ideal, abs=0.15)


def test_where_margins_overlap_the_threshold_is_the_fixed_one():
    threshold = Threshold(OpenSetConfig(threshold="calibrated", epsilon=0.125))
    for value in normal(math.log(0.3), 0.3, 256):
        threshold.observe(1 + math.exp(value), new=False)
    for value in normal(math.log(0.2), 0.5, 64):
        threshold.observe(1 + math.exp(value), new=True)
    assert threshold.epsilon == 0.125
    for value in normal(math.log(0.05), 0.1, 64):
        threshold.observe(1 + math.exp(value), new=True)
    assert 0.05 < threshold.epsilon < 0.3
    assert threshold.epsilon != 0.125


def test_only_the_first_recognition_of_a_mask_calibrates():
    threshold = Threshold(OpenSetConfig(threshold="calibrated", epsilon=0.3))

    def take(mask: int, new: bool, margin: float, mixed: bool = False) -> None:
        threshold.take(
            Step(
                segment=0, mask=mask, new=new, mixed=mixed, margin=margin, epsilon=0.3,
                decision_seconds=0, packed_B=None, state=None, batches=0,
            )
        )  # fmt: skip

    for mask in range(40):
        take(mask, True, 1.08)
        take(mask, False, 1.3)
    first = threshold.epsilon
    assert 0.08 < first < 0.3
    for mask in range(40):  # trained further, the masks stand out more
        take(mask, False, 1.9)
        take(mask, False, 1.01, mixed=True)
    assert threshold.epsilon == first


def test_a_fixed_threshold_stays():
    threshold = Threshold(OpenSetConfig(epsilon=0.2))
    assert math.isnan(threshold.false_alarm)
    feed(threshold, known=256, new=64)
    assert threshold.epsilon == 0.2
    assert 0 < threshold.false_alarm < 1e-3


# --- the arithmetic --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_scores_are_the_gradients_of_autograd(depth):
    packed = random_bank(6)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 21)))
    members = LocalMembers(LAYERS, WEIGHTS, depth)
    superposition = Superposition(LAYERS, WEIGHTS, 10, depth)
    for mask, packed_B in enumerate(packed):
        members.put(mask, packed_B)
        superposition.add(packed_B)
    found = members.scores(superposition.factor(x.float(), 6))

    alpha = torch.full((6,), 1 / 6, dtype=torch.float64, requires_grad=True)
    hidden = x
    masks = unpack(torch.from_numpy(packed), LAYERS, torch.float64)
    for i, (w, mask_TOI) in enumerate(zip(WEIGHTS, masks, strict=True)):
        own = alpha if not depth or i < depth else alpha.detach()
        mixed = w.double() * torch.einsum("t,toi->oi", own, mask_TOI)
        hidden = (hidden.relu() if i else hidden) @ mixed.T
    entropy(hidden[None]).mean().backward()
    assert np.allclose(found, -alpha.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_an_incremental_superposition_is_the_sum():
    packed = random_bank(8)
    changing, fresh = (Superposition(LAYERS, WEIGHTS, 10) for _ in range(2))
    for packed_B in packed[:5]:
        changing.add(packed_B)
    for old, new in ((0, 5), (3, 6), (1, 7)):
        changing.add(packed[old], -1)
        changing.add(packed[new])
    for mask in (2, 4, 5, 6, 7):
        fresh.add(packed[mask])
    assert torch.equal(changing._counts_1W, fresh._counts_1W)


def test_a_mask_may_be_replaced_and_pages_fill_up():
    packed = random_bank(2 * PAGE + 9)
    members = LocalMembers(LAYERS, WEIGHTS)
    for mask, packed_B in enumerate(packed):
        members.put(mask, packed[0] if mask == 70 else packed_B)
    vector = packed_masks(torch.from_numpy(packed), WEIGHTS, LAYERS).vectors(1)
    plain = PackedMasks(torch.from_numpy(packed), [w.double() for w in WEIGHTS], LAYERS)
    numbers = np.random.default_rng(3).normal(size=plain.bits)
    vector[0, : plain.bits] = torch.from_numpy(numbers)
    expected = -plain.sums(torch.from_numpy(numbers)[None])[0].numpy()
    before = members.scores(vector[0])
    assert len(before) == len(packed)
    assert abs(before[70] - expected[70]) > 1
    members.put(70, packed[70])
    assert np.allclose(members.scores(vector[0]), expected, rtol=1e-5, atol=2e-3)


# --- training --------------------------------------------------------------------------------


def segments_of(config, data, batches: int, count: int) -> list[Segment]:
    config = with_values(config, {"openset.decide_every": batches, "tasks": 1})
    return list(Stream(config, data))[:count]


def test_training_is_a_plain_loop_of_rmsprop(open_config, digits_16):
    (segment,) = segments_of(open_config, digits_16, 3, 1)
    layers, train = layers_of(open_config, digits_16), open_config.train
    state = initial_state(open_config, layers, 3)
    found = LocalTrainer(open_config, digits_16).train(3, segment, state)

    weights = [torch.from_numpy(w).double() for w in fixed_weights(open_config.seed, layers)]
    parts = np.split(state.scores_W, np.cumsum([layer.weights for layer in layers])[:-1])
    scores = [
        torch.from_numpy(part).double().view(layer.outputs, layer.inputs).requires_grad_()
        for part, layer in zip(parts, layers, strict=True)
    ]
    optimizer = torch.optim.RMSprop(scores, lr=1, alpha=train.alpha, eps=train.epsilon)
    for number, (images, labels) in enumerate(segment.batches()):
        optimizer.param_groups[0]["lr"] = train.learning_rate * (1 - number / train.batches)
        hidden = (torch.from_numpy(images).double() / 16 - digits_16.mean) / digits_16.std
        for i, (w, s) in enumerate(zip(weights, scores, strict=True)):
            straight = (s >= 0).double() + s - s.detach()
            hidden = (hidden.relu() if i else hidden) @ (w * straight).T
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(hidden, torch.from_numpy(labels)).backward()
        optimizer.step()
    expected = torch.cat([s.detach().flatten() for s in scores]).numpy()
    moved = np.abs(expected - state.scores_W)
    assert moved.mean() > 1e-3
    # A score that crosses zero a step earlier in fp32 changes others a little.
    assert np.abs(found.scores_W - expected).mean() < 0.02 * moved.mean()
    assert found.batches == 3


def test_training_that_goes_away_and_comes_back_goes_on(open_config, digits_16):
    layers = layers_of(open_config, digits_16)
    trainer = LocalTrainer(open_config, digits_16)
    state = initial_state(open_config, layers, 0)
    (whole,) = segments_of(open_config, digits_16, 20, 1)
    halves = segments_of(open_config, digits_16, 10, 2)
    for half in halves:
        state = trainer.train(0, half, state)
        trainer.train(1, half, initial_state(open_config, layers, 1))  # another one in between
    at_once = trainer.train(0, whole, initial_state(open_config, layers, 0))
    assert np.array_equal(state.scores_W, at_once.scores_W)
    assert np.array_equal(state.square_avg_W, at_once.square_avg_W)
    assert state.batches == at_once.batches == 20


def test_every_task_gets_a_mask_and_keeps_it(learned):
    assert [step.mask for step in learned.steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [step.new for step in learned.steps] == 4 * [True, False, False]
    assert learned.learner.allocated == 4
    assert len(learned.learner.masks()) == 4


def test_a_mask_that_was_trained_to_the_end_keeps_no_state(learned):
    alive = [step.state is not None for step in learned.steps]
    assert alive == 4 * [True, True, False]
    assert [step.batches for step in learned.steps] == 4 * [20, 40, 60]


def test_a_restored_learner_goes_on_with_the_same_bits(learned, open_config, digits_16):
    cut = 7  # in the middle of task 2
    before = learned.steps[:cut]
    masks = {s.mask: s.packed_B for s in before}
    recorder = Recorder(open_config, digits_16, {s.mask: s.state for s in before})
    recorder.learner.restore(before, masks)
    stream = Stream(open_config, digits_16)
    for number in range(cut, len(stream)):
        step, expected = recorder.learn(stream.segment(number)), learned.steps[number]
        assert (step.mask, step.new, step.margin) == (expected.mask, expected.new, expected.margin)
    assert np.array_equal(recorder.learner.masks(), learned.learner.masks())


def test_a_full_budget_refuses_what_looks_new(learned, open_config, digits_16):
    config = with_values(open_config, {"openset.budget": 2})
    recorder = Recorder(config, digits_16)
    steps = [recorder.learn(segment) for segment in Stream(config, digits_16)]
    assert [step.mask for step in steps] == [0, 0, 0, 1, 1, 1] + 6 * [None]
    assert not any(step.new for step in steps[6:])
    assert np.array_equal(recorder.learner.masks(), learned.learner.masks()[:2])


def test_known_data_after_the_last_batch_of_a_mask_leaves_it(open_config, digits_16):
    recorder = Recorder(open_config, digits_16)
    segments = list(Stream(with_values(open_config, {"train.batches": 80}), digits_16))[:4]
    steps = [recorder.learn(segment) for segment in segments]
    assert [step.mask for step in steps] == [0, 0, 0, 0]
    assert (steps[3].packed_B, steps[3].state, steps[3].batches) == (None, None, 0)


def test_a_mask_whose_last_batch_falls_into_a_segment_takes_no_more(open_config, digits_16):
    layers = layers_of(open_config, digits_16)
    trainer, state = LocalTrainer(open_config, digits_16), initial_state(open_config, layers, 0)
    state = replace(state, batches=open_config.train.batches - 13)
    (long,) = segments_of(open_config, digits_16, 20, 1)
    (short,) = segments_of(open_config, digits_16, 13, 1)
    found, expected = trainer.train(0, long, state), trainer.train(0, short, state)
    assert found.batches == open_config.train.batches
    assert np.array_equal(found.scores_W, expected.scores_W)


def test_a_constant_rate_has_no_end(open_config, digits_16):
    config = with_values(open_config, {"train.schedule": "constant"})
    recorder = Recorder(config, digits_16)
    segments = list(Stream(with_values(config, {"train.batches": 80}), digits_16))[:4]
    steps = [recorder.learn(segment) for segment in segments]
    assert [step.batches for step in steps] == [20, 40, 60, 80]
    assert steps[3].state is not None


def test_told_boundaries_start_the_optimiser_anew(open_config, digits_16):
    config = with_values(open_config, {"openset.boundaries": "told", "tasks": 1})
    recorder = Recorder(config, digits_16)
    (segment, *_) = Stream(config, digits_16)
    assert segment.begins_task
    first = recorder.learn(segment)
    again = recorder.learn(segment)  # the same task begins again
    assert (again.mask, again.new, again.batches) == (0, False, 20)
    state = MaskState(
        scores_W=first.state.scores_W,
        square_avg_W=np.zeros_like(first.state.square_avg_W),
        batches=0,
    )
    expected = LocalTrainer(config, digits_16).train(0, segment, state)
    assert np.array_equal(again.state.scores_W, expected.scores_W)


def test_packed_masks_are_the_scores_that_are_not_negative():
    rng = np.random.default_rng(0)
    total = sum(layer.weights for layer in LAYERS)
    state = MaskState(
        scores_W=rng.normal(size=total).astype(np.float32),
        square_avg_W=np.zeros(total, np.float32),
        batches=0,
    )
    masks = unpack(torch.from_numpy(packed_mask(state, LAYERS))[None], LAYERS, torch.float32)
    flat = torch.cat([mask.flatten() for mask in masks]).numpy()
    assert np.array_equal(flat, state.scores_W >= 0)


def test_looking_at_both_ends_trains_no_mask_on_two_tasks(open_config, digits_16):
    values = {"openset.stream": "random-length", "tasks": 6, "openset.decide_every": 10}
    masks = {}
    for look in ("first", "both"):
        config = with_values(open_config, {**values, "openset.look": look})
        recorder, stream = Recorder(config, digits_16), Stream(config, digits_16)
        steps = [recorder.learn(segment) for segment in stream]
        truths = [set(stream.truth(step.segment).tolist()) for step in steps]
        trained = [
            truth for step, truth in zip(steps, truths, strict=True) if step.packed_B is not None
        ]
        masks[look] = max(map(len, trained))
        assert any(step.mixed for step in steps) == (look == "both")
        assert all(step.mask is None and not step.new for step in steps if step.mixed)
    assert masks == {"first": 2, "both": 1}
