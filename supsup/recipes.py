"""Recipes, functions that return a configuration, and protocols, which fix some of its values.

A recipe's first line says what it is; docs/recipes.md has all of them in a table.
"""

from collections.abc import Callable, Mapping
from typing import Any

from supsup.baselines.settings import learner_values
from supsup.config import (
    MLPS,
    EvalConfig,
    MaskConfig,
    Method,
    ModelConfig,
    OpenSetConfig,
    RunConfig,
    TrainConfig,
)
from supsup.errors import ConfigError
from supsup.fields import get_field, with_values

#: Stands for a folder that only the user knows.
ANY_FOLDER = "images:DIR"
#: Task inference without superfluous output neurons, if the task is not given.
_INFERRED: tuple[Method, ...] = ("h-binary", "h-one-shot", "max-logit")


def permuted_digits() -> RunConfig:
    """SupSup on permuted 8x8 digits: embedded data, about a minute on a laptop."""
    return RunConfig(
        tasks=100,
        dataset="digits",
        model=ModelConfig(output_size=500),
        train=TrainConfig(batches=500, learning_rate=1e-3),
        # With 64 pixels a wrong mask is often surer of an image than the right one: no shortlist.
        eval=EvalConfig(methods=("h-one-shot", "g-one-shot"), depth=1),
    )


def open_digits() -> RunConfig:
    """Open set (NNs) on permuted digits: no task is ever named. Embedded data, a minute or so."""
    return RunConfig(
        tasks=20,
        scenario="nns",
        # Of 64 pixels, two permutations have too many in common to tell new data from known.
        dataset="digits-16",
        model=ModelConfig(output_size=500),
        train=TrainConfig(batches=300, learning_rate=1e-3),
        eval=EvalConfig(methods=("h-one-shot", "g-one-shot"), depth=1),
        openset=OpenSetConfig(depth=1),
    )


def permuted_mnist() -> RunConfig:
    """SupSup on PermutedMNIST with LeNet-300-100, s = 100."""
    # What tells permutations apart is in the first layer; of the others the gradient is noise.
    return RunConfig(
        tasks=50,
        dataset="mnist",
        model=ModelConfig(output_size=100),
        eval=EvalConfig(depth=1),
        openset=OpenSetConfig(depth=1),
    )


def rotated_mnist() -> RunConfig:
    """RotatedMNIST (paper, Figure 5 left): 36 angles, FC-1024-1024, binary search on 128 images."""
    return RunConfig(
        tasks=36,
        family="rotated",
        degrees=10,
        dataset="mnist",
        model=ModelConfig(name="fc-1024-1024", output_size=200),
        train=TrainConfig(batches=1000, learning_rate=1e-4, schedule="constant"),
        eval=EvalConfig(
            methods=("h-binary", "g-binary"), batch=128, images=0, at=(2, 5, 10, 15, 20, 25, 30, 35)
        ),
    )


def split_mnist() -> RunConfig:
    """SplitMNIST: five tasks of two digits each, LeNet-300-100, task inferred from 128 images."""
    return RunConfig(
        tasks=5,
        family="split",
        classes_per_task=2,
        class_order="sorted",
        dataset="mnist",
        model=ModelConfig(output_size=100),
        train=TrainConfig(batches=500),
        eval=EvalConfig(
            methods=("h-binary", "h-one-shot", "max-logit"), batch=128, images=0, at=(1, 2, 3, 4)
        ),
    )


def split_cifar100() -> RunConfig:
    """SplitCIFAR100 (paper, Figure 2 right): 20 tasks of 5 classes, narrow ResNet-18, task given.

    250 epochs of a task's 2500 images are 4883 batches of 128. Of the paper's sparsities, this is
    the densest; the classes are drawn by seed.
    """
    return RunConfig(
        tasks=20,
        family="split",
        classes_per_task=5,
        scenario="gg",
        dataset="cifar100",
        model=ModelConfig(name="gem-resnet18", output_size=5),
        mask=MaskConfig(algorithm="edge-popup", keep_fraction=0.075, budget="erdos-renyi"),
        train=TrainConfig(batches=4883, optimizer="adam", learning_rate=1e-3, schedule="cosine"),
        eval=EvalConfig(methods=_INFERRED),
    )


def split_imagenet() -> RunConfig:
    """SplitImageNet (paper, Figure 2 left): 100 tasks of 10 classes, ResNet-50, task given.

    100 epochs of a task's 12,800 images are 5000 batches of 256. Of the paper's sparsities, this
    is the densest.
    """
    return RunConfig(
        tasks=100,
        family="split",
        classes_per_task=10,
        scenario="gg",
        dataset=ANY_FOLDER,
        image_size=224,
        model=ModelConfig(name="torchvision:resnet50", output_size=10),
        mask=MaskConfig(algorithm="edge-popup", keep_fraction=0.034, budget="erdos-renyi"),
        train=TrainConfig(
            batches=5000, batch_size=256, optimizer="sgd", learning_rate=0.1, schedule="cosine"
        ),
        eval=EvalConfig(methods=_INFERRED),
    )


def split_images() -> RunConfig:
    """Tasks of two classes each of any folder of images, narrow ResNet-18, task given."""
    return RunConfig(
        tasks=5,
        family="split",
        classes_per_task=2,
        scenario="gg",
        dataset=ANY_FOLDER,
        model=ModelConfig(name="gem-resnet18", output_size=2),
        mask=MaskConfig(algorithm="edge-popup", keep_fraction=0.1, budget="erdos-renyi"),
        train=TrainConfig(batches=500, optimizer="adam", learning_rate=1e-3, schedule="cosine"),
        eval=EvalConfig(methods=_INFERRED, at=(1, 2, 3, 4)),
    )


def hop_split_mnist() -> RunConfig:
    """HopSupSup on SplitMNIST (paper, 3.5): masks of hidden units, found in a Hopfield network."""
    base = split_mnist()
    asked = {"train.batches": 94, "model.output_size": 10, "learner": "hopsupsup", "eval.at": ()}
    return with_values(base, {**learner_values(asked), **asked})


RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    "permuted-digits": permuted_digits,
    "permuted-mnist": permuted_mnist,
    "open-digits": open_digits,
    "rotated-mnist": rotated_mnist,
    "split-mnist": split_mnist,
    "hop-split-mnist": hop_split_mnist,
    "split-cifar100": split_cifar100,
    "split-imagenet": split_imagenet,
    "split-images": split_images,
}


def summary(recipe: Callable[[], RunConfig]) -> str:
    """Return what a recipe is, in a line."""
    return (recipe.__doc__ or "").partition("\n")[0].removesuffix(".")


def quick(config: RunConfig) -> dict[str, Any]:
    """Return what to change, by dotted field, so that a run takes minutes on two cores.

    What it measures then is that everything works; accuracies are those of too little training.
    """
    mlp = config.model.name in MLPS
    most: dict[str, Any] = {
        "tasks": 5,
        "train.batches": 200 if mlp else 40,
        "train.batch_size": 128 if mlp else 32,
        "image_size": 32,
        "eval.images": 50 if config.eval.batch == 1 else 2 * config.eval.batch,
    }
    smaller: dict[str, Any] = {
        name: min(get_field(config, name) or value, value) for name, value in most.items()
    }
    smaller["eval.at"] = tuple(k for k in config.eval.at if k < smaller["tasks"])
    return {name: value for name, value in smaller.items() if value != get_field(config, name)}


_PAPER: Mapping[str, Any] = {
    "train.batches": 1000,
    "train.batch_size": 128,
    "train.learning_rate": 1e-4,
    "train.schedule": "constant",
    "train.alpha": 0.99,
    "train.epsilon": 1e-8,
    "eval.methods": ("h-one-shot", "g-one-shot"),
    "eval.batch": 1,
    "eval.group": 128,
    "eval.images": 0,
    "eval.depth": 0,
    "openset.depth": 0,
    "openset.epsilon": 0.125,
    "openset.threshold": "fixed",
    "openset.decide_every": 100,
    "openset.look": "first",
    "openset.boundaries": "hidden",
}
#: Values that a protocol fixes for permuted tasks, by dotted field. "paper": Sections 4.2 and 4.3
#: and Appendix C. "paper-code": what the paper's code does beyond that, where nns learns of task
#: boundaries.
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    "paper-code": {**_PAPER, "openset.boundaries": "told"},
}
#: Recipes that are an experiment of the paper's as they are.
_AS_IN_THE_PAPER = ("rotated-mnist", "hop-split-mnist", "split-cifar100", "split-imagenet")


def protocol_values(protocol: str, recipe: str) -> Mapping[str, Any]:
    """Return what a protocol puts in the place of a recipe's values, by dotted field.

    Raises:
        ConfigError: if it is the paper's, and the paper has no such experiment.
    """
    if protocol == "default" or recipe in _AS_IN_THE_PAPER:
        return {}
    if RECIPES[recipe]().family != "permuted":
        raise ConfigError(
            f"protocol is {protocol}, but the paper has no experiment like recipe {recipe}; leave "
            "the protocol out"
        )
    return PROTOCOLS[protocol]
