"""What a run is: frozen configuration. Every field has a rule and a line of help."""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from supsup.errors import near, shown

MAX_TASKS = 10_000_000
DATASETS = ("digits", "digits-16", "mnist", "fashion-mnist", "cifar10", "cifar100")
#: Networks by name; any other is a torchvision model, ``torchvision:NAME``.
MLPS = ("lenet-300-100", "fc-1024-1024")
NETS = (*MLPS, "bnnet", "gem-resnet18")
Scenario = Literal["gg", "gns", "gnu", "nns"]
OBJECTIVES = ("h", "g")
ALGORITHMS = (
    "shortlist",
    "one-shot",
    "sketch",
    "binary",
    "gradient-descent",
    "all-masks",
    "max-logit",
)
Method = Literal[
    "h-shortlist",
    "h-one-shot",
    "h-sketch",
    "h-binary",
    "h-gradient-descent",
    "h-all-masks",
    "g-shortlist",
    "g-one-shot",
    "g-sketch",
    "g-binary",
    "g-gradient-descent",
    "max-logit",
]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _setting(help_text: str, **rule: Any) -> Any:
    return Field(description=help_text, **rule)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The network whose fixed random weights all masks share."""

    name: Annotated[
        str,
        _setting(
            "the fixed network: lenet-300-100, fc-1024-1024, bnnet (2048-2048 with batch norm), "
            "gem-resnet18 (20 channels), or torchvision:NAME"
        ),
    ] = "lenet-300-100"
    output_size: Annotated[
        int,
        _setting(
            "output neurons s; those beyond the classes are superfluous and sharpen task inference",
            ge=1,
            le=100_000,
        ),
    ] = 100

    def __post_init__(self) -> None:
        if self.name not in NETS and not re.fullmatch(r"torchvision:\w+", self.name):
            raise ValueError(
                f"name is {shown(self.name)}, must be one of {', '.join(NETS)} or "
                f"torchvision:NAME{near(self.name, NETS)}"
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MaskConfig:
    """What makes a mask of scores, and where the scores of a task start from."""

    algorithm: Annotated[
        Literal["threshold", "edge-popup"],
        _setting(
            "threshold: weights whose score is not negative; edge-popup: those of the largest "
            "|score| of each layer"
        ),
    ] = "threshold"
    keep_fraction: Annotated[
        float, _setting("part of the weights that an edge-popup mask keeps", gt=0, lt=1)
    ] = 0.5
    budget: Annotated[
        Literal["uniform", "erdos-renyi"],
        _setting(
            "how edge-popup spreads them: uniform: the same part of every layer; erdos-renyi: more "
            "of small layers, at most half of any"
        ),
    ] = "uniform"
    transfer: Annotated[
        Literal["none", "running-mean", "previous", "most-similar"],
        _setting(
            "scores that a task starts from; none: random; running-mean: the mean of those of all "
            "tasks before; previous: the last task's; most-similar: those of the task before that "
            "is inferred from the new one's data. All but none train the tasks one after another"
        ),
    ] = "none"

    def __post_init__(self) -> None:
        if self.budget == "erdos-renyi" and self.keep_fraction > 0.5:
            raise ValueError(
                f"keep_fraction is {self.keep_fraction}, must be at most 0.5 with budget "
                "erdos-renyi, which keeps at most half of any layer"
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """How a mask is trained: an optimiser on the scores, gradients straight through the mask."""

    batches: Annotated[int, _setting("training batches per task", ge=1, le=10_000_000)] = 1000
    batch_size: Annotated[int, _setting("images per batch", ge=1, le=65_536)] = 128
    optimizer: Annotated[Literal["rmsprop", "adam", "sgd"], _setting("what updates the scores")] = (
        "rmsprop"
    )
    learning_rate: Annotated[float, _setting("learning rate at the first batch", gt=0, le=1e3)] = (
        5e-4
    )
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        _setting("learning rate over the batches of a task: constant, or falling to 0"),
    ] = "linear"
    trunk_learning_rate: Annotated[
        float,
        _setting(
            "learners batche and heads: rate of task 1, which trains weights that all tasks share; "
            "0: learning_rate",
            ge=0,
            le=1e3,
        ),
    ] = 0.0
    momentum: Annotated[float, _setting("momentum of sgd", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, _setting("L2 penalty on the scores", ge=0, le=1)] = 0.0
    alpha: Annotated[float, _setting("RMSprop's smoothing constant", ge=0, lt=1)] = 0.99
    epsilon: Annotated[float, _setting("RMSprop's epsilon", gt=0, le=1)] = 1e-8
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        _setting("operands of the matrix products (scores are always fp32); auto: bf16 if native"),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], _setting("where blocks are trained; auto: GPUs if any")
    ] = "auto"
    engine: Annotated[
        Literal["auto", "dense", "sparse", "fused", "general"],
        _setting(
            "dense, sparse and fused train permuted tasks of MLPs with threshold and rmsprop, "
            "sparse by skipping background pixels (on CPUs: bf16 with AVX512-BF16, fp32 with "
            "AVX2), fused by kernels of Triton (on GPUs); general trains everything else; auto: "
            "the fastest that can be had and pays"
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    """How a bank is evaluated. Nothing here shapes the masks."""

    methods: Annotated[
        tuple[Method, ...],
        _setting(
            "task inference, objective-algorithm or max-logit, comma-separated; the first is the "
            "headline"
        ),
    ] = ("h-shortlist", "h-one-shot", "g-one-shot")
    batch: Annotated[int, _setting("images that one task decision looks at", ge=1, le=65_536)] = 1
    group: Annotated[
        int,
        _setting(
            "images that share a decision, made from the first eval.batch of them; 0: as many",
            ge=0,
            le=65_536,
        ),
    ] = 0
    images: Annotated[
        int, _setting("test images per task, drawn by seed; 0: the whole test set", ge=0)
    ] = 200
    tasks: Annotated[
        int,
        _setting(
            "tasks asked about at each checkpoint, drawn by seed and spread evenly; 0: all of them",
            ge=0,
            le=MAX_TASKS,
        ),
    ] = 0
    depth: Annotated[
        int,
        _setting(
            "layers, from the first on, whose masks' gradient infers the task; 0: all, as in the "
            "paper",
            ge=0,
            le=1000,
        ),
    ] = 0
    shortlist: Annotated[
        int,
        _setting(
            "masks that shortlist runs per decision, and that sketch looks at in full",
            ge=1,
            le=4096,
        ),
    ] = 16
    sketch: Annotated[
        float,
        _setting(
            "part of the weights, those of the largest gradient, that the sketch algorithm looks "
            "at for every mask",
            gt=0,
            le=1,
        ),
    ] = 0.05
    memory_mb: Annotated[
        int,
        _setting(
            "memory in MB that task inference may take above the packed bank, per worker",
            ge=16,
            le=1_048_576,
        ),
    ] = 512
    at: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MAX_TASKS)], ...],
        _setting("numbers of tasks learned to evaluate at, comma-separated; none: a spread"),
    ] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty, must name at least one objective-algorithm")
        if self.group and self.group < self.batch:
            raise ValueError(
                f"group is {self.group}, must be 0 or at least batch, which is {self.batch}"
            )
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        object.__setattr__(self, "at", tuple(sorted(set(self.at))))

    @property
    def group_size(self) -> int:
        """Images that share one decision."""
        return self.group or self.batch


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OpenSetConfig:
    """How tasks are told apart in training when nobody names them. Scenario nns alone."""

    stream: Annotated[
        Literal["paper", "random-length", "recurring", "fuzzy", "drift"],
        _setting(
            "paper: every task once, train.batches each; random-length: lengths drawn; recurring: "
            "tasks come twice, in halves; fuzzy: tasks mix where one ends; drift: images turn "
            "slowly"
        ),
    ] = "paper"
    epsilon: Annotated[
        float,
        _setting(
            "a new mask is allocated where k times the largest probability of a mask is below "
            "1 + epsilon",
            gt=0,
            lt=4,
        ),
    ] = 0.125
    threshold: Annotated[
        Literal["fixed", "calibrated"],
        _setting("fixed: epsilon is; calibrated: it follows the margins of the decisions so far"),
    ] = "fixed"
    budget: Annotated[
        int,
        _setting(
            "masks at most; when all are taken, data that looks new is left out", ge=1, le=MAX_TASKS
        ),
    ] = 2500
    decide_every: Annotated[
        int, _setting("batches from one decision to the next", ge=1, le=10_000_000)
    ] = 100
    look: Annotated[
        Literal["first", "both"],
        _setting(
            "first: the first batch decides, as in the paper; both: the last batch must be decided "
            "alike, or nothing is trained until the next decision"
        ),
    ] = "first"
    depth: Annotated[
        int,
        _setting(
            "layers, from the first on, whose masks' gradient decides; 0: all, as in the paper",
            ge=0,
            le=1000,
        ),
    ] = 0
    boundaries: Annotated[
        Literal["hidden", "told"],
        _setting(
            "told: decisions fall on the first batch of a task and the optimiser starts anew "
            "there, as in the paper's code"
        ),
    ] = "hidden"
    chunks: Annotated[
        int,
        _setting(
            "parts that the stream is cut into, learned side by side and merged; 1: one stream",
            ge=1,
            le=4096,
        ),
    ] = 1


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """One experiment: tasks, network, training and evaluation."""

    tasks: Annotated[int, _setting("tasks to learn", ge=1, le=MAX_TASKS)] = 50
    family: Annotated[
        Literal["permuted", "rotated", "split"],
        _setting(
            "what the tasks are: permuted: all classes, the pixels in another order; rotated: all "
            "classes, the images turned; split: some of the classes each"
        ),
    ] = "permuted"
    degrees: Annotated[
        float, _setting("rotated: angle between a task and the next", gt=0, le=180)
    ] = 10.0
    classes_per_task: Annotated[int, _setting("split: classes of a task", ge=2, le=1000)] = 2
    class_order: Annotated[
        Literal["random", "sorted"],
        _setting("split: classes drawn for the tasks by seed, or taken in their order"),
    ] = "random"
    learner: Annotated[
        Literal[
            "supsup",
            "hopsupsup",
            "batche",
            "batche-random",
            "psp",
            "heads",
            "heads-random",
            "upper-bound",
            "lower-bound",
        ],
        _setting(
            "supsup; hopsupsup: masks kept in a Hopfield network; or a baseline: batche and heads "
            "(trunk trained on task 1, or random), psp (rotations), upper-bound (a network per "
            "task), lower-bound (one network, which forgets)"
        ),
    ] = "supsup"
    scenario: Annotated[
        Scenario,
        _setting(
            "gg: task given at inference; gns: inferred, labels shared; gnu: inferred, not shared; "
            "nns: never given, not in training either"
        ),
    ] = "gnu"
    dataset: Annotated[
        str,
        _setting(
            "digits, digits-16 (16x16 pixels), mnist, fashion-mnist, cifar10, cifar100, or "
            "images:DIR with train/ and test/ in it"
        ),
    ] = "mnist"
    image_size: Annotated[
        int, _setting("side in pixels that images:DIR is resized to", ge=1, le=512)
    ] = 32
    seed: Annotated[int, _setting("root of every random stream", ge=0, lt=2**64)] = 0
    block_size: Annotated[
        int,
        _setting(
            "tasks per block, the unit of work and of commit; 0: 10 on a CPU, 250 on a GPU; with "
            "the general engine 1, of MLPs on a GPU 32",
            ge=0,
            le=10_000,
        ),
    ] = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    openset: OpenSetConfig = dataclasses.field(default_factory=OpenSetConfig)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS and not re.fullmatch(r"images:[^\x00-\x1f]+", self.dataset):
            raise ValueError(
                f"dataset is {self.dataset!r}, must be one of {', '.join(DATASETS)} "
                f"or images:DIR{near(self.dataset, DATASETS)}"
            )


def method_parts(method: str) -> tuple[str, str]:
    """Return the objective of a method, "" if it has none, and its algorithm."""
    objective, _, algorithm = method.partition("-")
    return (objective, algorithm) if objective in OBJECTIVES else ("", method)


def checkpoints(config: RunConfig) -> tuple[int, ...]:
    """Return the numbers of tasks learned at which the run is evaluated, the last one included.

    Without ``eval.at``: 1, 2.5 and 5 times the powers of ten from 10 on, below the task count.
    """
    if config.eval.at:
        return (*(k for k in config.eval.at if k < config.tasks), config.tasks)
    powers = range(1, int(math.log10(config.tasks)) + 1)
    spread = (round(step * 10**power) for power in powers for step in (1, 2.5, 5))
    return tuple(sorted({k for k in spread if k < config.tasks} | {config.tasks}))
