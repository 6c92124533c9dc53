"""The checkpoints of a run: what is asked at each, which wait, which are evaluated, in which order.

A checkpoint is evaluated in parts, by whichever workers are free; it is shown once those before it
are, for its measures look back at them.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from orchestrator.blocks import evaluation_jobs
from orchestrator.progress import Reporter
from orchestrator.runfolder import RunFolder
from supsup.config import RunConfig
from supsup.evaluate import Evaluation, decisions_per_task, merge
from supsup.sampling import sampled_tasks

_EVALUATED = "tasks evaluated"


class Checkpoints:
    """The checkpoints of a run, and how far each of them is."""

    def __init__(
        self,
        *,
        config: RunConfig,
        numbers: Sequence[int],
        sizes: npt.NDArray[np.int64],
        folder: RunFolder,
        reporter: Reporter,
        workers: int,
        show: Callable[[int, Evaluation | None], None],
        unknown: Callable[[int], str] = lambda learned: "",
    ) -> None:
        """Let all of them wait.

        Args:
            config: the resolved configuration.
            numbers: numbers of tasks learned to evaluate at, ascending.
            sizes: test images of every task [T].
            folder: where evaluations are kept.
            reporter: where progress goes.
            workers: how many share an evaluation.
            show: called with each checkpoint in order, and its evaluation if the task is inferred.
            unknown: says why a checkpoint can't be evaluated; "" if it can.
        """
        self._config, self._sizes, self._folder = config, sizes, folder
        self._reporter, self._workers, self._show, self._unknown = reporter, workers, show, unknown
        self._waiting, self._unshown = deque(numbers), deque(numbers)
        self._parts: dict[int, list[Evaluation]] = {}
        self._evaluated: dict[int, Evaluation | None] = {}
        if self.infer:
            reporter.start(_EVALUATED, sum(len(self.asked(k)) for k in numbers))

    @property
    def infer(self) -> bool:
        """Whether the task is inferred at them, which takes workers."""
        return self._config.scenario != "gg"

    @property
    def widest(self) -> int:
        """Tasks that are asked about at once, at most, at those that wait for workers."""
        return max((len(self.asked(k)) for k in self._waiting), default=0) if self.infer else 0

    @property
    def next(self) -> int:
        """Tasks learned at the first that is not evaluated yet; all, if there is none."""
        return min([*self._parts, *self._waiting], default=self._config.tasks)

    def asked(self, learned: int) -> tuple[int, ...]:
        """Return the tasks asked about at a checkpoint, ascending."""
        return sampled_tasks(self._config.seed, learned, self._config.eval.tasks)

    def settle(self, learned: int) -> None:
        """Finish those up to a number of tasks learned that need no worker; the others wait."""
        self._waiting = deque(k for k in self._waiting if k > learned or not self._settled(k))

    def due(self, learned: int) -> int | None:
        """Take the next checkpoint, if it needs workers and so many tasks are learned."""
        while self._waiting and self._waiting[0] <= learned:
            number = self._waiting.popleft()
            if not self._settled(number):
                return number
        return None

    def open(self, learned: int) -> list[Sequence[int]]:
        """Return the tasks that are asked about at a checkpoint, in parts."""
        self._parts[learned] = []
        decisions = decisions_per_task(self._config.eval, int(self._sizes.max()))
        return evaluation_jobs(self.asked(learned), decisions, self._workers)

    def add(self, part: Evaluation) -> None:
        """Add a part to its checkpoint, and finish it if that was the last."""
        learned, parts = part.learned, self._parts.get(part.learned)
        self._reporter.advance(_EVALUATED, len(part.tasks))
        if parts is None:  # it was given up
            return
        parts.append(part)
        if sum(len(part.tasks) for part in parts) == len(self.asked(learned)):
            whole = merge(self._parts.pop(learned))
            self._folder.write_evaluation(self._config.eval, whole)
            self._finish(learned, whole)

    def give_up(self, learned: int) -> None:
        """Let the checkpoints behind one that can't be evaluated go on without it."""
        self._parts.pop(learned, None)
        if learned in self._unshown:
            self._unshown.remove(learned)
        self._show_those_that_can()

    def drop_rest(self) -> None:
        """Let those go that wait."""
        self._waiting.clear()

    def _settled(self, learned: int) -> bool:
        """Finish a checkpoint that needs no worker, if it is one; say whether it was."""
        if reason := self._unknown(learned):
            self._reporter.note(reason)
            self.give_up(learned)
            return True
        if not self.infer:
            self._finish(learned, None)
            return True
        asked = self.asked(learned)
        stored = self._folder.read_evaluation(self._config.eval, learned, asked)
        if stored is None:
            return False
        self._reporter.advance(_EVALUATED, len(asked))
        self._finish(learned, stored)
        return True

    def _finish(self, learned: int, evaluation: Evaluation | None) -> None:
        self._evaluated[learned] = evaluation
        self._show_those_that_can()

    def _show_those_that_can(self) -> None:
        while self._unshown and self._unshown[0] in self._evaluated:
            learned = self._unshown.popleft()
            self._show(learned, self._evaluated.pop(learned))
