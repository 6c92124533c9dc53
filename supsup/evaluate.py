"""Accuracy of a bank: GG from training, GNs and GNu by task inference among the first k masks.

Images that share a decision form a group; the decision looks at the group's first images. The
paper's protocol decides once per batch of 128 from its first image; the default decides for
every image alone. A wrong task with GNu is a wrong answer; with GNs it may still be right.

Task inference is fast in large batches, so the decisions of many tasks are taken together.

Shapes: M methods, T tasks, Q decisions, N images that a decision looks at, G images of a group,
P pixels, B bytes of a packed mask.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.inference import Queries, TaskInference, infer
from supsup.masking import mask_bytes
from supsup.material import as_tensor, layers_of
from supsup.models import fixed_weights
from supsup.packed import packed_masks
from supsup.sampling import half_width, sampled_images
from supsup.seeding import generator
from supsup.tasks import permutation

#: Columns of the counts.
COUNTS = ("decisions", "task_hits", "images", "gns_hits", "gnu_hits")
Counts = npt.NDArray[np.int64]

#: Decisions taken together at most, and the bytes that their images may take.
_DECISIONS, _IMAGE_BYTES = 1024, 64 << 20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How often each method was right, for some tasks, among the first ``learned`` masks."""

    learned: int
    tasks: tuple[int, ...]
    """The tasks asked about, ascending: all of them, or a sample."""
    methods: tuple[str, ...]
    counts: Counts
    """int64 [M, T, 5]: see COUNTS."""

    def accuracy(self, method: str, scenario: str) -> float:
        """Return the fraction of images classified rightly in scenario "gns" or "gnu"."""
        return self._rate(method, f"{scenario}_hits", "images")

    def task_accuracy(self, method: str) -> float:
        """Return the fraction of decisions that found the right task."""
        return self._rate(method, "task_hits", "decisions")

    def accuracy_half_width(self, method: str, scenario: str, test_images: int) -> float:
        """Return the half-width of the accuracy's 95 % interval: see ``sampling.half_width``.

        Args:
            method: the method.
            scenario: "gns" or "gnu".
            test_images: size of the test set, the same for every task.
        """
        return self._half_width(method, f"{scenario}_hits", "images", test_images)

    def task_accuracy_half_width(self, method: str, test_images: int) -> float:
        """Return the half-width of the task accuracy's 95 % interval."""
        return self._half_width(method, "task_hits", "decisions", test_images)

    @property
    def images_per_task(self) -> int:
        """Test images asked about in each task."""
        return int(self.counts[0, 0, COUNTS.index("images")])

    def is_sample(self, test_images: int) -> bool:
        """Say whether tasks or test images were left out, so that rates are estimates."""
        return len(self.tasks) < self.learned or self.images_per_task < test_images

    def _rate(self, method: str, hits: str, of: str) -> float:
        total = self._columns(method).sum(0)
        return float(total[COUNTS.index(hits)] / total[COUNTS.index(of)])

    def _half_width(self, method: str, hits: str, of: str, test_images: int) -> float:
        columns_5T = self._columns(method).T
        return half_width(
            columns_5T[COUNTS.index(hits)] / columns_5T[COUNTS.index(of)],
            columns_5T[COUNTS.index("decisions")],
            self.learned,
            self.images_per_task / test_images,
        )

    def _columns(self, method: str) -> Counts:
        columns_T5: Counts = self.counts[self.methods.index(method)]
        return columns_T5


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """Join evaluations of different tasks, in any order, into one.

    Raises:
        ValueError: if they are of different banks or methods, or share a task.
    """
    head = parts[0]
    for part in parts:
        if (part.learned, part.methods) != (head.learned, head.methods):
            raise ValueError(
                f"evaluation of {part.methods} among {part.learned} masks doesn't belong to one "
                f"of {head.methods} among {head.learned}"
            )
    tasks_T = np.concatenate([part.tasks for part in parts])
    order = np.argsort(tasks_T, kind="stable")
    ascending = tuple(tasks_T[order].tolist())
    twice = [task for task, following in itertools.pairwise(ascending) if task == following]
    if twice:
        raise ValueError(f"task {twice[0]} is in more than one of the evaluations")
    counts = np.concatenate([part.counts for part in parts], axis=1)[:, order]
    return Evaluation(learned=head.learned, tasks=ascending, methods=head.methods, counts=counts)


def decisions_per_task(evaluation: EvalConfig, test_images: int) -> int:
    """Return how many decisions each method takes about a task."""
    return -(-min(evaluation.images or test_images, test_images) // evaluation.group_size)


@dataclass(frozen=True, kw_only=True)
class _Queries:
    """Decisions to take together, all about groups of one size."""

    rows_Q: npt.NDArray[np.int64]
    """The row of each decision's task in the counts."""
    tasks_Q: npt.NDArray[np.int64]
    images_QG: npt.NDArray[np.int64]
    """Indices into the test set."""


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
        self._engines: dict[tuple[int, int], TaskInference] = {}

    def evaluate(
        self,
        evaluation: EvalConfig,
        masks_TB: npt.NDArray[np.uint8],
        learned: int,
        tasks: Sequence[int],
        owners_T: npt.NDArray[np.int64] | None = None,
    ) -> Evaluation:
        """Return the counts of some tasks among the first ``learned`` masks, or all owned ones.

        Args:
            evaluation: what to evaluate, and on how many images; its ``tasks`` is not used.
            masks_TB: packed masks of a bank, from task 0 on, at least ``learned`` of them; may
                be read-only.
            learned: k, the number of masks in the superposition.
            tasks: the tasks whose test images are asked about, ascending.
            owners_T: the task that each of the masks belongs to, for all masks of an open-set
                learner; None: mask t is task t's.
        """
        if owners_T is None:
            owners_T = np.arange(learned)
        engine = self._engine(masks_TB, len(owners_T), evaluation.memory_mb << 20)
        counts_TM5 = np.zeros((len(tasks), len(evaluation.methods), len(COUNTS)), dtype=np.int64)
        for queries in self._queries(evaluation, tasks):
            found_MQ = self._infer(evaluation, engine, queries)
            for part in self._parts(queries.images_QG.shape[1], len(queries.tasks_Q)):
                counted_QM5 = self._count(engine, queries, found_MQ, part, owners_T)
                np.add.at(counts_TM5, queries.rows_Q[part], counted_QM5)
        return Evaluation(
            learned=learned,
            tasks=tuple(tasks),
            methods=evaluation.methods,
            counts=counts_TM5.swapaxes(0, 1),
        )

    def given(self, masks_KB: npt.NDArray[np.uint8], tasks: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return how many test images [K] each mask has right, given the task that it is asked."""
        masks = packed_masks(as_tensor(masks_KB), self._weights, self._layers)
        labels_N = torch.from_numpy(self._data.test_labels)
        everything = np.arange(len(labels_N))[None]
        correct = []
        for mask, task in enumerate(tasks):
            images_NP = self._pixels(np.array([task]), everything)[0]
            classes_N = masks.logits(mask, images_NP)[:, : self._data.classes].argmax(-1)
            correct.append(int((classes_N == labels_N).sum()))
        return np.array(correct, dtype=np.int64)

    def _engine(
        self, masks_TB: npt.NDArray[np.uint8], learned: int, memory_bytes: int
    ) -> TaskInference:
        # An open-set learner's masks change while their number stays.
        key = learned, zlib.crc32(np.ascontiguousarray(masks_TB[:learned]).data)
        if key not in self._engines:
            bytes_needed = mask_bytes(self._layers)
            if masks_TB.shape[1] != bytes_needed or len(masks_TB) < learned:
                raise ValueError(f"masks are {masks_TB.shape}, not {learned} x {bytes_needed}")
            # One superposition at a time: checkpoints are evaluated in turn.
            self._engines = {
                key: TaskInference(
                    as_tensor(masks_TB[:learned]),
                    self._weights,
                    self._layers,
                    self._data.classes,
                    memory_bytes,
                )
            }
        return self._engines[key]

    # --- what is asked -------------------------------------------------------------------------

    def _queries(self, evaluation: EvalConfig, tasks: Sequence[int]) -> Iterator[_Queries]:
        """Yield the decisions about the tasks in batches; those about smaller groups last."""
        most = self._together(evaluation.batch)
        for whole in (True, False):
            decisions = self._decisions(evaluation, tasks, whole)
            while batch := list(itertools.islice(decisions, most)):
                rows, of_tasks, images = zip(*batch, strict=True)
                yield _Queries(
                    rows_Q=np.array(rows), tasks_Q=np.array(of_tasks), images_QG=np.stack(images)
                )

    def _decisions(
        self, evaluation: EvalConfig, tasks: Sequence[int], whole: bool
    ) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Yield row, task and images [G] of each decision about a whole group.

        Or, if not ``whole``, of those about what is left of a task's images behind its groups.
        """
        size = evaluation.group_size
        for row, task in enumerate(tasks):
            stream = generator(self._config.seed, "evaluation", task)
            chosen_N = sampled_images(self._data.test_labels, evaluation.images, stream)
            end = len(chosen_N) - len(chosen_N) % size
            groups = chosen_N[:end].reshape(-1, size) if whole else chosen_N[None, end:]
            yield from ((row, task, group_G) for group_G in groups if len(group_G))

    def _together(self, images: int) -> int:
        """Return how many decisions to take together, of so many images each."""
        bytes_each = images * self._data.pixels * torch.float32.itemsize
        return max(1, min(_DECISIONS, _IMAGE_BYTES // bytes_each))

    def _parts(self, images: int, decisions: int) -> Iterator[slice]:
        step = self._together(images)
        return (slice(start, start + step) for start in range(0, decisions, step))

    def _pixels(self, tasks_Q: npt.NDArray[np.int64], images_QN: npt.NDArray[np.int64]) -> Tensor:
        """Return test images as their tasks see them, normalised, [Q, N, P]."""
        data = self._data
        pixels_QNP = np.empty((*images_QN.shape, data.pixels), dtype=np.float32)
        for task in np.unique(tasks_Q):
            mine_Q = tasks_Q == task
            order_P = permutation(self._config.seed, int(task), data.pixels)
            pixels_QNP[mine_Q] = data.test_images[images_QN[mine_Q]][..., order_P]
        return torch.from_numpy((pixels_QNP / data.scale - data.mean) / data.std)

    # --- what is answered ----------------------------------------------------------------------

    def _infer(self, evaluation: EvalConfig, engine: TaskInference, queries: _Queries) -> Tensor:
        """Return the task [M, Q] that each method finds."""
        seen_QNP = self._pixels(queries.tasks_Q, queries.images_QG[:, : evaluation.batch])
        asked = Queries(engine, seen_QNP, evaluation.shortlist, evaluation.sketch)
        return torch.stack([infer(asked, method) for method in evaluation.methods])

    def _count(
        self,
        engine: TaskInference,
        queries: _Queries,
        found_MQ: Tensor,
        part: slice,
        owners_T: npt.NDArray[np.int64],
    ) -> Counts:
        """Return the counts [Q, M, 5] of some of the decisions."""
        tasks_Q, images_QG = queries.tasks_Q[part], queries.images_QG[part]
        hit_MQ = as_tensor(owners_T)[found_MQ[:, part]] == torch.from_numpy(tasks_Q)
        classes_MQG = _classes(engine, found_MQ[:, part], self._pixels(tasks_Q, images_QG))
        right_MQG = classes_MQG == torch.from_numpy(self._data.test_labels[images_QG])
        right_MQ = right_MQG.sum(-1)
        ones_MQ = torch.ones_like(right_MQ)
        groups_MQ = ones_MQ * images_QG.shape[1]
        columns = (ones_MQ, hit_MQ.long(), groups_MQ, right_MQ, right_MQ * hit_MQ)
        counts_QM5: Counts = torch.stack(columns, dim=-1).transpose(0, 1).numpy()
        return counts_QM5


def _classes(engine: TaskInference, found_MQ: Tensor, images_QGP: Tensor) -> Tensor:
    """Return the class [M, Q, G] of each image under the found masks; equal finds share a run."""
    queries = found_MQ.shape[1]
    pairs_MQ = found_MQ * queries + torch.arange(queries)
    distinct, which_MQ = torch.unique(pairs_MQ, return_inverse=True)
    return engine.predict(distinct // queries, images_QGP[distinct % queries])[which_MQ]
