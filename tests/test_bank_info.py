from orchestrator.bank_info import bank_info
from supsup.bank import Bank
from supsup.baselines.asking import make_learner
from supsup.baselines.shelf import Shelf
from supsup.fields import with_values
from supsup.manifest import make_manifest


def test_masks_are_counted_as_stored_and_as_the_paper_counts_them(full_bank):
    said = dict(bank_info(full_bank))
    assert said["tasks"] == "8 in 3 blocks, 8 from task 0 on without a gap"
    weights = 300 * 64 + 100 * 300 + 30 * 100
    assert said["stored"] == f"{weights // 8:,} bytes per task (mask bits), 8 shared"
    assert said["family"] == "permuted, tasks of 10 classes"
    assert said["model"] == "lenet-300-100: linear0 300x64, linear1 100x300, linear2 30x100"


def test_layers_of_a_large_network_are_added_up(tmp_path, quick, digits):
    values = {"model.name": "gem-resnet18", "train.engine": "general", "tasks": 1}
    manifest = make_manifest(with_values(quick, values), digits)
    said = dict(bank_info(Bank.create(tmp_path / "bank", manifest)))
    weights = sum(layer.weights for layer in manifest.layers)
    assert said["model"] == f"gem-resnet18: {len(manifest.layers)} layers, {weights:,} weights"
    assert "batch-norm statistics" in said["stored"]
    assert said["tasks"].startswith("0 in 0 blocks")


def test_what_another_learner_learned_is_said_too(tmp_path, quick, digits):
    values = {"learner": "heads-random", "train.engine": "general", "tasks": 2}
    config = with_values(quick, values)
    bank = Bank.create(tmp_path / "bank", make_manifest(config, digits))
    assert dict(bank_info(bank))["tasks"] == 0
    learned = make_learner(config, digits).learn(0, None, False)
    Shelf(bank.path, bank.manifest.fingerprint, forgets=False).commit(learned)
    said = dict(bank_info(bank))
    assert (said["learner"], said["tasks"]) == ("heads-random", 1)
    assert said["stored"] == f"{4 * 30 * 100:,} bytes per task (last layer), 8 shared"
