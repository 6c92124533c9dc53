"""The book of an open-set run: its steps, what they came to, its checkpoints, and its bank.

Whoever learns the stream (orchestrator.stream, orchestrator.stream_jobs) commits steps here, asks
which checkpoint is to be evaluated and which masks are to be tested, and hands in the answers. The
files are the run's only state: a book that is opened after a kill goes on where they end. No Ray.

Shapes: K masks, B bytes of a packed mask.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.blocks import evaluation_jobs, remaining
from orchestrator.coordinator import MetricSink
from orchestrator.progress import Reporter
from orchestrator.runfolder import RunFolder
from orchestrator.stream_report import StreamCheckpoint, StreamResults, metrics, summary
from supsup.bank import Bank
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.evaluate import Evaluation, decisions_per_task
from supsup.ledger import Ledger
from supsup.masking import mask_bytes
from supsup.material import layers_of
from supsup.members import Packed
from supsup.openset import Step, Threshold
from supsup.sampling import sampled_tasks
from supsup.streams import Stream
from supsup.tally import Tally
from supsup.train import TrainedBlock

LEARNED, EVALUATED, CHECKED = "segments learned", "tasks evaluated", "masks tested"


class StreamBook:
    """What an open-set run has learned, found and stored so far."""

    def __init__(
        self,
        *,
        config: RunConfig,
        checkpoints: Sequence[int],
        data: Dataset,
        bank: Bank,
        folder: RunFolder,
        tracker: MetricSink,
        reporter: Reporter,
    ) -> None:
        """Take in the steps of the ledger, and finish the checkpoints that they passed.

        Args:
            config: the resolved configuration.
            checkpoints: numbers of tasks gone by to evaluate at, ascending.
            data: the data set.
            bank: the bank, locked by this process; gets the masks when the stream is over.
            folder: where evaluations and the ledger are kept.
            tracker: where metrics go.
            reporter: where progress goes.
        """
        self.stream, self.ledger = Stream(config, data), Ledger(folder.path / "stream")
        self.learned_now = 0
        self.first_step_at: float | None = None
        self.config, self.data, self.bank, self.reporter = config, data, bank, reporter
        self._folder, self._tracker = folder, tracker
        self._mask_bytes = mask_bytes(layers_of(config, data))
        self._due = due(self.stream, checkpoints)
        self._tally, self._threshold = Tally(), Threshold(config.openset)
        self._waiting: deque[int] = deque()
        self._finished: list[StreamCheckpoint] = []
        self._mask_accuracy: float | None = None
        asked = [len(self.asked(k)) for ks in self._due.values() for k in ks]
        reporter.start(LEARNED, len(self.stream), self.ledger.segments)
        reporter.start(EVALUATED, sum(asked))
        for step in self.ledger.steps:
            # Its masks are gone, but for those of the last step: what a kill hit is made up for.
            while self._waiting:
                self._finish(self._stored_evaluation(self._waiting[0]))
            self._take(step)
        self.to_evaluate()

    # --- the stream ----------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the stream is learned to its end."""
        return self.ledger.segments == len(self.stream)

    @property
    def masks(self) -> int:
        """Masks allocated so far."""
        return self._tally.masks

    @property
    def tasks_gone(self) -> int:
        """Tasks that went by and don't come back."""
        last = self.ledger.segments - 1
        return self.stream.count_finished(last) if last >= 0 else 0

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """The task that each mask belongs to [K]."""
        return self._tally.owners()

    def until_checkpoint(self, most: int) -> range:
        """Return the next segments to learn, up to a checkpoint that they pass; at most so many."""
        first = self.ledger.segments
        stop = min(first + most, len(self.stream))
        return range(first, next((n + 1 for n in range(first, stop) if n in self._due), stop))

    def commit(self, step: Step) -> None:
        """Store a step; when this returns, it survives a power cut.

        Raises:
            BankError: if the disk fails; the steps before it are safe.
        """
        self.ledger.commit(step)
        self._take(step)
        self.learned_now += 1
        if self.first_step_at is None:
            self.first_step_at = time.time()
        self.reporter.advance(LEARNED, 1)

    def _take(self, step: Step) -> None:
        self._threshold.take(step)
        self._tally.add(step, self.stream.truth(step.segment), self.config.train.batch_size)
        self._waiting.extend(self._due.get(step.segment, ()))

    # --- checkpoints ---------------------------------------------------------------------------

    def to_evaluate(self) -> int | None:
        """Return a number of tasks gone by that the masks as they are now are to be evaluated at.

        Call it until it returns None, before the next step is taken. Checkpoints that were
        evaluated before are finished on the way.
        """
        while self._waiting:
            stored = self._stored_evaluation(self._waiting[0])
            if stored is None:
                return self._waiting[0]
            self._finish(stored)
        return None

    def evaluated(self, evaluation: Evaluation) -> None:
        """Store the evaluation that was asked for by ``to_evaluate``, and finish its checkpoint."""
        self._folder.write_evaluation(self.config.eval, evaluation)
        self._finish(evaluation)

    def asked(self, learned: int) -> tuple[int, ...]:
        """Return the tasks asked about, ascending: of those that went by, all or a sample."""
        number = next(n for n, ks in self._due.items() if learned in ks)
        gone = self.stream.finished_by(number)[:learned]
        drawn = sampled_tasks(self.config.seed, learned, self.config.eval.tasks)
        return tuple(sorted(gone[place] for place in drawn))

    def _stored_evaluation(self, learned: int) -> Evaluation | None:
        asked = self.asked(learned)
        stored = self._folder.read_evaluation(self.config.eval, learned, asked)
        if stored is not None:
            self.reporter.advance(EVALUATED, len(asked))
        return stored

    def _finish(self, evaluation: Evaluation | None) -> None:
        """Finish the checkpoint that waits first, at the end of the last segment taken."""
        learned, tally = self._waiting.popleft(), self._tally
        tasks = self.stream.finished_by(tally.decisions[-1].segment)
        before = self._finished[-1].decisions if self._finished else 0
        checkpoint = StreamCheckpoint(
            learned=learned,
            evaluation=evaluation,
            masks=tally.masks,
            missed=tally.missed(tasks),
            false_new=tally.false_new,
            wrong=tally.wrong,
            late=tally.late,
            refused=tally.refused,
            mixed=tally.mixed,
            decisions=len(tally.decisions),
            recent=tuple(tally.decisions[before:]),
            false_alarm=self._threshold.false_alarm,
        )
        self._finished.append(checkpoint)
        values = metrics(checkpoint, self.config.eval)
        values["bank/bytes"] = float(tally.masks * self._mask_bytes)
        self._tracker.metrics(values, learned)
        self.reporter.note(summary(checkpoint))

    # --- the bank ------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether no worker is needed any more."""
        return self.over and not self._waiting and not self.unfilled()

    def masks_now(self) -> Packed:
        """Return all masks [K, B] as the last step left them."""
        if self.over and not self.unfilled():
            return self.bank.read(range(self.masks)).masks
        return np.stack([packed_B for _, packed_B in self.ledger.masks()])

    def unfilled(self) -> list[slice]:
        """Return which masks the bank has still to get when the stream is over, a slice a block."""
        return unfilled(self.bank, self.masks)

    def close(self) -> None:
        """Remove what the bank holds now. Call it when the run is ``settled``."""
        self.ledger.clear()
        self._mask_accuracy = mask_accuracy(self.bank, self.masks)

    def results(self) -> StreamResults:
        """Return all that there is to show."""
        return StreamResults(
            name=self._folder.name,
            dataset=self.config.dataset,
            config=self.config,
            checkpoints=tuple(self._finished),
            decisions=tuple(self._tally.decisions),
            mask_accuracy=self._mask_accuracy,
            test_images=len(self.data.test_labels),
        )


# --- what every way to learn a stream shares -------------------------------------------------


def due(stream: Stream, checkpoints: Sequence[int]) -> dict[int, list[int]]:
    """Return the numbers of tasks to evaluate at, by the segment at whose end they have gone by."""
    found: dict[int, list[int]] = {}
    waiting = deque(checkpoints)
    for number in range(len(stream)):
        gone = stream.count_finished(number)
        while waiting and waiting[0] <= gone:
            found.setdefault(number, []).append(waiting.popleft())
    return found


def evaluations(
    settings: EvalConfig, masks: Any, owners: Any, learned: int, asked: Sequence[int],
    test_images: int, workers: int,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """Return the arguments of the ``TaskWorker.evaluate`` calls that make up an evaluation.

    Args:
        settings: what to evaluate.
        masks: the masks [K, B], packed, or a reference of them.
        owners: the task that each belongs to [K], or a reference of that.
        learned: tasks that went by.
        asked: those of them that are asked about, ascending.
        test_images: images of a task's test set.
        workers: how many share the calls.
    """
    jobs = evaluation_jobs(asked, decisions_per_task(settings, test_images), workers)
    return [(settings, masks, learned, tasks, owners) for tasks in jobs]


def unfilled(bank: Bank, masks: int) -> list[slice]:
    """Return which of so many masks a bank lacks, a slice for each block to come."""
    done = [tasks for tasks, _ in bank.blocks()]
    todo = remaining(masks, bank.manifest.config.block_size, done)
    return [slice(block.start, block.stop) for block in todo]


def store(bank: Bank, part: slice, masks_KB: Packed, correct_K: npt.NDArray[np.int64]) -> None:
    """Store a slice of masks.

    Args:
        bank: where.
        part: which of all masks.
        masks_KB: the masks of the slice.
        correct_K: how many test images each has right, of the task that it belongs to.
    """
    bank.commit(
        TrainedBlock(
            first=part.start,
            masks=masks_KB,
            gg_correct=correct_K,
            loss=np.zeros(len(correct_K), np.float32),
            seconds=0.0,
        )
    )


def mask_accuracy(bank: Bank, masks: int) -> float:
    """Return the mean accuracy of the masks of a full bank on their own tasks."""
    correct_K = bank.read(range(masks)).gg_correct
    return float(correct_K.mean() / bank.manifest.test_images)
