"""Images that all tasks of a block share, as the network takes them.

Shapes: N images, B images of a batch, P pixels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from supsup.material import TEST_CHUNK, Material

#: Images [B, P] as the network takes them, and labels [B].
Batch = tuple[Tensor, Tensor]


class Feed:
    """Training batches and test images: on a CPU held as the network takes them, else as bytes."""

    def __init__(self, material: Material, padding: int = 1) -> None:
        """Move the data to the device.

        Args:
            material: of the run.
            padding: what rows of pixels are made a multiple of, by zeros behind the last.
        """
        self._material, self._padding = material, padding
        data = material.data
        self._train = material.on_device(data.train_images), material.on_device(data.train_labels)
        self._test = material.on_device(data.test_images), material.on_device(data.test_labels)
        if material.device.type == "cpu":
            self._train = material.normalised(self._train[0]), self._train[1]

    def training_batch(self, number: int) -> Batch:
        """Return a batch of the run's own order."""
        images_NP, labels_N = self._train
        indices_B = self._material.order[number]
        return self._taken(
            images_NP.index_select(0, indices_B), labels_N.index_select(0, indices_B)
        )

    def batches(self, images_NP: Tensor, y_N: Tensor) -> Sequence[Batch]:
        """Return batches of the images and labels that are given."""
        size = self._material.config.train.batch_size
        parts = zip(torch.split(images_NP, size), torch.split(y_N, size), strict=True)
        return [self._taken(*part) for part in parts]

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test images and labels, in order."""
        images_NP, labels_N = self._test
        for start in range(0, len(labels_N), TEST_CHUNK):
            part = slice(start, start + TEST_CHUNK)
            yield self._taken(images_NP[part], labels_N[part])

    def _taken(self, images_BP: Tensor, y_B: Tensor) -> Batch:
        device = self._material.device
        x_BP = self._material.normalised(images_BP.to(device))
        missing = -x_BP.shape[1] % self._padding
        return functional.pad(x_BP, (0, missing)) if missing else x_BP, y_B.to(device)
