"""SupSup the way everybody would write it: the yardstick of the benchmarks.

One task after another, a DataLoader with per-sample transforms, autograd through a
straight-through threshold, ``torch.optim.RMSprop``.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import Compose, Lambda, Normalize, ToTensor

from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.masking import initial_scores
from supsup.material import layers_of
from supsup.models import fixed_weights
from supsup.tasks import permutation


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, scores: Tensor) -> Tensor:
        return (scores >= 0).float()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class _MaskLinear(nn.Module):
    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.scores = nn.Parameter(scores)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * _Threshold.apply(self.scores))


class _Pictures(TorchDataset[tuple[Tensor, int]]):
    def __init__(self, data: Dataset, order: np.ndarray) -> None:
        side = int(data.pixels**0.5)
        self._images = [Image.fromarray(x.reshape(side, side)) for x in data.train_images[:20_000]]
        self._labels = data.train_labels
        permute = torch.from_numpy(order)
        self._transform = Compose(
            [ToTensor(), Normalize(data.mean, data.std), Lambda(lambda x: x.view(-1)[permute])]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def train_task(config: RunConfig, data: Dataset, task: int, batches: int) -> list[Tensor]:
    """Train one task for that many batches; return its masks."""
    layers = layers_of(config, data)
    modules: list[nn.Module] = []
    for layer, weight in zip(layers, fixed_weights(config.seed, layers), strict=True):
        scores = torch.from_numpy(initial_scores(config.seed, task, layer))
        modules += [_MaskLinear(torch.from_numpy(weight), scores), nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    optimizer = torch.optim.RMSprop(model.parameters(), config.train.learning_rate)
    order = permutation(config.seed, task, data.pixels)
    loader = DataLoader(_Pictures(data, order), config.train.batch_size, shuffle=True)
    done = 0
    while done < batches:
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            done += 1
            if done == batches:
                break
    return [parameter.detach() >= 0 for parameter in model.parameters()]
