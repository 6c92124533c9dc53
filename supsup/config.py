"""What a run is: frozen configuration, the recipes that fill it, and its training fingerprint.

Every field has a rule and a line of help; the command line is made from them. A recipe is a
function that returns a configuration.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from supsup.errors import ConfigError

MAX_TASKS = 10_000_000
#: Tasks per block where the user leaves it open, by device.
_BLOCK_SIZES = {"cpu": 10, "cuda": 250}
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


# --- recipes ---------------------------------------------------------------------------------


def permuted_digits() -> RunConfig:
    """SupSup on permuted 8x8 digits: embedded data, about a minute on a laptop."""
    return RunConfig(
        tasks=100,
        dataset="digits",
        model=ModelConfig(output_size=500),
        train=TrainConfig(batches=500, learning_rate=1e-3),
        # With 64 pixels a wrong mask is often surer of an image than the right one: no shortlist.
        eval=EvalConfig(methods=("h-one-shot", "g-one-shot")),
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
        eval=EvalConfig(methods=("h-one-shot", "g-one-shot")),
    )


def permuted_mnist() -> RunConfig:
    """SupSup on PermutedMNIST with LeNet-300-100, s = 100."""
    return RunConfig(tasks=50, dataset="mnist", model=ModelConfig(output_size=100))


RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    "permuted-digits": permuted_digits,
    "permuted-mnist": permuted_mnist,
    "open-digits": open_digits,
}

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
    "openset.epsilon": 0.125,
    "openset.threshold": "fixed",
    "openset.decide_every": 100,
    "openset.look": "first",
    "openset.boundaries": "hidden",
}
#: Values that a protocol fixes, by dotted field. "paper": Sections 4.2 and 4.3 and Appendix C.
#: "paper-code": what the paper's code does beyond that, where nns learns of task boundaries.
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    "paper-code": {**_PAPER, "openset.boundaries": "told"},
}


# --- values in and out -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One configurable value: where it is, what it means, what it may be."""

    path: str
    help: str
    choices: tuple[str, ...]
    is_list: bool


def config_fields() -> tuple[FieldInfo, ...]:
    """Return every configurable field of a run, nested ones by dotted path."""
    return tuple(_walk_fields(RunConfig, ""))


def _walk_fields(cls: type, prefix: str) -> Iterable[FieldInfo]:
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _walk_fields(typing.cast(type, hint), f"{prefix}{name}.")
            continue
        value_type, *notes = typing.get_args(hint)
        item = typing.get_args(value_type)[0] if _is_tuple(value_type) else value_type
        yield FieldInfo(
            path=prefix + name,
            help=notes[0].description,
            choices=typing.get_args(item) if typing.get_origin(item) is Literal else (),
            is_list=_is_tuple(value_type),
        )


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and not isinstance(hint, types.UnionType)


def get_field(config: RunConfig, path: str) -> Any:
    """Return the value at a dotted path, such as ``train.learning_rate``."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def as_text(value: Any) -> str:
    """Return a field's value as it is typed: lists comma-separated, "none" for an empty one."""
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with the values at dotted paths replaced and checked.

    Strings are parsed to the field's type; lists may be comma-separated strings.

    Raises:
        ConfigError: naming the first field that breaks its rule.
    """
    tree = to_dict(config)
    lists = {info.path for info in config_fields() if info.is_list}
    for path, given in values.items():
        value = given
        if path in lists and isinstance(value, str):
            value = [item.strip() for item in value.split(",") if item.strip()]
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[name] = value
    return from_dict(tree)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested plain values, fit for JSON."""
    return typing.cast(dict[str, Any], _ADAPTER.dump_python(config, mode="json"))


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that ``to_dict`` wrote.

    Raises:
        ConfigError: naming the first field that is unknown or breaks its rule.
    """
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        fields = {info.path: info.choices for info in config_fields()}
        raise ConfigError(explain(error.errors()[0], fields)) from None


_ADAPTER = TypeAdapter(RunConfig)

_RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of reasonable size",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
}


def explain(error: ErrorDetails, fields: Mapping[str, tuple[str, ...]]) -> str:
    """Say value, rule and remedy of one failed check; ``fields`` has the choices of each field."""
    path = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    context = error.get("ctx", {})
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown field {path}{near(path, fields)}"
    if error["type"] == "value_error":
        prefix = f"{path}." if path else ""
        return prefix + str(context["error"])
    value = shown(error["input"])
    if error["type"] == "literal_error":
        choices = fields.get(path, ())
        meant = near(str(error["input"]), choices)
        return f"{path} is {value}, must be one of {', '.join(choices)}{meant}"
    rule = _RULES.get(error["type"], error["msg"]).format(**context)
    return f"{path} is {value}, {rule}"


def shown(value: Any) -> str:
    """Return a value as an error shows it: short, on one line."""
    text = repr(value)
    if isinstance(value, str) and re.fullmatch(r"[-+.\w]+", value):
        text = value
    return text if len(text) <= 60 else text[:57] + "..."


def near(word: str, known: Iterable[str]) -> str:
    """Return a question that names the word meant, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# --- identity --------------------------------------------------------------------------------


def resolve(
    config: RunConfig, *, device: str, native_bf16: bool, sparse: Collection[str]
) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what the workers are.

    Args:
        config: as the user gave it.
        device: what ``auto`` means here, "cpu" or "cuda".
        native_bf16: whether that device multiplies bf16 in hardware.
        sparse: the precisions in which the sparse engine can be had there; none if it doesn't pay
            for this data set.

    Raises:
        ConfigError: if the sparse engine is asked for with a device it isn't made for.
    """
    values: dict[str, Any] = {}
    if config.train.device == "auto":
        values["train.device"] = device
    if config.train.precision == "auto":
        values["train.precision"] = "bf16" if native_bf16 else "fp32"
    train = with_values(config, values).train
    if config.block_size == 0:
        values["block_size"] = _BLOCK_SIZES[train.device]
    fits = train.device == "cpu"
    if train.engine == "auto":
        values["train.engine"] = "sparse" if fits and train.precision in sparse else "dense"
    elif train.engine == "sparse" and not fits:
        raise ConfigError(
            f"train.engine is sparse, which is made for CPUs, not {train.device}; set it to auto "
            "or dense"
        )
    return with_values(config, values)


def is_auto(config: RunConfig) -> bool:
    """Say whether something still depends on the machine that trains."""
    train = config.train
    return "auto" in (train.device, train.precision, train.engine)


def training_fields(config: RunConfig) -> dict[str, Any]:
    """Return everything that shapes the masks and nothing else, by dotted field.

    The number of tasks is not among them: a bank of 50 tasks is the beginning of one of 100.
    Neither is ``block_size``: blocks of any size give the same masks (a test holds that). In
    scenario nns both count where they matter: a bank is what one whole stream left behind.
    """
    fields = {"family": "permuted", "dataset": config.dataset, "seed": config.seed}
    if config.dataset.startswith("images:"):
        fields |= {"dataset": "images", "image_size": config.image_size}
    groups = ["model", "train"]
    if config.scenario == "nns":
        fields |= {"scenario": "nns", "tasks": config.tasks}
        groups.append("openset")
    for group in groups:
        values = dataclasses.asdict(getattr(config, group))
        fields |= {f"{group}.{name}": value for name, value in values.items()}
    return fields


def fingerprint(config: RunConfig, dataset_sha256: str) -> str:
    """Return the training fingerprint, 64 hex digits: equal if and only if the masks are.

    Raises:
        ValueError: if precision, device or engine is still ``auto``.
    """
    if is_auto(config):
        raise ValueError("resolve the configuration before taking its fingerprint")
    identity = training_fields(config) | {"dataset_sha256": dataset_sha256}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def checkpoints(config: RunConfig) -> tuple[int, ...]:
    """Return the numbers of tasks learned at which the run is evaluated, the last one included.

    Without ``eval.at``: 1, 2.5 and 5 times the powers of ten from 10 on, below the task count.
    """
    if config.eval.at:
        return (*(k for k in config.eval.at if k < config.tasks), config.tasks)
    powers = range(1, int(math.log10(config.tasks)) + 1)
    spread = (round(step * 10**power) for power in powers for step in (1, 2.5, 5))
    return tuple(sorted({k for k in spread if k < config.tasks} | {config.tasks}))
