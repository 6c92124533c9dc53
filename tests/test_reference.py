import numpy as np
import pytest

from orchestrator.reference import forward_transfer
from supsup.bank import Bank
from supsup.fields import with_values
from supsup.manifest import make_manifest
from tests.conftest import rows

#: The run that is measured.
_TRANSFER = {"mask.transfer": "previous", "train.engine": "general"}


@pytest.fixture
def measured(tmp_path, quick, digits) -> Bank:
    config = with_values(quick, _TRANSFER)
    return Bank.create(tmp_path / "measured", make_manifest(config, digits))


def other(tmp_path, quick, digits, trained, name, **values) -> None:
    bank = Bank.create(tmp_path / name, make_manifest(with_values(quick, values), digits))
    for tasks in (range(3), range(3, 5), range(6, 8)):
        bank.commit(rows(trained, tasks))


def test_tasks_that_start_at_random_are_trained_alone(quick, full_bank):
    assert forward_transfer(quick, np.array([0.5, 0.9]), full_bank) == 0
    assert forward_transfer(quick, np.array([0.5]), full_bank) is None


def test_transfer_is_measured_against_the_run_without_it(
    tmp_path, quick, digits, trained, measured
):
    config = measured.manifest.config
    learned = np.linspace(0.5, 0.9, 8)
    assert forward_transfer(config, learned, measured) is None
    other(tmp_path, quick, digits, trained, "a-other-seed", seed=1)
    other(tmp_path, quick, digits, trained, "b-other-transfer", **{
        "mask.transfer": "running-mean", "train.engine": "general"})  # fmt: skip
    (tmp_path / "c-rubbish").mkdir()
    (tmp_path / "c-rubbish" / "manifest.json").write_text("rubbish")
    assert forward_transfer(config, learned, measured) is None
    other(tmp_path, quick, digits, trained, "d-alone")
    # Its tasks from 0 on without a gap: five of them.
    alone = trained.gg_correct / len(digits.test_labels)
    expected = (learned - alone)[1:5].mean()
    assert forward_transfer(config, learned, measured) == pytest.approx(expected)


def test_other_learners_have_no_such_reference(quick, full_bank):
    config = with_values(quick, {"learner": "psp"})
    assert forward_transfer(config, np.array([0.5, 0.9]), full_bank) is None
