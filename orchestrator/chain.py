"""A run whose tasks start from those before: its blocks, one at a time and in order.

What a block leaves to the next is on disk before the block is committed: whatever stops a run, it
goes on from the last block that is.
"""

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.blocks import remaining
from orchestrator.jobs import Job
from supsup.config import RunConfig
from supsup.transfer import Legacy, LegacyStore


class Chain:
    """Which block comes next, and what it starts from."""

    def __init__(
        self,
        config: RunConfig,
        store: LegacyStore,
        done: Sequence[range],
        put: Callable[[Any], Any],
    ) -> None:
        """Find where the chain goes on.

        Blocks that are there but whose legacy isn't are trained again, to the same masks, if a
        block behind them is missing.

        Args:
            config: the resolved configuration.
            store: what the blocks leave.
            done: the blocks of the bank that can be trusted, in order.
            put: stores an object for all workers and returns its reference.
        """
        self._store, self._put = store, put
        self._legacy: Legacy | None = None
        self._busy = False
        missing = remaining(config.tasks, config.block_size, done)
        self.todo: list[range] = []
        if missing:
            self._legacy = store.newest(done)
            start = self._legacy.learned if self._legacy else 0
            again = [block for block in done if start <= block.start < missing[-1].start]
            self.todo = sorted([*again, *missing], key=lambda block: block.start)

    def ready(self) -> bool:
        """Say whether the next block can start: not while another is in training."""
        return not self._busy

    def job(self, block: range) -> Job:
        """Return the job that trains the next block."""
        self._busy = True
        legacy = None if self._legacy is None else self._put(self._legacy)
        return Job("train_after", (block, legacy), tag=("train", block), size=len(block))

    def keep(self, block: range, legacy: Legacy) -> None:
        """Keep what a trained block leaves, before the block is committed."""
        self._store.save(block, legacy)
        self._legacy, self._busy = legacy, False

    def committed(self, block: range) -> None:
        """Forget what was needed for this block alone."""
        self._store.forget(block)
