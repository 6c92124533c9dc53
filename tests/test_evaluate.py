import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from supsup.evaluate import COUNTS, Evaluation, Evaluator, decisions_per_task, merge
from supsup.fields import with_values
from supsup.inference import Queries, TaskInference, ranked
from supsup.manifest import make_manifest
from supsup.recipes import PROTOCOLS
from supsup.tasks import permutation, task_family


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
        queries = Queries(engine, group[None, : settings.batch], settings.shortlist)
        ranking = ranked(queries, method)[0].tolist()
        found = ranking[0]
        counts["decisions"] += 1
        counts["task_hits"] += found == task
        counts["top5_hits"] += task in ranking
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
        (queries,) = evaluator._queries(quick.eval, [task], 8)
        return queries.images_QG

    assert drawn(0).shape == (20, 1)
    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))


def test_decisions_among_many_masks_are_taken_in_smaller_batches(quick, evaluator):
    """Their gradients take room by the number of masks, and are within ``eval.memory_mb``."""
    config = with_values(quick, {"eval.memory_mb": 16, "eval.images": 360})
    sizes = [len(q.tasks_Q) for q in evaluator._queries(config.eval, [0], 10_000)]
    assert max(sizes) * 10_000 * 4 * 6 <= 16 << 20
    assert sum(sizes) == 360
    assert len(list(evaluator._queries(config.eval, [0], 8))) == 1


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
    """Every task counts alike: the mean of the tasks' rates, not the rate of all images."""
    evaluation = evaluation_of([[10, 9, 40, 36, 32, 10], [5, 1, 20, 8, 4, 4]], 2, (0, 1))
    assert evaluation.task_accuracy("h-one-shot") == pytest.approx((0.9 + 0.2) / 2)
    assert evaluation.top5_accuracy("h-one-shot") == pytest.approx((1 + 0.8) / 2)
    assert evaluation.accuracy("h-one-shot", "gns") == pytest.approx((0.9 + 0.4) / 2)
    assert evaluation.accuracy("h-one-shot", "gnu") == pytest.approx((0.8 + 0.2) / 2)
    assert not evaluation.is_sample(np.array([40, 20]))
    assert evaluation.is_sample(np.array([40, 21]))
    assert evaluation.is_sample(40)


def test_intervals_are_those_of_the_columns_asked_for():
    """Two of 10 tasks, 40 of 80 images of each in 10 decisions: equation 10.15 by hand."""
    evaluation = evaluation_of([[10, 9, 40, 36, 32, 10], [10, 1, 40, 8, 4, 10]], 10, (3, 7))

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


def test_intervals_of_test_sets_of_unequal_sizes():
    """Both tasks of 2: all 40 images of one, 10 of 40 of the other: its own variance alone."""
    evaluation = evaluation_of([[40, 39, 40, 30, 20, 40], [10, 5, 10, 8, 4, 10]], 2, (0, 1))
    variance = (1 - 10 / 40) * 0.4 * 0.6 / 9
    found = evaluation.accuracy_half_width("h-one-shot", "gnu", np.array([40, 40]))
    assert found == pytest.approx(1.96 * (variance / 2 / 2) ** 0.5)


def split_digits(quick, **values):
    """Five tasks of two digits each, whose test sets differ in size."""
    split = {"family": "split", "tasks": 5, "train.engine": "general", "eval.images": 0}
    return with_values(quick, {**split, **values})


@pytest.mark.parametrize("values", [{"eval.group": 0}, {"eval.group": 30}], ids=str)
@pytest.mark.parametrize("family", ["rotated", "split"])
def test_any_family_is_counted_as_in_a_plain_loop(family, values, quick, digits):
    """Untrained masks: what counts is which images are asked about, and their labels."""
    config = split_digits(quick, family=family, **{"eval.methods": "h-one-shot", **values})
    tasks, evaluator = task_family(config, digits), Evaluator(config, digits)
    bits = np.random.default_rng(0).random((5, make_manifest(config, digits).mask_bytes * 8)) < 0.5
    masks = np.packbits(bits, axis=1, bitorder="little")
    result = evaluator.evaluate(config.eval, masks, 5, range(1, 4))
    weights, layers = evaluator._weights, evaluator._layers
    engine = TaskInference(torch.from_numpy(masks), weights, layers, tasks.classes)
    confused = []
    for column, task in enumerate((1, 2, 3)):
        images, labels = tasks.test(task)
        images = torch.from_numpy((images / digits.scale - digits.mean) / digits.std).float()
        counts = dict.fromkeys(COUNTS, 0)
        for start in range(0, len(images), config.eval.group_size):
            part = slice(start, start + config.eval.group_size)
            ranking = ranked(Queries(engine, images[None, start : start + 1]), "h-one-shot")[0]
            found = int(ranking[0])
            classes = engine.logits(found, images[part])[:, : tasks.classes].argmax(1)
            right, hit = int((classes.numpy() == labels[part]).sum()), found == task
            confused += [] if hit else [(task, found)]
            pairs = zip(COUNTS, (1, hit, len(classes), right, right * hit, 1), strict=True)
            counts = {name: counts[name] + value for name, value in pairs}
        # Batched products round differently: a near tie may fall the other way.
        assert np.abs(result.counts[0, column] - list(counts.values())).max() <= 2
        assert counts["images"] == result.column("images")[column] == len(labels)
    times = {(task, found): n for task, found, n in result.confusions_X3.tolist()}
    assert confused
    assert sum((Counter(confused) - Counter(times)).values()) <= 2
    assert sum((Counter(times) - Counter(confused)).values()) <= 2
    assert not (result.confusions_X3[:, 0] == result.confusions_X3[:, 1]).any()


def test_more_images_than_a_task_has_are_all_of_them(quick, digits):
    config = split_digits(quick, **{"eval.images": 70})
    sizes = make_manifest(config, digits).sizes(5)
    assert sizes.sum() == len(digits.test_labels)
    assert len(set(sizes.tolist())) > 1
    masks = np.zeros((5, make_manifest(config, digits).mask_bytes), np.uint8)
    result = Evaluator(config, digits).evaluate(config.eval, masks, 5, range(5))
    assert result.column("images").tolist() == np.minimum(sizes, 70).tolist()
    assert result.is_sample(sizes) == bool((sizes > 70).any())


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
