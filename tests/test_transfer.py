"""Transfer between tasks: what scores start from, the chain of blocks, and its state on disk."""

import dataclasses

import numpy as np
import pytest
import torch

from orchestrator.jobs import Failure
from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.bank import Bank
from supsup.fields import with_values
from supsup.inference import entropy
from supsup.manifest import make_manifest
from supsup.masking import initial_scores, unpack
from supsup.train import BlockTrainer, join_blocks
from supsup.transfer import Legacy, LegacyStore, inherited, most_similar
from tests.test_coordinator import Notes, make_jobs, work

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


# --- the chain of a run, without Ray -----------------------------------------------------------


@pytest.fixture
def chain_run(tmp_path, quick, digits):
    """A run of seven tasks, and what makes its jobs anew, as a resumed run does."""
    config = configured(quick, "running-mean", tasks=7, scenario="gg", block_size=2)
    bank = Bank.create(tmp_path / "bank", make_manifest(config, digits))
    worker = TaskWorker(
        WorkerSetup(config=config, weights_sha256=bank.manifest.weights_sha256), digits
    )
    notes = Notes()

    def jobs_of(workers=1):
        return make_jobs(config, bank, notes, at=(7,), workers=workers)

    return config, bank, worker, notes, jobs_of


def test_a_run_trains_its_chain_in_order_however_often_it_is_killed(chain_run, digits):
    config, bank, worker, notes, jobs_of = chain_run
    whole, _ = chain(BlockTrainer(config, digits), [range(7)])
    assert [job.tag[1] for job in work(jobs_of(), worker, most=2)] == [range(2), range(2, 4)]
    # Killed in the middle of the third block, and again before its legacy's block was committed.
    jobs = jobs_of()
    job = jobs.next_job()
    assert job.args[1].learned == 4
    result = worker.train_after(*job.args)
    jobs._chain.keep(job.tag[1], result.legacy)
    seen = work(jobs_of(), worker)
    assert [job.tag[1] for job in seen] == [range(4, 6), range(6, 7)]
    np.testing.assert_array_equal(bank.read(range(7)).masks, whole.masks)
    assert any("they are trained one after another" in line for line in notes.lines)
    assert len(list((bank.path / "transfer").iterdir())) == 1


def test_no_two_blocks_of_a_chain_are_in_training_at_once(chain_run):
    _, bank, worker, _, jobs_of = chain_run
    jobs = jobs_of(workers=2)
    assert jobs.left() == 1
    first = jobs.next_job()
    assert jobs.next_job() is None
    assert jobs.left() == 0
    jobs.done(first, worker.train_after(*first.args))
    assert jobs.next_job().tag[1] == range(2, 4)
    assert bank.read(range(2)).masks.any()


def test_a_lost_legacy_is_made_again_to_the_same_masks(chain_run):
    _, bank, worker, notes, jobs_of = chain_run
    work(jobs_of(), worker)
    before = bank.sha256(7)
    # All there: nothing to do, whatever became of the legacies.
    for path in (bank.path / "transfer").iterdir():
        path.unlink()
    assert jobs_of().widest == 0
    path = next(path for tasks, path in bank.blocks() if tasks == range(4, 6))
    path.unlink()
    seen = work(jobs_of(), worker)
    assert [job.tag[1] for job in seen] == [range(2), range(2, 4), range(4, 6)]
    assert bank.sha256(7) == before
    assert notes.counts["tasks trained"] == (7, 7)


def test_behind_a_block_that_failed_the_chain_ends(chain_run):
    _, _, _, notes, jobs_of = chain_run
    jobs = jobs_of()
    jobs.failed(jobs.next_job(), Failure("raised", "NonFiniteLoss"))
    assert jobs.next_job() is None
    assert notes.lines[-1] == "3 blocks behind it start from it: left out"
