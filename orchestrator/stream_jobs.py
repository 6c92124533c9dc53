"""One stream as jobs of a pool: for many open-set runs side by side over the same workers.

A stream is learned in order, so a run has one stretch of it at work at a time, or the evaluation of
a checkpoint, or in the end the tests of its masks; the other workers are for other runs. Steps,
masks and evaluations are those of ``StreamRun``, bit for bit, and so are the files: what one
leaves the other goes on with.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.jobs import Failure, Job, given_up, tried_again
from orchestrator.stream_book import CHECKED, EVALUATED, StreamBook, evaluations, store
from orchestrator.stream_report import StreamResults
from orchestrator.stretch import Chronicle, History
from supsup.apprentice import MaskState
from supsup.evaluate import Evaluation, merge
from supsup.members import Packed
from supsup.openset import Step

#: Segments that a worker learns before it hands them in: what a kill loses at most.
STRETCH = 10


class StreamJobs:
    """The jobs of an open-set run, and what became of them."""

    def __init__(self, book: StreamBook, put: Callable[[Any], Any], workers: int) -> None:
        """Finish the run if no worker is needed for it.

        Args:
            book: the run's book.
            put: stores an object for all workers and returns its reference.
            workers: how many work off the jobs.
        """
        self.failures: list[str] = []
        self._book, self._put, self._workers = book, put, workers
        self._gone_before = self._book.tasks_gone
        self._queue: deque[Job] = deque()
        self._at_work = 0
        self._dropped = False
        self._parts: list[Evaluation] = []
        self._unanswered = 0
        self._chronicle: Chronicle | None = None
        if self._book.settled:
            self._finish()

    @property
    def trained(self) -> int:
        """Tasks that went by under this command."""
        return self._book.tasks_gone - self._gone_before

    @property
    def learned_now(self) -> int:
        """Segments learned by this command."""
        return self._book.learned_now

    @property
    def widest(self) -> int:
        """Jobs that can ever run side by side, at most; 0 if there is nothing to do."""
        return 0 if self._dropped else self._workers

    def results(self) -> StreamResults:
        """Return what the run has to show so far."""
        return self._book.results()

    def drop_rest(self) -> None:
        """Start no more jobs; what workers have in hand is still taken."""
        self._dropped = True
        self._queue.clear()
        self._chronicle = None

    # --- JobSource -----------------------------------------------------------------------------

    def left(self) -> int:
        """Return how many jobs can start now, those that are not queued yet counted as one."""
        return len(self._queue) or int(not self._at_work and not self._dropped)

    def next_job(self) -> Job | None:
        """Return the next job, if the ones before leave one."""
        if not self._queue and not self._at_work and not self._dropped:
            self._plan()
        if not self._queue:
            return None
        self._at_work += 1
        return self._queue.popleft()

    def done(self, job: Job, result: Any) -> None:
        """Commit the steps of a stretch, add up an evaluation, or store masks."""
        self._at_work -= 1
        if job.method == "learn_stretch":
            self._take(result)
        elif job.method == "evaluate":
            self._add(result)
        else:
            masks_KB, part = job.args[0], slice(job.tag[1].start, job.tag[1].stop)
            store(self._book.bank, part, masks_KB, result)
            self._book.reporter.advance(CHECKED, len(result))
        if not self._queue and not self._at_work and self._book.settled:
            self._finish()

    def failed(self, job: Job, failure: Failure) -> None:
        """Note a job that is given up: nothing can follow it."""
        self._at_work -= 1
        text = given_up(_describe(job), failure)
        self.failures.append(text)
        self._book.reporter.note(text)
        self.drop_rest()

    def retrying(self, job: Job, failure: Failure) -> None:
        """Say that a job is tried again."""
        self._book.reporter.note(tried_again(_describe(job), job, failure))

    # --- what comes next -----------------------------------------------------------------------

    def _plan(self) -> None:
        """Queue what is next: a checkpoint, else a stretch, else tests of the masks."""
        book = self._book
        learned = book.to_evaluate()
        if learned is not None:
            self._plan_evaluation(learned)
        elif not book.over:
            numbers = book.until_checkpoint(STRETCH)
            args, tag = (numbers, self._history()), ("learn_stretch", numbers)
            self._queue.append(Job("learn_stretch", args, tag, size=len(numbers)))
        else:
            self._plan_tests()

    def _plan_evaluation(self, learned: int) -> None:
        book, settings = self._book, self._book.config.eval
        masks, owners = self._put(book.masks_now()), self._put(book.owners)
        jobs = evaluations(
            settings, masks, owners, learned, book.asked(learned),
            len(self._book.data.test_labels), self._workers,
        )  # fmt: skip
        self._parts, self._unanswered = [], len(jobs)
        self._queue.extend(
            Job("evaluate", args, ("evaluate", learned, number), size=len(args[3]) * book.masks)
            for number, args in enumerate(jobs)
        )

    def _plan_tests(self) -> None:
        masks_KB, owners_K, parts = self._book.masks_now(), self._book.owners, self._book.unfilled()
        left = sum(part.stop - part.start for part in parts)
        self._book.reporter.start(CHECKED, len(masks_KB), len(masks_KB) - left)
        self._queue.extend(
            Job(
                "given",
                (masks_KB[part], owners_K[part].tolist()),
                ("given", range(part.start, part.stop)),
                size=part.stop - part.start,
            )
            for part in parts
        )

    def _finish(self) -> None:
        self._book.close()
        self.drop_rest()

    # --- the stream ----------------------------------------------------------------------------

    def _history(self) -> History:
        """Return what the next stretch goes on from."""
        if self._chronicle is None:
            ledger, self._chronicle = self._book.ledger, Chronicle(self._put)
            masks = dict(ledger.masks())
            self._chronicle.add(ledger.steps, masks, {mask: ledger.state(mask) for mask in masks})
        return self._chronicle.history()

    def _take(self, steps: Sequence[Step]) -> None:
        masks: dict[int, Packed] = {}
        states: dict[int, MaskState | None] = {}
        for step in steps:
            self._book.commit(step)
            if step.mask is not None and step.packed_B is not None:
                masks[step.mask], states[step.mask] = step.packed_B, step.state
        if self._chronicle is not None:
            self._chronicle.add(steps, masks, states)

    def _add(self, part: Evaluation) -> None:
        self._parts.append(part)
        self._unanswered -= 1
        self._book.reporter.advance(EVALUATED, len(part.tasks))
        if not self._unanswered:
            self._book.evaluated(merge(self._parts))


def _describe(job: Job) -> str:
    if job.method == "learn_stretch":
        return f"segments {job.tag[1].start} to {job.tag[1].stop - 1}"
    if job.method == "evaluate":
        return f"evaluation after {job.tag[1]} tasks"
    return f"test of masks {job.tag[1].start} to {job.tag[1].stop - 1}"
