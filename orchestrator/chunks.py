"""The open-set coordinator of a stream in chunks: a learner per chunk, then a merge.

Every worker learns chunks by learners of its own, side by side; their steps are committed here, to
a ledger per chunk. In the end masks of different chunks that are the same task are found by cross
task-inference and joined (supsup.merging).
"""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from orchestrator.actors import put
from orchestrator.coordinator import MetricSink
from orchestrator.crew import Call, Crew
from orchestrator.progress import Reporter
from orchestrator.runfolder import RunFolder
from orchestrator.stream import always, evaluate_masks, fill_bank
from orchestrator.stream_book import EVALUATED, LEARNED, mask_accuracy
from orchestrator.stream_report import StreamCheckpoint, StreamResults, metrics, summary
from supsup.bank import Bank
from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.evaluate import Evaluation
from supsup.files import write_atomically
from supsup.ledger import Ledger
from supsup.members import Packed
from supsup.merging import Member, groups, join_errors, kept
from supsup.openset import Step
from supsup.sampling import sampled_tasks
from supsup.streams import Stream
from supsup.tally import Decision, Tally

_COMPARED = "comparisons of chunks"
#: Masks of a chunk that one job asks another chunk about.
_PROBES = 100


class ChunkedRun:
    """An open-set run whose stream is learned in chunks; evaluated at its end."""

    def __init__(
        self,
        *,
        config: RunConfig,
        data: Dataset,
        bank: Bank,
        folder: RunFolder,
        tracker: MetricSink,
        reporter: Reporter,
    ) -> None:
        """Take stock of the ledgers; see ``StreamRun``."""
        self._config, self._data, self._bank, self._folder = config, data, bank, folder
        self._tracker, self._reporter = tracker, reporter
        self._stream = Stream(config, data)
        chunks, segments = config.openset.chunks, len(self._stream)
        bounds = [segments * i // chunks for i in range(chunks + 1)]
        self._chunks = [range(*bounds[i : i + 2]) for i in range(chunks)]
        self._ledgers = [Ledger(folder.path / "stream" / f"chunk-{i:04d}") for i in range(chunks)]
        self._merge_file = folder.path / "stream" / "merge.json"
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.learned_now = 0
        self.first_step_at: float | None = None

    @property
    def settled(self) -> bool:
        """Whether no worker is needed any more."""
        return self._over and self._in_bank and self._evaluation() is not None

    @property
    def masks(self) -> int:
        """Masks allocated so far; after the merge, masks that stay."""
        merge = self._merge()
        return len(merge["kept"]) if merge else sum(map(_allocated, self._ledgers))

    def work(self, crew: Crew | None) -> StreamResults:
        """Learn what is left of the chunks; merge; evaluate; fill the bank. See ``StreamRun``."""
        learned = sum(ledger.segments for ledger in self._ledgers)
        self._reporter.start(LEARNED, len(self._stream), learned)
        self._reporter.start(EVALUATED, len(self._asked()))
        if crew is not None and not self._over:
            self._learn(crew)
        tallies = [self._tally(ledger) for ledger in self._ledgers]
        owners = {
            (chunk, mask): task
            for chunk, tally in enumerate(tallies)
            for mask, task in enumerate(tally.owners().tolist())
        }
        if crew is not None and self._merge() is None:
            self._write_merge(self._find_groups(crew), owners)
        checkpoint = self._finish(crew, tallies, owners)
        return StreamResults(
            name=self._folder.name,
            dataset=self._config.dataset,
            config=self._config,
            checkpoints=(checkpoint,),
            decisions=checkpoint.recent,
            mask_accuracy=mask_accuracy(self._bank, self.masks),
            test_images=len(self._data.test_labels),
        )

    # --- learning ------------------------------------------------------------------------------

    @property
    def _over(self) -> bool:
        chunks = zip(self._ledgers, self._chunks, strict=True)
        return all(ledger.segments == len(chunk) for ledger, chunk in chunks)

    def _learn(self, crew: Crew) -> None:
        """Learn every chunk, one after another on each worker; a thread here for each worker."""
        waiting = list(reversed(range(len(self._chunks))))

        def work_off(worker: int) -> None:
            while not self._stopped.is_set():
                with self._lock:
                    if not waiting:
                        return
                    chunk = waiting.pop()
                self._learn_chunk(crew, worker, chunk)

        with ThreadPoolExecutor(len(crew)) as pool:
            futures = [pool.submit(work_off, worker) for worker in range(len(crew))]
            try:
                wait(futures)
            finally:
                self._stopped.set()
        for future in futures:
            future.result()

    def _learn_chunk(self, crew: Crew, worker: int, chunk: int) -> None:
        ledger = self._ledgers[chunk]
        life: int | None = None

        def arguments(number: int) -> tuple[Any, ...]:
            """Send what was learned before if the worker hasn't learned it itself."""
            nonlocal life
            before = None
            if life != crew.lives[worker]:
                life = crew.lives[worker]
                masks = dict(ledger.masks())
                before = (list(ledger.steps), masks, {mask: ledger.state(mask) for mask in masks})
            return chunk, number, before

        for number in self._chunks[chunk][ledger.segments :]:
            if self._stopped.is_set():
                return
            call = Call(worker, "learn_chunk", lambda number=number: arguments(number))  # type: ignore[misc]
            (step,) = crew.map([call])
            ledger.commit(step)
            with self._lock:
                self.learned_now += 1
                if self.first_step_at is None:
                    self.first_step_at = time.time()
                self._reporter.advance(LEARNED, 1)

    # --- merging -------------------------------------------------------------------------------

    def _find_groups(self, crew: Crew) -> list[list[Member]]:
        """Ask every chunk's masks about every other chunk's data, and join what agrees."""
        started = time.perf_counter()
        sizes = [_allocated(ledger) for ledger in self._ledgers]
        masks = [put(_masks(ledger)) for ledger in self._ledgers]
        steps = [put(ledger.steps) for ledger in self._ledgers]
        probes = [_last_segments(ledger.steps) for ledger in self._ledgers]
        questions = [
            (a, b, start)
            for a in range(len(sizes))
            for b in range(len(sizes))
            if a != b
            for start in range(0, sizes[b], _PROBES)
        ]
        calls = [
            Call(
                i % len(crew),
                "recognise",
                always(a, masks[a], steps[a], probes[b][start : start + _PROBES]),
            )
            for i, (a, b, start) in enumerate(questions)
        ]
        found: dict[tuple[int, int], list[int | None]] = {}
        self._reporter.start(_COMPARED, len(calls))
        for (a, b, _), answer in zip(questions, crew.map(calls), strict=True):
            found.setdefault((a, b), []).extend(answer)
            self._reporter.advance(_COMPARED, 1)
        joined = groups(sizes, found)
        self._reporter.note(
            f"merged {sum(sizes)} masks of {len(sizes)} chunks into {len(joined)} in "
            f"{time.perf_counter() - started:.1f} s"
        )
        return joined

    def _write_merge(self, joined: list[list[Member]], owners: dict[Member, int]) -> None:
        batches = {
            (chunk, mask): trained
            for chunk, ledger in enumerate(self._ledgers)
            for mask, trained in _batches(ledger.steps).items()
        }
        merge = {
            "kept": kept(joined, batches, self._config.openset.budget),
            "joins": join_errors(joined, owners),
        }
        write_atomically(self._merge_file, json.dumps(merge).encode())

    def _merge(self) -> dict[str, Any] | None:
        try:
            merge: dict[str, Any] = json.loads(self._merge_file.read_bytes())
        except FileNotFoundError:
            return None
        return {**merge, "kept": [tuple(member) for member in merge["kept"]]}

    # --- the end -------------------------------------------------------------------------------

    def _finish(
        self, crew: Crew | None, tallies: Sequence[Tally], owners: dict[Member, int]
    ) -> StreamCheckpoint:
        merge = self._merge()
        assert merge is not None
        owners_K = np.array([owners[member] for member in merge["kept"]], dtype=np.int64)
        evaluation = self._evaluation()
        if crew is not None and not (self._in_bank and evaluation):
            masks_KB = self._kept_masks(merge["kept"])
            if evaluation is None:
                evaluation = evaluate_masks(
                    crew, self._config.eval, self._data, masks_KB, owners_K, self._config.tasks,
                    self._asked(), self._reporter,
                )  # fmt: skip
                self._folder.write_evaluation(self._config.eval, evaluation)
            fill_bank(crew, self._bank, masks_KB, owners_K, self._reporter)
        for ledger in self._ledgers:
            ledger.clear()
        decisions = _joined_decisions(tallies)
        checkpoint = StreamCheckpoint(
            learned=self._config.tasks,
            evaluation=evaluation,
            masks=len(owners_K),
            missed=self._config.tasks - len(set(owners_K.tolist())),
            false_new=sum(tally.false_new for tally in tallies),
            wrong=sum(tally.wrong for tally in tallies),
            late=sum(tally.late for tally in tallies),
            refused=sum(tally.refused for tally in tallies),
            mixed=sum(tally.mixed for tally in tallies),
            decisions=len(decisions),
            recent=decisions,
            joins=merge["joins"],
        )
        self._tracker.metrics(metrics(checkpoint, self._config.eval), self._config.tasks)
        self._reporter.note(summary(checkpoint))
        return checkpoint

    @property
    def _in_bank(self) -> bool:
        stored = sum(len(tasks) for tasks, _ in self._bank.blocks())
        return self._merge() is not None and stored == self.masks

    def _kept_masks(self, members: Sequence[Member]) -> Packed:
        if self._in_bank:
            return self._bank.read(range(len(members))).masks
        masks = [_masks(ledger) for ledger in self._ledgers]
        return np.stack([masks[chunk][mask] for chunk, mask in members])

    def _asked(self) -> tuple[int, ...]:
        return sampled_tasks(self._config.seed, self._config.tasks, self._config.eval.tasks)

    def _evaluation(self) -> Evaluation | None:
        return self._folder.read_evaluation(self._config.eval, self._config.tasks, self._asked())

    def _tally(self, ledger: Ledger) -> Tally:
        tally = Tally()
        for step in ledger.steps:
            truth_N = self._stream.truth(step.segment)
            tally.add(step, truth_N, self._config.train.batch_size)
        return tally


def _allocated(ledger: Ledger) -> int:
    return sum(step.new for step in ledger.steps)


def _masks(ledger: Ledger) -> Packed:
    return np.stack([packed_B for _, packed_B in ledger.masks()])


def _last_segments(steps: Sequence[Step]) -> list[int]:
    """Return the last segment that each mask was given: its probe for the other chunks."""
    last = {step.mask: step.segment for step in steps if step.mask is not None}
    return [last[mask] for mask in range(len(last))]


def _batches(steps: Sequence[Step]) -> dict[int, int]:
    """Return how many batches each mask was trained on."""
    batches: dict[int, int] = {}
    for step in steps:
        if step.mask is not None:
            batches[step.mask] = max(batches.get(step.mask, 0), step.batches)
    return batches


def _joined_decisions(tallies: Sequence[Tally]) -> tuple[Decision, ...]:
    """Return all decisions in the order of the stream, their masks counted over all chunks."""
    before = itertools.accumulate((tally.masks for tally in tallies), initial=0)
    return tuple(
        dataclasses.replace(decision, masks=decision.masks + offset)
        for tally, offset in zip(tallies, before, strict=False)
        for decision in tally.decisions
    )
