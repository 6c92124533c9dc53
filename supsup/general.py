"""The general engine: any network, mask algorithm, optimiser and task family.

Each task has its own images; tasks with as many images share the order of their batches. The masked
weights of the tasks that are trained together go through the network by ``vmap``; the gradient of a
score is that of its masked weight times the weight, straight through the mask (paper, Section 3.1).

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

from supsup.masking import make_masks
from supsup.material import TEST_CHUNK, Material, learning_rate, net_of
from supsup.optimizers import ScoreUpdate
from supsup.tasks import Labelled

#: Part of a GPU's free memory that the tasks trained together may take.
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

    @property
    def alone(self) -> bool:
        """Say whether every task is trained by itself: then nothing goes through vmap."""
        config = self.material.config
        return (
            self.material.device.type == "cpu"
            or self.net.convolutional
            or config.mask.transfer != "none"
        )

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most.

        One on a CPU, where more gain nothing, and where tasks start from those before.
        """
        if self.alone:
            return 1
        material = self.material
        free, _ = torch.cuda.mem_get_info(material.device)
        numbers = _NUMBERS_PER_WEIGHT * sum(layer.weights for layer in material.layers)
        return max(1, int(_GPU_PART * free) // (4 * numbers + material.data.train_images.nbytes))

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
        self._train = [_Images(material, material.family.train(task)) for task in tasks]
        self._orders = [material.batches(len(images)) for images in self._train]
        self._scores = [scores_TOI.to(device, copy=True) for scores_TOI in scores]
        fresh_TS = engine.net.fresh_statistics(len(tasks)).to(device)
        self._statistics = engine.net.by_norm(fresh_TS)
        self._update = ScoreUpdate(material.config, engine.weights, self._scores)
        self._masked = [torch.empty_like(part, dtype=material.dtype) for part in self._scores]
        # One task's gradients come as matrices that lie together if it isn't one of several.
        self._alone = engine.alone and len(tasks) == 1
        parts = [part[0] for part in self._masked] if self._alone else self._masked
        self._leaves = [part.detach().requires_grad_() for part in parts]
        self._mask()

    def step(self, number: int) -> None:
        """Train every task on a batch of its own."""
        images_TBP, y_TB = self._batch(number)
        logits_TBS = self._forward(images_TBP, training=True)
        loss = functional.cross_entropy(
            logits_TBS.to(self._scores[0].dtype).flatten(0, 1), y_TB.flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss / y_TB.shape[1], self._leaves)
        config = self._engine.material.config
        self._update(gradients, self._masked, learning_rate(config, number), number)
        if config.mask.algorithm == "edge-popup":
            self._mask()

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of the tasks' training batches, and their labels [T, B]."""
        images_TBP, y_TB = self._batch(number)
        with torch.no_grad():
            return self._forward(images_TBP, training=False), y_TB

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [T, B], in order.

        Where a task has fewer images than another, the label is -1 behind its last.
        """
        material = self._engine.material
        tests = [_Images(material, material.family.test(task)) for task in self._tasks]
        most = max(len(test) for test in tests)
        conv = self._engine.net.convolutional
        size = material.config.train.batch_size if conv else TEST_CHUNK
        for start in range(0, most, size):
            indices_B = np.arange(start, min(start + size, most))
            parts = [test.batch(np.minimum(indices_B, len(test) - 1)) for test in tests]
            y_TB = torch.stack([y_B for _, y_B in parts])
            for row, test in enumerate(tests):
                y_TB[row, max(0, len(test) - start) :] = -1
            with torch.no_grad():
                images_TBP = torch.stack([images_BP for images_BP, _ in parts])
                yield self._forward(images_TBP, training=False), y_TB

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""
        return self._scores

    def statistics(self) -> npt.NDArray[np.float32] | None:
        """Return what batch norm gathered in training [T, statistics]; None without batch norm."""
        return torch.cat(self._statistics, 1).cpu().numpy() if self._statistics else None

    def _forward(self, images_TBP: Tensor, *, training: bool) -> Tensor:
        logits = partial(self._engine.net.logits, training=training)
        if self._alone:
            statistics = [part_TC[0] for part_TC in self._statistics]
            return logits(self._leaves, statistics, images_TBP[0])[None]
        logits_TBS: Tensor = vmap(logits)(self._leaves, self._statistics, images_TBP)
        return logits_TBS

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        parts = [
            images.batch(order[number])
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

    def batch(self, indices_B: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return images [B, P] as the network takes them, and their labels [B]."""
        indices = torch.from_numpy(indices_B).to(self._images_NP.device)
        images_BP = self._material.normalised(self._images_NP.index_select(0, indices))
        return images_BP, self._labels_N.index_select(0, indices)
