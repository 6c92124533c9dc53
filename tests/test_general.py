"""The general engine against the dense one, and against a plain loop in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import batch_norm, cross_entropy, silu

from supsup import optimizers
from supsup.fields import with_values
from supsup.masking import initial_scores, unpack
from supsup.material import batch_indices, learning_rate
from supsup.tasks import permutation
from supsup.train import BlockTrainer


@pytest.fixture(scope="module")
def general(quick):
    return with_values(quick, {"train.engine": "general"})


@pytest.fixture(autouse=True)
def _uncompiled(request, monkeypatch):
    """Compiling takes seconds for every optimiser and precision; one test holds it to this."""
    if "compiled" not in request.node.name:
        monkeypatch.setattr(optimizers, "compiled", lambda function, trial: function)
    optimizers._make_update.cache_clear()
    yield
    optimizers._make_update.cache_clear()


def noisy(digits):
    """Noise, not digits: hidden units seldom add up to exactly zero."""
    noise = np.random.default_rng(0).integers(0, 256, digits.train_images.shape, dtype=np.uint8)
    return dataclasses.replace(digits, train_images=noise, scale=255.0)


class Plain:
    """One task of an MLP in float64: torch's autograd through the mask, torch's optimisers."""

    def __init__(self, trainer: BlockTrainer, task: int):
        self.material = trainer.material
        self.config, data = self.material.config, self.material.data
        train = self.config.train
        self.scores = [
            torch.from_numpy(initial_scores(self.config.seed, task, x)).double().requires_grad_()
            for x in self.material.layers
        ]
        optimizer = {
            "rmsprop": lambda: torch.optim.RMSprop(
                self.scores, alpha=train.alpha, eps=train.epsilon, weight_decay=train.weight_decay
            ),
            "adam": lambda: torch.optim.Adam(self.scores, eps=train.epsilon),
            "sgd": lambda: torch.optim.SGD(self.scores, momentum=train.momentum),
        }
        self.optimizer = optimizer[train.optimizer]()
        images, self.labels = self.material.family.train(task)
        # Pixels are rounded alike: ReLU can tell a sum of zero from one of rounding.
        pixels = (torch.from_numpy(images).float() / data.scale - data.mean) / data.std
        self.images = pixels.double()
        self.labels = torch.from_numpy(self.labels)
        self.order = batch_indices(self.config.seed, len(images), train.batch_size, train.batches)
        units = [x.outputs for x in self.material.layers[:-1]]
        self.statistics = [[torch.zeros(u).double(), torch.ones(u).double()] for u in units]

    def logits(self, x, training):
        for i, (weight, score) in enumerate(zip(self.material.weights, self.scores, strict=True)):
            mask = (score >= 0).double() + score - score.detach()
            x = x @ (weight.double() * mask).T
            if i + 1 < len(self.scores):
                if self.config.model.name == "bnnet":
                    x = silu(batch_norm(x, *self.statistics[i], training=training))
                else:
                    x = x.relu()
        return x

    def step(self, number):
        chosen = self.order[number]
        loss = cross_entropy(self.logits(self.images[chosen], True), self.labels[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, number)
        self.optimizer.step()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train.optimizer": "adam", "train.schedule": "cosine"},
        {"train.optimizer": "sgd", "train.learning_rate": 1.0},
        {"train.weight_decay": 0.01},
        {"family": "rotated"},
        {"family": "split", "tasks": 5},
        {"model.name": "bnnet"},
    ],
)
def test_the_general_training_is_the_plain_one(general, digits, values, monkeypatch):
    """In float64 they stay together: every score of every layer, batch after batch."""
    config = with_values(general, {"train.batches": 4, "train.batch_size": 32, **values})
    trainer = BlockTrainer(config, noisy(digits))
    if config.model.name == "bnnet":
        shrink(trainer, monkeypatch)
    as_float64(trainer)
    tasks = range(1, 3)
    group = trainer.engine.begin(tasks)
    plains = [Plain(trainer, task) for task in tasks]
    for number in range(config.train.batches):
        group.step(number)
        for plain in plains:
            plain.step(number)
    for row, plain in enumerate(plains):
        for found, score in zip(group.scores(), plain.scores, strict=True):
            torch.testing.assert_close(found[row], score.detach(), rtol=1e-6, atol=1e-9)
        if config.model.name == "bnnet":
            expected = torch.cat([part for pair in plain.statistics for part in pair])
            np.testing.assert_allclose(group.statistics()[row], expected, rtol=1e-6)
    logits_TBS, y_TB = group.logits(2)
    for row, plain in enumerate(plains):
        chosen = plain.order[2]
        expected = plain.logits(plain.images[chosen], False)
        torch.testing.assert_close(logits_TBS[row], expected.detach())
        assert torch.equal(y_TB[row], plain.labels[chosen])


def as_float64(trainer):
    """Let an engine work in float64."""
    engine, material = trainer.engine, trainer.material
    material.dtype = torch.float64
    engine.weights = [weight.double() for weight in engine.weights]
    initial_state, fresh = material.initial_state, engine.net.fresh_statistics
    material.initial_state = lambda tasks: tuple(
        [part.double() for part in parts] for parts in initial_state(tasks)
    )
    engine.net.fresh_statistics = lambda tasks: fresh(tasks).double()


def shrink(trainer, monkeypatch):
    """Give BNNet few units: its layers alone matter here."""
    from supsup import general as module
    from supsup import material as of_material
    from supsup import nets

    nets.make_module.cache_clear()
    monkeypatch.setattr(nets, "_BNNET_UNITS", 40)
    small = of_material.Material(trainer.material.config, trainer.material.data)
    trainer.material, trainer.engine = small, module.GeneralEngine(small)
    nets.make_module.cache_clear()


def test_the_general_engine_is_the_dense_one_on_an_mlp(quick, general, digits):
    """Both in fp32, on permuted tasks, from the same scores: the same scores, then masks."""
    data, tasks = noisy(digits), range(2, 5)
    dense, other = BlockTrainer(quick, data), BlockTrainer(general, data)
    groups = dense.engine.begin(tasks), other.engine.begin(tasks)
    orders = [torch.from_numpy(permutation(quick.seed, task, data.pixels)) for task in tasks]
    for number in range(3):
        for group in groups:
            group.step(number)
        pairs = list(zip(groups[0].scores(), groups[1].scores(), strict=True))
        for layer, (fast, slow) in enumerate(pairs):
            for row, order in enumerate(orders):
                mine = fast[row][:, order] if layer == 0 else fast[row]
                assert ((mine >= 0) == (slow[row] >= 0)).float().mean() > 0.98
                if number == 0:
                    # A gradient of nothing but rounding moves a score by a whole step of RMSprop.
                    close = torch.isclose(mine, slow[row], rtol=1e-3, atol=1e-5).float().mean()
                    assert close > 0.98
    accuracies = [trainer.train(range(4)).gg_correct.mean() for trainer in (dense, other)]
    assert abs(accuracies[0] - accuracies[1]) < 0.03 * len(digits.test_images)


@pytest.mark.parametrize(
    "values",
    [
        {"family": "rotated"},
        {"family": "split", "train.precision": "bf16"},
        {"family": "split", "model.name": "gem-resnet18", "train.batches": 1},
        {"mask.algorithm": "edge-popup", "train.optimizer": "adam"},
    ],
)
def test_masks_do_not_depend_on_which_tasks_share_a_block(general, digits, values):
    config = with_values(general, {"tasks": 5, "train.batch_size": 16, **values})
    trainer = BlockTrainer(config, digits)
    whole = trainer.train(range(4))
    for tasks in (range(1, 2), range(2, 4)):
        part = BlockTrainer(config, digits).train(tasks)
        place = slice(tasks.start, tasks.stop)
        np.testing.assert_array_equal(part.masks, whole.masks[place])
        np.testing.assert_array_equal(part.gg_correct, whole.gg_correct[place])
        np.testing.assert_array_equal(part.loss, whole.loss[place])
        if whole.statistics is not None:
            np.testing.assert_array_equal(part.statistics, whole.statistics[place])


def test_tasks_of_different_sizes_are_counted_alone(general, digits):
    """Together in a group, or each on its own: as many test images are right."""
    config = with_values(general, {"family": "split", "tasks": 5, "train.batches": 3})
    engine = BlockTrainer(config, digits).engine
    family = engine.material.family
    sizes = [len(family.test(task).labels_N) for task in range(5)]
    assert len(set(sizes)) > 1
    together = engine.begin(range(5))
    alone = [engine.begin(range(task, task + 1)) for task in range(5)]
    labels = torch.cat([y_TB for _, y_TB in together.test_logits()], 1)
    assert (labels >= 0).sum(1).tolist() == sizes
    logits = torch.cat([x for x, _ in together.test_logits()], 1)
    for task, group in enumerate(alone):
        expected = torch.cat([x for x, _ in group.test_logits()], 1)[0]
        torch.testing.assert_close(logits[task, : sizes[task]], expected)


def test_the_packed_mask_and_its_statistics_have_the_stored_accuracy(general, digits):
    config = with_values(
        general, {"model.name": "gem-resnet18", "family": "split", "tasks": 5, "train.batches": 2}
    )
    trainer = BlockTrainer(config, digits)
    block = trainer.train(range(2))
    material, net = trainer.material, trainer.engine.net
    assert block.statistics.shape == (2, net.statistics)
    assert not np.array_equal(block.statistics[0], block.statistics[1])
    masks = unpack(torch.from_numpy(block.masks), material.layers, torch.float32)
    for task in range(2):
        images, labels = map(torch.from_numpy, material.family.test(task))
        weights = [w * m[task] for w, m in zip(material.weights, masks, strict=True)]
        statistics = net.by_norm(torch.from_numpy(block.statistics[task]))
        with torch.no_grad():
            logits = net.logits(weights, statistics, material.normalised(images), training=False)
        found = int((logits[:, :2].argmax(1) == labels).sum())
        assert abs(found - int(block.gg_correct[task])) <= 1


def test_the_compiled_update_gives_the_same_masks(general, digits, monkeypatch):
    config = with_values(general, {"tasks": 2})
    fast = BlockTrainer(config, digits).train(range(2))
    monkeypatch.setattr(optimizers, "compiled", lambda function, trial: function)
    optimizers._make_update.cache_clear()
    plain = BlockTrainer(config, digits).train(range(2))
    np.testing.assert_array_equal(fast.masks, plain.masks)
    np.testing.assert_array_equal(fast.loss, plain.loss)


def test_one_task_alone_is_one_of_several(general, digits):
    """Without vmap, and by it: scores and statistics."""
    config = with_values(general, {"model.name": "gem-resnet18", "train.batch_size": 8})
    trainer = BlockTrainer(config, digits)
    as_float64(trainer)
    several, alone = trainer.engine.begin(range(2)), trainer.engine.begin(range(1, 2))
    for number in range(2):
        several.step(number)
        alone.step(number)
    for a, b in zip(several.scores(), alone.scores(), strict=True):
        torch.testing.assert_close(a[1], b[0], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(several.statistics()[1], alone.statistics()[0], rtol=1e-6)


def test_schedules_and_optimisers_are_all_there(quick):
    cosine = with_values(quick, {"train.batches": 4, "train.schedule": "cosine"})
    rates = [learning_rate(cosine, i) / cosine.train.learning_rate for i in range(4)]
    assert rates == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert set(optimizers.OPTIMIZERS) == {"rmsprop", "adam", "sgd"}
