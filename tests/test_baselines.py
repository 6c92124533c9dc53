import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from supsup.baselines.inference import RankOneInference, objective_value
from supsup.baselines.learner import BaselineLearner
from supsup.baselines.network import Network, rotation
from supsup.baselines.rules import METHODS, RULES, check_baseline
from supsup.errors import ConfigError, NonFiniteLoss
from supsup.fields import with_values
from supsup.inference import OBJECTIVES, Queries, entropy, infer
from supsup.material import batch_indices
from supsup.seeding import generator


@pytest.fixture(scope="module")
def split(quick):
    """Two classes of the digits a task."""
    values = {
        "family": "split", "class_order": "sorted", "tasks": 4, "scenario": "gg",
        "train.optimizer": "adam", "train.learning_rate": 1e-2, "train.engine": "general",
        "train.batches": 25, "train.batch_size": 32,
    }  # fmt: skip
    return with_values(quick, values)


def learner_of(config, data, name, **values):
    return BaselineLearner(with_values(config, {"learner": name, **values}), data)


def learn_all(learner, tasks):
    """Learn tasks in order; return what each left, and the trunk in the end."""
    learned, trunk = [], None
    for task in range(tasks):
        needed = learner.rule.needs(task)
        learned.append(learner.learn(task, None if needed is None else trunk))
        trunk = learned[-1].trunk or trunk
    return learned, trunk


def images(data, count):
    draws = generator(0, "test images").standard_normal((count, data.pixels))
    return torch.from_numpy(draws)


def as_float64(arrays):
    return {name: torch.from_numpy(array).double() for name, array in arrays.items()}


# --- layers against explicit weights -------------------------------------------------------------


def test_batche_against_explicit_weights(split, digits):
    network = Network(split, digits, "rank-one")
    arrays = as_float64({**network.weights("trunk", 0, rotated=False), **network.factors(3)})
    x = images(digits, 7)
    hidden = x
    for i in range(3):
        weight, r, s = (arrays[f"linear{i}.{name}"] for name in ("weight", "r", "s"))
        hidden = hidden @ (weight * torch.outer(r, s)).T
        hidden = hidden.relu() if i < 2 else hidden
    assert torch.allclose(network.logits(arrays, x, training=False), hidden, atol=1e-12)
    # Random signs alone: other factors must matter too.
    arrays["linear1.r"] = arrays["linear1.r"] * 0.5
    assert not torch.allclose(network.logits(arrays, x, training=False), hidden, atol=1e-3)


def test_batche_of_a_convolutional_net_against_explicit_weights(split, digits):
    config = with_values(split, {"model.name": "gem-resnet18"})
    network, plain = Network(config, digits, "rank-one"), Network(config, digits, "plain")
    trunk, factors = network.weights("trunk", 0, rotated=False), network.factors(1)
    explicit = {}
    for name, weight in trunk.items():
        r, s = (factors[name.replace("weight", part)] * 1.5 for part in ("r", "s"))
        factors |= {name.replace("weight", "r"): r, name.replace("weight", "s"): s}
        outer = np.outer(r, s)
        explicit[name] = weight * outer.reshape(*outer.shape, *[1] * (weight.ndim - 2))
    x = images(digits, 8).float()
    given = {k: torch.from_numpy(v) for k, v in {**trunk, **factors}.items()}
    wanted = {k: torch.from_numpy(v) for k, v in explicit.items()}
    for tensors in (given, wanted):
        tensors |= {k: torch.from_numpy(v) for k, v in network.statistics().items()}
    with torch.no_grad():
        out = network.logits(given, x, training=True)
        assert torch.allclose(out, plain.logits(wanted, x, training=True), rtol=1e-2, atol=1e-2)
    moved = [name for name in given if name.endswith("running_mean")]
    assert moved
    assert all(given[name].abs().max() > 0 for name in moved)


def test_psp_against_explicit_weights(split, digits):
    network, plain = Network(split, digits, "rotated"), Network(split, digits, "plain")
    weights, contexts = (
        as_float64(network.weights("trunk", 0, rotated=True)),
        as_float64(network.contexts(2)),
    )
    explicit = {
        name: weight @ contexts[name.replace("weight", "context")]
        for name, weight in weights.items()
    }
    x = images(digits, 5)
    out = network.logits({**weights, **contexts}, x, training=False)
    assert torch.allclose(out, plain.logits(explicit, x, training=False), atol=1e-10)


def test_psp_of_a_convolutional_net_turns_the_channels_of_every_pixel(split, digits):
    config = with_values(split, {"model.name": "gem-resnet18"})
    network, plain = Network(config, digits, "rotated"), Network(config, digits, "plain")
    weights, contexts = network.weights("trunk", 0, rotated=True), network.contexts(0)
    explicit = {
        name: np.einsum("oi...,ij->oj...", weight, contexts[name.replace("weight", "context")])
        for name, weight in weights.items()
    }
    x = images(digits, 8).float()
    tensors = [
        {k: torch.from_numpy(v.copy()) for k, v in {**arrays, **network.statistics()}.items()}
        for arrays in ({**weights, **contexts}, explicit)
    ]
    with torch.no_grad():
        out, wanted = (
            net.logits(given, x, training=True)
            for net, given in zip((network, plain), tensors, strict=True)
        )
    assert torch.allclose(out, wanted, rtol=1e-2, atol=1e-2)


def test_rotations_are_orthogonal_and_uniform():
    c = rotation(generator(0, "one"), 40).astype(np.float64)
    assert np.allclose(c @ c.T, np.eye(40), atol=1e-5)
    # Without the signs of R's diagonal, LAPACK's Q has a first row of one sign on average.
    corner = [rotation(generator(seed, "many"), 3)[0, 0] for seed in range(600)]
    assert abs(np.mean(corner)) < 0.1
    assert np.mean(np.square(corner)) == pytest.approx(1 / 3, abs=0.05)


# --- learning ------------------------------------------------------------------------------------


def test_the_upper_bound_is_plain_training(split, digits):
    """Against a loop of torch's own layers and Adam."""
    learner = learner_of(split, digits, "upper-bound")
    learned = learner.learn(1, None)
    start = learner.network.weights("own weights", 1, rotated=False)
    weights = [torch.tensor(start[f"linear{i}.weight"]).requires_grad_() for i in range(3)]
    optimizer = torch.optim.Adam(weights, lr=1e-2, eps=1e-8)
    x_NP, y_N = (torch.from_numpy(part) for part in learner.family.train(1))
    x_NP = (x_NP.float() / digits.scale - digits.mean) / digits.std
    for number, chosen in enumerate(batch_indices(0, len(y_N), 32, 25)):
        hidden = x_NP[chosen]
        for weight in weights[:-1]:
            hidden = (hidden @ weight.T).relu()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / 25)
        optimizer.zero_grad()
        functional.cross_entropy(hidden @ weights[-1].T, y_N[chosen]).backward()
        optimizer.step()
    for i, weight in enumerate(weights):
        found = torch.from_numpy(learned.own[f"linear{i}.weight"])
        assert torch.allclose(found, weight, atol=1e-5)
    assert learned.trunk is None
    assert learned.correct[0] > 0.9 * len(learner.family.test_labels(1))


@pytest.mark.parametrize("name", RULES)
def test_every_baseline_learns_and_shares_what_it_says(split, digits, name):
    learner = learner_of(split, digits, name, **{"train.batches": 60})
    learned, trunk = learn_all(learner, 3)
    sizes = [len(learner.family.test_labels(task)) for task in range(3)]
    own = [int(part.correct[-1]) / size for part, size in zip(learned, sizes, strict=True)]
    assert np.mean(own) > {"heads": 0.7, "heads-random": 0.7}.get(name, 0.9), own
    rule = learner.rule
    for task, part in enumerate(learned):
        assert (part.trunk is not None) == rule.trains_trunk(task)
        assert len(part.correct) == (task + 1 if rule.forgets else 1)
        assert bool(part.own) == (rule.own != "nothing")
        assert math.isfinite(part.loss)
    # The rows that were counted in training are those of the weights that were kept.
    last = trunk if trunk is not None else learner.initial_trunk()
    again = learner.correct(1, learned[1].own, last)
    assert again == (learned[2].correct[1] if rule.forgets else learned[1].correct[0])


def test_one_network_forgets_and_rotations_forget_less(split, digits):
    lost = {}
    for name in ("lower-bound", "psp"):
        learned, _ = learn_all(learner_of(split, digits, name, **{"train.batches": 60}), 4)
        lost[name] = sum(int(learned[t].correct[t] - learned[3].correct[t]) for t in range(3))
    assert lost["lower-bound"] > 30
    assert lost["psp"] < lost["lower-bound"] / 2


@pytest.mark.parametrize("name", ["batche", "batche-random", "heads", "heads-random"])
def test_tasks_after_the_first_need_the_trunk_alone(split, digits, name):
    learner = learner_of(split, digits, name)
    learned, trunk = learn_all(learner, 3)
    fresh = learner_of(split, digits, name)
    alone = fresh.learn(2, trunk)
    for key, array in learned[2].own.items():
        assert np.array_equal(alone.own[key], array), key
    assert alone.correct == learned[2].correct
    if trunk is not None:
        start = fresh.initial_trunk()
        assert all(not np.array_equal(trunk[key], start[key]) for key in trunk)


def test_the_trunk_has_a_rate_of_its_own(split, digits):
    slow = {"train.trunk_learning_rate": 1e-6}
    learner = learner_of(split, digits, "batche", **slow)
    learned, trunk = learn_all(learner, 2)
    start = learner.initial_trunk()
    assert max(np.abs(trunk[key] - start[key]).max() for key in trunk) < 1e-4
    moved = [np.abs(np.abs(array) - 1).max() for array in learned[1].own.values()]
    assert max(moved) > 1e-2


def test_batch_norm_keeps_statistics_per_task_or_with_the_one_network(split, digits):
    values = {"model.name": "gem-resnet18", "train.batches": 2}
    for name in ("batche-random", "lower-bound"):
        learner = learner_of(split, digits, name, **values)
        learned = learner.learn(0, None)
        kept = learned.own if name == "batche-random" else learned.trunk
        moved = kept["norm1.running_var"]
        assert moved.shape == (20,)
        assert not np.array_equal(moved, np.ones(20, np.float32))


def test_a_loss_that_is_not_finite_names_the_task(split, digits):
    learner = learner_of(split, digits, "lower-bound", **{"train.learning_rate": 1e3,
                         "train.optimizer": "sgd"})  # fmt: skip
    with pytest.raises(NonFiniteLoss, match="task 0: the loss is not finite"):
        learner.learn(0, None)


# --- task inference ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(quick, digits):
    """Five permuted tasks of BatchE, and the engine that infers among them."""
    values = {
        "train.optimizer": "adam", "train.learning_rate": 1e-2, "train.batches": 60,
        "train.engine": "general",
    }  # fmt: skip
    learner = learner_of(quick, digits, "batche", **values)
    learned, trunk = learn_all(learner, 5)
    own = [part.own for part in learned]
    engine = RankOneInference(learner._config, digits, 10, trunk, own)
    return learner, engine, trunk, own


@pytest.mark.parametrize("objective", ["h", "g"])
@pytest.mark.parametrize("depth", [0, 1])
def test_gradients_of_alpha_against_autograd_in_float64(ensemble, digits, objective, depth):
    learner, _, trunk, own = ensemble
    engine = RankOneInference(learner._config, digits, 10, trunk, own, depth)
    x = learner.normalised(learner.family.test(1)[0][:3])
    tasks = torch.tensor([0, 2, 4])
    alpha = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    hidden = x.double()
    for i in range(3):
        weight = torch.from_numpy(trunk[f"linear{i}.weight"]).double()
        outer = [
            torch.outer(*(torch.from_numpy(own[t][f"linear{i}.{k}"]).double() for k in "rs"))
            for t in tasks
        ]
        asked = alpha if not depth or i < depth else alpha.detach()
        hidden = hidden @ (weight * sum(a * m for a, m in zip(asked, outer, strict=True))).T
        hidden = hidden.relu() if i < 2 else hidden
    p = hidden.softmax(1)
    value = -(p * p.log()).sum(1).mean()
    if objective == "g":
        real = hidden[:, :10].detach()
        value = torch.cat([real, hidden[:, 10:]], 1).exp().sum(1).log().mean()
    (wanted,) = torch.autograd.grad(value, alpha)
    found = engine.gradient_at(x, objective, tasks, alpha.detach().float())
    assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-5)


def test_one_shot_gradients_are_those_of_each_decision_alone(ensemble):
    learner, engine, _, _ = ensemble
    x_QNP = learner.normalised(learner.family.test(2)[0][:8]).view(4, 2, -1)
    together = engine.alpha_gradients(x_QNP, "h")
    for images_NP, gradient_T in zip(x_QNP, together, strict=True):
        alone = engine.gradient_at(images_NP, "h", torch.arange(5))
        assert torch.allclose(alone, gradient_T, atol=1e-6)


@pytest.mark.parametrize("objective", ["h", "g"])
def test_objectives_are_those_of_masks(objective):
    logits = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(objective_value(logits, objective, 10), logits)
    assert torch.allclose(4 * found, OBJECTIVES[objective](logits.detach(), 10))


def test_batche_says_which_task_a_batch_is_of(ensemble):
    learner, engine, trunk, own = ensemble
    factors = [{k: torch.from_numpy(v) for k, v in {**trunk, **part}.items()} for part in own]
    for task in range(5):
        x_QNP = learner.normalised(learner.family.test(task)[0][:64]).view(1, 64, -1)
        queries = Queries(engine, x_QNP, shortlist=5)
        found = {method: int(infer(queries, method)) for method in METHODS}
        steepest = {o: int(engine.alpha_gradients(x_QNP, o).argmin()) for o in "hg"}
        logits = [learner.network.logits(f, x_QNP[0], training=False) for f in factors]
        surest = int(torch.stack([entropy(part).mean() for part in logits]).argmin())
        assert found["h-all-masks"] == found["h-shortlist"] == surest
        assert {o: found[f"{o}-one-shot"] for o in "hg"} == steepest
    images_NP, labels_N = learner.family.test(3)
    x = learner.normalised(images_NP)
    right = engine.predict(torch.tensor([3]), x[None])[0].numpy() == labels_N
    assert int(right.sum()) == learner.correct(3, own[3], trunk)


# --- what can't be asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learner": "psp", "scenario": "gnu"}, "learner psp can't infer tasks; set it to gg"),
        ({"learner": "heads", "scenario": "nns"}, "isn't made for"),
        ({"learner": "batche", "scenario": "gnu", "eval.methods": "h-sketch"}, "h-sketch"),
        ({"learner": "batche", "scenario": "gg", "mask.transfer": "previous"}, "has no masks"),
    ],
)
def test_what_a_baseline_cannot_do_is_one_line(quick, values, message):
    with pytest.raises(ConfigError, match=message):
        check_baseline(with_values(quick, values))


def test_grouped_convolutions_are_refused(split, digits):
    config = with_values(split, {"learner": "psp", "model.name": "torchvision:resnext50_32x4d"})
    with pytest.raises(ConfigError, match="grouped convolutions"):
        BaselineLearner(config, digits)
