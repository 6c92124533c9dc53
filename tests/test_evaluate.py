import dataclasses

import numpy as np
import pytest
import torch

from supsup.evaluate import COUNTS, Evaluation, Evaluator, decisions_per_task, merge
from supsup.fields import with_values
from supsup.inference import Queries, TaskInference, infer
from supsup.recipes import PROTOCOLS
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
        found = int(
            infer(Queries(engine, group[None, : settings.batch], settings.shortlist), method)[0]
        )
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
    def drawn(task):
        (queries,) = evaluator._queries(quick.eval, [task])
        return queries.images_QG

    assert drawn(0).shape == (20, 1)
    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))


@pytest.mark.parametrize("values", [{}, {"eval.images": 0, "eval.group": 64}], ids=str)
def test_any_cut_gives_the_same_counts(values, quick, evaluator, trained, monkeypatch):
    config = with_values(quick, values)
    whole = evaluator.evaluate(config.eval, trained.masks, 8, range(8))
    assert whole.tasks == tuple(range(8))
    # Other batches, too: a few decisions at a time, and the pixels of one group.
    monkeypatch.setattr("supsup.evaluate._DECISIONS", 7)
    monkeypatch.setattr("supsup.evaluate._IMAGE_BYTES", 64 * 4 * 64)
    parts = [
        evaluator.evaluate(config.eval, trained.masks, 8, tasks)
        for tasks in ((5, 7), range(1), (1, 2, 3, 4, 6))
    ]
    merged = merge(parts)
    assert merged.tasks == whole.tasks
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_masks_may_be_read_only_and_are_not_copied(quick, digits, trained):
    masks = trained.masks.copy()
    masks.setflags(write=False)
    evaluator = Evaluator(quick, digits)
    evaluator.evaluate(quick.eval, masks, 5, [4])
    (engine,) = evaluator._engines.values()
    assert engine.masks.packed_TB.data_ptr() == masks.ctypes.data


def test_a_task_twice_or_another_bank_is_not_merged(quick, evaluator, trained):
    part = evaluator.evaluate(quick.eval, trained.masks, 8, (0, 2))
    with pytest.raises(ValueError, match="task 2 is in more than one"):
        merge([part, dataclasses.replace(part, tasks=(1, 2))])
    for odd in (
        dataclasses.replace(part, tasks=(3, 4), learned=4),
        dataclasses.replace(part, tasks=(3, 4), methods=("h-one-shot",)),
    ):
        with pytest.raises(ValueError, match="doesn't belong to"):
            merge([part, odd])


@pytest.mark.parametrize(
    ("values", "decisions"),
    [
        ({"eval.images": 0}, 360),
        ({"eval.images": 200}, 200),
        ({"eval.images": 1000, "eval.group": 128}, 3),
        ({"eval.images": 200, "eval.batch": 100}, 2),
    ],
    ids=str,
)
def test_decisions_per_task_are_those_that_are_counted(
    values, decisions, quick, evaluator, trained
):
    settings = with_values(quick, values).eval
    assert decisions_per_task(settings, 360) == decisions
    counts = evaluator.evaluate(settings, trained.masks, 2, [1]).counts
    assert (counts[:, :, COUNTS.index("decisions")] == decisions).all()


def evaluation_of(counts, learned, tasks):
    return Evaluation(
        learned=learned, tasks=tasks, methods=("h-one-shot",), counts=np.array([counts])
    )


def test_rates():
    evaluation = evaluation_of([[10, 9, 40, 36, 32], [10, 1, 40, 8, 4]], 2, (0, 1))
    assert evaluation.task_accuracy("h-one-shot") == 0.5
    assert evaluation.accuracy("h-one-shot", "gns") == 44 / 80
    assert evaluation.accuracy("h-one-shot", "gnu") == 36 / 80
    assert evaluation.images_per_task == 40


def test_intervals_are_those_of_the_columns_asked_for():
    """Two of 10 tasks, 40 of 80 images of each in 10 decisions: equation 10.15 by hand."""
    evaluation = evaluation_of([[10, 9, 40, 36, 32], [10, 1, 40, 8, 4]], 10, (3, 7))

    def expected(one, two):
        mean = (one + two) / 2
        between = (one - mean) ** 2 + (two - mean) ** 2
        within = (one * (1 - one) + two * (1 - two)) / 2 * 10 / 9
        return 1.96 * (0.8 * between / 2 + 0.2 * 0.5 * within / (2 * 10)) ** 0.5

    assert evaluation.task_accuracy_half_width("h-one-shot", 80) == pytest.approx(
        expected(0.9, 0.1)
    )
    for scenario, rates in {"gns": (0.9, 0.2), "gnu": (0.8, 0.1)}.items():
        found = evaluation.accuracy_half_width("h-one-shot", scenario, 80)
        assert found == pytest.approx(expected(*rates))


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
