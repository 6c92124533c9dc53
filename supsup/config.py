"""What a run is: frozen configuration. Every field has a rule and a line of help."""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from supsup.errors import near

MAX_TASKS = 10_000_000
DATASETS = ("digits", "digits-16", "mnist", "fashion-mnist")
Scenario = Literal["gg", "gns", "gnu", "nns"]
OBJECTIVES = ("h", "g")
ALGORITHMS = ("shortlist", "one-shot", "sketch", "binary", "gradient-descent", "all-masks")
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
]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _setting(help_text: str, **rule: Any) -> Any:
    return Field(description=help_text, **rule)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The network whose fixed random weights all masks share."""

    name: Annotated[
        Literal["lenet-300-100", "fc-1024-1024"],
        _setting("hidden layers of the fixed network"),
    ] = "lenet-300-100"
    output_size: Annotated[
        int,
        _setting(
            "output neurons s; those beyond the classes are superfluous and sharpen task inference",
            ge=1,
            le=100_000,
        ),
    ] = 100


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """How the mask of one task is trained: RMSprop on the scores, straight through the mask."""

    batches: Annotated[int, _setting("training batches per task", ge=1, le=10_000_000)] = 1000
    batch_size: Annotated[int, _setting("images per batch", ge=1, le=65_536)] = 128
    learning_rate: Annotated[float, _setting("RMSprop's rate at the first batch", gt=0, le=1e3)] = (
        5e-4
    )
    schedule: Annotated[
        Literal["constant", "linear"],
        _setting("learning rate over the batches of a task: constant, or linear down to 0"),
    ] = "linear"
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
        Literal["auto", "dense", "sparse"],
        _setting(
            "sparse skips background pixels (on CPUs: bf16 with AVX512-BF16, fp32 with AVX2); "
            "auto: sparse where it can be had and most pixels are background"
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    """How a bank is evaluated. Nothing here shapes the masks."""

    methods: Annotated[
        tuple[Method, ...],
        _setting("task inference, objective-algorithm, comma-separated; the first is the headline"),
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
    ] = 0.25
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
            "digits, digits-16 (16x16 pixels), mnist, fashion-mnist, or images:DIR with train/ and "
            "test/ in it"
        ),
    ] = "mnist"
    image_size: Annotated[
        int, _setting("side in pixels that images:DIR is resized to", ge=1, le=512)
    ] = 32
    seed: Annotated[int, _setting("root of every random stream", ge=0, lt=2**64)] = 0
    block_size: Annotated[
        int,
        _setting(
            "tasks per block, the unit of work and of commit; 0: 10 on a CPU, 250 on a GPU, which "
            "trains as many together as its memory holds",
            ge=0,
            le=10_000,
        ),
    ] = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    openset: OpenSetConfig = dataclasses.field(default_factory=OpenSetConfig)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS and not re.fullmatch(r"images:[^\x00-\x1f]+", self.dataset):
            raise ValueError(
                f"dataset is {self.dataset!r}, must be one of {', '.join(DATASETS)} "
                f"or images:DIR{near(self.dataset, DATASETS)}"
            )


def checkpoints(config: RunConfig) -> tuple[int, ...]:
    """Return the numbers of tasks learned at which the run is evaluated, the last one included.

    Without ``eval.at``: 1, 2.5 and 5 times the powers of ten from 10 on, below the task count.
    """
    if config.eval.at:
        return (*(k for k in config.eval.at if k < config.tasks), config.tasks)
    powers = range(1, int(math.log10(config.tasks)) + 1)
    spread = (round(step * 10**power) for power in powers for step in (1, 2.5, 5))
    return tuple(sorted({k for k in spread if k < config.tasks} | {config.tasks}))
