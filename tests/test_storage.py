import numpy as np
import pytest
import torch

from supsup.config import MaskConfig
from supsup.masking import budgets, make_masks
from supsup.models import make_layers
from supsup.storage import SEED_BYTES, mask_storage

LAYERS = make_layers("lenet-300-100", 784, 100)


def test_threshold_masks_are_bits():
    found = mask_storage(MaskConfig(), LAYERS, 0)
    assert found.per_task == sum(-(-n // 8) for n in (300 * 784, 100 * 300, 100 * 100))
    assert found.shared == SEED_BYTES == 8
    assert found.what == "mask bits"
    assert found.total(250) == 8 + 250 * found.per_task


def test_statistics_of_batch_norm_count():
    without, with_norm = (mask_storage(MaskConfig(), LAYERS, n) for n in (0, 10))
    assert with_norm.per_task == without.per_task + 40
    assert with_norm.what == "mask bits and batch-norm statistics"


@pytest.mark.parametrize("budget", ["uniform", "erdos-renyi"])
def test_a_sparse_mask_is_as_large_as_scipy_has_it(budget):
    """Against compressed rows of scipy: 16-bit columns, 32-bit pointers, no values."""
    from scipy import sparse

    mask = MaskConfig(algorithm="edge-popup", keep_fraction=0.02, budget=budget)
    scores = [torch.rand(1, x.outputs, x.inputs) for x in LAYERS]
    expected = 0
    for layer, mask_1OI in zip(LAYERS, make_masks(mask, LAYERS, scores), strict=True):
        rows = sparse.csr_matrix(mask_1OI[0].numpy())
        size = rows.indices.astype(np.uint16).nbytes + rows.indptr.astype(np.uint32).nbytes
        expected += min(size, layer.mask_bytes)
    assert mask_storage(mask, LAYERS, 0).per_task == expected
    assert mask_storage(mask, LAYERS, 0).what == "sparse mask index"
    assert sum(budgets(mask, LAYERS)) < 0.03 * sum(layer.weights for layer in LAYERS)


def test_a_dense_mask_is_bits_though_its_size_is_known():
    mask = MaskConfig(algorithm="edge-popup", keep_fraction=0.5)
    assert mask_storage(mask, LAYERS, 0) == mask_storage(MaskConfig(), LAYERS, 0)
