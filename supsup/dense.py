"""The dense engine: every layer as batched matrix products, on any device and in any precision.

Forward and backward are products into buffers that are allocated once; the score update (gradient,
RMSprop, threshold, new masked weight) is one compiled pass.

Shapes: T tasks, B images of a batch, P pixels, O outputs and I inputs of a layer, S output
neurons, W weights of all layers and tasks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from supsup.compiling import compiled, square_root
from supsup.feed import Batch, Feed
from supsup.gpu import free_memory
from supsup.material import TEST_CHUNK, Material, learning_rate

#: Tasks trained together on a CPU. More share their batches and overhead, fewer the cache.
CPU_TASKS = 10
#: The part of a GPU's free memory that tasks trained together may take.
_GPU_PART = 0.8


class DenseEngine:
    """Trains tasks together by batched matrix products."""

    def __init__(self, material: Material) -> None:
        """Move the data to the device, and compile the update."""
        self.material, device = material, material.device
        self.feed = Feed(material)
        train = material.config.train
        update = _make_update(device)

        def update_group(layers: "DenseLayers", rate: float) -> None:
            on_device = torch.tensor(rate, device=device)
            settings = (on_device, train.alpha, train.epsilon, train.batch_size)
            update(
                layers.grad, layers.weights, layers.scores, layers.square_avg, layers.masked,
                *settings,
            )  # fmt: skip

        self.update = update_group

    @property
    def tasks_at_once(self) -> int:
        """Tasks that ``begin`` should be given at most."""
        material = self.material
        if material.device.type == "cpu":
            return CPU_TASKS
        free = free_memory(material.device)
        size, batch = material.dtype.itemsize, material.config.train.batch_size
        weights = sum(layer.weights for layer in material.layers) * (3 * size + 2 * 4)
        neurons = sum(layer.outputs for layer in material.layers) * size * (2 * batch + TEST_CHUNK)
        return max(1, int(_GPU_PART * free) // (weights + neurons))

    def begin(self, tasks: range) -> "DenseGroup":
        """Return the state of some tasks, untrained."""
        return DenseGroup(self, *self.material.initial_state(tasks))

    def resume(
        self, weights: Sequence[Tensor], scores: Sequence[Tensor], square_avgs: Sequence[Tensor]
    ) -> "DenseGroup":
        """Return masks in training, from weights and state [T, O, I] per layer."""
        return DenseGroup(self, weights, scores, square_avgs)

    def batches(self, images_NP: Tensor, y_N: Tensor) -> Sequence[Batch]:
        """Return the images [B, P] of batches as the network takes them, and the labels [B]."""
        return self.feed.batches(images_NP, y_N)


class DenseGroup:
    """Tasks in training together, all of their layers dense."""

    def __init__(
        self,
        engine: DenseEngine,
        weights: Sequence[Tensor],
        scores: Sequence[Tensor],
        square_avgs: Sequence[Tensor] | None = None,
    ) -> None:
        """Start from weights and scores [T, O, I] per layer; without mean squares, from zero."""
        self._engine, self._tasks = engine, len(scores[0])
        self.layers = DenseLayers(engine.material, weights, scores, square_avgs)
        self._outputs = self.layers.activations(engine.material.config.train.batch_size)

    def step(self, number: int) -> None:
        """Train all tasks on a batch of the run's own order."""
        self.learn(self._engine.feed.training_batch(number), number)

    def learn(self, batch: Batch, number: int) -> None:
        """Train all tasks on a batch, as their ``number``-th."""
        x_BP, y_B = batch
        self.layers.backward(self._forward(x_BP, self._outputs), y_B)
        self._engine.update(self.layers, learning_rate(self._engine.material.config, number))

    def logits(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, S] of a training batch as the masks are, and its labels [B]."""
        x_BP, y_B = self._engine.feed.training_batch(number)
        return self._forward(x_BP, self._outputs)[-1], y_B

    def test_logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, B, S] of the test images, and labels [B], in order."""
        outputs = self.layers.activations(TEST_CHUNK)
        for x_BP, y_B in self._engine.feed.test_batches():
            yield self._forward(x_BP, outputs)[-1], y_B

    def scores(self) -> list[Tensor]:
        """Return the scores [T, O, I] per layer."""
        return self.layers.by_layer(self.layers.scores)

    def square_avgs(self) -> list[Tensor]:
        """Return RMSprop's mean squares [T, O, I] per layer."""
        return self.layers.by_layer(self.layers.square_avg)

    def _forward(self, x_BP: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        return self.layers.forward(x_BP.expand(self._tasks, *x_BP.shape), outputs)


class DenseLayers:
    """The last layers of several tasks, or all. Flat buffers [W]; layers are views into them."""

    def __init__(
        self,
        material: Material,
        weights: Sequence[Tensor],
        scores: Sequence[Tensor],
        square_avgs: Sequence[Tensor] | None = None,
    ) -> None:
        """Copy weights, scores and mean squares (zero if None), [T, O, I] per layer."""
        self._shapes = [layer_TOI.shape for layer_TOI in scores]
        self.weights = _flat(weights).to(material.device, material.dtype)
        self.scores = _flat(scores).to(material.device)
        self.square_avg = (
            torch.zeros_like(self.scores)
            if square_avgs is None
            else _flat(square_avgs).to(material.device)
        )
        self.masked = torch.where(self.scores >= 0, self.weights, 0)
        self.grad = torch.zeros_like(self.weights)
        self._masked_TOI = self.by_layer(self.masked)
        self._grad_TOI = self.by_layer(self.grad)
        self._deltas = self.activations(material.config.train.batch_size)

    def by_layer(self, flat: Tensor) -> list[Tensor]:
        """Return views [T, O, I] of a flat buffer, one per layer."""
        sizes = [shape.numel() for shape in self._shapes]
        parts = torch.split(flat[: sum(sizes)], sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def activations(self, batch: int) -> list[Tensor]:
        """Return a buffer [T, B, O] per layer."""
        return [self.masked.new_empty(t, batch, outputs) for t, outputs, _ in self._shapes]

    def forward(self, x_TBI: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the input of every layer [T, B, I], and the logits [T, B, S] last.

        Args:
            x_TBI: the input; tasks may share it.
            outputs: the buffers of ``activations``, for at least as many images.
        """
        acts = [x_TBI]
        for i, masked_TOI in enumerate(self._masked_TOI):
            if i:
                acts[-1].relu_()
            out = outputs[i][:, : x_TBI.shape[1]]
            acts.append(torch.bmm(acts[-1], masked_TOI.transpose(1, 2), out=out))
        return acts

    def backward(self, acts: Sequence[Tensor], y_B: Tensor) -> Tensor:
        """Leave the gradient of the cross-entropy, summed over the batch, in ``grad``.

        Args:
            acts: what ``forward`` returned.
            y_B: the labels.

        Returns:
            The gradient [T, B, O] at the output of the first of these layers.
        """
        *inputs, logits_TBS = acts
        delta = cross_entropy_gradient(logits_TBS, y_B, self._deltas[-1])
        for i in reversed(range(len(inputs))):
            torch.bmm(delta.transpose(1, 2), inputs[i], out=self._grad_TOI[i])
            if i:
                back = self.propagate(delta, i, self._deltas[i - 1])
                # Where a unit was silent nothing goes back.
                delta = _threshold_backward(back, inputs[i], 0, grad_input=back)
        return delta

    def propagate(self, delta_TBO: Tensor, layer: int, out: Tensor) -> Tensor:
        """Write the gradient [T, B, I] at a layer's input into ``out``, given its output's."""
        return torch.bmm(delta_TBO, self._masked_TOI[layer], out=out)


_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """Join the layers; zeros behind them fill up a vector register."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return torch.nn.functional.pad(flat, (0, -len(flat) % 16))


def cross_entropy_gradient(logits_TBS: Tensor, y_B: Tensor, out: Tensor) -> Tensor:
    """Write the gradient of the summed cross-entropy, ``p - onehot(y)`` [T, B, S], into ``out``.

    The entry of the true class is minus the sum of the others: in bf16, ``p - 1`` would lose what
    is left of a class that is nearly sure.
    """
    index_TB1 = y_B.view(1, -1, 1).expand(len(logits_TBS), -1, 1)
    p_TBS = torch.softmax(logits_TBS, dim=-1, out=out)
    p_TBS.scatter_(-1, index_TB1, 0)
    others_TB1 = p_TBS.sum(-1, keepdim=True, dtype=torch.float32)
    return p_TBS.scatter_(-1, index_TB1, -others_TB1.to(p_TBS.dtype))


# --- the fused score update ------------------------------------------------------------------

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, float, int], None]


def update_scores(
    grad: Tensor,
    weights: Tensor,
    scores: Tensor,
    square_avg: Tensor,
    masked: Tensor,
    rate: Tensor,
    alpha: float,
    epsilon: float,
    batch: int,
) -> None:
    """Update scores by RMSprop, in place, and the masked weights with them. All are flat.

    ``grad`` is the gradient of the weights, of the loss summed over the batch; times the weight it
    is the gradient of the score: straight through the threshold (paper, Section 3.1).
    """
    score_grad = grad.float() / batch * weights.float()
    square_avg.mul_(alpha).add_((1 - alpha) * score_grad * score_grad)
    scores.sub_(rate * score_grad / (square_root(square_avg) + epsilon))
    masked.copy_(torch.where(scores >= 0, weights, torch.zeros_like(weights)))


@functools.cache
def _make_update(device: torch.device) -> Update:
    """Return the update compiled to one pass, or as it is where there is no compiler."""
    buffers = torch.zeros(5, 64, device=device)
    rate = torch.tensor(1e-3, device=device)
    return compiled(update_scores, (*buffers, rate, 0.99, 1e-8, 128))
