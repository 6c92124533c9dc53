"""Which tasks are left to train, cut into blocks: pure functions."""

from collections.abc import Iterable, Iterator


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


def learned_prefix(done: Iterable[range]) -> int:
    """Return how many tasks are done from task 0 on without a gap."""
    learned = 0
    for block in sorted(done, key=lambda b: b.start):
        if block.start > learned:
            break
        learned = max(learned, block.stop)
    return learned
