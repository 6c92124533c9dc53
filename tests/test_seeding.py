import itertools

import numpy as np

from supsup.masking import initial_scores
from supsup.models import fixed_weights, make_layers
from supsup.seeding import derive_seed, generator
from supsup.tasks import inverse, permutation

LAYERS = make_layers("lenet-300-100", 64, 30)


def test_names_are_not_confused():
    names = [(), ("a",), ("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), ("a", 10), ("1",)]
    seeds = {derive_seed(root, *name) for name in names for root in (0, 1)}
    assert len(seeds) == 2 * len(names)


def test_a_known_value():
    assert derive_seed(0, "weights", "linear0") == 0x7F85FF4958BC6F5B


def test_streams_are_independent():
    """Weights, scores, permutations and orders: no two are correlated."""
    draws = {
        "weights": fixed_weights(0, LAYERS)[0].ravel(),
        "weights, other layer": np.resize(fixed_weights(0, LAYERS)[1].ravel(), 19200),
        "weights, other seed": fixed_weights(1, LAYERS)[0].ravel(),
        **{f"scores {t}": initial_scores(0, t, LAYERS[0]).ravel() for t in range(4)},
        "order": generator(0, "order", 0).permutation(19200),
        "order, next epoch": generator(0, "order", 1).permutation(19200),
        **{f"permutation {t}": permutation(0, t, 19200) for t in range(3)},
    }
    for (name, a), (other, b) in itertools.combinations(draws.items(), 2):
        correlation = np.corrcoef(a.astype(float), b.astype(float))[0, 1]
        # 5 standard deviations of n = 19200 independent draws
        assert abs(correlation) < 5 / np.sqrt(19200), (name, other, correlation)


def test_weights_are_signed_kaiming_constants():
    for weight, layer in zip(fixed_weights(3, LAYERS), LAYERS, strict=True):
        assert weight.shape == (layer.outputs, layer.inputs)
        np.testing.assert_allclose(np.abs(weight), np.sqrt(2 / layer.inputs), rtol=1e-6)
        assert abs(np.sign(weight).mean()) < 5 / np.sqrt(weight.size)


def test_scores_are_uniform():
    scores = initial_scores(0, 0, LAYERS[0])
    bound = LAYERS[0].inputs ** -0.5
    assert np.abs(scores).max() <= bound
    assert abs((scores >= 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(scores.size)
    assert abs(scores.std() - bound / np.sqrt(3)) < 0.01 * bound


def test_inverse_undoes():
    order = permutation(0, 5, 784)
    np.testing.assert_array_equal(order[inverse(order)], np.arange(784))
