"""Networks by name as modules, and what of a module is masked.

Any ``torch.nn.Module`` will do whose parameters are the weights of ``Linear`` and ``Conv2d``
layers: those are the masked layers. Biases and the affine parameters of normalisation are left out,
and dropout with them; batch norm keeps statistics per task. Modules are made on the meta device,
without memory: weights, masks and statistics are given with each call.

Shapes: B images of a batch, C channels, S output neurons, O outputs and I inputs of a layer.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from supsup.config import MLPS
from supsup.errors import ConfigError, near, one_line, shown
from supsup.models import MODELS, Layer

#: Channels, rows and columns of an image.
Shape = tuple[int, int, int]
#: Units of BNNet's two hidden layers.
_BNNET_UNITS = 2048


class TaskNorm(nn.Module):
    """Batch norm without affine parameters, in the precision of a task's statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        """Make room for statistics [C]."""
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...]: in training by the batch, which moves the statistics."""
        statistics = self.running_mean, self.running_var
        normal = functional.batch_norm(
            x.to(self.running_mean.dtype),
            *statistics,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        return normal.to(x.dtype)


class Mlp(nn.Module):
    """Linear layers without biases, ReLU between them; with batch norm SiLU (the code of paper)."""

    def __init__(self, widths: Sequence[int], batch_norm: bool = False) -> None:
        """Make layers of these widths, the inputs' first."""
        super().__init__()
        self.depth = len(widths) - 1
        for i in range(self.depth):
            setattr(self, f"linear{i}", nn.Linear(widths[i], widths[i + 1], bias=False))
            if batch_norm and i + 1 < self.depth:
                setattr(self, f"norm{i}", TaskNorm(widths[i + 1]))
        self.batch_norm = batch_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, S] of images [B, C, rows, columns]."""
        x = x.flatten(1)
        for i in range(self.depth):
            x = getattr(self, f"linear{i}")(x)
            if i + 1 < self.depth:
                x = functional.silu(getattr(self, f"norm{i}")(x)) if self.batch_norm else x.relu()
        logits_BS: Tensor = x
        return logits_BS


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = TaskNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = TaskNorm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, TaskNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x)).relu()
        summed: Tensor = self.norm2(self.conv2(hidden)) + self.shortcut(x)
        return summed.relu()


class GemResNet18(nn.Module):
    """The narrow ResNet-18 of Gradient Episodic Memory (Lopez-Paz & Ranzato 2017)."""

    def __init__(self, channels: int, output_size: int, width: int = 20) -> None:
        """Take images of so many channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = TaskNorm(width)
        inputs = width
        for i, outputs in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
            blocks = _Block(inputs, outputs, 1 if i == 1 else 2), _Block(outputs, outputs, 1)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            inputs = outputs
        self.linear = nn.Linear(inputs, output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, S] of images [B, C, rows, columns]."""
        x = self.norm1(self.conv1(x)).relu()
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        logits_BS: Tensor = self.linear(x.mean((2, 3)))
        return logits_BS


@functools.lru_cache(maxsize=8)
def make_module(name: str, shape: Shape, output_size: int) -> nn.Module:
    """Return a network over images of a shape, on the meta device; shared, not to be changed.

    Raises:
        ConfigError: if there is no such network, it isn't made for such images, or has parameters
            that no mask covers.
    """
    with torch.device("meta"):
        if name in MLPS:
            return Mlp((math.prod(shape), *MODELS[name], output_size))
        if name == "bnnet":
            widths = (math.prod(shape), _BNNET_UNITS, _BNNET_UNITS, output_size)
            return Mlp(widths, batch_norm=True)
        if name == "gem-resnet18":
            return GemResNet18(shape[0], output_size)
        return _torchvision_module(name.removeprefix("torchvision:"), shape, output_size)


def _torchvision_module(name: str, shape: Shape, output_size: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"model.name is torchvision:{shown(name)}, must be one of torchvision's classifiers, "
            f"such as resnet18 and resnet50{near(name, known)}"
        )
    with warnings.catch_warnings():
        # Some say how slow their initialisation is, which is none here.
        warnings.simplefilter("ignore")
        module: nn.Module = models.get_model(name, weights=None, num_classes=output_size)
    prepare(module, shape[0])
    try:
        logits = module(torch.empty(2, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"model.name is torchvision:{name}, which doesn't take images of {shape[0]} x "
            f"{shape[1]} x {shape[2]} ({one_line(error)}); choose another, or larger images"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (2, output_size):
        raise ConfigError(f"model.name is torchvision:{name}, which gives no plain logits")
    uncovered = {key for key, _ in module.named_parameters()} - set(_weight_names(module))
    if uncovered:
        raise ConfigError(
            f"model.name is torchvision:{name}, whose parameter {min(uncovered)} is no weight of a "
            "linear or convolutional layer; choose a network without, such as torchvision:resnet18"
        )
    return module


def prepare(module: nn.Module, channels: int) -> None:
    """Leave out, in place, all that isn't masked; let the first convolution take the channels."""
    first = True
    for path, part in list(module.named_modules()):
        if isinstance(part, nn.Conv2d) and first:
            first = False
            if part.in_channels != channels:
                _replace(module, path, _with_inputs(part, channels))
                continue
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.bias = None
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            momentum = 0.1 if part.momentum is None else part.momentum
            _replace(module, path, TaskNorm(part.num_features, part.eps, momentum))
        elif isinstance(part, nn.LayerNorm | nn.GroupNorm):
            part.weight = part.bias = None  # type: ignore[assignment]
        elif (
            isinstance(part, nn.Dropout | nn.Dropout2d) or type(part).__name__ == "StochasticDepth"
        ):
            _replace(module, path, nn.Identity())


def _with_inputs(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    size = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return nn.Conv2d(channels, conv.out_channels, *size, bias=False)  # type: ignore[arg-type]


def _replace(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)


def _weight_names(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {
        f"{path}.weight": part
        for path, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    }


def net_layers(module: nn.Module) -> tuple[Layer, ...]:
    """Return the masked layers of a network, in the order of its modules."""
    return tuple(
        Layer(
            name=name.removesuffix(".weight"),
            outputs=part.weight.shape[0],
            inputs=math.prod(part.weight.shape[1:]),
            kernel=tuple(part.weight.shape[1:]) if isinstance(part, nn.Conv2d) else (),
        )
        for name, part in _weight_names(module).items()
    )


class Net:
    """A network as a function of its weights and statistics."""

    def __init__(self, module: nn.Module, shape: Shape) -> None:
        """Find the masked layers and the normalisations.

        Args:
            module: as ``make_module`` returns it.
            shape: channels, rows and columns of an image.
        """
        self.layers = net_layers(module)
        self._module, self._shape = module, shape
        norms = {path: x for path, x in module.named_modules() if isinstance(x, TaskNorm)}
        self._statistic_names = [f"{path}.running_{x}" for path in norms for x in ("mean", "var")]
        self._statistic_sizes = [norm.channels for norm in norms.values() for _ in range(2)]

    @property
    def statistics(self) -> int:
        """Statistics of a task: the mean and the variance of every normalised channel."""
        return sum(self._statistic_sizes)

    @property
    def convolutional(self) -> bool:
        """Say whether some of the layers are convolutions."""
        return any(layer.kernel for layer in self.layers)

    def fresh_statistics(self, tasks: int) -> Tensor:
        """Return what the statistics [T, statistics] start from: mean 0, variance 1."""
        values = torch.tensor([0.0, 1.0]).repeat(len(self._statistic_sizes) // 2)
        sizes = torch.tensor(self._statistic_sizes, dtype=torch.int64)
        return values.repeat_interleave(sizes).repeat(tasks, 1)

    def by_norm(self, statistics: Tensor) -> list[Tensor]:
        """Return statistics [..., statistics] as means and variances [..., C] by turns, copied."""
        parts = torch.split(statistics, self._statistic_sizes, dim=-1)
        # In training they are written to, and under vmap only what lies together is.
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def logits(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[Tensor],
        images_BP: Tensor,
        *,
        training: bool,
    ) -> Tensor:
        """Return the logits [B, S] of one network; in training, its statistics move.

        Args:
            weights: one [O, I] per layer.
            statistics: of the task, as ``by_norm`` gives them.
            images_BP: images as they enter the network.
            training: whether the batch, not the statistics, normalises.
        """
        values = dict(zip(self._statistic_names, statistics, strict=True))
        for layer, weight_OI in zip(self.layers, weights, strict=True):
            values[f"{layer.name}.weight"] = weight_OI.view(layer.shape)
        images = images_BP.view(-1, *self._shape)
        self._module.train(training)
        logits_BS: Tensor = functional_call(self._module, values, (images,))
        return logits_BS
