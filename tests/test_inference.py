"""Task inference held against autograd in float64, with each α an explicit variable."""

import typing

import numpy as np
import pytest
import torch

from supsup.config import Method
from supsup.errors import ConfigError
from supsup.inference import (
    Queries,
    TaskInference,
    check_methods,
    entropy,
    infer,
    least_of_largest,
    ranked,
)
from supsup.masking import pack, unpack
from supsup.models import fixed_weights, make_layers

CLASSES, OUTPUTS, PIXELS = 10, 17, 21
LAYERS = make_layers("lenet-300-100", PIXELS, OUTPUTS)
WEIGHTS = [torch.from_numpy(w).double() for w in fixed_weights(0, LAYERS)]


def bank(k: int) -> torch.Tensor:
    random = np.random.default_rng(k)
    masks = [torch.from_numpy(random.random((k, x.outputs, x.inputs)) < 0.5) for x in LAYERS]
    return torch.from_numpy(pack(masks))


def images(queries: int, per_query: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).normal(size=(queries, per_query, PIXELS)))


def superposition_logits(packed: torch.Tensor, alpha: torch.Tensor, x: torch.Tensor, depth=0):
    masks = unpack(packed, LAYERS, torch.float64)
    for i, (weight, mask) in enumerate(zip(WEIGHTS, masks, strict=True)):
        own = alpha if not depth or i < depth else alpha.detach()
        x = (x.relu() if i else x) @ (weight * torch.einsum("t,toi->oi", own, mask)).T
    return x


def autograd_alpha(packed: torch.Tensor, x_NP: torch.Tensor, objective: str, depth: int = 0):
    alpha = torch.full((len(packed),), 1 / len(packed), dtype=torch.float64, requires_grad=True)
    logits = superposition_logits(packed, alpha, x_NP, depth)
    if objective == "h":
        p = logits.softmax(-1)
        value = -(p * p.log()).sum(-1).mean()
    else:
        real = torch.arange(OUTPUTS) < CLASSES
        value = torch.where(real, logits.detach(), logits).logsumexp(-1).mean()
    return torch.autograd.grad(value, alpha)[0]


@pytest.mark.parametrize("objective", ["h", "g"])
@pytest.mark.parametrize("per_query", [1, 5])
@pytest.mark.parametrize("k", [1, 2, 9, 33])
def test_closed_form_equals_autograd(objective, per_query, k):
    packed, x = bank(k), images(3, per_query)
    found = TaskInference(packed, WEIGHTS, LAYERS, CLASSES).alpha_gradients(x, objective)
    for query in range(3):
        expected = autograd_alpha(packed, x[query], objective)
        torch.testing.assert_close(found[query], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("objective", ["h", "g"])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_the_first_layers_alone_are_asked(objective, depth):
    packed, x = bank(9), images(2, 3)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES, depth=depth)
    found = engine.alpha_gradients(x, objective)
    for query in range(2):
        expected = autograd_alpha(packed, x[query], objective, depth)
        torch.testing.assert_close(found[query], expected, rtol=1e-9, atol=1e-14)
    some = torch.tensor([7, 2, 4])
    part = engine.gradient_at(x[0], objective, some)
    expected = autograd_alpha(packed[some], x[0], objective, depth)
    torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("objective", ["h", "g"])
def test_tiles_change_nothing(objective):
    packed, x = bank(9), images(6, 2)
    whole = TaskInference(packed, WEIGHTS, LAYERS, CLASSES).alpha_gradients(x, objective)
    memory = 16 * 8 * 8 * packed.shape[1]  # two queries, and four masks, at a time
    tiled = TaskInference(packed, WEIGHTS, LAYERS, CLASSES, memory).alpha_gradients(x, objective)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-14)


def test_one_mask_of_the_bank_is_its_network():
    packed, x = bank(5), images(1, 4)[0]
    alone = superposition_logits(packed[3:4], torch.ones(1, dtype=torch.float64), x)
    found = TaskInference(packed, WEIGHTS, LAYERS, CLASSES).logits(3, x)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_one_shot_is_the_steepest_descent():
    packed, x = bank(12), images(4, 1)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    expected = [int((-autograd_alpha(packed, q, "h")).argmax()) for q in x]
    assert infer(Queries(engine, x), "h-one-shot").tolist() == expected


def test_shortlist_is_the_surest_of_the_steepest():
    packed, x = bank(12), images(4, 3)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    for size in (1, 4, 12, 50):
        expected = []
        for query in x:
            order = autograd_alpha(packed, query, "h").argsort()[:size].tolist()
            entropies = {t: float(entropy(engine.logits(t, query)).mean()) for t in order}
            expected.append(min(entropies, key=entropies.get))
        assert infer(Queries(engine, x, size), "h-shortlist").tolist() == expected


@pytest.mark.parametrize("method", typing.get_args(Method))
def test_every_method_answers_for_one_image_and_one_mask(method):
    engine = TaskInference(bank(1), WEIGHTS, LAYERS, CLASSES)
    assert infer(Queries(engine, images(2, 1)), method).tolist() == [0, 0]


def test_predictions_are_of_the_chosen_mask_and_the_real_classes():
    engine, x = TaskInference(bank(3), WEIGHTS, LAYERS, CLASSES), images(4, 2)
    tasks = torch.tensor([2, 0, 2, 1])
    found = engine.predict(tasks, x)
    for query, task in enumerate(tasks.tolist()):
        assert torch.equal(found[query], engine.logits(task, x[query])[:, :CLASSES].argmax(1))
    assert found.max() < CLASSES


def test_g_needs_superfluous_neurons():
    check_methods(("h-one-shot",), 10, 10)
    check_methods(("g-one-shot",), 11, 10)
    with pytest.raises(ConfigError, match=r"g-one-shot.*output_size is 10, must be above 10"):
        check_methods(("h-one-shot", "g-one-shot"), 10, 10)


def test_sketch_is_one_shot_where_it_sees_everything():
    engine, x = TaskInference(bank(40), WEIGHTS, LAYERS, CLASSES), images(5, 2)
    expected = infer(Queries(engine, x), "h-one-shot")
    assert torch.equal(infer(Queries(engine, x, 40, 1.0), "h-sketch"), expected)
    assert torch.equal(infer(Queries(engine, x, 40, 0.01), "h-sketch"), expected)


@pytest.mark.parametrize("part", [0.01, 0.05, 0.5])
def test_the_bound_of_the_largest_numbers_keeps_their_part(part):
    vectors = torch.from_numpy(np.random.default_rng(1).standard_t(3, size=(4, 235_200)))
    least = least_of_largest(vectors, part)
    kept = (vectors.abs() > least[:, None]).double().mean(1)
    torch.testing.assert_close(kept, torch.full_like(kept, part), rtol=0.5, atol=0)
    assert (least_of_largest(torch.zeros(1, 90), 1.0) < 0).all()  # all of them, zeros too


@pytest.mark.parametrize("part", [0.02, 0.3])
def test_the_sketch_ranks_by_the_largest_numbers_alone(part):
    packed, x = bank(60), images(6, 2)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES, depth=1)
    (factors_QW,) = engine.factors(x, "h")
    bits_TW = unpack(packed, LAYERS, torch.float64)[0].flatten(1)
    numbers_QW = factors_QW[:, : bits_TW.shape[1]]
    least_Q1 = least_of_largest(factors_QW, part)[:, None]
    expected = (torch.where(numbers_QW.abs() > least_Q1, numbers_QW, 0) @ bits_TW.T).argmin(1)
    assert torch.equal(infer(Queries(engine, x, 1, part), "h-sketch"), expected)
    assert not torch.equal(infer(Queries(engine, x), "h-one-shot"), expected)


def test_binary_halves_by_the_gradient_of_what_is_left():
    packed, x = bank(11), images(3, 2)
    found = infer(Queries(TaskInference(packed, WEIGHTS, LAYERS, CLASSES), x), "h-binary")
    for query, task in zip(x, found.tolist(), strict=True):
        left = list(range(11))
        while len(left) > 1:
            gradient = autograd_alpha(packed[left], query, "h")
            left = sorted(left[i] for i in gradient.argsort()[: (len(left) + 1) // 2].tolist())
        assert left == [task]


def test_gradient_descent_lowers_the_entropy_of_the_superposition():
    packed, x = bank(6), images(4, 3)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    for query, task in zip(x, infer(Queries(engine, x), "h-gradient-descent"), strict=True):
        corner = torch.nn.functional.one_hot(task, 6).double()
        uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
        before, after = (
            entropy(superposition_logits(packed, alpha, query)).mean()
            for alpha in (uniform, corner)
        )
        assert after < before


def test_all_masks_takes_the_surest_of_all():
    packed, x = bank(9), images(4, 2)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    surest = [[float(entropy(engine.logits(t, q)).mean()) for t in range(9)] for q in x]
    assert infer(Queries(engine, x), "h-all-masks").tolist() == np.argmin(surest, axis=1).tolist()


def test_gradient_where_some_alphas_are_zero():
    packed, x = bank(8), images(1, 3)[0]
    tasks, alpha = torch.tensor([1, 4, 5]), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    free = alpha.clone().requires_grad_()
    entropy(superposition_logits(packed[tasks], free, x)).mean().backward()
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    found = engine.gradient_at(x, "h", tasks, alpha)
    torch.testing.assert_close(found, free.grad, rtol=1e-9, atol=1e-14)


# --- rankings --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", typing.get_args(Method))
@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_ranking_begins_with_the_task_that_is_found(method, k):
    queries = Queries(TaskInference(bank(k), WEIGHTS, LAYERS, CLASSES), images(3, 2))
    ranking_QR = ranked(queries, method)
    assert ranking_QR.shape == (3, min(5, k))
    assert all(len(set(row)) == len(row) for row in ranking_QR.tolist())
    assert (ranking_QR[:, 0] == infer(queries, method)).all()


def test_rankings_follow_what_the_algorithm_looks_at():
    """Against the definitions, with every mask run one by one."""
    packed, x_QNP = bank(9), images(4, 3)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    queries = Queries(engine, x_QNP, sketch=1.0)
    one_hot = torch.eye(9, dtype=torch.float64)
    logits_TQNS = torch.stack([superposition_logits(packed, alpha, x_QNP) for alpha in one_hot])
    steepness_QT = torch.stack([autograd_alpha(packed, x_NP, "h") for x_NP in x_QNP])
    surest_QT = entropy(logits_TQNS).mean(-1).T
    largest_QT = -logits_TQNS[..., :CLASSES].amax(-1).mean(-1).T
    for method, costs_QT in {
        "h-one-shot": steepness_QT,
        "h-sketch": steepness_QT,
        "h-shortlist": surest_QT,
        "h-all-masks": surest_QT,
        "max-logit": largest_QT,
    }.items():
        expected = costs_QT.argsort(1)[:, :5]
        assert ranked(queries, method).tolist() == expected.tolist(), method


def test_the_largest_logit_is_that_of_the_concatenated_outputs():
    packed, x_QNP = bank(9), images(5, 1)
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    one_hot = torch.eye(9, dtype=torch.float64)
    rows = [superposition_logits(packed, alpha, x_QNP[:, 0])[:, :CLASSES] for alpha in one_hot]
    expected = torch.cat(rows, 1).argmax(1) // CLASSES
    assert infer(Queries(engine, x_QNP), "max-logit").tolist() == expected.tolist()


def test_binary_ranks_by_how_long_a_task_was_kept():
    packed, x_NP = bank(9), images(1, 4)[0]
    engine = TaskInference(packed, WEIGHTS, LAYERS, CLASSES)
    left, dropped = list(range(9)), []
    while len(left) > 1:
        gradient = engine.gradient_at(x_NP, "h", torch.tensor(left))
        order = [left[i] for i in gradient.argsort()]
        half = (len(left) + 1) // 2
        dropped = order[half:] + dropped
        left = sorted(order[:half])
    ranking = ranked(Queries(engine, x_NP[None]), "h-binary")[0].tolist()
    assert ranking == (left + dropped)[:5]
