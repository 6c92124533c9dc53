"""The lookup kernels held against unpacked masks in float64."""

import numpy as np
import pytest
import torch

from supsup import native
from supsup.answering import packed_masks
from supsup.masking import pack
from supsup.models import fixed_weights, make_layers
from supsup.packed import KERNELS, LookupMasks, PackedMasks

LAYERS = make_layers("lenet-300-100", 21, 17)  # layers that don't end on a word, or a byte
WEIGHTS = [torch.from_numpy(w) for w in fixed_weights(0, LAYERS)]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch) -> str:
    """Make some kernels those that are taken here."""
    if not native.supported(request.param):
        pytest.skip(f"the processor lacks the instructions of {request.param}.cpp")
    monkeypatch.setattr("supsup.packed.KERNELS", (request.param,))
    return request.param


def random_bank(k: int) -> torch.Tensor:
    random = np.random.default_rng(k)
    masks = [torch.from_numpy(random.random((k, x.outputs, x.inputs)) < 0.4) for x in LAYERS]
    return torch.from_numpy(pack(masks))


def both(packed: torch.Tensor, memory: int = 512 << 20) -> tuple[LookupMasks, PackedMasks]:
    doubles = [w.double() for w in WEIGHTS]
    return LookupMasks(packed, WEIGHTS, LAYERS, memory), PackedMasks(packed, doubles, LAYERS)


def random_vectors(masks: PackedMasks, count: int) -> torch.Tensor:
    vectors, random = masks.vectors(count), np.random.default_rng(count)
    for layer in masks.by_layer(vectors):
        layer.copy_(torch.from_numpy(random.normal(size=layer.shape)))
    return vectors


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("k", [1, 16, 63, 64, 130])
@pytest.mark.parametrize("queries", [1, 5, 20])
def test_sums_are_those_of_unpacked_masks(k, queries):
    fast, plain = both(random_bank(k))
    vectors = random_vectors(fast, queries)
    vectors[0, 1024:4096] = 0  # words of zeros are skipped
    expected = plain.sums(vectors[:, : plain.bits].double())
    torch.testing.assert_close(fast.sums(vectors).double(), expected, rtol=1e-5, atol=1e-3)
    some = torch.arange(k).flip(0)[: k // 2 + 1]
    few = fast.sums_of(vectors[:1], some[None])[0].double()
    torch.testing.assert_close(few, expected[0, some], rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("k", [1, 64, 70, 400])
def test_small_numbers_are_left_out(queries, k):
    fast, plain = both(random_bank(k))
    vectors = random_vectors(fast, queries)
    least = torch.linspace(1.5, 2.5, queries)
    doubles = vectors[:, : plain.bits].double()
    expected = plain.large_sums(doubles, least.double())
    found = fast.large_sums(vectors, least).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(found, plain.sums(doubles), atol=0.1)
    everything = fast.large_sums(vectors, torch.full_like(least, -1)).double()
    torch.testing.assert_close(everything, plain.sums(doubles), rtol=1e-5, atol=5e-3)


@pytest.mark.usefixtures("kernels")
def test_large_sums_in_tiles_and_threads_are_the_same_bits():
    packed = random_bank(300)
    whole, _ = both(packed)
    tiled, _ = both(packed, memory=1)
    vectors, least = random_vectors(whole, 5), torch.ones(5)
    expected = whole.large_sums(vectors, least)
    torch.set_num_threads(3)
    try:
        assert torch.equal(whole.large_sums(vectors, least), expected)
        assert torch.equal(tiled.large_sums(vectors, least), expected)
        assert torch.equal(whole.large_sums(vectors[2:3], least[2:3]), expected[2:3])
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("depth", [1, 2])
def test_the_first_layers_are_looked_at_alone(depth):
    fast, plain = (masks.first_layers(depth) for masks in both(random_bank(70)))
    vectors = random_vectors(fast, 3)
    assert len(fast.by_layer(vectors)) == depth
    assert fast.bits < 8 * fast.packed_TB.shape[1]
    expected = plain.sums(vectors[:, : plain.bits].double())
    torch.testing.assert_close(fast.sums(vectors).double(), expected, rtol=1e-5, atol=1e-3)
    some = torch.tensor([69, 0, 31])
    of_two = torch.stack([some, some.flip(0)])
    few = fast.sums_of(vectors[1:], of_two).double()
    torch.testing.assert_close(few, expected[1:].gather(1, of_two), rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("kernels")
def test_vectors_of_other_layers_are_refused():
    fast, _ = both(random_bank(3))
    short = fast.first_layers(1).vectors(1)
    for ask in (
        lambda: fast.sums(short),
        lambda: fast.large_sums(short, torch.ones(1)),
        lambda: fast.sums_of(short, torch.tensor([[0]])),
    ):
        with pytest.raises(ValueError, match="wide, must be"):
            ask()


@pytest.mark.usefixtures("kernels")
def test_a_mask_that_changed_is_looked_at_anew():
    packed, others = random_bank(100), random_bank(101)
    fast, _ = both(packed)
    vectors, least = random_vectors(fast, 2), torch.ones(2)
    before = fast.sums(vectors), fast.large_sums(vectors, least)
    for task in (0, 63, 99):
        packed[task] = others[task]
        fast.changed(task)
    fresh, _ = both(packed.clone())
    assert torch.equal(fast.sums(vectors), fresh.sums(vectors))
    assert torch.equal(fast.large_sums(vectors, least), fresh.large_sums(vectors, least))
    assert not torch.equal(before[0], fast.sums(vectors))


@pytest.mark.usefixtures("kernels")
def test_little_memory_and_many_threads_change_no_bit():
    packed = random_bank(300)
    whole, _ = both(packed)
    tiled, _ = both(packed, memory=1)
    vectors = random_vectors(whole, 3)
    expected = whole.sums(vectors)
    assert torch.equal(tiled.sums(vectors), expected)
    torch.set_num_threads(3)
    try:
        assert torch.equal(whole.sums(vectors), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("kernels")
def test_sums_are_the_same_bits_in_any_company():
    bank = np.random.default_rng(0).integers(0, 256, (3300, random_bank(1).shape[1]), np.uint8)
    packed = torch.from_numpy(bank)
    whole, _ = both(packed)
    vectors = random_vectors(whole, 20)
    together = whole.sums(vectors)
    assert torch.equal(torch.cat([whole.sums(vectors[q : q + 1]) for q in range(20)]), together)
    few, _ = both(packed[3200:])
    assert torch.equal(few.sums(vectors), together[:, 3200:])


@pytest.mark.usefixtures("kernels")
def test_weighted_sums_of_masks():
    fast, plain = both(random_bank(40))
    tasks = torch.tensor([3, 39, 0, 7])
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25])
    found, expected = fast.add_up(tasks, weights), plain.add_up(tasks, weights)
    for mine, theirs in zip(fast.by_layer(found), plain.by_layer(expected), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("images", [1, 4, 6, 30])
def test_logits_of_one_mask(images):
    fast, plain = both(random_bank(5))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(images, 21)))
    found = fast.logits(4, x.float()).double()
    torch.testing.assert_close(found, plain.logits(4, x), rtol=1e-4, atol=1e-4)


def test_float64_is_never_answered_in_fp32():
    doubles = [w.double() for w in WEIGHTS]
    assert type(packed_masks(random_bank(2), doubles, LAYERS)) is PackedMasks


def test_without_the_kernels_torch_answers(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: None)
    assert type(packed_masks(random_bank(2), WEIGHTS, LAYERS)) is PackedMasks


def test_sums_of_some_masks_stay_within_their_memory(monkeypatch):
    """Without kernels: masks are unpacked by tiles, however many are asked for."""
    packed = random_bank(130)
    masks = PackedMasks(packed, WEIGHTS, LAYERS, memory_bytes=10 * 4 * 8 * packed.shape[1])
    vectors = random_vectors(masks, 3)
    expected = masks.sums(vectors)
    some = torch.arange(130).flip(0)[None].expand(3, -1)
    most, unpacked = [], PackedMasks._unpacked
    monkeypatch.setattr(
        PackedMasks, "_unpacked", lambda self, bits: most.append(len(bits)) or unpacked(self, bits)
    )
    found = masks.sums_of(vectors, some)
    torch.testing.assert_close(found, expected.flip(1), rtol=1e-5, atol=1e-3)
    assert max(most) == masks._tile() < 130
