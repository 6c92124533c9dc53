import dataclasses
import json

import numpy as np
import pytest

from supsup import ledger as ledger_module
from supsup.apprentice import MaskState
from supsup.errors import BankError, DiskFault
from supsup.ledger import Ledger
from supsup.openset import Step


def a_step(number: int, mask: int | None, new: bool = False, alive: bool = True) -> Step:
    random = np.random.default_rng(number)
    state = MaskState(
        scores_W=random.normal(size=50).astype(np.float32),
        square_avg_W=random.random(50, dtype=np.float32),
        batches=10 * number,
    )
    return Step(
        segment=number, mask=mask, new=new, mixed=mask is None,
        margin=1.25, epsilon=0.125, decision_seconds=0.5,
        packed_B=None if mask is None else random.integers(0, 256, 7, dtype=np.uint8),
        state=state if alive and mask is not None else None,
        batches=10,
    )  # fmt: skip


STEPS = [a_step(0, 0, new=True), a_step(1, 1, new=True), a_step(2, None), a_step(3, 0, alive=False)]


def same(found: Ledger, steps: list[Step]) -> None:
    plain = [dataclasses.replace(step, packed_B=None, state=None) for step in steps]
    assert found.steps == plain
    last = {step.mask: step for step in steps if step.mask is not None}
    masks = dict(found.masks())
    assert list(masks) == sorted(last)
    for mask, step in last.items():
        assert np.array_equal(masks[mask], step.packed_B)
        state = found.state(mask)
        if step.state is None:
            assert state is None
            continue
        assert state.batches == step.state.batches
        assert np.array_equal(state.scores_W, step.state.scores_W)
        assert np.array_equal(state.square_avg_W, step.state.square_avg_W)


def test_a_ledger_opened_again_is_the_same(tmp_path):
    ledger = Ledger(tmp_path)
    for count, step in enumerate(STEPS, 1):
        ledger.commit(step)
        same(ledger, STEPS[:count])
        same(Ledger(tmp_path), STEPS[:count])
    assert len(list((tmp_path / "masks").iterdir())) == 2  # one version of each mask


def test_a_torn_line_and_files_never_committed_are_dropped(tmp_path):
    ledger = Ledger(tmp_path)
    for step in STEPS[:2]:
        ledger.commit(step)
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b'{"segment": 2, "mas')
    (tmp_path / "masks" / "000000000-000000009.safetensors").write_bytes(b"half")
    (tmp_path / "masks" / ".x.tmp").write_bytes(b"half")
    again = Ledger(tmp_path)
    same(again, STEPS[:2])
    assert len(list((tmp_path / "masks").iterdir())) == 2
    for step in STEPS[2:]:
        again.commit(step)
    same(Ledger(tmp_path), STEPS)


@pytest.mark.parametrize("point", ["publish", "_append"])
def test_a_step_that_the_disk_refuses_is_not_there(tmp_path, monkeypatch, point):
    ledger = Ledger(tmp_path)
    for step in STEPS[:3]:
        ledger.commit(step)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    where = ledger_module if point == "publish" else Ledger
    with monkeypatch.context() as patch:
        patch.setattr(where, point, full)
        with pytest.raises(DiskFault, match=r"No space left.*supsup resume"):
            ledger.commit(STEPS[3])
    same(Ledger(tmp_path), STEPS[:3])
    again = Ledger(tmp_path)
    again.commit(STEPS[3])
    same(again, STEPS)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_mask_is_named(tmp_path, harm):
    ledger = Ledger(tmp_path)
    for step in STEPS:
        ledger.commit(step)
    (path,) = (tmp_path / "masks").glob("000000001-*")
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        content[-3] ^= 4
        path.write_bytes(content if harm == "flip" else content[:-5])
    again = Ledger(tmp_path)
    with pytest.raises(BankError, match=r"000000001-000000001.*missing or damaged"):
        again.state(1)
    assert again.state(0) is None


def test_a_damaged_line_is_named(tmp_path):
    ledger = Ledger(tmp_path)
    for step in STEPS:
        ledger.commit(step)
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    body = json.loads(lines[1])
    del body["mask"]
    lines[1] = json.dumps(body)
    (tmp_path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(BankError, match="damaged: line 2"):
        Ledger(tmp_path)


def test_clearing_keeps_the_steps(tmp_path):
    ledger = Ledger(tmp_path)
    for step in STEPS:
        ledger.commit(step)
    ledger.clear()
    assert not list((tmp_path / "masks").iterdir())
    assert Ledger(tmp_path).segments == 4
