"""What a GPU answers about packed masks, held on the CPU against float64."""

import numpy as np
import pytest
import torch

from supsup.device_masks import DeviceMasks
from supsup.inference import Queries, TaskInference, ranked
from supsup.masking import pack, pack_bits
from supsup.models import fixed_weights, make_layers
from supsup.packed import PackedMasks

LAYERS = make_layers("lenet-300-100", 21, 17)
WEIGHTS = [torch.from_numpy(w) for w in fixed_weights(0, LAYERS)]
DOUBLES = [w.double() for w in WEIGHTS]


def random_bank(k: int) -> torch.Tensor:
    random = np.random.default_rng(k)
    masks = [torch.from_numpy(random.random((k, x.outputs, x.inputs)) < 0.4) for x in LAYERS]
    return torch.from_numpy(pack(masks))


def both(k: int, memory: int = 512 << 20, depth: int = 0) -> tuple[DeviceMasks, PackedMasks]:
    packed = random_bank(k)
    made = DeviceMasks(packed, WEIGHTS, LAYERS, memory), PackedMasks(packed, DOUBLES, LAYERS)
    return tuple(masks.first_layers(depth) for masks in made)


def random_vectors(masks: PackedMasks, count: int) -> torch.Tensor:
    vectors = masks.vectors(count)
    shape = count, masks.bits
    vectors[:, : masks.bits] = torch.from_numpy(np.random.default_rng(count).normal(size=shape))
    return vectors


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("memory", [1, 1 << 20, 512 << 20])
@pytest.mark.parametrize("k", [1, 70])
def test_sums_are_those_of_unpacked_masks(k, memory, depth):
    fast, plain = both(k, memory, depth)
    vectors = random_vectors(fast, 5)
    expected = plain.sums(vectors[:, : plain.bits].double())
    found = fast.sums(vectors).double()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    chosen = torch.from_numpy(np.random.default_rng(0).integers(0, k, (5, 9)))
    few = fast.sums_of(vectors, chosen).double()
    torch.testing.assert_close(few, expected.gather(1, chosen), rtol=1e-5, atol=1e-3)


def test_two_halves_have_16_bits():
    from supsup.device_masks import _halves

    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 1000))).float()
    high, low = _halves(vectors).double().chunk(2)
    assert ((high + low - vectors).abs() <= vectors.abs() * 2**-16).all()


@pytest.mark.parametrize("memory", [1, 1 << 21, 512 << 20])
@pytest.mark.parametrize("images", [1, 3])
def test_pairs_of_masks_and_queries_are_run(memory, images):
    """Some masks are asked about often, most once or never."""
    fast, plain = both(40, memory)
    random = np.random.default_rng(0)
    often = np.concatenate([random.integers(0, 40, 30), np.full(20, 7), np.full(9, 39)])
    tasks = torch.from_numpy(random.permutation(often))
    rows = torch.from_numpy(random.integers(0, 6, len(tasks)))
    x = torch.from_numpy(random.normal(size=(6, images, 21))).float()
    found = torch.full((len(tasks), images, 17), torch.nan)
    for pairs, logits in fast.runs(tasks, rows, x):
        found[pairs] = logits
    for pair, (task, row) in enumerate(zip(tasks.tolist(), rows.tolist(), strict=True)):
        expected = plain.logits(task, x[row].double()).float()
        torch.testing.assert_close(found[pair], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        "h-one-shot", "g-one-shot", "h-shortlist", "h-sketch", "h-binary", "g-gradient-descent",
        "h-all-masks", "max-logit",
    ],
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 1])
def test_every_method_finds_the_tasks_that_float64_finds(method, depth, monkeypatch):
    monkeypatch.setattr("supsup.inference.packed_masks", DeviceMasks)
    packed = random_bank(33)
    x = torch.from_numpy(np.random.default_rng(7).normal(size=(12, 2, 21)))
    found = [
        ranked(
            Queries(
                TaskInference(packed, weights, LAYERS, 10, depth=depth, kernels=kernels),
                x.to(weights[0].dtype), 5, 0.3,
            ),
            method,
        )
        for weights, kernels in ((WEIGHTS, True), (DOUBLES, False))
    ]  # fmt: skip
    assert (found[0][:, 0] == found[1][:, 0]).all()


@pytest.mark.parametrize("bits", [1, 8, 13, 64])
def test_bits_are_packed_on_a_device_as_by_numpy(bits):
    mask = torch.from_numpy(np.random.default_rng(bits).random((3, bits)) < 0.5)
    assert (pack_bits(mask).numpy() == pack([mask[:, None]])).all()
