import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from supsup.bank import Bank, locked
from supsup.errors import BankError, DeterminismFault
from supsup.fields import with_values
from supsup.files import publish, write_atomically
from supsup.manifest import make_manifest
from tests.conftest import rows

FIRST = "tasks-000000000-000000002.safetensors"


def test_what_is_committed_can_be_read(full_bank, trained):
    opened = Bank.open(full_bank.path)
    assert opened.manifest == full_bank.manifest
    for tasks in (range(8), range(1), range(2, 7), range(7, 8)):
        found = opened.read(tasks)
        part = slice(tasks.start, tasks.stop)
        np.testing.assert_array_equal(found.masks, trained.masks[part])
        np.testing.assert_array_equal(found.gg_correct, trained.gg_correct[part])
        np.testing.assert_array_equal(found.loss, trained.loss[part])


def test_the_plain_loop_is_a_whole_experiment(tmp_path, quick, digits, trainer, full_bank):
    bank = Bank.create(tmp_path / "plain", make_manifest(quick, digits))
    for tasks in (range(5), range(5, 8)):
        bank.commit(trainer.train(tasks))
    assert bank.sha256(8) == full_bank.sha256(8)
    assert bank.sha256(3) == full_bank.sha256(3) != bank.sha256(8)


def test_one_pass_says_how_well_each_task_does(full_bank, trained):
    stock = full_bank.stock()
    assert stock.tasks == [range(3), range(3, 6), range(6, 8)]
    np.testing.assert_array_equal(np.concatenate(stock.gg_correct), trained.gg_correct)


GOLDEN_WEIGHTS = "916349bdf6bc5c82"
GOLDEN_FINGERPRINT = "a381c05a8f44dd2a"
GOLDEN_CORRECT = 2598


def test_a_golden_bank(full_bank):
    """Generators, training and packing are what they were. fp32 sums differ between processors,
    so the masks themselves are compared within one machine only; what is stored here is not."""
    manifest = json.loads((full_bank.path / "manifest.json").read_bytes())
    assert manifest["weights_sha256"].startswith(GOLDEN_WEIGHTS)
    assert manifest["fingerprint"].startswith(GOLDEN_FINGERPRINT)
    assert abs(int(full_bank.read(range(8)).gg_correct.sum()) - GOLDEN_CORRECT) <= 30


def test_equal_bytes_are_a_retry(bank, trained):
    path = bank.commit(rows(trained, range(3)))
    content = path.read_bytes()
    bank.commit(rows(trained, range(3)))
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [FIRST]


def test_other_bytes_are_a_determinism_fault(bank, trained):
    path = bank.commit(rows(trained, range(3)))
    content = path.read_bytes()
    block = rows(trained, range(3))
    with pytest.raises(DeterminismFault, match=FIRST):
        bank.commit(dataclasses.replace(block, loss=block.loss + 1))
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"masks": np.zeros((3, 5), np.uint8)},
        {"masks": np.zeros((0, 5), np.uint8)},
        {"gg_correct": np.zeros(2, np.int64)},
        {"gg_correct": np.full(3, 361)},
        {"loss": np.zeros(3, np.float64)},
    ],
    ids=str,
)
def test_a_block_that_does_not_fit_is_refused(bank, trained, change):
    with pytest.raises(BankError, match="doesn't fit"):
        bank.commit(dataclasses.replace(rows(trained, range(3)), **change))
    assert bank.blocks() == []


def test_a_missing_task_is_named(bank, trained):
    bank.commit(rows(trained, range(3)))
    bank.commit(rows(trained, range(6, 8)))
    with pytest.raises(BankError, match="lacks task 3"):
        bank.read(range(8))
    with pytest.raises(BankError, match="lacks task 3"):
        bank.sha256(8)
    assert len(bank.read(range(6, 8)).masks) == 2


def block_path(bank):
    return bank.path / "blocks" / FIRST


def test_a_flipped_bit_anywhere_is_noticed_and_contained(full_bank, trained):
    """One bit in every 97th byte of the file: header, masks, accuracies, losses, checksums."""
    path = block_path(full_bank)
    content = path.read_bytes()
    positions = [*range(0, 400), *range(400, len(content), 997), len(content) - 1]
    for position in positions:
        broken = bytearray(content)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        stock = full_bank.stock()
        assert [d.path.name for d in stock.damaged] == [FIRST], position
        assert stock.tasks == [range(3, 6), range(6, 8)]
        np.testing.assert_array_equal(full_bank.read(range(3, 8)).masks, trained.masks[3:8])
    path.write_bytes(content)
    assert full_bank.stock().tasks == [range(3), range(3, 6), range(6, 8)]
    assert full_bank.stock().damaged == []


@pytest.mark.parametrize("length", [0, 1, 7, 8, 50, 300, -100, -1])
def test_a_cut_file_is_noticed(full_bank, length):
    path = block_path(full_bank)
    path.write_bytes(path.read_bytes()[:length])
    assert [d.tasks for d in full_bank.stock().damaged] == [range(3)]
    with pytest.raises(BankError, match=f"{FIRST} .tasks 0 to 2. is damaged"):
        full_bank.read(range(3))


def test_the_damaged_task_is_named(full_bank):
    path = block_path(full_bank)
    tensors = safetensors.numpy.load(path.read_bytes())
    tensors["masks"][1, 5] ^= 1
    with safetensors.safe_open(path, framework="np") as file:
        header = file.metadata()
    path.write_bytes(safetensors.numpy.save(tensors, metadata=header))
    assert "checksum of task 1 doesn't match" in str(full_bank.stock().damaged[0])


def test_a_block_of_another_bank_is_refused(full_bank, tmp_path, quick, digits, trained):
    other = make_manifest(with_values(quick, {"seed": 9}), digits)
    foreign = Bank.create(tmp_path / "other", other)
    path = foreign.commit(rows(trained, range(3)))
    block_path(full_bank).write_bytes(path.read_bytes())
    assert "its header says" in str(full_bank.stock().damaged[0])


def test_a_renamed_block_is_refused(full_bank):
    path = block_path(full_bank)
    path.rename(path.with_name("tasks-000000010-000000012.safetensors"))
    assert [d.tasks for d in full_bank.stock().damaged] == [range(10, 13)]


def test_a_task_twice_names_both_files(full_bank):
    path = block_path(full_bank)
    path.with_name("tasks-000000002-000000002.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(BankError, match=r"task 2 is in both tasks-000000000.*tasks-000000002"):
        full_bank.stock()


def test_a_damaged_block_set_aside_can_be_committed_again(full_bank, trained):
    sha256 = full_bank.sha256(8)
    block_path(full_bank).write_bytes(b"rubbish")
    moved = full_bank.set_aside(full_bank.stock().damaged[0])
    assert moved.read_bytes() == b"rubbish"
    full_bank.commit(rows(trained, range(3)))
    assert full_bank.sha256(8) == sha256


def test_leftovers_are_ignored_and_discarded(full_bank):
    leftover = full_bank.path / "blocks" / f".{FIRST}.abc.tmp"
    leftover.write_bytes(b"half")
    (full_bank.path / "blocks" / "notes.txt").write_text("mine")
    assert full_bank.stock().damaged == []
    full_bank.discard_leftovers()
    assert not leftover.exists()
    assert (full_bank.path / "blocks" / "notes.txt").exists()


def test_there_is_one_bank_per_folder(bank):
    with pytest.raises(BankError, match="has a bank already"):
        Bank.create(bank.path, bank.manifest)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"sha256": 1}', b"\xff\xfe"])
def test_a_damaged_manifest_is_a_clear_error(bank, content):
    (bank.path / "manifest.json").write_bytes(content)
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        Bank.open(bank.path)


def test_a_changed_manifest_is_noticed(bank):
    file = bank.path / "manifest.json"
    body = json.loads(file.read_bytes())
    body["config"]["seed"] = 5
    file.write_text(json.dumps(body))
    with pytest.raises(BankError, match="its checksum doesn't match"):
        Bank.open(bank.path)


def test_a_later_format_is_refused(bank):
    file = bank.path / "manifest.json"
    body = json.loads(file.read_bytes())
    body["format_version"] = 2
    file.write_text(json.dumps(body))
    with pytest.raises(BankError, match="format version 2, this supsup reads 1"):
        Bank.open(bank.path)


def test_no_bank(tmp_path):
    with pytest.raises(BankError, match=r"no mask bank: it has no manifest\.json"):
        Bank.open(tmp_path)


def test_the_second_writer_learns_who_is_first(bank):
    code = f"""
from pathlib import Path
from supsup.bank import locked
with locked(Path({str(bank.path)!r})):
    print("locked", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(BankError, match=f"in use by process {holder.pid} on "), locked(bank.path):
        pass
    holder.kill()
    holder.communicate()
    with locked(bank.path):
        assert json.loads((bank.path / "lock-holder.json").read_bytes())["pid"] == os.getpid()


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("call", ["write", "fsync", "link", "unlink"])
def test_a_writer_stopped_anywhere_leaves_absent_or_complete(call, tmp_path, monkeypatch):
    """Stop at the k-th call of each kind, for every k; what is there is whole."""
    content = b"x" * 1000
    real = getattr(os, call)
    for stop_at in range(1, 4):
        path = tmp_path / f"{call}{stop_at}" / "block"
        path.parent.mkdir()
        count = 0

        def failing(*args, _stop_at=stop_at, **kwargs):
            nonlocal count
            count += 1
            if count == _stop_at:
                raise PowerCut
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                publish(path, content)
                finished = True
            except PowerCut:
                finished = False
        assert not path.exists() or path.read_bytes() == content
        assert path.exists() or not finished


def test_a_full_disk_is_one_clear_line(bank, trained, monkeypatch):
    bank.commit(rows(trained, range(3, 6)))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BankError, match=r"No space left on device.*resume"):
            bank.commit(rows(trained, range(3)))
    assert bank.stock().tasks == [range(3, 6)]
    bank.commit(rows(trained, range(3)))
    assert bank.stock().tasks == [range(3), range(3, 6)]


def test_replacing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    write_atomically(path, b"old")

    def failing(*args: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(PowerCut):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["launch.json"]
