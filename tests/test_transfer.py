"""Transfer between tasks: what scores start from, the chain of blocks, and its state on disk."""

import dataclasses

import numpy as np
import pytest
import torch

from supsup.fields import with_values
from supsup.inference import entropy
from supsup.masking import initial_scores, unpack
from supsup.train import BlockTrainer, join_blocks
from supsup.transfer import Legacy, LegacyStore, inherited, most_similar

TRANSFERS = ("running-mean", "previous", "most-similar")


def configured(quick, transfer, **values):
    chosen = {
        "train.engine": "general", "mask.transfer": transfer, "family": "rotated",
        "train.batches": 4, "train.batch_size": 32,
    }  # fmt: skip
    return with_values(quick, {**chosen, **values})


def chain(trainer, blocks):
    """The whole chain in a plain loop."""
    parts, legacies, legacy = [], [], None
    for block in blocks:
        part, legacy = trainer.train_after(block, legacy)
        parts.append(part)
        legacies.append(legacy)
    return join_blocks(parts, 0.0), legacies


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_blocks_of_any_size_give_the_same_chain(quick, digits, transfer):
    config = configured(quick, transfer)
    whole, _ = chain(BlockTrainer(config, digits), [range(5)])
    for blocks in ([range(1), range(1, 4), range(4, 5)], [range(2), range(2, 5)]):
        parts, _ = chain(BlockTrainer(config, digits), blocks)
        np.testing.assert_array_equal(parts.masks, whole.masks)
        np.testing.assert_array_equal(parts.loss, whole.loss)


def test_scores_start_from_what_they_should(quick, digits):
    """A chain is followed task by task with the formulas written out."""
    trained = {}
    for transfer in ("running-mean", "previous"):
        config = configured(quick, transfer)
        trainer = BlockTrainer(config, digits)
        material, engine = trainer.material, trainer.engine
        own: list[list[torch.Tensor]] = []
        legacy = None
        for task in range(4):
            if task == 0:
                start = [
                    torch.from_numpy(initial_scores(config.seed, 0, x))[None]
                    for x in material.layers
                ]
            elif transfer == "previous":
                start = own[-1]
            else:
                start = [torch.stack(parts).mean(0) for parts in zip(*own, strict=True)]
            found = inherited(material, legacy, task) or material.initial_state(range(1))[1]
            for mine, expected in zip(found, start, strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
            group = engine.begin(range(task, task + 1), found)
            for number in range(config.train.batches):
                group.step(number)
            own.append([scores.clone() for scores in group.scores()])
            _, legacy = trainer.train_after(range(task, task + 1), legacy)
        trained[transfer] = legacy.scores_KW
    assert not np.array_equal(trained["running-mean"], trained["previous"])


def test_the_most_similar_task_is_inferred_from_the_new_ones_data(quick, digits):
    """By autograd over α; and among tasks that were learned well alone, each finds itself."""
    values = {"train.batches": 60, "degrees": 90.0, "tasks": 4}
    config = configured(quick, "most-similar", **values)
    alone = BlockTrainer(with_values(config, {"mask.transfer": "none"}), digits).engine
    groups = [alone.begin(range(task, task + 1)) for task in range(3)]
    for group in groups:
        for number in range(config.train.batches):
            group.step(number)
    rows = [torch.cat([part.flatten() for part in group.scores()]) for group in groups]
    legacy = Legacy(
        learned=3,
        scores_KW=torch.stack(rows).numpy(),
        statistics_KS=np.empty((3, 0), np.float32),
    )
    trainer = BlockTrainer(config, digits)
    material = trainer.material
    for task in range(3):
        assert most_similar(material, legacy, task) == task
    images, _ = material.family.train(3)
    x = material.normalised(torch.from_numpy(images))[material.order[0]]
    alpha = torch.full((3,), 1 / 3, requires_grad=True)
    hidden, start = x, 0
    for i, (weight, layer) in enumerate(zip(material.weights, material.layers, strict=True)):
        scores = torch.from_numpy(legacy.scores_KW[:, start : start + layer.weights])
        start += layer.weights
        masks = (scores >= 0).float().view(3, layer.outputs, layer.inputs)
        mixed = weight * torch.einsum("t,toi->oi", alpha, masks)
        hidden = (hidden.relu() if i else hidden) @ mixed.T
    entropy(hidden).mean().backward()
    assert most_similar(material, legacy, 3) == int(alpha.grad.argmin())
    chosen = most_similar(material, legacy, 3)
    found = torch.cat([part.flatten() for part in inherited(material, legacy, 3)])
    np.testing.assert_array_equal(found.numpy(), legacy.scores_KW[chosen])


def test_transfer_with_batch_norm_asks_with_the_tasks_statistics(quick, digits):
    values = {"model.name": "gem-resnet18", "family": "split", "tasks": 5, "train.batches": 1}
    config = configured(quick, "most-similar", **values)
    trainer = BlockTrainer(config, digits)
    block, legacy = trainer.train_after(range(2), None)
    np.testing.assert_array_equal(legacy.statistics_KS, block.statistics)
    again, _ = trainer.train_after(range(2, 3), legacy)
    assert unpack(torch.from_numpy(again.masks), trainer.material.layers, torch.float32)


def test_a_chain_is_trained_in_order_alone(quick, digits):
    trainer = BlockTrainer(configured(quick, "previous"), digits)
    with pytest.raises(ValueError, match="train_after"):
        trainer.train(range(2))
    with pytest.raises(ValueError, match="task 2 needs the legacy of the 2 tasks before it"):
        trainer.train_after(range(2, 3), None)


# --- on disk ---------------------------------------------------------------------------------


def legacy_of(learned, transfer):
    rows = learned if transfer == "most-similar" else 1
    values = np.arange(rows * 6, dtype=np.float32).reshape(rows, 6) + (rows == 1) * learned
    width = 2 if transfer == "most-similar" else 0
    return Legacy(
        learned=learned, scores_KW=values, statistics_KS=np.ones((rows, width), np.float32)
    )


@pytest.fixture(params=TRANSFERS)
def store(request, tmp_path, quick):
    config = configured(quick, request.param)
    return LegacyStore(tmp_path / "transfer", config, "f" * 64), request.param


def same(a, b):
    return a.learned == b.learned and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("scores_KW", "statistics_KS")
    )


def test_a_legacy_is_what_it_was(store):
    store, transfer = store
    assert store.load(3) is None
    assert store.newest([]) is None
    for block in (range(3), range(3, 5)):
        store.save(block, legacy_of(block.stop, transfer))
        assert same(store.load(block.stop), legacy_of(block.stop, transfer))
    assert store.load(4) is None
    # A block that isn't committed doesn't count, and its legacy waits for it.
    assert store.newest([range(3)]).learned == 3
    assert store.newest([range(3), range(3, 5), range(9, 12)]).learned == 5


def test_only_what_is_needed_is_kept(store):
    store, transfer = store
    for block in (range(3), range(3, 5), range(5, 6)):
        store.save(block, legacy_of(block.stop, transfer))
        store.forget(block)
    assert same(store.load(6), legacy_of(6, transfer))
    assert (store.load(5) is None) == (transfer != "most-similar")


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_a_damaged_legacy_is_none(store, harm, quick):
    store, transfer = store
    store.save(range(3), legacy_of(3, transfer))
    [path] = store._folder.iterdir()
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-5] ^= 1
    path.write_bytes({"cut": content[:-3], "empty": b""}.get(harm, content))
    if harm == "other":
        store = LegacyStore(store._folder, configured(quick, transfer), "0" * 64)
    assert store.newest([range(3)]) is None


def test_legacies_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        legacy_of(1, "previous").learned = 2
