"""A network whose layers are scaled by rank-one factors, or see their inputs turned.

Shapes: B images of a batch, O outputs and I inputs of a layer (channels, if convolutional), S
output neurons.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.errors import ConfigError
from supsup.nets import TaskNorm, make_module, net_layers
from supsup.seeding import generator

Arrays = dict[str, npt.NDArray[Any]]
Tensors = Mapping[str, Tensor]


class RankOne(nn.Module):
    """A layer with the weights ``W ⊙ r sᵀ``: its inputs times s, its outputs times r."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Take over the weights of a layer, and make room for the factors."""
        super().__init__()
        self.weight = layer.weight
        self.r = nn.Parameter(layer.weight.new_empty(layer.weight.shape[0]))
        self.s = nn.Parameter(layer.weight.new_empty(layer.weight.shape[1]))
        self._multiply = _product(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``r ⊙ (W (s ⊙ x))``."""
        out = self._multiply(x * _by_channel(self.s, x), self.weight)
        return out * _by_channel(self.r, out)


class Rotated(nn.Module):
    """A layer with the weights ``W C``: its inputs are turned by an orthogonal C first."""

    context: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Take over the weights of a layer, and make room for the rotation [I, I]."""
        super().__init__()
        self.weight = layer.weight
        inputs = layer.weight.shape[1]
        self.register_buffer("context", layer.weight.new_empty(inputs, inputs))
        self._multiply = _product(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``W (C x)``, of a convolution at every pixel."""
        turned = (
            torch.einsum("oi,bi...->bo...", self.context, x) if x.dim() > 2 else x @ self.context.T
        )
        return self._multiply(turned, self.weight)


def _product(layer: nn.Linear | nn.Conv2d) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear
    settings: dict[str, Any] = {
        "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation,
    }  # fmt: skip
    return lambda x, weight: nn.functional.conv2d(x, weight, **settings)


def _by_channel(values_C: Tensor, x: Tensor) -> Tensor:
    """Return one value per channel in a shape that meets images [B, C, ...]."""
    return values_C.view(-1, *[1] * (x.dim() - 2))


_WRAPPERS: Mapping[str, type[RankOne] | type[Rotated]] = {"rank-one": RankOne, "rotated": Rotated}


class Network:
    """A network as a function of named tensors."""

    def __init__(self, config: RunConfig, data: Dataset, form: str) -> None:
        """Make the run's network.

        Args:
            config: the run's configuration.
            data: its data set.
            form: "plain", "rank-one" or "rotated".

        Raises:
            ConfigError: if the network isn't made for such images, or its convolutions have groups.
        """
        self._shape, self._seed = data.shape, config.seed
        module = copy.deepcopy(make_module(config.model.name, data.shape, config.model.output_size))
        self.layers = net_layers(module)
        for layer in self.layers if form != "plain" else ():
            part = module.get_submodule(layer.name)
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                raise ConfigError(
                    f"model.name is {config.model.name}, whose grouped convolutions learner "
                    f"{config.learner} isn't made for; choose another network"
                )
            parent, _, name = layer.name.rpartition(".")
            setattr(module.get_submodule(parent), name, _WRAPPERS[form](part))  # type: ignore[arg-type]
        self._module = module

    @property
    def head(self) -> str:
        """Name of the last layer's weights."""
        return f"{self.layers[-1].name}.weight"

    def statistics(self) -> Arrays:
        """Return what batch norm's statistics start from: mean 0, variance 1."""
        return {
            f"{path}.running_{what}": np.full(part.channels, start, np.float32)
            for path, part in self._module.named_modules()
            if isinstance(part, TaskNorm)
            for what, start in (("mean", 0.0), ("var", 1.0))
        }

    def weights(self, stream: str, task: int, rotated: bool) -> Arrays:
        """Return random weights by name.

        Kaiming normal, ``N(0, 2 / fan_in)``; for rotated layers, whose inputs are mixed, Xavier
        normal, ``N(0, 2 / (fan_in + fan_out))``, as in the paper's code.

        Args:
            stream: name of the random stream.
            task: the task that they are for; 0 if for all.
            rotated: whether the layers are.
        """
        found = {}
        for layer in self.layers:
            draws = generator(self._seed, stream, task, layer.name, layer.outputs, layer.inputs)
            outgoing = layer.outputs * math.prod(layer.kernel[1:])
            fans = layer.inputs + outgoing if rotated else layer.inputs
            normal = draws.standard_normal(layer.shape, dtype=np.float32)
            found[f"{layer.name}.weight"] = normal * np.float32(math.sqrt(2 / fans))
        return found

    def factors(self, task: int) -> Arrays:
        """Return the rank-one factors that a task starts from: random signs, as in the paper."""
        found = {}
        for layer in self.layers:
            for name, size in (("r", layer.outputs), ("s", layer.shape[1])):
                draws = generator(self._seed, "factors", task, layer.name, name)
                signs = draws.integers(0, 2, size)
                found[f"{layer.name}.{name}"] = (2 * signs - 1).astype(np.float32)
        return found

    def contexts(self, task: int) -> Arrays:
        """Return a random rotation [I, I] per layer, one task's."""
        return {
            f"{layer.name}.context": rotation(
                generator(self._seed, "rotation", task, layer.name), layer.shape[1]
            )
            for layer in self.layers
        }

    def logits(self, tensors: Tensors, images_BP: Tensor, *, training: bool) -> Tensor:
        """Return the logits [B, S] of images as they enter the network.

        In training the batch normalises, and moves the statistics among the tensors.
        """
        self._module.train(training)
        images = images_BP.view(-1, *self._shape)
        logits_BS: Tensor = functional_call(self._module, dict(tensors), (images,))
        return logits_BS


def rotation(draws: np.random.Generator, size: int) -> npt.NDArray[np.float32]:
    """Return a random orthogonal matrix, uniform over all of them (Haar; Mezzadri 2007)."""
    normal = torch.from_numpy(draws.standard_normal((size, size), dtype=np.float32))
    q, r = torch.linalg.qr(normal)
    return np.asarray((q * r.diagonal().sign()).numpy())
