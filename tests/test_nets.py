"""Networks as functions of their weights, and task inference over them, against autograd."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from supsup.errors import ConfigError
from supsup.fields import with_values
from supsup.inference import TaskInference
from supsup.masking import mask_bytes, pack, unpack
from supsup.material import layers_of, net_of, statistics_of
from supsup.models import fixed_weights, make_layers
from supsup.net_inference import NetInference, make_inference
from supsup.nets import Net, TaskNorm, make_module, net_layers, prepare

SHAPE = (1, 8, 8)
#: Width 20 over one channel, 30 outputs, stage by stage.
GEM_WEIGHTS = (
    9 * 20
    + 9 * 4 * 20**2
    + sum(9 * (n * 2 * n + 3 * (2 * n) ** 2) + n * 2 * n for n in (20, 40, 80))
    + 160 * 30
)


class Small(nn.Module):
    """Everything that a network may have: groups, strides, biases, affine norms, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.group_norm = nn.GroupNorm(2, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(54, 9)

    def forward(self, x):
        x = self.grouped(self.norm(self.conv(x)).relu())
        return self.head(self.drop(self.group_norm(x).relu().flatten(1)))


@pytest.fixture(scope="module")
def small() -> Net:
    with torch.device("meta"):
        module = Small()
        prepare(module, channels=1)
    return Net(module, SHAPE)


def weights_of(net: Net, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.from_numpy(w).to(dtype) for w in fixed_weights(3, net.layers)]


def images(*shape, seed=0) -> torch.Tensor:
    stream = np.random.default_rng(seed)
    return torch.from_numpy(stream.normal(size=(*shape, 64)))


def random_statistics(net: Net, tasks: int) -> torch.Tensor:
    stream = np.random.default_rng(1)
    return torch.from_numpy(stream.uniform(0.5, 1.5, size=(tasks, net.statistics)))


def random_bank(net: Net, tasks: int) -> torch.Tensor:
    stream = np.random.default_rng(2)
    shapes = [(tasks, layer.outputs, layer.inputs) for layer in net.layers]
    return torch.from_numpy(pack([torch.from_numpy(stream.random(x) < 0.5) for x in shapes]))


def obvious(weights, statistics, x):
    """The small network, written out, in evaluation."""
    conv, grouped, head = weights
    hidden = functional.conv2d(x.view(-1, *SHAPE), conv.view(4, 1, 3, 3), padding=1)
    mean, var = (part.view(1, 4, 1, 1) for part in statistics.split(4))
    hidden = ((hidden - mean) / (var + 1e-5).sqrt()).relu()
    hidden = functional.conv2d(hidden, grouped.view(6, 2, 3, 3), stride=2, groups=2)
    return functional.group_norm(hidden, 2).relu().flatten(1) @ head.T


def test_what_is_masked_of_a_module(small):
    assert [(x.name, x.outputs, x.inputs, x.kernel) for x in small.layers] == [
        ("conv", 4, 9, (1, 3, 3)),
        ("grouped", 6, 18, (2, 3, 3)),
        ("head", 9, 54, ()),
    ]
    assert small.statistics == 8
    assert small.convolutional
    assert small.fresh_statistics(2).tolist() == [[0.0] * 4 + [1.0] * 4] * 2


def test_a_network_is_a_function_of_weights_and_statistics(small):
    weights, statistics = weights_of(small), random_statistics(small, 1)[0]
    found = small.logits(weights, small.by_norm(statistics), images(5), training=False)
    torch.testing.assert_close(found, obvious(weights, statistics, images(5)))


def test_statistics_move_as_torch_moves_them():
    norm, reference = TaskNorm(4), nn.BatchNorm2d(4, affine=False)
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
    for seed in range(3):
        x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(norm(x), reference(x))
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    norm.eval(), reference.eval()
    torch.testing.assert_close(norm(x), reference(x))


def test_mlps_have_the_layers_of_the_fast_engines():
    for name in ("lenet-300-100", "fc-1024-1024"):
        assert net_layers(make_module(name, SHAPE, 30)) == make_layers(name, 64, 30)


@pytest.mark.parametrize(
    ("name", "weights", "statistics"),
    [
        ("bnnet", 2048 * (64 + 2048 + 30), 2 * 2 * 2048),
        ("gem-resnet18", GEM_WEIGHTS, 2 * 1500),
        ("torchvision:resnet18", None, 2 * 4800),
    ],
)
def test_sizes_of_networks(quick, digits, name, weights, statistics):
    config = with_values(quick, {"model.name": name})
    assert statistics_of(config, digits) == statistics
    if weights is not None:
        assert sum(layer.weights for layer in layers_of(config, digits)) == weights


def test_weights_depend_on_the_name_and_the_shape_of_a_layer(small):
    first, second, _ = small.layers
    a, b = fixed_weights(0, [first, second])
    assert np.unique(np.abs(a)).tolist() == [np.float32(np.sqrt(2 / 9))]
    assert np.unique(np.abs(b)).tolist() == [np.float32(np.sqrt(2 / 18))]
    np.testing.assert_array_equal(fixed_weights(0, [second])[0], b)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "did you mean resnet1"),
        ("torchvision:vit_b_16", "parameter|doesn't take images"),
        ("torchvision:alexnet", "doesn't take images of 1 x 8 x 8"),
        ("torchvision:googlenet", "googlenet"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_one_line(quick, digits, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        layers_of(with_values(quick, {"model.name": name}), digits)
    assert "\n" not in str(caught.value)


# --- task inference --------------------------------------------------------------------------


def engine_of(net: Net, tasks: int) -> NetInference:
    weights = weights_of(net)
    statistics = random_statistics(net, tasks)
    return NetInference(
        random_bank(net, tasks), weights, net.layers, 6, net=net, statistics_TS=statistics
    )


def objective_of(logits, objective):
    log_p = logits.log_softmax(-1)
    if objective == "h":
        return -(log_p.exp() * log_p).sum(-1).mean()
    return torch.cat([logits[..., :6].detach(), logits[..., 6:]], -1).logsumexp(-1).mean()


@pytest.mark.parametrize("objective", ["h", "g"])
@pytest.mark.parametrize("per_query", [1, 4])
def test_gradients_are_those_of_autograd_over_alpha(small, objective, per_query):
    engine, weights = engine_of(small, 5), weights_of(small)
    masks = unpack(random_bank(small, 5), small.layers, torch.float64)
    statistics = random_statistics(small, 5)
    x = images(3, per_query)
    found = engine.alpha_gradients(x, objective)
    for query, images_NP in enumerate(x):
        alpha = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)
        mixed = [
            w * torch.einsum("t,toi->oi", alpha, m) for w, m in zip(weights, masks, strict=True)
        ]
        logits = obvious(mixed, statistics.mean(0), images_NP)
        objective_of(logits, objective).backward()
        torch.testing.assert_close(found[query], alpha.grad)


def test_gradients_where_some_alphas_are_zero(small):
    engine = engine_of(small, 5)
    tasks, alpha = torch.tensor([1, 4]), torch.tensor([0.3, 0.7], dtype=torch.float64)
    masks = unpack(random_bank(small, 5), small.layers, torch.float64)
    free = alpha.clone().requires_grad_()
    mixed = [
        w * torch.einsum("t,toi->oi", free, m[tasks])
        for w, m in zip(weights_of(small), masks, strict=True)
    ]
    statistics = alpha @ random_statistics(small, 5)[tasks]
    objective_of(obvious(mixed, statistics, images(2)), "h").backward()
    found = engine.gradient_at(images(2), "h", tasks, alpha)
    torch.testing.assert_close(found, free.grad)


def test_logits_of_a_mask_take_its_own_statistics(small):
    engine, x = engine_of(small, 3), images(2, 4)
    masks = unpack(random_bank(small, 3), small.layers, torch.float64)
    for task in range(3):
        masked = [w * m[task] for w, m in zip(weights_of(small), masks, strict=True)]
        expected = obvious(masked, random_statistics(small, 3)[task], x.flatten(0, 1))
        torch.testing.assert_close(engine.logits(task, x).flatten(0, 1), expected)
    tasks = torch.tensor([2, 0])
    for query, found in enumerate(engine.predict(tasks, x)):
        expected = engine.logits(int(tasks[query]), x[query])[:, :6].argmax(1)
        assert torch.equal(found, expected)


def test_the_general_inference_of_an_mlp_is_the_fast_one(quick, digits):
    layers, net = layers_of(quick, digits), net_of(quick, digits)
    weights = [torch.from_numpy(w).double() for w in fixed_weights(0, layers)]
    stream = np.random.default_rng(0)
    packed = torch.from_numpy(
        pack([torch.from_numpy(stream.random((6, x.outputs, x.inputs)) < 0.5) for x in layers])
    )
    assert packed.shape[1] == mask_bytes(layers)
    x, none = images(3, 2), torch.empty(6, 0)
    for depth in (0, 1, 2):
        fast = make_inference(quick, digits, packed, weights, layers, 10, depth=depth)
        assert type(fast) is TaskInference
        general = NetInference(
            packed, weights, layers, 10, depth=depth, net=net, statistics_TS=none
        )
        for objective in ("h", "g"):
            torch.testing.assert_close(
                general.alpha_gradients(x, objective), fast.alpha_gradients(x, objective)
            )
    torch.testing.assert_close(general.logits(4, x), fast.logits(4, x))


def test_inference_is_picked_by_the_network(quick, digits):
    config = with_values(quick, {"model.name": "gem-resnet18"})
    layers = layers_of(config, digits)
    weights = [torch.from_numpy(w) for w in fixed_weights(0, layers)]
    packed = torch.zeros(2, mask_bytes(layers), dtype=torch.uint8)
    statistics = np.ones((2, statistics_of(config, digits)), np.float32)
    engine = make_inference(config, digits, packed, weights, layers, 10, 1 << 20, statistics)
    assert isinstance(engine, NetInference)
    with pytest.raises(ValueError, match="statistics are"):
        make_inference(config, digits, packed, weights, layers, 10, 1 << 20, statistics[:, :-1])
