"""The open-set coordinator: one stream, its masks in shards on the workers.

The learner's loop (supsup.openset) runs here. A decision is one gradient sent to all shards and one
arg-max over their answers; the mask that is decided on is trained by a worker. Every step is
committed to the ledger before the next is taken. At checkpoints all workers evaluate.

Shapes: K masks, W numbers per weight.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from orchestrator.blocks import evaluation_jobs, remaining
from orchestrator.coordinator import MetricSink
from orchestrator.crew import Call, Crew
from orchestrator.progress import Reporter
from orchestrator.runfolder import RunFolder
from orchestrator.stream_report import StreamCheckpoint, StreamResults, metrics, summary
from orchestrator.worker import THREADS
from supsup.apprentice import MaskState
from supsup.bank import Bank
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.evaluate import Evaluation, decisions_per_task, merge
from supsup.ledger import Ledger
from supsup.members import PAGE, Packed, Scores
from supsup.openset import OpenSetLearner, Step, Threshold
from supsup.sampling import sampled_tasks
from supsup.streams import Segment, Stream
from supsup.tally import Tally
from supsup.train import TrainedBlock

LEARNED, EVALUATED, _CHECKED = "segments learned", "tasks evaluated", "masks tested"
#: Segments generated ahead of the learner.
_AHEAD = 2


class ShardedMembers:
    """The masks that take part, in shards of whole pages on the workers: page p on p mod n."""

    def __init__(self, crew: Crew) -> None:
        """Begin empty."""
        self._crew = crew
        self._packed: list[Packed] = []
        self._changed: list[set[int]] = [set() for _ in range(len(crew))]
        self._lives = list(crew.lives)

    def put(self, mask: int, packed_B: Packed) -> None:
        """See ``Members``; the shard gets it with its next question."""
        if mask == len(self._packed):
            self._packed.append(packed_B)
        self._packed[mask] = packed_B
        self._changed[self._shard(mask)].add(mask)

    def scores(self, factor_W: Tensor) -> Scores:
        """See ``Members``."""
        factor = ray.put(factor_W.numpy())
        shards = range(min(len(self._crew), -(-len(self._packed) // PAGE)))
        calls = [
            Call(shard, "scores", functools.partial(self._question, shard, factor))
            for shard in shards
        ]
        scores_K = np.empty(len(self._packed), np.float32)
        for shard, answer in zip(shards, self._crew.map(calls), strict=True):
            scores_K[self._members(shard)] = answer
            self._changed[shard].clear()
        return scores_K

    def _question(self, shard: int, factor: Any) -> tuple[dict[int, Packed], Any]:
        """Return what to send: the masks that a shard lacks, by their place in it, and the factor.

        A worker that replaces a dead one lacks them all.
        """
        if self._lives[shard] != self._crew.lives[shard]:
            self._lives[shard] = self._crew.lives[shard]
            self._changed[shard] = set(self._members(shard).tolist())
        return {self._place(mask): self._packed[mask] for mask in self._changed[shard]}, factor

    def _shard(self, mask: int) -> int:
        return mask // PAGE % len(self._crew)

    def _place(self, mask: int) -> int:
        return mask // PAGE // len(self._crew) * PAGE + mask % PAGE

    def _members(self, shard: int) -> npt.NDArray[np.int64]:
        masks = np.arange(len(self._packed))
        members: npt.NDArray[np.int64] = masks[masks // PAGE % len(self._crew) == shard]
        return members


class RemoteTrainer:
    """Trains masks on the first worker."""

    def __init__(self, crew: Crew) -> None:
        """Take the workers."""
        self._crew = crew

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """See ``Trainer``."""
        trained: MaskState = self._crew.call(0, "train_mask", mask, ray.put(segment), state)
        return trained


class StreamRun:
    """An open-set run: its stream, its checkpoints, and in the end its bank."""

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
        """Take stock of the ledger.

        Args:
            config: the resolved configuration.
            checkpoints: numbers of tasks gone by to evaluate at, ascending.
            data: the data set.
            bank: the bank, locked by this process; gets the masks when the stream is over.
            folder: where evaluations and the ledger are kept.
            tracker: where metrics go.
            reporter: where progress goes.
        """
        self._config, self._data, self._bank, self._folder = config, data, bank, folder
        self._tracker, self._reporter = tracker, reporter
        self._stream = Stream(config, data)
        self._ledger = Ledger(folder.path / "stream")
        self._due = due(self._stream, checkpoints)
        self._tally, self._threshold = Tally(), Threshold(config.openset)
        self._finished: list[StreamCheckpoint] = []
        self._mask_accuracy: float | None = None
        self.learned_now = 0
        self.first_step_at: float | None = None

    @property
    def settled(self) -> bool:
        """Whether no worker is needed any more."""
        last = self._due[len(self._stream) - 1]
        evaluated = all(self._stored_evaluation(k) for k in last)
        return self._over and evaluated and self._in_bank == self._allocated

    @property
    def masks(self) -> int:
        """Masks allocated so far."""
        return self._tally.masks

    def work(self, crew: Crew | None) -> StreamResults:
        """Learn what is left of the stream; evaluate; fill the bank.

        Args:
            crew: the workers; None if the run is ``settled``.
        """
        asked = [len(self._asked(k)) for ks in self._due.values() for k in ks]
        self._reporter.start(LEARNED, len(self._stream), self._ledger.segments)
        self._reporter.start(EVALUATED, sum(asked))
        self._replay(crew)
        if crew is not None and not self._over:
            self._learn(crew)
        self._fill_bank(crew)
        return StreamResults(
            name=self._folder.name,
            dataset=self._config.dataset,
            config=self._config,
            checkpoints=tuple(self._finished),
            decisions=tuple(self._tally.decisions),
            mask_accuracy=self._mask_accuracy,
            test_images=len(self._data.test_labels),
        )

    # --- the stream ----------------------------------------------------------------------------

    @property
    def _over(self) -> bool:
        return self._ledger.segments == len(self._stream)

    def _replay(self, crew: Crew | None) -> None:
        """Take in the steps of the ledger; finish the checkpoint that a kill may have hit."""
        last = self._ledger.segments - 1
        for number, step in enumerate(self._ledger.steps):
            self._take(step)
            for k in self._due.get(number, ()):
                masks = self._last_masks if crew is not None and number == last else None
                self._checkpoint(k, number, crew, masks)

    def _learn(self, crew: Crew) -> None:
        # As in a worker: the bits of a decision don't depend on this machine's cores.
        torch.set_num_threads(THREADS)
        learner = OpenSetLearner(
            self._config, self._data, ShardedMembers(crew), RemoteTrainer(crew), self._ledger.state
        )
        learner.restore(self._ledger.steps, dict(self._ledger.masks()))
        for segment in ahead(self._stream, self._ledger.segments):
            step = learner.learn(segment)
            self._ledger.commit(step)
            self._take(step)
            self.learned_now += 1
            if self.first_step_at is None:
                self.first_step_at = time.time()
            self._reporter.advance(LEARNED, 1)
            for k in self._due.get(segment.number, ()):
                self._checkpoint(k, segment.number, crew, learner.masks)

    def _take(self, step: Step) -> None:
        self._threshold.take(step)
        truth_N = self._stream.truth(step.segment)
        self._tally.add(step, truth_N, self._config.train.batch_size)

    # --- checkpoints ---------------------------------------------------------------------------

    def _checkpoint(
        self, learned: int, number: int, crew: Crew | None, masks: Callable[[], Packed] | None
    ) -> None:
        """Evaluate after so many tasks went by, which was at the end of a segment."""
        tasks = self._stream.finished_by(number)
        evaluation, asked = self._stored_evaluation(learned), self._asked(learned)
        if evaluation is not None:
            self._reporter.advance(EVALUATED, len(asked))
        elif crew is not None and masks is not None:
            owners_K = self._tally.owners()
            evaluation = evaluate_masks(
                crew,
                self._config.eval,
                self._data,
                masks(),
                owners_K,
                learned,
                asked,
                self._reporter,
            )
            self._folder.write_evaluation(self._config.eval, evaluation)
        before = self._finished[-1].decisions if self._finished else 0
        checkpoint = StreamCheckpoint(
            learned=learned,
            evaluation=evaluation,
            masks=self._tally.masks,
            missed=self._tally.missed(tasks),
            false_new=self._tally.false_new,
            wrong=self._tally.wrong,
            late=self._tally.late,
            refused=self._tally.refused,
            mixed=self._tally.mixed,
            decisions=len(self._tally.decisions),
            recent=tuple(self._tally.decisions[before:]),
            false_alarm=self._threshold.false_alarm,
        )
        self._finished.append(checkpoint)
        self._tracker.metrics(metrics(checkpoint, self._config.eval), learned)
        self._reporter.note(summary(checkpoint))

    def _asked(self, learned: int) -> tuple[int, ...]:
        """Return the tasks asked about, ascending: of those that went by, all or a sample."""
        number = next(n for n, ks in self._due.items() if learned in ks)
        gone = self._stream.finished_by(number)[:learned]
        drawn = sampled_tasks(self._config.seed, learned, self._config.eval.tasks)
        return tuple(sorted(gone[place] for place in drawn))

    def _stored_evaluation(self, learned: int) -> Evaluation | None:
        return self._folder.read_evaluation(self._config.eval, learned, self._asked(learned))

    # --- the bank ------------------------------------------------------------------------------

    @property
    def _allocated(self) -> int:
        return sum(step.new for step in self._ledger.steps)

    @property
    def _in_bank(self) -> int:
        return sum(len(tasks) for tasks, _ in self._bank.blocks())

    def _last_masks(self) -> Packed:
        """Return all masks as the last step left them."""
        if self._in_bank == self._allocated:
            return self._bank.read(range(self._allocated)).masks
        return np.stack([packed_B for _, packed_B in self._ledger.masks()])

    def _fill_bank(self, crew: Crew | None) -> None:
        if crew is not None and self._in_bank < self._allocated:
            masks_KB, owners_K = self._last_masks(), self._tally.owners()
            fill_bank(crew, self._bank, masks_KB, owners_K, self._reporter)
        self._ledger.clear()
        self._mask_accuracy = mask_accuracy(self._bank, self._allocated)


# --- what every way to learn a stream shares -------------------------------------------------


def evaluate_masks(
    crew: Crew,
    settings: EvalConfig,
    data: Dataset,
    masks_KB: Packed,
    owners_K: npt.NDArray[np.int64],
    learned: int,
    asked: Sequence[int],
    reporter: Reporter,
) -> Evaluation:
    """Evaluate an open-set learner's masks, spread over the workers.

    Args:
        crew: the workers.
        settings: what to evaluate.
        data: the data set.
        masks_KB: the masks, packed.
        owners_K: the task that each belongs to.
        learned: tasks that went by.
        asked: those of them that are asked about, ascending.
        reporter: where progress goes.
    """
    masks, owners = ray.put(masks_KB), ray.put(owners_K)
    decisions = decisions_per_task(settings, len(data.test_labels))
    jobs = evaluation_jobs(asked, decisions, len(crew))
    calls = [
        Call(i % len(crew), "evaluate", always(settings, masks, learned, tasks, owners))
        for i, tasks in enumerate(jobs)
    ]
    parts = []
    for part in crew.map(calls):
        parts.append(part)
        reporter.advance(EVALUATED, len(part.tasks))
    return merge(parts)


def fill_bank(
    crew: Crew,
    bank: Bank,
    masks_KB: Packed,
    owners_K: npt.NDArray[np.int64],
    reporter: Reporter,
) -> None:
    """Store masks with how well each does on the test set of the task that it belongs to."""
    done = [tasks for tasks, _ in bank.blocks()]
    todo = remaining(len(masks_KB), bank.manifest.config.block_size, done)
    reporter.start(_CHECKED, len(masks_KB), sum(map(len, done)))
    parts = [slice(block.start, block.stop) for block in todo]
    calls = [
        Call(i % len(crew), "given", always(masks_KB[part], owners_K[part].tolist()))
        for i, part in enumerate(parts)
    ]
    for part, correct_K in zip(parts, crew.map(calls), strict=True):
        bank.commit(
            TrainedBlock(
                first=part.start,
                masks=masks_KB[part],
                gg_correct=correct_K,
                loss=np.zeros(len(correct_K), np.float32),
                seconds=0.0,
            )
        )
        reporter.advance(_CHECKED, len(correct_K))


def mask_accuracy(bank: Bank, masks: int) -> float:
    """Return the mean accuracy of the masks of a full bank on their own tasks."""
    correct_K = bank.read(range(masks)).gg_correct
    return float(correct_K.mean() / bank.manifest.test_images)


def always(*args: Any) -> Callable[[], tuple[Any, ...]]:
    """Return a function that returns these arguments."""
    return lambda: args


def due(stream: Stream, checkpoints: Sequence[int]) -> dict[int, list[int]]:
    """Return the numbers of tasks to evaluate at, by the segment at whose end they have gone by."""
    found: dict[int, list[int]] = {}
    waiting = deque(checkpoints)
    for number in range(len(stream)):
        gone = len(stream.finished_by(number))
        while waiting and waiting[0] <= gone:
            found.setdefault(number, []).append(waiting.popleft())
    return found


def ahead(stream: Stream, first: int) -> Iterator[Segment]:
    """Yield the segments from one on, each generated while those before are learned."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[Future[Segment]] = deque()
        for number in range(first, len(stream)):
            coming.append(pool.submit(stream.segment, number))
            if len(coming) > _AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
