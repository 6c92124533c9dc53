"""Accuracy of a bank: GG from training, GNs and GNu by task inference among the first k masks.

Images that share a decision form a group; the decision looks at the group's first images. The
paper's protocol decides once per batch of 128 from its first image; the default decides for
every image alone. A wrong task with GNu is a wrong answer; with GNs it may still be right.

Shapes: M methods, T tasks, Q decisions, G images of a group, N images looked at, P pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.inference import TaskInference, infer
from supsup.masking import layer_slices
from supsup.models import fixed_weights
from supsup.seeding import generator
from supsup.tasks import permutation
from supsup.train import layers_of

#: Columns of the counts.
COUNTS = ("decisions", "task_hits", "images", "gns_hits", "gnu_hits")
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How often each method was right, for some tasks, among the first ``learned`` masks."""

    learned: int
    first: int
    methods: tuple[str, ...]
    counts: Counts
    """int64 [M, T, 5]: see COUNTS."""

    def rate(self, method: str, hits: str, of: str) -> float:
        """Return a ratio of two columns over all tasks, such as task_hits of decisions."""
        total = self.counts[self.methods.index(method)].sum(0)
        return float(total[COUNTS.index(hits)] / total[COUNTS.index(of)])

    def accuracy(self, method: str, scenario: str) -> float:
        """Return the fraction of images classified rightly in scenario "gns" or "gnu"."""
        return self.rate(method, f"{scenario}_hits", "images")

    def task_accuracy(self, method: str) -> float:
        """Return the fraction of decisions that found the right task."""
        return self.rate(method, "task_hits", "decisions")


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """Join evaluations of adjoining ranges of tasks, in any order, into one.

    Raises:
        ValueError: if they are of different banks or methods, or leave a gap.
    """
    ordered = sorted(parts, key=lambda part: part.first)
    head = ordered[0]
    expected = head.first
    for part in ordered:
        if (part.learned, part.methods, part.first) != (head.learned, head.methods, expected):
            raise ValueError(f"evaluation of task {part.first} on doesn't continue {expected}")
        expected += part.counts.shape[1]
    return Evaluation(
        learned=head.learned,
        first=head.first,
        methods=head.methods,
        counts=np.concatenate([part.counts for part in ordered], axis=1),
    )


class Evaluator:
    """Evaluates tasks of one run among the first k masks of its bank, in fp32."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Generate the weights of the run.

        Args:
            config: the configuration of the run; its ``eval`` part is not used.
            data: the data set of the run.
        """
        self._config, self._data = config, data
        self._layers = layers_of(config, data)
        self._weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, self._layers)]
        self._engines: dict[int, TaskInference] = {}

    def evaluate(
        self, evaluation: EvalConfig, masks_TB: npt.NDArray[np.uint8], learned: int, tasks: range
    ) -> Evaluation:
        """Return the counts of some tasks among the first ``learned`` masks.

        Args:
            evaluation: what to evaluate, and on how many images.
            masks_TB: packed masks of a bank, from task 0 on, at least ``learned`` of them.
            learned: k, the number of masks in the superposition.
            tasks: the tasks whose test images are asked about.
        """
        engine = self._engine(masks_TB, learned)
        counts = np.stack([self._one_task(evaluation, engine, task) for task in tasks], axis=1)
        return Evaluation(
            learned=learned, first=tasks.start, methods=evaluation.methods, counts=counts
        )

    def _engine(self, masks_TB: npt.NDArray[np.uint8], learned: int) -> TaskInference:
        if learned not in self._engines:
            bytes_needed = list(layer_slices(self._layers))[-1][1].stop
            if masks_TB.shape[1] != bytes_needed or len(masks_TB) < learned:
                raise ValueError(f"masks are {masks_TB.shape}, not {learned} x {bytes_needed}")
            # One superposition at a time: checkpoints are evaluated in turn.
            self._engines = {
                learned: TaskInference(
                    torch.tensor(masks_TB[:learned]),
                    self._weights,
                    self._layers,
                    self._data.classes,
                )
            }
        return self._engines[learned]

    def _one_task(self, evaluation: EvalConfig, engine: TaskInference, task: int) -> Counts:
        """Return the counts [M, 5] of one task."""
        counts = np.zeros((len(evaluation.methods), len(COUNTS)), dtype=np.int64)
        for images_QGP, labels_QG in self._groups(evaluation, task):
            seen_QNP = images_QGP[:, : evaluation.batch]
            for row, method in enumerate(evaluation.methods):
                found_Q = infer(engine, seen_QNP, method, evaluation.shortlist)
                hit_Q = found_Q == task
                right_QG = engine.predict(found_Q, images_QGP) == labels_QG
                counts[row] += np.array(
                    [
                        len(found_Q),
                        int(hit_Q.sum()),
                        labels_QG.numel(),
                        int(right_QG.sum()),
                        int((right_QG & hit_Q[:, None]).sum()),
                    ]
                )
        return counts

    def _groups(self, evaluation: EvalConfig, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the task's test images [Q, G, P] and labels [Q, G]; a smaller group last."""
        data = self._data
        total = len(data.test_images)
        chosen = np.arange(total)
        if 0 < evaluation.images < total:
            stream = generator(self._config.seed, "evaluation", task)
            chosen = stream.permutation(total)[: evaluation.images]
        order = permutation(self._config.seed, task, data.pixels)
        pixels = data.test_images[chosen][:, order].astype(np.float32)
        images = torch.from_numpy((pixels / data.scale - data.mean) / data.std).float()
        labels = torch.from_numpy(data.test_labels[chosen])
        size = evaluation.group_size
        full = len(images) - len(images) % size
        for part, group in ((slice(0, full), size), (slice(full, None), len(images) - full)):
            if len(labels[part]):
                yield images[part].view(-1, group, data.pixels), labels[part].view(-1, group)
