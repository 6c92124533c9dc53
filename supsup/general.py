"""The general engine: any network, mask algorithm, optimiser and task family.

Each task has its own images; tasks with as many images share the order of their batches. The masked
weights of the tasks that are trained together go through the network by ``vmap``; the gradient of a
score is that of its masked weight times the weight, straight through the mask (paper, Section 3.1).

On a GPU a step is recorded once and replayed, for launching its kernels would take several times
longer than they do. Tasks that go through ``vmap`` are always as many there, the last of them
several times if need be: kernels are chosen by the number of matrices, and must not depend on it.

Shapes: T tasks, B images of a batch, N images, P pixels, O outputs and I inputs of a layer, S
output neurons.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from supsup.gpu import Recording, Replayed
from supsup.identity import TOGETHER, trained_alone
from supsup.masking import make_masks
from supsup.material import TEST_CHUNK, Material, net_of
from supsup.optimizers import ScoreUpdate, rates
from supsup.tasks import Labelled

#: Part of a GPU's memory that the tasks trained together may take.
_GPU_PART = 0.5
#: Numbers per weight that training holds: score, two of the optimiser, masked weight, gradient.
_NUMBERS_PER_WEIGHT = 6


class GeneralEngine:
    """Trains tasks together, each on images of its own."""

    def __init__(self, material: Material) -> None:
        """Move the fixed weights to the device."""
        self.material = material
        self.net = net_of(material.config, material.data)
        self.weights = [weight_OI.to(material.device) for weight_OI in material.weights]
        #: Whether every task is trained by itself: then nothing goes through vmap.
        self.alone = trained_alone(material.config)
        self.rates = rates(material.config)
        self.recording = Recording(allocates=True)

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most: one if they are trained alone."""
        if self.alone:
            return 1
        material = self.material
        _, memory = torch.cuda.mem_get_info(material.device)
        numbers = _NUMBERS_PER_WEIGHT * sum(layer.weights for layer in material.layers)
        each = 4 * numbers + material.data.train_images.nbytes
        return min(TOGETHER, max(1, int(_GPU_PART * memory) // each))

    def begin(self, tasks: range, scores: Sequence[Tensor] | None = None) -> "GeneralGroup":
        """Return the state of some tasks, untrained.

        Args:
            tasks: the tasks.
            scores: what their scores start from, [T, O, I] per layer; None: the random ones.
        """
        if scores is None:
            _, scores = self.material.initial_state(tasks)
        return GeneralGroup(self, tasks, scores)


class GeneralGroup:
    """Tasks in training together."""

    def __init__(self, engine: GeneralEngine, tasks: range, scores: Sequence[Tensor]) -> None:
        """Take the tasks' images, and start from scores [T, O, I] per layer."""
        material = engine.material
        device = material.device
        self._engine, self._tasks = engine, tasks
        on_gpu = device.type == "cuda"
        again = 0
        if on_gpu and not engine.alone:
            again = max(0, engine.tasks_at_once - len(tasks))
        self._train = [_Images(material, material.family.train(task)) for task in tasks]
        self._train += again * self._train[-1:]
        sizes = {len(images) for images in self._train}
        orders = {size: torch.from_numpy(material.batches(size)).to(device) for size in sizes}
        self._orders = [orders[len(images)] for images in self._train]
        self._scores = [_repeated(scores_TOI.to(device), again) for scores_TOI in scores]
        fresh_TS = engine.net.fresh_statistics(len(self._train)).to(device)
        self._statistics = engine.net.by_norm(fresh_TS)
        self._update = ScoreUpdate(material.config, engine.weights, self._scores, engine.rates)
        self._masked = [torch.empty_like(part, dtype=material.dtype) for part in self._scores]
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._replayed = Replayed(engine.recording) if on_gpu else None
        # One task's gradients come as matrices that lie together if it isn't one of several.
        self._alone = engine.alone and len(tasks) == 1
        parts = [part[0] for part in self._masked] if self._alone else self._masked
        self._leaves = [part.detach().requires_grad_() for part in parts]
        self._mask()

    def step(self, number: int) -> None:
        """Train every task on a batch of its own."""
        self._number.fill_(number)
        if self._replayed is None:
            self._take_step()
        else:
            self._replayed(self._take_step)

    def _take_step(self) -> None:
        images_TBP, y_TB = self._batch()
        logits_TBS = self._forward(images_TBP, training=True)
        loss = functional.cross_entropy(
            logits_TBS.to(self._scores[0].dtype).flatten(0, 1), y_TB.flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss / y_TB.shape[1], self._leaves)
        self._update(gradients, self._masked, self._number)
        if self._engine.material.config.mask.algorithm == "edge-popup":
            self._mask()

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of the tasks' training batches, and their labels [T, B]."""
        self._number.fill_(number)
        images_TBP, y_TB = self._batch()
        own = len(self._tasks)
        with torch.no_grad():
            return self._forward(images_TBP, training=False)[:own], y_TB[:own]

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [T, B], in order.

        Where a task has fewer images than another, the label is -1 behind its last.
        """
        material = self._engine.material
        own = len(self._tasks)
        tests = [_Images(material, material.family.test(task)) for task in self._tasks]
        tests += (len(self._train) - own) * tests[-1:]
        most = max(len(test) for test in tests)
        conv = self._engine.net.convolutional
        size = material.config.train.batch_size if conv else TEST_CHUNK
        for start in range(0, most, size):
            indices_B = torch.arange(start, min(start + size, most), device=material.device)
            parts = [test.batch(indices_B.clamp(max=len(test) - 1)) for test in tests]
            y_TB = torch.stack([y_B for _, y_B in parts])
            for row, test in enumerate(tests):
                y_TB[row, max(0, len(test) - start) :] = -1
            with torch.no_grad():
                images_TBP = torch.stack([images_BP for images_BP, _ in parts])
                yield self._forward(images_TBP, training=False)[:own], y_TB[:own]

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""
        return [scores_TOI[: len(self._tasks)] for scores_TOI in self._scores]

    def statistics(self) -> npt.NDArray[np.float32] | None:
        """Return what batch norm gathered in training [T, statistics]; None without batch norm."""
        if not self._statistics:
            return None
        return torch.cat(self._statistics, 1)[: len(self._tasks)].cpu().numpy()

    def _forward(self, images_TBP: Tensor, *, training: bool) -> Tensor:
        logits = partial(self._engine.net.logits, training=training)
        if self._alone:
            statistics = [part_TC[0] for part_TC in self._statistics]
            return logits(self._leaves, statistics, images_TBP[0])[None]
        logits_TBS: Tensor = vmap(logits)(self._leaves, self._statistics, images_TBP)
        return logits_TBS

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return the images [T, B, P] and labels [T, B] of the batch whose number it is."""
        parts = [
            images.batch(order.index_select(0, self._number)[0])
            for images, order in zip(self._train, self._orders, strict=True)
        ]
        return torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts])

    def _mask(self) -> None:
        """Make the masked weights anew, in the training precision."""
        material = self._engine.material
        masks = make_masks(material.config.mask, material.layers, self._scores)
        for masked_TOI, weight_OI, mask_TOI in zip(
            self._masked, self._engine.weights, masks, strict=True
        ):
            torch.mul(weight_OI, mask_TOI, out=masked_TOI)


class _Images:
    """Images of a task on the device, as bytes."""

    def __init__(self, material: Material, labelled: Labelled) -> None:
        self._material = material
        self._images_NP = material.on_device(labelled.images_NP)
        self._labels_N = material.on_device(labelled.labels_N)

    def __len__(self) -> int:
        return len(self._labels_N)

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [B, P] as the network takes them, and their labels [B]."""
        images_BP = self._material.normalised(self._images_NP.index_select(0, indices_B))
        return images_BP, self._labels_N.index_select(0, indices_B)


def _repeated(scores_TOI: Tensor, again: int) -> Tensor:
    """Return a copy of scores with those of the last task so many times more."""
    more = scores_TOI[-1:].expand(again, *scores_TOI.shape[1:])
    return torch.cat([scores_TOI, more])
