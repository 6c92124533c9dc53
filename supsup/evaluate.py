"""Accuracy of a bank: GG from training, GNs and GNu by task inference among the first k masks.

Images that share a decision form a group; the decision looks at the group's first images. The
paper's protocol decides once per batch of 128 from its first image; the default decides for
every image alone. A wrong task with GNu is a wrong answer; with GNs it may still be right: labels
count from 0 in every task, and are shared.

Accuracies are means over tasks of each task's own, whatever the sizes of their test sets.

Task inference is fast in large batches, so the decisions of many tasks are taken together.

Shapes: M methods, T tasks, Q decisions, N images that a decision looks at, G images of a group,
P pixels, B bytes of a packed mask, R tasks of a ranking, X pairs of tasks.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supsup.answering import packed_masks
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.gpu import repeatable
from supsup.inference import RANKED, Queries, TaskInference, ranked
from supsup.masking import mask_bytes
from supsup.material import as_tensor, layers_of
from supsup.models import fixed_weights
from supsup.net_inference import make_inference
from supsup.sampling import half_width, sampled_images
from supsup.seeding import generator
from supsup.tasks import task_family

#: Columns of the counts. A task is a top-5 hit where it is among the first five of a ranking.
COUNTS = ("decisions", "task_hits", "images", "gns_hits", "gnu_hits", "top5_hits")
Counts = npt.NDArray[np.int64]
#: Test images of the tasks from task 0 on, or of all alike.
Sizes = npt.NDArray[np.int64] | int


def no_confusions() -> Counts:
    """Return what ``Evaluation.confusions_X3`` is where no task was taken for another."""
    return np.zeros((0, 3), dtype=np.int64)


#: Decisions taken together at most, and the bytes that their images may take.
_DECISIONS, _IMAGE_BYTES = 1024, 64 << 20
#: Numbers per decision and mask: the gradients of two objectives, in parts, joined, and ranked.
_PER_MASK = 6
#: Of a GPU's memory, the part that task inference may take.
_GPU_PART = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How often each method was right, for some tasks, among the first ``learned`` masks."""

    learned: int
    tasks: tuple[int, ...]
    """The tasks asked about, ascending: all of them, or a sample."""
    methods: tuple[str, ...]
    counts: Counts
    """int64 [M, T, 6]: see COUNTS."""
    confusions_X3: Counts = field(default_factory=no_confusions)
    """Of the first method: task, other task that it was taken for, and how many decisions."""

    def accuracy(self, method: str, scenario: str) -> float:
        """Return the fraction of images classified rightly in scenario "gns" or "gnu"."""
        return float(self.rates(method, f"{scenario}_hits", "images").mean())

    def task_accuracy(self, method: str) -> float:
        """Return the fraction of decisions that found the right task."""
        return float(self.rates(method, "task_hits", "decisions").mean())

    def top5_accuracy(self, method: str) -> float:
        """Return the fraction of decisions that ranked the right task among the first five."""
        return float(self.rates(method, "top5_hits", "decisions").mean())

    def accuracy_half_width(self, method: str, scenario: str, sizes: Sizes) -> float:
        """Return the half-width of the accuracy's 95 % interval: see ``sampling.half_width``."""
        return self._half_width(self.rates(method, f"{scenario}_hits", "images"), sizes)

    def task_accuracy_half_width(self, method: str, sizes: Sizes) -> float:
        """Return the half-width of the task accuracy's 95 % interval."""
        return self._half_width(self.rates(method, "task_hits", "decisions"), sizes)

    def rates(self, method: str, hits: str, of: str) -> npt.NDArray[np.float64]:
        """Return the quotient [T] of two columns of a method's counts."""
        counts_T6 = self.counts[self.methods.index(method)]
        rates_T: npt.NDArray[np.float64] = (
            counts_T6[:, COUNTS.index(hits)] / counts_T6[:, COUNTS.index(of)]
        )
        return rates_T

    def column(self, name: str) -> Counts:
        """Return a column [T] of the first method's counts; those of what was asked are alike."""
        column_T: Counts = self.counts[0, :, COUNTS.index(name)]
        return column_T

    def is_sample(self, sizes: Sizes) -> bool:
        """Say whether tasks or test images were left out, so that rates are estimates."""
        left_out = (self.column("images") < self.sizes_asked(sizes)).any()
        return len(self.tasks) < self.learned or bool(left_out)

    def sizes_asked(self, sizes: Sizes) -> Counts:
        """Return the sizes [T] of the test sets of the tasks asked about."""
        if isinstance(sizes, int):
            return np.full(len(self.tasks), sizes)
        return sizes[list(self.tasks)]

    def _half_width(self, rates_T: npt.NDArray[np.float64], sizes: Sizes) -> float:
        images_asked_T = self.column("images") / self.sizes_asked(sizes)
        return half_width(rates_T, self.column("decisions"), self.learned, images_asked_T)


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
    confusions_X3 = np.concatenate([part.confusions_X3 for part in parts])
    return Evaluation(
        learned=head.learned,
        tasks=ascending,
        methods=head.methods,
        counts=np.concatenate([part.counts for part in parts], axis=1)[:, order],
        confusions_X3=confusions_X3[np.lexsort(confusions_X3.T[1::-1])],
    )


def decisions_per_task(evaluation: EvalConfig, test_images: int) -> int:
    """Return how many decisions each method takes about a task with so many test images."""
    return -(-min(evaluation.images or test_images, test_images) // evaluation.group_size)


@dataclass(frozen=True, kw_only=True)
class _Queries:
    """Decisions to take together, all about groups of one size."""

    rows_Q: npt.NDArray[np.int64]
    """The row of each decision's task in the counts."""
    tasks_Q: npt.NDArray[np.int64]
    images_QG: npt.NDArray[np.int64]
    """Places in the test sets of their tasks."""


class Evaluator:
    """Evaluates tasks of one run among the first k masks of its bank, in fp32.

    Where the run trains, if that is here: on a GPU, or on the cores.
    """

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Generate the weights of the run.

        Args:
            config: the configuration of the run; its ``eval`` part is not used.
            data: the data set of the run.
        """
        self._config, self._data = config, data
        self._layers = layers_of(config, data)
        self._family = task_family(config, data)
        on_gpu = config.train.device == "cuda" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        """Where images and masks are."""
        self._weights = [
            torch.from_numpy(weight_OI).to(self.device)
            for weight_OI in fixed_weights(config.seed, self._layers)
        ]
        self._engines: dict[tuple[int, int, int], TaskInference] = {}

    def evaluate(
        self,
        evaluation: EvalConfig,
        masks_TB: npt.NDArray[np.uint8],
        learned: int,
        tasks: Sequence[int],
        owners_T: npt.NDArray[np.int64] | None = None,
        statistics_TS: npt.NDArray[np.float32] | None = None,
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
            statistics_TS: the statistics of batch norm of each mask; None without batch norm.
        """
        if owners_T is None:
            owners_T = np.arange(learned)
        with repeatable():
            return self._evaluated(evaluation, masks_TB, learned, tasks, owners_T, statistics_TS)

    def _evaluated(
        self,
        evaluation: EvalConfig,
        masks_TB: npt.NDArray[np.uint8],
        learned: int,
        tasks: Sequence[int],
        owners_T: npt.NDArray[np.int64],
        statistics_TS: npt.NDArray[np.float32] | None,
    ) -> Evaluation:
        engine = self._engine(evaluation, masks_TB, statistics_TS, len(owners_T))
        counts_TM6 = np.zeros((len(tasks), len(evaluation.methods), len(COUNTS)), dtype=np.int64)
        pairs: list[npt.NDArray[np.int64]] = []
        for queries in self._queries(evaluation, tasks, len(owners_T)):
            ranked_MQR = self._infer(evaluation, engine, queries)
            for part in self._parts(queries.images_QG.shape[1], len(queries.tasks_Q)):
                counted_QM6 = self._count(engine, queries, ranked_MQR, part, owners_T)
                np.add.at(counts_TM6, queries.rows_Q[part], counted_QM6)
            found_Q = owners_T[ranked_MQR[0, :, 0].numpy()]
            pairs.append(np.stack([queries.tasks_Q, found_Q], axis=1))
        return Evaluation(
            learned=learned,
            tasks=tuple(tasks),
            methods=evaluation.methods,
            counts=counts_TM6.swapaxes(0, 1),
            confusions_X3=_confusions(np.concatenate(pairs)),
        )

    def given(self, masks_KB: npt.NDArray[np.uint8], tasks: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return how many test images [K] each mask has right, given the task that it is asked."""
        masks = packed_masks(as_tensor(masks_KB).to(self.device), self._weights, self._layers)
        correct = []
        for mask, task in enumerate(tasks):
            labels_N = self._family.test_labels(task)
            images_NP = self._pixels(np.array([task]), np.arange(len(labels_N))[None])[0]
            classes_N = masks.logits(mask, images_NP)[:, : self._family.classes].argmax(-1)
            correct.append(int((classes_N.cpu().numpy() == labels_N).sum()))
        return np.array(correct, dtype=np.int64)

    def _engine(
        self,
        evaluation: EvalConfig,
        masks_TB: npt.NDArray[np.uint8],
        statistics_TS: npt.NDArray[np.float32] | None,
        learned: int,
    ) -> TaskInference:
        # An open-set learner's masks change while their number stays.
        crc32 = zlib.crc32(np.ascontiguousarray(masks_TB[:learned]).data)
        key = learned, crc32, evaluation.depth
        if key not in self._engines:
            bytes_needed = mask_bytes(self._layers)
            if masks_TB.shape[1] != bytes_needed or len(masks_TB) < learned:
                raise ValueError(f"masks are {masks_TB.shape}, not {learned} x {bytes_needed}")
            # One superposition at a time: checkpoints are evaluated in turn.
            self._engines = {}
            self._engines = {
                key: make_inference(
                    self._config,
                    self._data,
                    as_tensor(masks_TB[:learned]).to(self.device),
                    self._weights,
                    self._layers,
                    self._family.classes,
                    self._memory(evaluation),
                    None if statistics_TS is None else statistics_TS[:learned],
                    evaluation.depth,
                )
            }
        return self._engines[key]

    def _memory(self, evaluation: EvalConfig) -> int:
        """Return the bytes that task inference may take above the packed masks.

        On a GPU more, for it has no other use: of all its memory, so that they are always as many.
        """
        least = evaluation.memory_mb << 20
        if self.device.type == "cpu":
            return least
        return max(least, torch.cuda.mem_get_info(self.device)[1] // _GPU_PART)

    # --- what is asked -------------------------------------------------------------------------

    def _queries(
        self, evaluation: EvalConfig, tasks: Sequence[int], masks: int
    ) -> Iterator[_Queries]:
        """Yield the decisions about the tasks in batches of one size; whole groups first.

        What is left of the tasks' images behind their whole groups is a smaller group each.
        """
        size = evaluation.group_size
        room = self._memory(evaluation) // (_PER_MASK * torch.float32.itemsize * masks)
        most = max(1, min(self._together(evaluation.batch), room))
        whole = (
            (row, task, group_G)
            for row, task, chosen_N in self._chosen(evaluation, tasks)
            for group_G in chosen_N[: len(chosen_N) // size * size].reshape(-1, size)
        )
        yield from _batches(whole, most)
        rests: dict[int, list[tuple[int, int, npt.NDArray[np.int64]]]] = {}
        for row, task, chosen_N in self._chosen(evaluation, tasks):
            rest = chosen_N[len(chosen_N) // size * size :]
            rests.setdefault(len(rest), []).append((row, task, rest))
        rests.pop(0, None)
        for some in rests.values():
            yield from _batches(iter(some), most)

    def _chosen(
        self, evaluation: EvalConfig, tasks: Sequence[int]
    ) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Yield row, task and places [N] of the test images that are asked about in each task."""
        for row, task in enumerate(tasks):
            stream = generator(self._config.seed, "evaluation", task)
            labels_N = self._family.test_labels(task)
            yield row, task, sampled_images(labels_N, evaluation.images, stream)

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
        pixels_QNP = np.empty((*images_QN.shape, data.pixels), dtype=np.uint8)
        for task in np.unique(tasks_Q):
            mine_Q = tasks_Q == task
            pixels_QNP[mine_Q] = self._family.test_images(int(task), images_QN[mine_Q])
        pixels = torch.from_numpy(pixels_QNP).to(self.device)
        return (pixels.float() / data.scale - data.mean) / data.std

    def _labels(
        self, tasks_Q: npt.NDArray[np.int64], images_QG: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return the labels [Q, G] of test images."""
        labels_QG = np.empty_like(images_QG)
        for task in np.unique(tasks_Q):
            mine_Q = tasks_Q == task
            labels_QG[mine_Q] = self._family.test_labels(int(task))[images_QG[mine_Q]]
        return labels_QG

    # --- what is answered ----------------------------------------------------------------------

    def _infer(self, evaluation: EvalConfig, engine: TaskInference, queries: _Queries) -> Tensor:
        """Return the tasks [M, Q, R] that each method ranks first, repeated if it ranks fewer.

        They are on the CPU, wherever they were found.
        """
        seen_QNP = self._pixels(queries.tasks_Q, queries.images_QG[:, : evaluation.batch])
        asked = Queries(engine, seen_QNP, evaluation.shortlist, evaluation.sketch)
        places = torch.arange(RANKED)
        rankings = (ranked(asked, method).cpu() for method in evaluation.methods)
        return torch.stack([found[:, places % found.shape[1]] for found in rankings])

    def _count(
        self,
        engine: TaskInference,
        queries: _Queries,
        ranked_MQR: Tensor,
        part: slice,
        owners_T: npt.NDArray[np.int64],
    ) -> Counts:
        """Return the counts [Q, M, 6] of some of the decisions."""
        tasks_Q, images_QG = queries.tasks_Q[part], queries.images_QG[part]
        found_MQR = ranked_MQR[:, part]
        hit_MQR = as_tensor(owners_T)[found_MQR] == torch.from_numpy(tasks_Q)[:, None]
        hit_MQ = hit_MQR[..., 0]
        classes_MQG = _classes(engine, found_MQR[..., 0], self._pixels(tasks_Q, images_QG))
        right_MQG = classes_MQG == torch.from_numpy(self._labels(tasks_Q, images_QG))
        right_MQ = right_MQG.sum(-1)
        ones_MQ = torch.ones_like(right_MQ)
        groups_MQ = ones_MQ * images_QG.shape[1]
        top5_MQ = hit_MQR.any(-1).long()
        columns = (ones_MQ, hit_MQ.long(), groups_MQ, right_MQ, right_MQ * hit_MQ, top5_MQ)
        counts_QM6: Counts = torch.stack(columns, dim=-1).transpose(0, 1).numpy()
        return counts_QM6


def _batches(
    decisions: Iterator[tuple[int, int, npt.NDArray[np.int64]]], most: int
) -> Iterator[_Queries]:
    while batch := list(itertools.islice(decisions, most)):
        rows, of_tasks, images = zip(*batch, strict=True)
        yield _Queries(
            rows_Q=np.array(rows), tasks_Q=np.array(of_tasks), images_QG=np.stack(images)
        )


def _confusions(pairs_Q2: npt.NDArray[np.int64]) -> Counts:
    """Return task, other task and how often [X, 3] of decisions' tasks and found tasks."""
    wrong_Q2 = pairs_Q2[pairs_Q2[:, 0] != pairs_Q2[:, 1]]
    distinct_X2, times_X = np.unique(wrong_Q2, axis=0, return_counts=True)
    return np.concatenate([distinct_X2, times_X[:, None]], axis=1)


def _classes(engine: TaskInference, found_MQ: Tensor, images_QGP: Tensor) -> Tensor:
    """Return the class [M, Q, G] of each image under the found masks; equal finds share a run."""
    queries = found_MQ.shape[1]
    pairs_MQ = found_MQ * queries + torch.arange(queries)
    distinct, which_MQ = torch.unique(pairs_MQ, return_inverse=True)
    asked = distinct.to(images_QGP.device)
    return engine.predict(asked // queries, images_QGP[asked % queries]).cpu()[which_MQ]
