"""The sparse engine held against float64, and against the dense engine on real data."""

import dataclasses

import numpy as np
import pytest
import torch

from supsup import native
from supsup.datasets import Dataset
from supsup.errors import ConfigError
from supsup.fields import with_values
from supsup.material import Material
from supsup.sparse import KERNELS, MOST_PIXELS, SparseEngine, _FirstLayer, mostly_background
from supsup.train import BlockTrainer, resolve_here


@pytest.fixture(scope="module")
def background(digits) -> Dataset:
    """Digits with their fainter half erased and an odd number of pixels, one of them constant."""
    faint = [np.where(x < 9, 0, x)[:, :63] for x in (digits.train_images, digits.test_images)]
    for images in faint:
        images[:, 20] = 7
    return dataclasses.replace(digits, train_images=faint[0], test_images=faint[1], shape=(1, 7, 9))


@pytest.fixture(scope="module", params=KERNELS)
def sparse(quick, request):
    if not native.supported(KERNELS[request.param]):
        pytest.skip(f"the processor lacks the instructions of {KERNELS[request.param]}.cpp")
    return with_values(quick, {"train.precision": request.param, "train.engine": "sparse"})


def test_the_first_layer_is_that_of_float64(sparse, background):
    material = Material(sparse, background)
    engine = SparseEngine(material)
    weights, scores = material.initial_state(range(1))
    layer = _FirstLayer(engine, weights[0][0], scores[0][0], torch.zeros_like(scores[0][0]))
    outputs, inputs = weights[0][0].shape
    # A state as after some training: mean squares of any size.
    layer._square_avg.copy_(torch.rand(layer._square_avg.shape) * 1e-4)
    weight = weights[0][0].to(material.dtype).double()
    half_ulp = {torch.bfloat16: 2**-8, torch.float32: 2e-6}[material.dtype]
    for number in range(3):
        pixels, _ = engine.training_batch(number)
        images = material.data.train_images[material.order[number].numpy()].astype(np.float64)
        x = torch.from_numpy((images / background.scale - background.mean) / background.std)
        before, square = layer.scores_OI().double(), _untiled(layer._square_avg, outputs, inputs)
        hidden = torch.empty(len(x), outputs, dtype=material.dtype)
        layer.forward(pixels, hidden)
        expected = (x @ torch.where(before >= 0, weight, 0).T).relu()
        torch.testing.assert_close(hidden.double(), expected, rtol=half_ulp, atol=1e-5)

        delta = torch.randn(len(x), outputs).to(material.dtype)
        layer.update(pixels, hidden, delta, 3e-3)
        delta_in = torch.where(hidden > 0, delta, 0).double()
        grad = (delta_in.T @ x) / len(x) * weight
        square = 0.99 * square + 0.01 * grad**2
        moved = 3e-3 * grad / (square.sqrt() + sparse.train.epsilon)
        torch.testing.assert_close(layer.scores_OI().double(), before - moved, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            _untiled(layer._square_avg, outputs, inputs), square, rtol=1e-4, atol=1e-12
        )


def test_batches_are_listed_together_as_alone_and_last_until_the_second_next_call(
    sparse, background
):
    engine, size = SparseEngine(Material(sparse, background)), sparse.train.batch_size
    images = torch.from_numpy(background.train_images[: 4 * size])
    labels = torch.from_numpy(background.train_labels[: 4 * size])
    first = engine.batches(images[: 3 * size], labels[: 3 * size])
    (other,) = engine.batches(images[3 * size :], labels[3 * size :])
    for number, (pixels, y_B) in enumerate([*first, other]):
        part = slice(number * size, (number + 1) * size)
        assert torch.equal(y_B, labels[part])
        (alone,) = engine._room(size)
        engine._list(images[part], [alone])
        pairs, entries = int(alone.row_start[-1]), int(alone.column_start[-1])
        for name, length in (
            ("row_start", size + 1), ("row_pair", pairs), ("row_value", pairs),
            ("column_start", 65), ("column_image", entries), ("column_value", entries),
        ):  # fmt: skip
            mine, theirs = (getattr(lists, name)[:length] for lists in (pixels, alone))
            assert mine.numpy().tolist() == theirs.numpy().tolist(), name


def test_an_image_of_nothing_but_white_overflows_nothing(sparse, digits):
    white = [
        np.full((len(x), 320), 255, np.uint8) for x in (digits.train_images, digits.test_images)
    ]
    data = dataclasses.replace(
        digits, train_images=white[0], test_images=white[1], shape=(1, 16, 20)
    )
    material = Material(sparse, data)
    engine = SparseEngine(material)
    weights, scores = (part[0][0].abs() for part in material.initial_state(range(1)))
    hidden = torch.empty(sparse.train.batch_size, len(weights), dtype=material.dtype)
    _FirstLayer(engine, weights, scores, torch.zeros_like(scores)).forward(
        engine.training_batch(0)[0], hidden
    )
    pixel = (255 / data.scale - data.mean) / data.std
    expected = pixel * weights.to(material.dtype).double().sum(1).expand_as(hidden)
    torch.testing.assert_close(hidden.double(), expected, rtol=2**-8, atol=0)


def _untiled(tiles: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    return tiles[:, :inputs].transpose(1, 2).reshape(-1, inputs)[:outputs].double()


def test_the_update_of_the_other_layers_is_the_dense_engines(sparse, background):
    from supsup.dense import update_scores

    engine = SparseEngine(Material(sparse, background))
    layers = engine.begin(range(2)).layers
    layers.grad.copy_(torch.randn(layers.grad.shape))
    layers.square_avg.copy_(torch.rand(layers.square_avg.shape))
    mine = [layers.grad, layers.weights, layers.scores, layers.square_avg, layers.masked]
    theirs = [buffer.clone() for buffer in mine]
    engine.update(layers, 1e-2)
    train = sparse.train
    settings = (torch.tensor(1e-2), train.alpha, train.epsilon, train.batch_size)
    update_scores(*theirs, *settings)
    torch.testing.assert_close(layers.scores, theirs[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layers.square_avg, theirs[3], rtol=1e-5, atol=1e-9)
    assert (layers.masked == theirs[4]).float().mean() > 0.999


def test_it_learns_what_the_dense_engine_learns(sparse, background):
    accuracy = {}
    for engine in ("sparse", "dense"):
        values = {"train.engine": engine, "train.batches": 300, "train.learning_rate": 1e-3}
        block = BlockTrainer(with_values(sparse, values), background).train(range(8))
        accuracy[engine] = block.gg_correct.mean() / len(background.test_images)
    assert accuracy["sparse"] > 0.93
    assert abs(accuracy["sparse"] - accuracy["dense"]) < 0.007


def test_blocks_of_any_size_and_a_new_engine_give_the_same_bits(sparse, background):
    whole = BlockTrainer(sparse, background).train(range(13))
    trainer = BlockTrainer(sparse, background)
    for tasks in (range(5, 8), range(12, 13), range(5)):
        block = trainer.train(tasks)
        part = slice(tasks.start, tasks.stop)
        np.testing.assert_array_equal(block.masks, whole.masks[part])
        np.testing.assert_array_equal(block.gg_correct, whole.gg_correct[part])


def test_it_is_chosen_where_most_pixels_are_background(sparse, digits, background):
    auto = with_values(sparse, {"train.engine": "auto"})
    assert not mostly_background(digits)
    assert mostly_background(background)
    assert resolve_here(auto, digits).train.engine == "dense"
    assert resolve_here(auto, background).train.engine == "sparse"


def test_the_kernels_number_pairs_of_pixels_in_16_bits(sparse, digits):
    """At the limit they are the dense engine's; above it they are not chosen, and refused."""
    side, over = 512, MOST_PIXELS // 512 + 1
    for rows in (over - 1, over):
        images = np.zeros((16, rows * side), np.uint8)
        images[:, -64:] = digits.train_images[:16]
        labels = digits.train_labels[:16]
        data = dataclasses.replace(
            digits, train_images=images, train_labels=labels, test_images=images,
            test_labels=labels, shape=(1, rows, side),
        )  # fmt: skip
        small = with_values(sparse, {"train.batches": 1, "train.batch_size": 2})
        assert mostly_background(data) == (rows < over)
        if rows == over:
            with pytest.raises(ConfigError, match="131072 pixels at most and not of 131584"):
                BlockTrainer(small, data)
            continue
        both = [with_values(small, {"train.engine": name}) for name in ("sparse", "dense")]
        groups = [BlockTrainer(config, data).engine.begin(range(1)) for config in both]
        mine, theirs = (next(iter(group.test_logits()))[0].float() for group in groups)
        assert theirs.std() > 0
        assert (mine - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_without_the_kernels_the_engine_is_an_error(sparse, background, monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: None)
    with pytest.raises(RuntimeError, match=r"lacks AVX.* or a C\+\+ compiler"):
        BlockTrainer(sparse, background)
