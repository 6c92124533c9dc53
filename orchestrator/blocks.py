"""Which tasks are left to train and to ask about, cut into jobs: no Ray, no files."""

import heapq
from collections.abc import Iterable, Iterator, Sequence

#: Decisions that an evaluation job should take: task inference is fast in large batches.
_JOB_DECISIONS = 1000
#: Evaluation jobs per worker that there should be at least, so that workers end together.
_JOBS_PER_WORKER = 2


def remaining(tasks: int, block_size: int, done: Iterable[range]) -> list[range]:
    """Return the blocks of the first ``tasks`` tasks that are not done yet, in order.

    Blocks lie on a fixed grid of ``block_size``; one that is partly done is cut down to what is
    missing, so no task is trained twice.
    """
    blocks: list[range] = []
    start = 0
    for block in [*sorted(done, key=lambda b: b.start), range(tasks, tasks)]:
        blocks += split(range(start, min(block.start, tasks)), block_size)
        start = max(start, block.stop)
    return blocks


def split(tasks: range, size: int) -> Iterator[range]:
    """Cut a range of tasks at the multiples of ``size``."""
    start = tasks.start
    while start < tasks.stop:
        stop = min(tasks.stop, (start // size + 1) * size)
        yield range(start, stop)
        start = stop


def halves(tasks: Sequence[int]) -> list[Sequence[int]]:
    """Cut two tasks or more into two parts."""
    middle = len(tasks) // 2
    return [tasks[:middle], tasks[middle:]]


def evaluation_jobs(
    tasks: Sequence[int], decisions_per_task: int, workers: int
) -> list[Sequence[int]]:
    """Cut the tasks that an evaluation asks about into jobs. Any cut gives the same counts."""
    by_decisions = _JOB_DECISIONS // decisions_per_task
    by_workers = len(tasks) // (_JOBS_PER_WORKER * workers)
    size = max(1, min(by_decisions, by_workers))
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def learned_prefix(done: Iterable[range]) -> int:
    """Return how many tasks are done from task 0 on without a gap."""
    return LearnedPrefix(done).length


class LearnedPrefix:
    """How many tasks are done from task 0 on without a gap, kept as blocks come in any order."""

    def __init__(self, done: Iterable[range] = ()) -> None:
        """Begin with the blocks that are done."""
        self.length = 0
        self._ahead: list[tuple[int, int]] = []
        for block in done:
            self.add(block)

    def add(self, block: range) -> None:
        """Count a block in; takes O(log n) with n blocks behind the first gap."""
        heapq.heappush(self._ahead, (block.start, block.stop))
        while self._ahead and self._ahead[0][0] <= self.length:
            self.length = max(self.length, heapq.heappop(self._ahead)[1])
