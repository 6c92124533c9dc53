"""The outbox without MLflow: what a torn line, a full disk and a failing sink leave of it."""

import errno
import json
import os

import pytest

from orchestrator.outbox import Address, Outbox, deliver


class Box:
    """A sink that keeps what it is told, and fails when told to."""

    def __init__(self, fail_at=None):
        self.taken, self.fail_at = [], fail_at

    def apply(self, record, folder):
        if len(self.taken) == self.fail_at:
            raise ConnectionError("away")
        self.taken.append(record)


def steps(outbox):
    return [record["step"] for record, _ in outbox.pending()]


def filled(folder, count=5):
    outbox = Outbox(folder)
    for step in range(count):
        outbox.metrics({"a": 1.0}, step)
    return outbox


def test_an_outbox_that_was_removed_holds_nothing(tmp_path):
    outbox = filled(tmp_path)
    (tmp_path / "records.jsonl").unlink()
    assert outbox.pending() == []
    assert outbox.last_status() == ""


def test_a_torn_line_is_dropped(tmp_path):
    filled(tmp_path, 1)
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "metr')
    again = Outbox(tmp_path)
    again.append("status", status="FINISHED")
    assert [record["kind"] for record, _ in again.pending()] == ["metrics", "status"]
    assert again.last_status() == "FINISHED"


@pytest.mark.parametrize("content", ["", "{", '{"position": "x"}', "[]", '{"position": 99999}'])
def test_a_lost_position_delivers_again(tmp_path, content):
    filled(tmp_path)
    (tmp_path / "records-delivered.json").write_text(content)
    assert steps(Outbox(tmp_path)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fail_at", range(5))
def test_what_arrived_is_remembered_whatever_stops_the_rest(tmp_path, fail_at):
    outbox, sink = filled(tmp_path), Box(fail_at)
    with pytest.raises(ConnectionError):
        deliver(outbox, sink)
    assert steps(outbox) == list(range(fail_at, 5))
    rest = Box()
    assert deliver(Outbox(tmp_path), rest) == 5 - fail_at
    assert [record["step"] for record in sink.taken + rest.taken] == [0, 1, 2, 3, 4]
    assert outbox.pending() == []


def test_a_checkpoint_told_again_is_recorded_once(tmp_path):
    outbox = filled(tmp_path)
    again = Outbox(tmp_path)
    again.metrics({"a": 1.0, "b": 2.0}, 4)
    again.metrics({"a": 1.5}, 4)
    news = [record["values"] for record, _ in again.pending()[5:]]
    assert news == [{"b": 2.0}, {"a": 1.5}]
    assert len(outbox.pending()) == 5  # as it was opened


@pytest.mark.parametrize("call", ["fsync", "open"])
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_full_disk_tears_no_line_and_the_rest_follows(tmp_path, monkeypatch, call, stop_at):
    """The k-th write fails after half of it; the next one finds room."""
    outbox, real, count = Outbox(tmp_path), getattr(os, call), 0

    def fill():
        for step in range(3):
            outbox.metrics({"a": 1.0}, step)

    def failing(*args, **names):
        nonlocal count
        count += 1
        if count == stop_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **names)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.warns(UserWarning, match=r"can't be written \(No space left on device\)"):
            fill()
    whole = steps(Outbox(tmp_path))
    outbox.append("status", status="FINISHED")
    assert whole == list(range(len(whole)))
    kinds = [record["kind"] for record, _ in Outbox(tmp_path).pending()]
    assert kinds == ["metrics"] * 3 + ["status"]


def test_a_damaged_line_is_named_and_hides_no_other(tmp_path):
    filled(tmp_path)
    file = tmp_path / "records.jsonl"
    content = bytearray(file.read_bytes())
    content[content.index(b"\n") + 3] = 0xFF
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"records\.jsonl is damaged: the line that ends at byte"):
        assert steps(Outbox(tmp_path)) == [0, 2, 3, 4]


def test_an_address_is_kept(tmp_path):
    outbox = Outbox(tmp_path)
    assert outbox.address() is None
    for parent in (None, ("sweep", "id")):
        address = Address(name="one", identity="x", tracking_uri="http://h:1", parent=parent)
        outbox.send_to(address)
        assert Outbox(tmp_path).address() == address
    (tmp_path / "records-to.json").write_text(json.dumps({"name": 3}))
    assert outbox.address() is None
