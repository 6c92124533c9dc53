"""Training the masks of a whole block of tasks at once.

Permuting a task's pixels equals permuting the columns of its first layer,
``(x P) Wᵀ = x (W P⁻¹)ᵀ``. So all tasks of a block share one batch of unpermuted images, each
with its own permuted copy of the weights and scores; the mask is put back into the order of the
weights when it is packed. Forward and backward are batched matrix products; the score update
(gradient, RMSprop, threshold, new masked weight) is one compiled pass.

Shapes: T tasks, N images, B images of a batch, P pixels, O outputs and I inputs of a layer, S
output neurons.
"""

import functools
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from supsup.config import RunConfig
from supsup.datasets import Dataset
from supsup.errors import ConfigError, NonFiniteLoss, SlowPath, one_line
from supsup.masking import initial_scores, pack
from supsup.models import Layer, fixed_weights, make_layers
from supsup.seeding import generator
from supsup.tasks import inverse, permutation

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TEST_CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class TrainedBlock:
    """What training a block gives: the masks, and how well each does on its own test set."""

    first: int
    masks: npt.NDArray[np.uint8]
    gg_correct: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]
    seconds: float


def native_bf16(device: str) -> bool:
    """Say whether the device multiplies bf16 in hardware (AVX512-BF16 or AMX, or a GPU)."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def layers_of(config: RunConfig, data: Dataset) -> tuple[Layer, ...]:
    """Return the layers of the run's network over this data set.

    Raises:
        ConfigError: if the network has fewer outputs than the data has classes.
    """
    size = config.model.output_size
    if size < data.classes:
        raise ConfigError(
            f"model.output_size is {size}, must be at least {data.classes}, the classes of "
            f"{data.name}"
        )
    return make_layers(config.model.name, data.pixels, size)


def batch_indices(root: int, images: int, batch: int, batches: int) -> npt.NDArray[np.int64]:
    """Return the images [batches, B] of every batch: epochs in fresh orders, end to end."""
    needed = batch * batches
    epochs = [
        generator(root, "order", epoch).permutation(images) for epoch in range(-(-needed // images))
    ]
    return np.concatenate(epochs)[:needed].reshape(batches, batch)


def learning_rate(config: RunConfig, batch: int) -> float:
    """Return the rate at a batch of a task, counted from 0."""
    if config.train.schedule == "constant":
        return config.train.learning_rate
    return config.train.learning_rate * (1 - batch / config.train.batches)


class BlockTrainer:
    """Trains blocks of tasks; keeps data, weights and buffers from one block to the next."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Move the data to the device and generate the fixed weights.

        Args:
            config: with precision and device resolved.
            data: the data set of the run; its arrays may be read-only.
        """
        self.config = config
        self.data = data
        self.device = torch.device(config.train.device)
        self.dtype = DTYPES[config.train.precision]
        self.layers = layers_of(config, data)
        self.weights = [
            torch.from_numpy(weight_OI) for weight_OI in fixed_weights(config.seed, self.layers)
        ]
        self._train = self._on_device(data.train_images), self._on_device(data.train_labels)
        self._test = self._on_device(data.test_images), self._on_device(data.test_labels)
        order = batch_indices(
            config.seed,
            len(data.train_images),
            config.train.batch_size,
            config.train.batches,
        )
        self._order = torch.from_numpy(order).to(self.device)
        self._update = _make_update(self.device)

    def train(self, tasks: range) -> TrainedBlock:
        """Train the masks of some tasks. The result doesn't depend on which share the block.

        Raises:
            NonFiniteLoss: naming the first task whose loss is not finite at the end.
        """
        started = time.perf_counter()
        block = _Block(self, tasks)
        loss_T = torch.zeros(len(tasks), device=self.device)
        for batch in range(self.config.train.batches):
            loss_T = block.step(batch)
        losses = loss_T.cpu().numpy().astype(np.float32)
        if not np.isfinite(losses).all():
            bad = tasks[int(np.flatnonzero(~np.isfinite(losses))[0])]
            raise NonFiniteLoss(f"task {bad}: the loss is not finite; lower train.learning_rate")
        return TrainedBlock(
            first=tasks.start,
            masks=block.packed_masks(),
            gg_correct=block.test_correct(),
            loss=losses,
            seconds=time.perf_counter() - started,
        )

    def images(self, part: str, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return normalised images [B, P] in the training precision, and labels [B]."""
        images_NP, labels_N = self._train if part == "train" else self._test
        pixels_BP = images_NP[indices].float()
        normalised = (pixels_BP / self.data.scale - self.data.mean) / self.data.std
        return normalised.to(self.dtype), labels_N[indices]

    def weights_of_block(self, orders: Sequence[npt.NDArray[np.int64]]) -> list[Tensor]:
        """Return the fixed weights [T, O, I] per layer, the first in each task's pixel order."""
        first = torch.stack(_permute_columns([self.weights[0]] * len(orders), orders))
        rest = [weight_OI.expand(len(orders), -1, -1) for weight_OI in self.weights[1:]]
        return [first, *rest]

    def _on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        with warnings.catch_warnings():
            # Arrays from an object store are read-only; nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).to(self.device)


class _Block:
    """The state of one block in training. Every buffer is flat; layers are views into it."""

    def __init__(self, trainer: BlockTrainer, tasks: range) -> None:
        self.trainer, self.tasks = trainer, tasks
        config, layers = trainer.config, trainer.layers
        pixels = layers[0].inputs
        self.orders = [permutation(config.seed, task, pixels) for task in tasks]
        self._sizes = [len(tasks) * layer.weights for layer in layers]
        device, dtype = trainer.device, trainer.dtype
        self.weights = self._flat(trainer.weights_of_block(self.orders)).to(device, dtype)
        self.scores = self._flat(self._initial_scores()).to(device)
        self.square_avg = torch.zeros_like(self.scores)
        self.masked = torch.where(self.scores >= 0, self.weights, 0)
        self.grad = torch.empty_like(self.weights)
        self._masked_TOI = self.by_layer(self.masked)
        self._grad_TOI = self.by_layer(self.grad)

    def by_layer(self, flat: Tensor) -> list[Tensor]:
        """Return views [T, O, I] of a flat buffer, one per layer."""
        return [
            part.view(len(self.tasks), layer.outputs, layer.inputs)
            for part, layer in zip(torch.split(flat, self._sizes), self.trainer.layers, strict=True)
        ]

    def step(self, batch: int) -> Tensor:
        """Train all tasks on one batch; return their losses [T] before the update."""
        trainer = self.trainer
        train = trainer.config.train
        x_BP, y_B = trainer.images("train", trainer._order[batch])
        acts = self._forward(x_BP)
        loss_T, delta = _cross_entropy_gradient(acts.pop(), y_B)
        for i in reversed(range(len(acts))):
            torch.bmm(delta.transpose(1, 2), acts[i], out=self._grad_TOI[i])
            if i:
                delta = torch.bmm(delta, self._masked_TOI[i])
                delta = torch.ops.aten.threshold_backward(delta, acts[i], 0)
        rate = torch.tensor(learning_rate(trainer.config, batch), device=trainer.device)
        trainer._update(
            self.grad, self.weights, self.scores, self.square_avg, self.masked, rate,
            train.alpha, train.epsilon,
        )  # fmt: skip
        return loss_T

    def _forward(self, x_BP: Tensor) -> list[Tensor]:
        """Return the input of every layer [T, B, I], and the logits [T, B, S] last."""
        acts = [x_BP.expand(len(self.tasks), *x_BP.shape)]
        for i, masked_TOI in enumerate(self._masked_TOI):
            if i:
                acts[-1] = acts[-1].relu_()
            acts.append(torch.bmm(acts[-1], masked_TOI.transpose(1, 2)))
        return acts

    def packed_masks(self) -> npt.NDArray[np.uint8]:
        masks = [scores_TOI >= 0 for scores_TOI in self.by_layer(self.scores)]
        # Back into the order of the weights: column p of the mask meets pixel order[p].
        masks[0] = torch.stack([m[:, o] for m, o in zip(masks[0], self.orders, strict=True)])
        return pack(masks)

    def test_correct(self) -> npt.NDArray[np.int64]:
        trainer = self.trainer
        total_T = torch.zeros(len(self.tasks), dtype=torch.int64, device=trainer.device)
        for start in range(0, len(trainer.data.test_images), _TEST_CHUNK):
            x_BP, y_B = trainer.images("test", slice(start, start + _TEST_CHUNK))
            real_TBC = self._forward(x_BP)[-1][..., : trainer.data.classes]
            total_T += (real_TBC.argmax(-1) == y_B).sum(-1)
        return total_T.cpu().numpy()

    def _initial_scores(self) -> list[Tensor]:
        root = self.trainer.config.seed
        scores = [
            [torch.from_numpy(initial_scores(root, task, layer)) for task in self.tasks]
            for layer in self.trainer.layers
        ]
        scores[0] = _permute_columns(scores[0], self.orders)
        return [torch.stack(layer) for layer in scores]

    @staticmethod
    def _flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])


def _permute_columns(
    first_OI: Sequence[Tensor], orders: Sequence[npt.NDArray[np.int64]]
) -> list[Tensor]:
    """Reorder each matrix's columns so that unpermuted pixels meet their weights."""
    pairs = zip(first_OI, orders, strict=True)
    return [weight_OI[:, torch.from_numpy(inverse(order))] for weight_OI, order in pairs]


def _cross_entropy_gradient(logits_TBS: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy [T] and its gradient [T, B, S] in the logits' precision."""
    log_p = functional.log_softmax(logits_TBS.float(), dim=-1)
    tasks, batch, _ = log_p.shape
    index_TB1 = y_B.view(1, batch, 1).expand(tasks, batch, 1)
    loss_T = -log_p.gather(-1, index_TB1).mean((1, 2))
    one = torch.ones((), device=log_p.device).expand(tasks, batch, 1)
    delta = log_p.exp().scatter_add(-1, index_TB1, -one) / batch
    return loss_T, delta.to(logits_TBS.dtype)


# --- the fused score update ------------------------------------------------------------------

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, float], None]


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root. torch's own on the CPU is not: it may be one ulp off."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sqrt(x.numpy()))
    return x.sqrt()


def update_scores(
    grad: Tensor,
    weights: Tensor,
    scores: Tensor,
    square_avg: Tensor,
    masked: Tensor,
    rate: Tensor,
    alpha: float,
    epsilon: float,
) -> None:
    """Update scores by RMSprop, in place, and the masked weights with them. All are flat.

    The gradient of a weight times the weight is the gradient of its score: straight through
    the threshold (paper, Section 3.1).
    """
    score_grad = grad.float() * weights.float()
    square_avg.mul_(alpha).add_((1 - alpha) * score_grad * score_grad)
    scores.sub_(rate * score_grad / (_sqrt(square_avg) + epsilon))
    masked.copy_(torch.where(scores >= 0, weights, torch.zeros_like(weights)))


@functools.cache
def _make_update(device: torch.device) -> Update:
    """Return the update compiled to one pass, or as it is where there is no compiler."""
    compiled: Update = torch.compile(update_scores, dynamic=True)
    grad, weights, scores, square_avg, masked = torch.zeros(5, 64, device=device)
    try:
        rate = torch.tensor(1e-3, device=device)
        compiled(grad, weights, scores, square_avg, masked, rate, 0.99, 1e-8)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        reason = one_line(error, 120)
        warnings.warn(
            f"the score update runs uncompiled, about 2 times slower: {reason}; "
            "install a C++ compiler (g++)",
            SlowPath,
            stacklevel=2,
        )
        return update_scores
    return compiled
