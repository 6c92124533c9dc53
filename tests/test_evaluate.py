import dataclasses

import numpy as np
import pytest
import torch

from supsup.config import PROTOCOLS, with_values
from supsup.evaluate import COUNTS, Evaluation, Evaluator, merge
from supsup.inference import TaskInference, infer
from supsup.tasks import permutation


@pytest.fixture(scope="module")
def evaluator(quick, digits) -> Evaluator:
    return Evaluator(quick, digits)


def one_by_one(config, data, evaluator, masks, learned, task, method) -> dict[str, int]:
    """The counts of a task by the definition: a loop over images, whole test set."""
    settings = config.eval
    engine = TaskInference(
        torch.from_numpy(masks[:learned]), evaluator._weights, evaluator._layers, data.classes
    )
    order = permutation(config.seed, task, data.pixels)
    pixels = torch.from_numpy(data.test_images[:, order].astype(np.float32))
    images = (pixels / data.scale - data.mean) / data.std
    counts = dict.fromkeys(COUNTS, 0)
    size = settings.group_size
    for start in range(0, len(images), size):
        group, labels = images[start : start + size], data.test_labels[start : start + size]
        found = int(infer(engine, group[None, : settings.batch], method, settings.shortlist)[0])
        counts["decisions"] += 1
        counts["task_hits"] += found == task
        for image, label in zip(group, labels, strict=True):
            right = int(engine.logits(found, image)[: data.classes].argmax()) == label
            counts["images"] += 1
            counts["gns_hits"] += right
            counts["gnu_hits"] += right and found == task
    return counts


@pytest.mark.parametrize(
    "values",
    [
        {"eval.batch": 1, "eval.group": 0},
        {"eval.batch": 1, "eval.group": 128},
        {"eval.batch": 7, "eval.group": 0},
        {"eval.batch": 3, "eval.group": 50},
    ],
    ids=str,
)
def test_counts_are_those_of_a_plain_loop(values, quick, digits, evaluator, trained):
    config = with_values(quick, {**values, "eval.images": 0})
    result = evaluator.evaluate(config.eval, trained.masks, 6, range(4, 6))
    for row, method in enumerate(config.eval.methods):
        for column, task in enumerate((4, 5)):
            expected = one_by_one(config, digits, evaluator, trained.masks, 6, task, method)
            found = dict(zip(COUNTS, result.counts[row, column], strict=True))
            assert (found["decisions"], found["images"]) == (
                expected["decisions"],
                expected["images"],
            )
            # Batched products round differently: a near tie may fall the other way.
            assert all(abs(found[name] - expected[name]) <= 2 for name in COUNTS)


def test_the_papers_protocol_decides_once_per_128_images(quick, evaluator, trained):
    config = with_values(quick, {**PROTOCOLS["paper"]})
    counts = evaluator.evaluate(config.eval, trained.masks, 8, range(1)).counts[0, 0]
    assert counts[COUNTS.index("decisions")] == 3  # 360 test images: 128 + 128 + 104
    assert counts[COUNTS.index("images")] == 360


def test_a_sample_of_images_is_drawn_by_seed_and_task(quick, evaluator):
    groups = [list(evaluator._groups(quick.eval, task)) for task in (0, 0, 1)]
    (first, labels), (again, _), (other, other_labels) = (group[0] for group in groups)
    assert first.shape == (20, 1, 64)
    assert torch.equal(first, again)
    assert not torch.equal(labels, other_labels)
    assert not torch.equal(first, other)


def test_any_cut_gives_the_same_counts(quick, evaluator, trained):
    whole = evaluator.evaluate(quick.eval, trained.masks, 8, range(8))
    parts = [
        evaluator.evaluate(quick.eval, trained.masks, 8, tasks)
        for tasks in (range(5, 8), range(1), range(1, 5))
    ]
    np.testing.assert_array_equal(merge(parts).counts, whole.counts)


def test_a_gap_or_another_bank_is_not_merged(quick, evaluator, trained):
    part = evaluator.evaluate(quick.eval, trained.masks, 8, range(2))
    for odd in (
        dataclasses.replace(part, first=3),
        dataclasses.replace(part, first=2, learned=4),
        dataclasses.replace(part, first=2, methods=("h-one-shot",)),
    ):
        with pytest.raises(ValueError, match="doesn't continue"):
            merge([part, odd])


def test_rates():
    counts = np.array([[[10, 9, 40, 36, 32], [10, 1, 40, 8, 4]]])
    evaluation = Evaluation(learned=2, first=0, methods=("h-one-shot",), counts=counts)
    assert evaluation.task_accuracy("h-one-shot") == 0.5
    assert evaluation.accuracy("h-one-shot", "gns") == 44 / 80
    assert evaluation.accuracy("h-one-shot", "gnu") == 36 / 80


def test_well_trained_masks_are_found(quick, digits):
    """The promise of the paper, small: eight tasks, one image, all found or nearly so."""
    from supsup.train import BlockTrainer

    config = with_values(
        quick, {"train.batches": 200, "train.learning_rate": 1e-3, "model.output_size": 100}
    )
    masks = BlockTrainer(config, digits).train(range(8)).masks
    settings = with_values(config, {"eval.methods": "h-one-shot,g-one-shot", "eval.images": 50})
    result = Evaluator(config, digits).evaluate(settings.eval, masks, 8, range(8))
    assert result.task_accuracy("h-one-shot") > 0.95
    assert result.task_accuracy("g-one-shot") > 0.95


def test_foreign_masks_are_refused(quick, evaluator, trained):
    with pytest.raises(ValueError, match="masks are"):
        evaluator.evaluate(quick.eval, trained.masks[:, :-1], 3, range(1))
    with pytest.raises(ValueError, match="masks are"):
        evaluator.evaluate(quick.eval, trained.masks[:3], 7, range(1))
