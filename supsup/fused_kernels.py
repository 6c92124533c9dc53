"""The kernels of the fused engine, in Triton.

Matrices are padded: a row of inputs or outputs is as long as the next multiple of ``PADDING``, its
last numbers zero. One program has one tile of one task, so that a task's numbers don't depend on
how many share the launch. Nothing is tuned at run time, for the order of additions is part of a
result.

Shapes: T tasks, B images of a batch, O outputs and I inputs of a layer, S output neurons.
"""

import triton
import triton.language as tl


@triton.jit
def forward_layer(
    x, masked, out, images, outputs, inputs, width, x_task,
    RELU: tl.constexpr, IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write ``x @ masked.T`` [T, B, O], where it isn't negative if RELU is set.

    Args:
        x: the layer's input [T, B, I], or [B, I] of all tasks alike.
        masked: the masked weights [T, O, I].
        out: where the result goes, zeros behind a row's last output.
        images: B.
        outputs: O.
        inputs: I, padded.
        width: O, padded.
        x_task: numbers of ``x`` from one task to the next, 0 if they share it.
    """
    task = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = x + task * x_task + b[:, None].to(tl.int64) * inputs
    columns = masked + task * outputs * inputs + o[None, :] * inputs
    sums = tl.zeros((IMAGES, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        i = start + tl.arange(0, INPUTS)
        there = i < inputs
        x_BI = tl.load(rows + i[None, :], mask=(b < images)[:, None] & there[None, :], other=0.0)
        w_IO = tl.load(
            columns + i[:, None], mask=(o < outputs)[None, :] & there[:, None], other=0.0
        )
        sums = tl.dot(x_BI, w_IO, sums, input_precision="ieee")
    if RELU:
        # What is not a number must stay so, that it is found.
        sums = tl.where(sums < 0.0, 0.0, sums)
    place = out + (task * images + b[:, None]) * width + o[None, :]
    inside = (b < images)[:, None] & (o < width)[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_gradient(logits, labels, images, outputs, width, WIDTH: tl.constexpr):
    """Replace logits [T, B, S] by the gradient of the summed cross-entropy, ``p - onehot(y)``.

    The entry of the true class is minus the sum of the others, as supsup.dense says why.
    """
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, WIDTH)
    place = logits + row * width + s
    z = tl.load(place, mask=s < width, other=0.0).to(tl.float32)
    z = tl.where(s < outputs, z, float("-inf"))
    e = tl.exp(z - tl.max(z, 0))
    true = s == tl.load(labels + row % images)
    others = tl.where(true, 0.0, e / tl.sum(e, 0))
    delta = tl.where(true, -tl.sum(others, 0), others)
    tl.store(place, delta.to(logits.dtype.element_ty), mask=s < width)


@triton.jit
def propagate(
    delta, masked, x, back, images, outputs, inputs, width,
    IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write the gradient ``delta @ masked`` [T, B, I] at a layer's input where that isn't zero.

    Args:
        delta: the gradient at the layer's output [T, B, O].
        masked: the masked weights [T, O, I].
        x: the layer's input [T, B, I], behind a ReLU.
        back: where the result goes.
        images: B.
        outputs: O.
        inputs: I, padded.
        width: O, padded.
    """
    task = tl.program_id(2).to(tl.int64)
    b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    i = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    rows = delta + (task * images + b[:, None]) * width
    columns = masked + task * outputs * inputs + i[None, :]
    sums = tl.zeros((IMAGES, INPUTS), tl.float32)
    for start in range(0, outputs, OUTPUTS):
        o = start + tl.arange(0, OUTPUTS)
        d_BO = tl.load(
            rows + o[None, :], mask=(b < images)[:, None] & (o < width)[None, :], other=0.0
        )
        w_OI = tl.load(
            columns + o[:, None] * inputs,
            mask=(o < outputs)[:, None] & (i < inputs)[None, :],
            other=0.0,
        )
        sums = tl.dot(d_BO, w_OI, sums, input_precision="ieee")
    inside = (b < images)[:, None] & (i < inputs)[None, :]
    place = (task * images + b[:, None]) * inputs + i[None, :]
    active = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) > 0.0
    tl.store(back + place, tl.where(active, sums, 0.0).to(back.dtype.element_ty), mask=inside)


@triton.jit
def update_layer(
    x, delta, weights, scores, second, masked, rates, number, images, outputs, inputs, width,
    x_task, weights_task, alpha, rest, epsilon,
    IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Update a layer's scores by RMSprop, in place, and the masked weights with them.

    The gradient of a weight, ``deltaᵀ x`` over the batch's images, times the weight is that of its
    score, straight through the threshold (paper, Section 3.1). It never leaves the registers.

    Args:
        x: the layer's input [T, B, I], or [B, I] of all tasks alike.
        delta: the gradient at the layer's output [T, B, O], of the sum over the images.
        weights: the fixed weights [T, O, I], or [O, I] of all tasks alike.
        scores: [T, O, I].
        second: RMSprop's mean squares [T, O, I].
        masked: the masked weights [T, O, I].
        rates: the learning rate of every batch.
        number: where the batch's number is.
        images: B.
        outputs: O.
        inputs: I, padded.
        width: O, padded.
        x_task: numbers of ``x`` from one task to the next, 0 if they share it.
        weights_task: the same of ``weights``.
        alpha: RMSprop's smoothing constant.
        rest: ``1 - alpha``.
        epsilon: RMSprop's.
    """
    task = tl.program_id(2).to(tl.int64)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    rows = delta + task * images * width + o[:, None]
    columns = x + task * x_task + i[None, :]
    # They are under way while the gradient is added up.
    inside = (o < outputs)[:, None] & (i < inputs)[None, :]
    place = o[:, None] * inputs + i[None, :]
    own = task * outputs * inputs
    w = tl.load(weights + task * weights_task + place, mask=inside, other=0.0)
    square = tl.load(second + own + place, mask=inside, other=0.0)
    score = tl.load(scores + own + place, mask=inside, other=0.0)
    sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, images, IMAGES):
        b = (start + tl.arange(0, IMAGES)).to(tl.int64)
        there = b < images
        d_OB = tl.load(
            rows + b[None, :] * width, mask=(o < width)[:, None] & there[None, :], other=0.0
        )
        x_BI = tl.load(
            columns + b[:, None] * inputs, mask=there[:, None] & (i < inputs)[None, :], other=0.0
        )
        sums = tl.dot(d_OB, x_BI, sums, input_precision="ieee")
    gradient = sums / images * w.to(tl.float32)
    square = alpha * square + rest * gradient * gradient
    rate = tl.load(rates + tl.load(number))
    score -= rate * gradient / (tl.sqrt(square) + epsilon)
    tl.store(second + own + place, square, mask=inside)
    tl.store(scores + own + place, score, mask=inside)
    tl.store(masked + own + place, tl.where(score >= 0.0, w, tl.zeros_like(w)), mask=inside)
