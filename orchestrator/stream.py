"""The open-set coordinator: one stream, its masks in shards on the workers.

The learner's loop (supsup.openset) runs here. A decision is one gradient sent to all shards and one
arg-max over their answers; the mask that is decided on is trained by a worker. Every step is
committed to the ledger before the next is taken. At checkpoints all workers evaluate.

Shapes: K masks, W numbers per weight.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.actors import put
from orchestrator.crew import Call, Crew
from orchestrator.progress import Reporter
from orchestrator.stream_book import (
    CHECKED,
    EVALUATED,
    StreamBook,
    evaluations,
    store,
    unfilled,
)
from orchestrator.stream_report import StreamResults
from orchestrator.worker import THREADS
from supsup.apprentice import MaskState
from supsup.bank import Bank
from supsup.config import EvalConfig
from supsup.datasets import Dataset
from supsup.evaluate import Evaluation, merge
from supsup.members import PAGE, Packed, Scores
from supsup.openset import OpenSetLearner
from supsup.streams import Segment, Stream


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
        factor = put(factor_W.numpy())
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


class Coming:
    """The segments of a stream from one on, the next one generated when there is time for it."""

    def __init__(self, stream: Stream, first: int) -> None:
        """Begin with a segment's number."""
        self._stream, self._next = stream, first
        self._pool = ThreadPoolExecutor(1)
        self._future: Future[Segment] | None = None

    def prepare(self) -> None:
        """Begin to generate the next segment, in a thread of its own."""
        if self._next < len(self._stream):
            self._begun()

    def __iter__(self) -> Iterator[Segment]:
        """Yield the segments in order."""
        with self._pool:
            while self._next < len(self._stream):
                segment = self._begun().result()
                self._next, self._future = self._next + 1, None
                yield segment

    def _begun(self) -> Future[Segment]:
        if self._future is None:
            self._future = self._pool.submit(self._stream.segment, self._next)
        return self._future


class RemoteTrainer:
    """Trains masks on the first worker."""

    def __init__(self, crew: Crew, meanwhile: Callable[[], None]) -> None:
        """Take the workers, and what is to be done here while they train."""
        self._crew, self._meanwhile = crew, meanwhile

    def train(self, mask: int, segment: Segment, state: MaskState) -> MaskState:
        """See ``Trainer``."""
        reference = put(segment)
        self._meanwhile()
        trained: MaskState = self._crew.call(0, "train_mask", mask, reference, state)
        return trained


class StreamRun:
    """An open-set run: its stream, its checkpoints, and in the end its bank."""

    def __init__(self, book: StreamBook) -> None:
        """Take the run's book."""
        self._book = book

    @property
    def settled(self) -> bool:
        """Whether no worker is needed any more."""
        return self._book.settled

    @property
    def masks(self) -> int:
        """Masks allocated so far."""
        return self._book.masks

    @property
    def learned_now(self) -> int:
        """Segments learned by this command."""
        return self._book.learned_now

    @property
    def first_step_at(self) -> float | None:
        """When the first of them was committed, in seconds of the epoch."""
        return self._book.first_step_at

    def work(self, crew: Crew | None) -> StreamResults:
        """Learn what is left of the stream; evaluate; fill the bank.

        Args:
            crew: the workers; None if the run is ``settled``.
        """
        book = self._book
        if crew is not None:
            self._evaluate(crew, book.masks_now)
            if not book.over:
                self._learn(crew)
            if book.unfilled():
                fill_bank(crew, book.bank, book.masks_now(), book.owners, book.reporter)
        book.close()
        return book.results()

    def _learn(self, crew: Crew) -> None:
        # As in a worker: the bits of a decision don't depend on this machine's cores.
        torch.set_num_threads(THREADS)
        book, ledger = self._book, self._book.ledger
        coming = Coming(book.stream, ledger.segments)
        trainer = RemoteTrainer(crew, coming.prepare)
        learner = OpenSetLearner(
            book.config, book.data, ShardedMembers(crew), trainer, ledger.state
        )
        learner.restore(ledger.steps, dict(ledger.masks()))
        for segment in coming:
            book.commit(learner.learn(segment))
            self._evaluate(crew, learner.masks)

    def _evaluate(self, crew: Crew, masks: Callable[[], Packed]) -> None:
        """Evaluate at the checkpoints that the last step passed, if any."""
        book = self._book
        while (learned := book.to_evaluate()) is not None:
            asked, owners_K = book.asked(learned), book.owners
            found = evaluate_masks(
                crew, book.config.eval, book.data, masks(), owners_K, learned, asked, book.reporter
            )
            book.evaluated(found)


# --- over a crew -----------------------------------------------------------------------------


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
    """Evaluate an open-set learner's masks, spread over the workers: see ``evaluations``."""
    refs, images = (put(masks_KB), put(owners_K)), len(data.test_labels)
    jobs = evaluations(settings, *refs, learned, asked, images, len(crew))
    parts = []
    for part in crew.map(_in_turn(crew, "evaluate", jobs)):
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
    parts = unfilled(bank, len(masks_KB))
    left = sum(part.stop - part.start for part in parts)
    reporter.start(CHECKED, len(masks_KB), len(masks_KB) - left)
    jobs = [(masks_KB[part], owners_K[part].tolist()) for part in parts]
    for part, correct_K in zip(parts, crew.map(_in_turn(crew, "given", jobs)), strict=True):
        store(bank, part, masks_KB[part], correct_K)
        reporter.advance(CHECKED, len(correct_K))


def _in_turn(crew: Crew, method: str, jobs: Sequence[tuple[Any, ...]]) -> list[Call]:
    """Return calls with these arguments, dealt out to the workers."""
    return [Call(i % len(crew), method, always(*args)) for i, args in enumerate(jobs)]


def always(*args: Any) -> Callable[[], tuple[Any, ...]]:
    """Return a function that returns these arguments."""
    return lambda: args
