"""What a GPU computes, held against the CPU and against plain ways; needs a CUDA device."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from supsup import fused, general
from supsup.bank import Bank
from supsup.baselines.asking import make_learner
from supsup.datasets import Dataset
from supsup.errors import NonFiniteLoss
from supsup.evaluate import Evaluator
from supsup.fields import with_values
from supsup.gpu import Replayed
from supsup.masking import largest, pack
from supsup.material import layers_of
from supsup.streams import Stream
from supsup.train import BlockTrainer, TrainedBlock, resolve_here
from tests.obvious import check_steps, noise
from tests.streaming import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

AUTO = {"train.precision": "auto", "train.engine": "auto", "block_size": 0}


def on_gpu(config, data, **values):
    return resolve_here(with_values(config, {"train.device": "cuda", **AUTO, **values}), data)


def accuracy(block: TrainedBlock, data: Dataset) -> float:
    return float(block.gg_correct.mean() / len(data.test_labels))


@pytest.fixture
def pictures(digits) -> Dataset:
    """Digits as colour images of 32 x 32, few of them."""

    def grown(images_NP, count):
        wide = images_NP[:count].reshape(-1, 1, 8, 8).repeat(3, 1).repeat(4, 2).repeat(4, 3)
        return np.ascontiguousarray(wide.reshape(len(wide), -1))

    return dataclasses.replace(
        digits,
        train_images=grown(digits.train_images, 300),
        train_labels=digits.train_labels[:300],
        test_images=grown(digits.test_images, 100),
        test_labels=digits.test_labels[:100],
        shape=(3, 32, 32),
    )


@pytest.fixture
def small_net(quick, pictures):
    values = {
        "family": "split", "classes_per_task": 2, "tasks": 5, "model.name": "gem-resnet18",
        "model.output_size": 2, "mask.algorithm": "edge-popup", "mask.keep_fraction": 0.2,
        "mask.budget": "erdos-renyi", "train.optimizer": "adam", "train.schedule": "cosine",
        "train.learning_rate": 1e-3, "train.batch_size": 32, "train.batches": 40, "scenario": "gg",
    }  # fmt: skip
    return on_gpu(quick, pictures, **values)


class Told(Replayed):
    """Repeats nothing: every kernel is told anew."""

    def __call__(self, step):
        step()


# --- training ----------------------------------------------------------------------------------


def test_the_fused_step_is_the_obvious_one(quick, digits):
    data = noise(digits)
    config = on_gpu(quick, data, **{"train.precision": "fp32"})
    assert config.train.engine == "fused"
    check_steps(BlockTrainer(config, data), torch.float64)


@pytest.mark.parametrize("engine", ["fused", "dense"])
def test_bf16_learns_as_much_as_fp32_on_the_cpu(quick, digits, engine):
    long = with_values(quick, {"train.batches": 300, "train.learning_rate": 1e-3})
    config = on_gpu(long, digits, **{"train.engine": engine})
    assert config.train.precision == "bf16"
    found = accuracy(BlockTrainer(config, digits).train(range(4)), digits)
    assert abs(found - accuracy(BlockTrainer(long, digits).train(range(4)), digits)) < 0.01


def test_a_block_equals_its_tasks_alone_and_again(quick, digits):
    config = on_gpu(quick, digits, **{"train.batches": 100, "model.output_size": 500})
    block = BlockTrainer(config, digits).train(range(70))
    again = BlockTrainer(config, digits)
    for tasks in (range(70), range(1), range(3, 11), range(69, 70)):
        part = slice(tasks.start, tasks.stop)
        mine = again.train(tasks)
        np.testing.assert_array_equal(mine.masks, block.masks[part])
        np.testing.assert_array_equal(mine.gg_correct, block.gg_correct[part])
        np.testing.assert_array_equal(mine.loss, block.loss[part])


def test_a_fc_network_of_500_outputs_is_trained_in_every_size_of_block(quick, digits_16):
    values = {"model.name": "fc-1024-1024", "model.output_size": 500, "train.batches": 30}
    trainer = BlockTrainer(on_gpu(quick, digits_16, **values), digits_16)
    both = trainer.train(range(9))
    np.testing.assert_array_equal(trainer.train(range(8, 9)).masks, both.masks[8:])


@pytest.mark.parametrize("family", ["permuted", "rotated", "split"])
@pytest.mark.parametrize("algorithm", ["threshold", "edge-popup"])
def test_the_general_engine_gives_a_task_the_same_mask_in_any_company(
    quick, digits, family, algorithm
):
    values = {
        "family": family, "classes_per_task": 2, "tasks": 5, "train.engine": "general",
        "mask.algorithm": algorithm, "train.batches": 30,
    }  # fmt: skip
    config = on_gpu(quick, digits, **values)
    assert config.block_size == 32
    trainer = BlockTrainer(config, digits)
    block = trainer.train(range(5))
    np.testing.assert_array_equal(trainer.train(range(3, 5)).masks, block.masks[3:])


def test_a_replayed_step_is_the_step(small_net, pictures, monkeypatch):
    replayed = BlockTrainer(small_net, pictures).train(range(2))

    monkeypatch.setattr(general, "Replayed", Told)
    told = BlockTrainer(small_net, pictures).train(range(2))
    np.testing.assert_array_equal(replayed.masks, told.masks)
    np.testing.assert_array_equal(replayed.statistics, told.statistics)
    np.testing.assert_array_equal(replayed.loss, told.loss)


def test_replayed_kernels_are_the_kernels(quick, digits, monkeypatch):
    config = on_gpu(quick, digits, **{"train.batches": 30})
    replayed = BlockTrainer(config, digits).train(range(3))

    monkeypatch.setattr(fused, "Replayed", Told)
    told = BlockTrainer(config, digits).train(range(3))
    np.testing.assert_array_equal(replayed.masks, told.masks)


def test_memory_does_not_grow_with_the_tasks(small_net, pictures):
    trainer, kept = BlockTrainer(with_values(small_net, {"train.batches": 6}), pictures), []
    for _ in range(6):
        trainer.train(range(5))
        kept.append(torch.cuda.memory_reserved())
    assert kept[-1] <= 1.1 * kept[1]


@pytest.mark.parametrize("deviation", [1e-38, 1e-39])
def test_diverging_is_an_error(quick, digits, deviation):
    data = dataclasses.replace(digits, std=deviation)
    config = on_gpu(quick, data, **{"train.batches": 2, "train.precision": "fp32"})
    with pytest.raises(NonFiniteLoss, match="task 4"):
        BlockTrainer(config, data).train(range(4, 6))


def test_a_replayed_step_learns(small_net, pictures):
    trainer = BlockTrainer(with_values(small_net, {"train.batches": 150}), pictures)
    block = trainer.train(range(3))
    sizes = [len(trainer.material.family.test_labels(task)) for task in range(3)]
    assert (block.gg_correct / sizes).mean() > 0.85


def test_what_cannot_be_recorded_is_trained_all_the_same(small_net, pictures, monkeypatch):
    waits = general.GeneralGroup._take_step

    def waiting(self):
        waits(self)
        torch.cuda.synchronize()

    expected = BlockTrainer(small_net, pictures).train(range(1))
    monkeypatch.setattr(general.GeneralGroup, "_take_step", waiting)
    with pytest.warns(UserWarning, match="can't be recorded"):
        block = BlockTrainer(small_net, pictures).train(range(1))
    np.testing.assert_array_equal(block.masks, expected.masks)


@pytest.mark.parametrize("transfer", ["running-mean", "previous", "most-similar"])
def test_transfer_goes_on_where_it_stopped(small_net, pictures, transfer):
    config = with_values(small_net, {"mask.transfer": transfer, "block_size": 1})
    trainer = BlockTrainer(config, pictures)
    whole, _ = trainer.train_after(range(3), None)
    first, legacy = trainer.train_after(range(2), None)
    last, _ = BlockTrainer(config, pictures).train_after(range(2, 3), legacy)
    np.testing.assert_array_equal(np.concatenate([first.masks, last.masks]), whole.masks)


@pytest.mark.parametrize("keep", [1, 7, 4000, 29_999])
def test_the_largest_scores_are_those_that_a_sort_finds(keep):
    random = np.random.default_rng(keep)
    scores = torch.from_numpy(random.integers(-50, 50, (2, 100, 300))).float()
    scores[1] = torch.from_numpy(random.normal(size=(100, 300)))
    assert torch.equal(largest(scores.cuda(), keep).cpu(), largest(scores, keep))


def test_masks_are_packed_as_on_the_cpu(quick, digits):
    masks = [
        torch.from_numpy(np.random.default_rng(0).random((3, x.outputs, x.inputs)) < 0.5)
        for x in layers_of(quick, digits)
    ]
    np.testing.assert_array_equal(pack([mask.cuda() for mask in masks]), pack(masks))


# --- inference ---------------------------------------------------------------------------------


def check_hits(cpu: np.ndarray, gpu: np.ndarray) -> None:
    """Check that counts are the same, but for few decisions so close that rounding takes them."""
    np.testing.assert_array_equal(cpu[..., [0, 2]], gpu[..., [0, 2]])
    hits, others = cpu[..., [1, 3, 4, 5]], gpu[..., [1, 3, 4, 5]]
    assert np.abs(hits - others).sum() <= 0.01 * hits.sum()


METHODS = "h-one-shot,g-one-shot,h-shortlist,h-sketch,h-binary,h-gradient-descent,max-logit"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_bank_is_evaluated_as_on_the_cpu(quick, digits, depth):
    values = {"train.batches": 200, "train.learning_rate": 1e-3, "tasks": 30, "eval.images": 30}
    values |= {"eval.methods": METHODS, "eval.depth": depth, "model.output_size": 100}
    config = with_values(quick, values)
    block = BlockTrainer(config, digits).train(range(30))
    evaluations = [
        Evaluator(one, digits).evaluate(one.eval, block.masks, 30, range(30))
        for one in (config, with_values(config, {"train.device": "cuda"}))
    ]
    cpu, gpu = (evaluation.counts for evaluation in evaluations)
    check_hits(cpu, gpu)
    given = [
        Evaluator(one, digits).given(block.masks[:3], range(3))
        for one in (config, with_values(config, {"train.device": "cuda"}))
    ]
    assert np.abs(given[0] - given[1]).max() <= 1


def test_batches_share_decisions_as_on_the_cpu(quick, digits):
    values = {"train.batches": 100, "train.learning_rate": 1e-3, "eval.images": 0}
    values |= {"eval.methods": "h-shortlist,h-binary", "eval.batch": 16, "eval.group": 40}
    config = with_values(quick, values)
    block = BlockTrainer(config, digits).train(range(8))
    cpu, gpu = (
        Evaluator(one, digits).evaluate(one.eval, block.masks, 8, range(8)).counts
        for one in (config, with_values(config, {"train.device": "cuda"}))
    )
    check_hits(cpu, gpu)


@pytest.mark.parametrize("learner", ["batche", "psp", "heads"])
def test_a_baseline_learns_and_is_asked_as_on_the_cpu(quick, digits, learner):
    values = {"learner": learner, "train.batches": 150, "train.engine": "auto", "tasks": 3}
    values |= {"eval.methods": "h-one-shot,h-shortlist,h-binary,h-all-masks", "eval.images": 20}
    config = resolve_here(with_values(quick, values), digits)
    on_device = with_values(config, {"train.device": "cuda"})
    learners = [make_learner(one, digits) for one in (config, on_device)]
    found, trunk, own = [], None, []
    for task in range(3):
        mine, other = (one.learn(task, trunk, look_back=False) for one in learners)
        found.append((mine.correct[-1], other.correct[-1]))
        trunk, own = mine.trunk or trunk, [*own, mine.own]
    cpu, gpu = np.array(found).T / len(digits.test_labels)
    assert np.abs(cpu - gpu).max() < 0.05
    if learner == "batche":
        asked = [one.evaluate(config.eval, trunk, own, range(3)) for one in learners]
        check_hits(*(one.evaluation.counts for one in asked))


def test_a_conv_net_with_statistics_is_evaluated_as_on_the_cpu(small_net, pictures):
    values = {"eval.methods": "h-one-shot,h-binary,max-logit", "eval.images": 10}
    config = with_values(small_net, {**values, "train.precision": "fp32"})
    block = BlockTrainer(config, pictures).train(range(5))
    cpu, gpu = (
        Evaluator(one, pictures)
        .evaluate(one.eval, block.masks, 5, range(5), statistics_TS=block.statistics)
        .counts
        for one in (with_values(config, {"train.device": "cpu"}), config)
    )
    check_hits(cpu, gpu)


# --- the open set, and the platform ------------------------------------------------------------


def test_an_open_set_learner_finds_its_tasks(open_config, digits_16):
    config = on_gpu(open_config, digits_16)
    assert config.train.engine == "fused"
    found = []
    for _ in range(2):
        recorder = Recorder(config, digits_16)
        for segment in Stream(config, digits_16):
            recorder.learn(segment)
        found.append({step.mask: step.packed_B for step in recorder.steps if step.mask is not None})
    assert len(found[0]) == config.tasks
    for mask, packed_B in found[0].items():
        np.testing.assert_array_equal(packed_B, found[1][mask])


def test_a_run_on_a_gpu_is_the_plain_loop_on_it(tmp_path, digits):
    """Ray, one GPU, blocks of 8, half of it resumed: the masks of a block of 20 without Ray."""
    for tasks in ("12", "20"):
        words = [
            "run", "permuted-digits", "--tasks", tasks, "--train.batches", "100",
            "--block-size", "8", "--runs-dir", str(tmp_path), "--name", "gpu",
            "--eval.images", "20",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"{tasks} tasks on 1 workers (cuda, bf16)" in done.stdout
    bank = Bank.open(tmp_path / "gpu")
    assert "NVIDIA" in bank.manifest.device
    assert bank.manifest.config.train.engine == "fused"
    plain = BlockTrainer(bank.manifest.config, digits).train(range(20))
    np.testing.assert_array_equal(bank.read(range(20)).masks, plain.masks)
