"""Open-set runs on Ray against the plain loop: same decisions, same masks, whatever happens."""

import io
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from orchestrator.crew import Call
from orchestrator.stream import ShardedMembers
from orchestrator.stream_report import table, write
from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.bank import Bank
from supsup.errors import RunFailed
from supsup.fields import with_values
from supsup.ledger import Ledger
from supsup.manifest import make_manifest
from supsup.members import PAGE, LocalMembers, Superposition
from tests.streaming import Killed, Silent, crew_of, sha256, stream_run, values_of
from tests.test_openset import LAYERS, WEIGHTS, random_bank


@pytest.fixture(scope="module")
def crew(cluster, open_config, digits_16):
    with crew_of(cluster, open_config, digits_16, 2, Silent()) as crew:
        yield crew


# --- one stream, sharded masks ---------------------------------------------------------------


class Here:
    """A crew whose workers are plain objects in this process."""

    def __init__(self, workers: list) -> None:
        self.workers, self.lives = workers, [0] * len(workers)

    def __len__(self) -> int:
        return len(self.workers)

    def map(self, calls: list[Call]):
        for call in calls:
            news, factor = call.args()
            yield self.workers[call.worker].scores(news, factor)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_answer_bit_for_bit_as_one(monkeypatch, shards):
    class Shard:
        def __init__(self) -> None:
            self.members = LocalMembers(LAYERS, WEIGHTS)

        def scores(self, changed, factor):
            for mask, packed_B in sorted(changed.items()):
                self.members.put(mask, packed_B)
            return self.members.scores(torch.from_numpy(factor))

    monkeypatch.setattr("orchestrator.stream.put", lambda array: array)
    packed = random_bank(3 * PAGE + 5)
    crew = Here([Shard() for _ in range(shards)])
    whole, sharded = LocalMembers(LAYERS, WEIGHTS), ShardedMembers(crew)
    superposition = Superposition(LAYERS, WEIGHTS, 10)
    for packed_B in packed[:5]:
        superposition.add(packed_B)
    factor = superposition.factor(torch.randn(4, 21, generator=torch.manual_seed(0)), 5)
    assert factor.count_nonzero() > 1000
    for mask, packed_B in enumerate(packed):
        for members in (whole, sharded):
            members.put(mask, packed_B)
        if mask in (3, PAGE + 6, 2 * PAGE + 22):
            assert np.array_equal(whole.scores(factor), sharded.scores(factor))
    crew.workers[0], crew.lives[0] = Shard(), 1  # one died, and another took its place
    for members in (whole, sharded):
        members.put(66, packed[0])
    assert np.array_equal(whole.scores(factor), sharded.scores(factor))


def test_a_run_on_ray_is_the_plain_loop(tmp_path, crew, learned, open_config, digits_16):
    sink = Silent()
    run = stream_run(tmp_path, open_config, digits_16, sink)
    assert not run.settled
    results = run.work(crew)
    found = Bank.open(tmp_path / "open").read(range(4))
    assert sha256(found.masks) == sha256(learned.learner.masks())
    assert [d.margin for d in results.decisions] == [step.margin for step in learned.steps]
    assert found.gg_correct.min() > 250
    assert results.mask_accuracy == found.gg_correct.mean() / 360
    assert list(sink.values) == [2, 4]
    assert sink.values[4]["nns/masks"] == 4
    assert sink.values[4]["nns/missed"] == sink.values[4]["nns/false_new"] == 0
    assert sink.values[4]["nns/accuracy"] > 0.7
    assert sink.values[4]["nns/margin_known_least"] > 1.125 > sink.values[4]["nns/margin_new_most"]
    assert not list((tmp_path / "open" / "stream" / "masks").iterdir())

    again = stream_run(tmp_path, open_config, digits_16, Silent())
    assert again.settled
    repeated = again.work(None)
    assert repeated.decisions == results.decisions
    assert values_of(repeated) == values_of(results)
    files = write(repeated, tmp_path / "report")
    assert {path.name for path in files} == {
        "checkpoints.csv", "decisions.csv", "masks.png", "margins.png", "accuracy.png",
    }  # fmt: skip
    assert table(repeated).row_count == 2
    many = {"eval.methods": "h-one-shot,g-one-shot,h-shortlist,g-shortlist,h-sketch"}
    last = replace(results.checkpoints[-1], evaluation=None)
    settings = with_values(open_config, many)
    rows = table(replace(repeated, config=settings, checkpoints=(last,)))
    assert rows.row_count == 5
    console = Console(width=80, file=io.StringIO())
    console.print(rows)
    assert "…" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("kill_at", "before_the_line"), [(0, True), (5, False), (6, True), (12, False)]
)
def test_a_killed_run_goes_on_to_the_same_bank(
    tmp_path, monkeypatch, crew, learned, open_config, digits_16, kill_at, before_the_line
):  # fmt: skip
    append, count = Ledger._append, 0

    def dying(self: Ledger, line: dict) -> None:
        nonlocal count
        count += 1
        if count == kill_at + 1 and before_the_line:
            raise Killed
        append(self, line)
        if count == kill_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", dying)
        with pytest.raises(Killed):
            stream_run(tmp_path, open_config, digits_16, Silent()).work(crew)
    sink = Silent()
    run = stream_run(tmp_path, open_config, digits_16, sink)
    results = run.work(crew)
    assert run.learned_now == 12 - kill_at
    assert sha256(Bank.open(tmp_path / "open").read(range(4)).masks) == sha256(
        learned.learner.masks()
    )
    assert list(sink.values) == [2, 4]
    assert all(checkpoint.evaluation for checkpoint in results.checkpoints)


@pytest.mark.slow
def test_dead_workers_lose_nothing(
    tmp_path, monkeypatch, crew, learned, open_config, digits_16
):  # fmt: skip
    append, count, lives = Ledger._append, 0, list(crew.lives)

    def murderous(self: Ledger, line: dict) -> None:
        nonlocal count
        append(self, line)
        count += 1
        if count in (4, 8):  # the one that trains, and the one that doesn't
            os.kill(crew.call(count // 8, "pid"), signal.SIGKILL)

    monkeypatch.setattr(Ledger, "_append", murderous)
    stream_run(tmp_path, open_config, digits_16, Silent()).work(crew)
    assert crew.lives == [lives[0] + 1, lives[1] + 1]
    assert sha256(Bank.open(tmp_path / "open").read(range(4)).masks) == sha256(
        learned.learner.masks()
    )


def test_what_fails_again_and_again_is_one_line(crew):
    with pytest.raises(RunFailed, match=r"given failed, given up: "):
        crew.call(0, "given", np.zeros((1, 3), np.uint8), [0])


def test_the_worker_is_an_ordinary_class(open_config, digits_16, learned):
    manifest = make_manifest(open_config, digits_16)
    setup = WorkerSetup(config=open_config, weights_sha256=manifest.weights_sha256)
    worker = TaskWorker(setup, digits_16)
    step = worker.learn_chunk(0, 0, ([], {}, {}))
    assert np.array_equal(step.packed_B, learned.steps[0].packed_B)
    assert worker.learn_chunk(0, 1, None).margin == learned.steps[1].margin
    masks, steps = learned.learner.masks(), learned.steps
    assert worker.recognise(0, masks, steps, [1, 5, 8]) == [0, 1, 2]
    assert worker.recognise(0, masks[:2], steps[:6], [8]) == [None]
