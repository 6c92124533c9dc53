import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup.masking import layer_slices, mask_bytes, pack, padding_is_zero, unpack
from supsup.models import Layer, make_layers, weights_sha256


@given(st.integers(1, 3), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_packing_loses_nothing_at_any_length(tasks, shapes):
    layers = [Layer(f"l{i}", *shape) for i, shape in enumerate(shapes)]
    random = np.random.default_rng(0)
    masks = [torch.from_numpy(random.random((tasks, x.outputs, x.inputs)) < 0.5) for x in layers]
    packed = pack(masks)
    assert packed.shape == (tasks, mask_bytes(layers))
    assert padding_is_zero(packed, layers)
    for mask, found in zip(
        masks, unpack(torch.from_numpy(packed), layers, torch.float32), strict=True
    ):
        assert torch.equal(mask.float(), found)


def test_every_remainder_is_covered():
    """Lengths 1 to 16, so every length mod 8, one by one against plain bit arithmetic."""
    for length in range(1, 17):
        layer = Layer("l", 1, length)
        bits = np.arange(length) % 3 == 0
        packed = pack([torch.from_numpy(bits.reshape(1, 1, -1))])
        expected = [
            sum(int(bit) << i for i, bit in enumerate(bits[start : start + 8]))
            for start in range(0, length, 8)
        ]
        assert packed.tolist() == [expected]
        assert unpack(torch.from_numpy(packed), [layer], torch.float64)[0].flatten().tolist() == [
            float(bit) for bit in bits
        ]


def test_set_padding_is_noticed():
    layers = [Layer("a", 1, 3), Layer("b", 1, 8)]
    packed = np.array([[0b0000_0111, 0xFF]], dtype=np.uint8)
    assert padding_is_zero(packed, layers)
    packed[0, 0] |= 0b0000_1000
    assert not padding_is_zero(packed, layers)


def test_layers_start_on_bytes():
    layers = make_layers("lenet-300-100", 784, 100)
    slices = [part for _, part in layer_slices(layers)]
    assert slices[0] == slice(0, 300 * 784 // 8)
    assert slices[-1].stop == mask_bytes(layers) == (300 * 784 + 100 * 300 + 100 * 100) // 8


@pytest.mark.parametrize("change", [lambda w: w * 2, lambda w: -w, lambda w: w.T.copy()])
def test_the_hash_of_weights_sees_changes(change):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert weights_sha256([weight]) != weights_sha256([change(weight)])
