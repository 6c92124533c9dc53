"""A stream in chunks on Ray against plain learners: same steps, right joins, whatever happens."""

import json

import numpy as np
import pytest

from supsup.bank import Bank
from supsup.fields import with_values
from supsup.ledger import Ledger
from supsup.streams import Stream
from tests.streaming import Killed, Recorder, Silent, crew_of, stream_run, values_of


@pytest.fixture(scope="module")
def chunked(open_config):
    """Two chunks of five tasks, the third of which is in both."""
    return with_values(open_config, {"openset.chunks": 2, "tasks": 5})


def plain_chunks(config, data) -> list[list]:
    """Steps of a plain learner per chunk: the truth."""
    stream, chunks = Stream(config, data), []
    half = len(stream) // 2
    for chunk, numbers in enumerate((range(half), range(half, len(stream)))):
        recorder = Recorder(config, data, first_mask=chunk * config.openset.budget)
        chunks.append([recorder.learn(stream.segment(number)) for number in numbers])
    return chunks


@pytest.mark.slow
def test_chunks_are_learned_as_a_plain_loop_does_and_joined(tmp_path, crew, chunked, digits_16):
    sink = Silent()
    results = stream_run(tmp_path, chunked, digits_16, sink).work(crew)
    expected = plain_chunks(chunked, digits_16)
    assert [d.margin for d in results.decisions] == [s.margin for steps in expected for s in steps]
    joins, last = results.checkpoints[-1].joins, results.checkpoints[-1]
    assert (joins["joined"], joins["wrong_joins"], last.missed) == (1, 0, 0)
    allocated = sum(len({s.mask for s in steps}) for steps in expected)
    assert last.masks == allocated - 1
    # Masks too many within a chunk are all that is left apart: of joins, none is missed.
    assert joins["missed_joins"] == last.false_new == last.masks - chunked.tasks
    bank = Bank.open(tmp_path / "open")
    kept = json.loads((tmp_path / "open" / "stream" / "merge.json").read_text())["kept"]
    assert len(kept) == last.masks
    packed = [{s.mask: s.packed_B for s in steps if s.packed_B is not None} for steps in expected]
    truth = np.stack([packed[chunk][mask] for chunk, mask in kept])
    assert np.array_equal(bank.read(range(len(kept))).masks, truth)

    again = stream_run(tmp_path, chunked, digits_16, Silent())
    assert again.settled
    assert values_of(again.work(None)) == values_of(results)


def test_killed_chunks_go_on_to_the_same_bank(tmp_path, monkeypatch, crew, chunked, digits_16):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    stream_run(tmp_path / "whole", chunked, digits_16, Silent()).work(crew)
    append = Ledger._append

    def dying(self: Ledger, line: dict) -> None:
        if line["segment"] == 4:
            raise Killed
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", dying)
        with pytest.raises(Killed):
            stream_run(tmp_path / "killed", chunked, digits_16, Silent()).work(crew)
    stream_run(tmp_path / "killed", chunked, digits_16, Silent()).work(crew)
    banks = [Bank.open(tmp_path / name / "open").sha256(5) for name in ("whole", "killed")]
    assert banks[0] == banks[1]


@pytest.fixture(scope="module")
def crew(cluster, chunked, digits_16):
    with crew_of(cluster, chunked, digits_16, 2, Silent()) as crew:
        yield crew
