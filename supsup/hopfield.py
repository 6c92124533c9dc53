"""HopSupSup: masks of hidden units, kept in a Hopfield network of fixed size (paper, Section 3.5).

BNNet's weights are fixed and random; what a task learns is which hidden units pass, behind batch
norm. The masks, as vectors of ±1, are stored in one Hopfield network per hidden layer by Storkey's
rule. To find a task's mask again, given its images alone, the mask descends the energy of the
Hopfield networks and the entropy of the output together: first the entropy counts, then the energy.

Batch norm goes by the statistics of the batch, in training and after, as in the paper's code. Tasks
have output neurons of their own while there are any, as there: masks of tasks that share them are
alike, and attractors that are alike are hard to tell apart.

Shapes: D hidden units, K stored masks, T tasks, B images of a batch, P pixels, S output neurons.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from supsup.baselines.learner import Learned, normalised
from supsup.baselines.optimizers import make_update
from supsup.config import EvalConfig, RunConfig
from supsup.datasets import Dataset
from supsup.errors import ConfigError, NonFiniteLoss
from supsup.inference import entropy
from supsup.material import as_tensor, batch_indices, layers_of, learning_rate
from supsup.models import fixed_weights
from supsup.sampling import sampled_images
from supsup.seeding import generator
from supsup.tasks import task_family

#: Hidden layers of BNNet, of as many units each.
HIDDEN_LAYERS = 2
METHOD = "h-gradient-descent"
#: Test images that batch norm sees together, as in the paper.
_TEST_BATCH = 64
#: Recovery (paper, Appendix): γ of the energy at the end, and SGD's rate, momentum and decay.
_GAMMA, _RATE, _MOMENTUM, _DECAY = 1.5e-3, 500.0, 0.9, 1e-4


# --- the Hopfield network ------------------------------------------------------------------------


def storkey(weights_DD: Tensor, pattern_D: Tensor) -> Tensor:
    """Return a Hopfield network's weights [D, D] with one more pattern of ±1 stored.

    Storkey's rule (Storkey 1997): ``Δw_ij = (x_i x_j - x_i h_ji - x_j h_ij) / D`` with the local
    fields ``h_ij = Σ_{k ≠ i, j} w_ik x_k``. The weights are symmetric with a diagonal of 0, where
    ``x_i h_ji = x_i h_j - w_ij`` with the full field ``h = W x``.
    """
    x_D, size = pattern_D, len(pattern_D)
    field_D = weights_DD @ x_D
    cross_DD = torch.outer(x_D, field_D)
    # Added first, the two are symmetric to the last bit.
    change_DD = torch.outer(x_D, x_D) - (cross_DD + cross_DD.T) + 2 * weights_DD
    return (weights_DD + change_DD / size).fill_diagonal_(0)


def energy(weights_DD: Tensor, state_D: Tensor) -> Tensor:
    """Return the energy ``-½ zᵀ W z`` of a state."""
    return -0.5 * state_D @ (weights_DD @ state_D)


class Memory:
    """What is kept of all masks: a Hopfield network and the mean mask, per hidden layer."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Begin with nothing stored in layers of so many units."""
        self.weights = [torch.zeros(size, size) for size in sizes]
        self.means = [torch.zeros(size) for size in sizes]
        self.stored = 0

    def store(self, masks: Sequence[Tensor]) -> None:
        """Store one boolean mask [D] per layer."""
        self.stored += 1
        for i, mask_D in enumerate(masks):
            pattern_D = 2 * mask_D.float() - 1
            self.weights[i] = storkey(self.weights[i], pattern_D)
            self.means[i] += (pattern_D - self.means[i]) / self.stored

    @property
    def bytes(self) -> int:
        """Bytes of it all: the same for any number of masks."""
        return sum(tensor.nbytes for tensor in (*self.weights, *self.means))


class _Straight(torch.autograd.Function):
    """``score >= 0``; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, score_D: Tensor) -> Tensor:
        return (score_D >= 0).to(score_D.dtype)

    @staticmethod
    def backward(ctx: object, gradient_D: Tensor) -> Tensor:
        return gradient_D


def passing(score_D: Tensor) -> Tensor:
    """Return the mask of 0 and 1 that scores stand for."""
    mask_D: Tensor = _Straight.apply(score_D)
    return mask_D


# --- the learner ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What became of finding a task's mask again."""

    task: int
    found: int
    """The stored mask that is nearest to what was found."""
    distance: int
    """Units in which that differs from the task's own mask."""
    steps: int
    """Steps after which it was the task's own mask, and stayed so; -1: never."""
    images: int
    correct: int
    """Test images that are right by what was found."""


class HopLearner:
    """Learns masks of hidden units, and finds them again."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Generate the fixed weights.

        Args:
            config: with precision and device resolved.
            data: the data set of the run; its arrays may be read-only.
        """
        self._config, self._data = config, data
        self._device = torch.device(config.train.device)
        self.family = task_family(config, data)
        layers = layers_of(config, data)
        fixed = fixed_weights(config.seed, layers)
        self._weights = [torch.from_numpy(weight_OI).to(self._device) for weight_OI in fixed]
        self.sizes = [layer.outputs for layer in layers[:-1]]
        self._kept: tuple[bytes, Memory] = (b"", Memory(self.sizes))

    def first_neuron(self, task: int) -> int:
        """Return the output neuron of a task's class 0; the blocks of the tasks take turns."""
        blocks = self._config.model.output_size // self.family.classes
        return task % blocks * self.family.classes

    def learn(self, task: int) -> Learned:
        """Learn the mask of a task; it is ``own["units"]``, packed bits of all hidden layers.

        Raises:
            NonFiniteLoss: if the loss is not finite at the end.
        """
        started = time.perf_counter()
        scores = [torch.zeros(size, device=self._device, requires_grad=True) for size in self.sizes]
        loss = self._train(task, scores)
        masks = [score_D.detach() >= 0 for score_D in scores]
        _, correct = self._test(task, masks)
        return Learned(
            task=task,
            own={"units": np.packbits(torch.cat(masks).cpu().numpy(), bitorder="little")},
            trunk=None,
            correct=np.array([correct], dtype=np.int64),
            loss=loss,
            seconds=time.perf_counter() - started,
        )

    def recover(
        self, evaluation: EvalConfig, units_KB: npt.NDArray[np.uint8], task: int
    ) -> Recovery:
        """Find a task's mask among the stored ones by its test images alone.

        One pass over ``eval.images`` images, ``eval.batch`` at a step. At step t of n the mask
        descends ``(1 - t/n) H + γ t/n Σ_layers E`` by SGD, from the mean of all masks.

        Args:
            evaluation: how many images, and how many at a step.
            units_KB: the packed masks of the first K tasks, stored here one after another; that of
                the task itself is what the result is compared with.
            task: the task.
        """
        stored = [self._unpacked(units_B) for units_B in units_KB]
        memory = self.memory(units_KB)
        scores = [mean_D.clone().to(self._device).requires_grad_() for mean_D in memory.means]
        networks = [weights_DD.to(self._device) for weights_DD in memory.weights]
        sgd = torch.optim.SGD(scores, lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
        own = torch.cat(stored[task]).to(self._device)
        batches = list(self._asked(evaluation, task))
        wrong = []
        for step, images_BP in enumerate(batches, start=1):
            part = step / len(batches)
            masks = [passing(score_D) for score_D in scores]
            logits_BS = self._logits(images_BP, masks)
            stress = entropy(logits_BS.float()).mean()
            pull = sum(energy(w, 2 * m - 1) for w, m in zip(networks, masks, strict=True))
            sgd.zero_grad()
            loss = (1 - part) * stress + _GAMMA * part * pull
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            wrong.append(int((torch.cat([s.detach() >= 0 for s in scores]) != own).sum()))
        masks = [score_D.detach() >= 0 for score_D in scores]
        found_D = torch.cat(masks).cpu()
        distances = [int((found_D != torch.cat(other)).sum()) for other in stored]
        images, correct = self._test(task, masks)
        return Recovery(
            task=task,
            found=int(np.argmin(distances)),
            distance=distances[task],
            steps=settled(wrong),
            images=images,
            correct=correct,
        )

    def memory(self, units_KB: npt.NDArray[np.uint8]) -> Memory:
        """Return a memory of packed masks, stored one after another.

        The last one is kept: storing a mask is a pass over all weights, and tasks are asked about
        one after another among the same masks, or more.
        """
        units = units_KB.tobytes()
        known, memory = self._kept
        if not units.startswith(known):
            memory = Memory(self.sizes)
        for units_B in units_KB[memory.stored :]:
            memory.store(self._unpacked(units_B))
        self._kept = units, memory
        return memory

    def _train(self, task: int, scores: Sequence[Tensor]) -> float:
        train = self._config.train
        update = make_update(train, scores)
        images_NP, labels_N = self.family.train(task)
        size = min(train.batch_size, len(labels_N))
        loss = torch.zeros(())
        order = batch_indices(self._config.seed, len(labels_N), size, train.batches)
        for number, chosen_B in enumerate(order):
            y_B = as_tensor(labels_N[chosen_B]).to(self._device) + self.first_neuron(task)
            images_BP = normalised(self._data, images_NP[chosen_B]).to(self._device)
            logits_BS = self._logits(images_BP, [passing(score_D) for score_D in scores])
            loss = functional.cross_entropy(logits_BS.float(), y_B)
            gradients = torch.autograd.grad(loss, scores)
            update(gradients, learning_rate(self._config, number))
        last = float(loss.detach())
        if not np.isfinite(last):
            raise NonFiniteLoss(f"task {task}: the loss is not finite; lower train.learning_rate")
        return last

    def _test(self, task: int, masks: Sequence[Tensor]) -> tuple[int, int]:
        """Return the test images of a task, and how many are right under a mask."""
        images_NP, labels_N = self.family.test(task)
        hits = 0
        for part in _batches(len(labels_N), _TEST_BATCH):
            with torch.no_grad():
                images_BP = normalised(self._data, images_NP[part]).to(self._device)
                logits_BS = self._logits(images_BP, [mask_D.float() for mask_D in masks])
            classes_B = logits_BS.argmax(-1).cpu() - self.first_neuron(task)
            hits += int((classes_B == as_tensor(labels_N[part])).sum())
        return len(labels_N), hits

    def _asked(self, evaluation: EvalConfig, task: int) -> Iterator[Tensor]:
        images_NP, labels_N = self.family.test(task)
        stream = generator(self._config.seed, "evaluation", task)
        chosen_N = sampled_images(labels_N, evaluation.images, stream)
        if evaluation.images == 0 or evaluation.images >= len(labels_N):
            chosen_N = stream.permutation(chosen_N)
        for part in _batches(len(chosen_N), evaluation.batch):
            yield normalised(self._data, images_NP[chosen_N[part]]).to(self._device)

    def _logits(self, images_BP: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Return the logits [B, S]: ``W₃ φ(m₂ ⊙ BN(W₂ φ(m₁ ⊙ BN(W₁ x))))`` with φ the SiLU."""
        bf16 = self._config.train.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            x = images_BP
            for weight_OI, mask_D in zip(self._weights, masks, strict=False):
                out = functional.linear(x, weight_OI).float()
                x = functional.silu(
                    functional.batch_norm(out, None, None, weight=mask_D, training=True)
                )
            return functional.linear(x, self._weights[-1])

    def _unpacked(self, units_B: npt.NDArray[np.uint8]) -> list[Tensor]:
        """Return one boolean mask [D] per hidden layer."""
        bits = np.unpackbits(units_B, count=sum(self.sizes), bitorder="little").astype(bool)
        return list(torch.split(torch.from_numpy(bits), self.sizes))


def settled(wrong: Sequence[int]) -> int:
    """Return after how many steps the count of wrong units was 0 for good; -1 if it isn't."""
    steps = len(wrong)
    while steps and wrong[steps - 1] == 0:
        steps -= 1
    return steps + 1 if steps < len(wrong) else -1


def _batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size``; what is left is added to the last, which batch norm needs."""
    bounds = list(range(0, max(count - size, 0) + 1, size))
    for start, stop in zip(bounds, [*bounds[1:], count], strict=True):
        yield slice(start, stop)


def check_hopfield(config: RunConfig) -> None:
    """Check that masks of hidden units can be learned and found again.

    Raises:
        ConfigError: if the network has no batch norm, or the evaluation is another.
    """
    if config.model.name != "bnnet":
        raise ConfigError(
            f"model.name is {config.model.name}, must be bnnet for learner hopsupsup, which masks "
            "its batch norm"
        )
    if config.scenario == "nns":
        raise ConfigError("scenario is nns, which learner hopsupsup isn't made for; choose gnu")
    if config.scenario == "gg":
        return
    if config.eval.methods != (METHOD,):
        raise ConfigError(
            f"eval.methods is {', '.join(config.eval.methods)}, must be {METHOD} for learner "
            "hopsupsup"
        )
    if config.eval.batch < 2:
        raise ConfigError(
            "eval.batch is 1, must be at least 2 for learner hopsupsup: batch norm goes by it"
        )
