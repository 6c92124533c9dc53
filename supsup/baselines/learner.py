"""A baseline learns tasks, each from what those before it left.

Weights are trained by the run's optimiser and schedule; ``train.trunk_learning_rate`` is the rate
of a first task that trains weights which others share. Plain objects: who keeps what between tasks,
and where a task is learned, is up to the caller.

Shapes: T tasks, N images, B images of a batch, P pixels, S output neurons.
"""

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from supsup.baselines.network import Arrays, Network
from supsup.baselines.optimizers import make_update
from supsup.baselines.rules import RULES
from supsup.config import RunConfig
from supsup.datasets import Dataset, Images
from supsup.errors import NonFiniteLoss
from supsup.gpu import repeatable
from supsup.material import TEST_CHUNK, as_tensor, batch_indices, learning_rate
from supsup.tasks import Labelled, task_family

#: Bytes of rotations kept, so that they aren't drawn again for every question.
_CONTEXT_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What learning a task gives."""

    task: int
    own: Arrays
    """What the task has of its own, by name."""
    trunk: Arrays | None
    """The shared weights, if the task changed them."""
    correct: npt.NDArray[np.int64]
    """Test images that are right, task given, of every task up to this one, or of this one alone if
    it can't have changed the others, or nobody looked back."""
    loss: float
    seconds: float


class BaselineLearner:
    """Learns and tests the tasks of one run."""

    def __init__(self, config: RunConfig, data: Dataset) -> None:
        """Make the network.

        Args:
            config: with precision and device resolved.
            data: the data set of the run; its arrays may be read-only.

        Raises:
            ConfigError: if the network isn't made for the data, or for this learner.
        """
        self.rule = RULES[config.learner]
        form = "rotated" if self.rule.rotated else "plain"
        form = "rank-one" if self.rule.own == "factors" else form
        self.network = Network(config, data, form)
        self._config, self._data = config, data
        self.family = task_family(config, data)
        self._device = torch.device(config.train.device)
        kept = max(1, _CONTEXT_BYTES // max(1, _bytes(self._contexts(0))))
        self._kept_contexts = functools.lru_cache(kept)(self._contexts)

    # --- learning ------------------------------------------------------------------------------

    def learn(self, task: int, trunk: Arrays | None, look_back: bool = True) -> Learned:
        """Learn a task.

        Args:
            task: the task.
            trunk: the shared weights as the task that this one needs left them; None before task 0
                and where they are random.
            look_back: whether the tasks before are asked about again, if they may be forgotten.

        Raises:
            NonFiniteLoss: if the loss is not finite at the end.
        """
        with repeatable():
            return self._learned(task, trunk, look_back)

    def _learned(self, task: int, trunk: Arrays | None, look_back: bool) -> Learned:
        started = time.perf_counter()
        trunk = self.initial_trunk() if trunk is None else trunk
        own = self._initial_own(task)
        trained = {**own, **trunk} if self.rule.trains_trunk(task) else own
        tensors = self._tensors(task, {**trunk, **own})
        loss = self._train(task, tensors, trained)
        after = {name: tensors[name].detach().cpu().numpy() for name in trained}
        changed = {name: after.get(name, array) for name, array in trunk.items()}
        asked = range(task + 1) if self.rule.forgets and look_back else (task,)
        learned_own = {name: after[name] for name in own}
        correct = [self.correct(t, learned_own, changed) for t in asked]
        return Learned(
            task=task,
            own=learned_own,
            trunk=changed if self.rule.trains_trunk(task) else None,
            correct=np.array(correct, dtype=np.int64),
            loss=loss,
            seconds=time.perf_counter() - started,
        )

    def initial_trunk(self) -> Arrays:
        """Return the shared weights before any task, batch norm's statistics among them."""
        rule = self.rule
        if rule.own == "network":
            return {}
        weights = self.network.weights("trunk", 0, rule.rotated)
        if rule.own == "head":
            weights.pop(self.network.head)
        return weights | (self.network.statistics() if rule.own == "nothing" else {})

    def correct(self, task: int, own: Arrays, trunk: Arrays) -> int:
        """Return how many test images of a task are right, the task being given."""
        tensors = self._tensors(task, {**trunk, **own})
        images_NP, labels_N = self.family.test(task)
        hits = 0
        for start in range(0, len(labels_N), TEST_CHUNK):
            part = slice(start, start + TEST_CHUNK)
            with torch.no_grad():
                logits_NS = self._logits(tensors, self.normalised(images_NP[part]), training=False)
            classes_N = logits_NS[:, : self.family.classes].argmax(-1).cpu()
            hits += int((classes_N == as_tensor(labels_N[part])).sum())
        return hits

    def _initial_own(self, task: int) -> Arrays:
        network, own = self.network, self.rule.own
        if own == "nothing":
            return {}
        if own == "factors":
            return {**network.factors(task), **network.statistics()}
        weights = network.weights("own weights", task, rotated=False)
        if own == "head":
            weights = {network.head: weights[network.head]}
        return {**weights, **network.statistics()}

    def _train(self, task: int, tensors: Mapping[str, Tensor], trained: Iterable[str]) -> float:
        """Train tensors in place; return the last loss."""
        train = self._config.train
        fitted = [tensors[name] for name in trained if ".running_" not in name]
        for tensor in fitted:
            tensor.requires_grad_()
        update = make_update(train, fitted)
        scale = 1.0
        if self.rule.trunk == "first" and task == 0 and train.trunk_learning_rate:
            scale = train.trunk_learning_rate / train.learning_rate
        images = self.family.train(task)
        size = min(train.batch_size, len(images.labels_N))
        order = batch_indices(self._config.seed, len(images.labels_N), size, train.batches)
        loss = torch.zeros(())
        for number, chosen_B in enumerate(order):
            loss = self._loss(tensors, images, chosen_B)
            gradients = torch.autograd.grad(loss, fitted)
            update(gradients, scale * learning_rate(self._config, number))
        for tensor in fitted:
            tensor.requires_grad_(False)
        last = float(loss.detach())
        if not np.isfinite(last):
            raise NonFiniteLoss(f"task {task}: the loss is not finite; lower train.learning_rate")
        return last

    def _loss(
        self, tensors: Mapping[str, Tensor], images: Labelled, chosen_B: npt.NDArray[np.int64]
    ) -> Tensor:
        y_B = as_tensor(images.labels_N[chosen_B]).to(self._device)
        logits_BS = self._logits(
            tensors, self.normalised(images.images_NP[chosen_B]), training=True
        )
        return functional.cross_entropy(logits_BS.float(), y_B)

    def _logits(
        self, tensors: Mapping[str, Tensor], images_BP: Tensor, *, training: bool
    ) -> Tensor:
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._config.train.precision == "bf16"
        ):
            return self.network.logits(tensors, images_BP, training=training)

    # --- tensors -------------------------------------------------------------------------------

    def normalised(self, images_NP: Images) -> Tensor:
        """Return images as they enter the network, fp32."""
        return normalised(self._data, images_NP).to(self._device)

    def _tensors(self, task: int, arrays: Arrays) -> dict[str, Tensor]:
        """Return copies of arrays on the device, and the task's rotations."""
        copies = {name: torch.tensor(array, device=self._device) for name, array in arrays.items()}
        return copies | self._kept_contexts(task)

    def _contexts(self, task: int) -> dict[str, Tensor]:
        if not self.rule.rotated:
            return {}
        contexts = self.network.contexts(task)
        return {name: torch.from_numpy(c).to(self._device) for name, c in contexts.items()}


def normalised(data: Dataset, images_NP: Images) -> Tensor:
    """Return images as they enter a network, fp32."""
    return (as_tensor(images_NP).float() / data.scale - data.mean) / data.std


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
