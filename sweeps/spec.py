"""What a sweep is: a frozen specification, read from TOML, checked before anything starts.

A sweep varies the fields of a recipe. A *grid* runs every combination of its values, an *arm*,
with every seed. A *search* lets a sampler draw the values, from a space, by their results. A grid
may have *variants*: settings that belong together, under a name, such as those of a learner.
"""

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from orchestrator.runfolder import check_name
from supsup.baselines.settings import learner_values
from supsup.config import RunConfig
from supsup.errors import ConfigError, near, shown
from supsup.fields import as_text, config_fields, explain, get_field, with_values
from supsup.recipes import PROTOCOLS, RECIPES, protocol_values

MAX_TRIALS = 100_000
#: Studies keep numbers as doubles: above this, two seeds could become one.
MAX_SEED = 2**53
#: What a search can go for, and which way.
OBJECTIVES = {
    "accuracy": "maximize",
    "task_accuracy": "maximize",
    "gg_accuracy": "maximize",
    "bytes": "minimize",
}
#: Objectives that a scenario doesn't measure.
_UNMEASURED = {"gg": "task_accuracy", "nns": "gg_accuracy"}
Values = Mapping[str, Any]
#: What tells variants apart among the values of an arm.
VARIANT = "variant"

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_FIELDS = {info.path: info for info in config_fields()}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Dimension:
    """What one field may be in a search: a range, or choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(problem)

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last of the choices, or of the range."""
        return (self.choices[0], self.choices[-1]) if self.choices else (self.low, self.high)

    def _problem(self) -> str | None:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                return "has both choices and a range; give one of them"
            return None if self.choices else "choices is empty, must hold at least one value"
        if self.low is None or self.high is None:
            return "has no range, must have low and high, or choices"
        if self.low >= self.high:
            return f"low is {self.low:g}, must be less than high, which is {self.high:g}"
        if self.log and self.low <= 0:
            return f"low is {self.low:g}, must be greater than 0 on a log scale"
        if self.step is not None and self.step <= 0:
            return f"step is {self.step:g}, must be greater than 0; leave it out for none"
        if self.step is not None and self.log:
            return "has both step and log; give one of them"
        return None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SearchSpec:
    """A search: how many trials, drawn by what, from where, for what."""

    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)]
    hours: Annotated[float | None, Field(gt=0)] = None
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "asha", "hyperband", "median"] = "asha"
    objectives: tuple[Literal["accuracy", "task_accuracy", "gg_accuracy", "bytes"], ...] = (
        "accuracy",
    )
    space: dict[str, Dimension]

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives is empty, must name at least one")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives names one twice; remove it")
        if not self.space:
            raise ValueError("space is empty, must have at least one field")

    @property
    def pruned(self) -> bool:
        """Whether poor trials are stopped: not among several objectives, none of which is first."""
        return self.pruner != "none" and len(self.objectives) == 1


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepSpec:
    """A sweep: what all its trials share, and what differs between them."""

    name: str
    recipe: str
    protocol: str = "default"
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_SEED)], ...], Field(min_length=1)] = (
        0,
    )
    grid: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    search: SearchSpec | None = None

    @property
    def axes(self) -> Mapping[str, tuple[Any, ...]]:
        """What the arms of a grid combine: the names of the variants, and values of fields."""
        return ({VARIANT: tuple(self.variants)} if self.variants else {}) | self.grid

    @property
    def varied(self) -> tuple[str, ...]:
        """The fields that differ between arms."""
        return tuple(self.search.space) if self.search else tuple(self.axes)

    @property
    def objectives(self) -> tuple[str, ...]:
        """What trials are compared by, the most important first."""
        return self.search.objectives if self.search else ("accuracy",)

    def first(self) -> RunConfig:
        """Return the configuration of the first arm; without any arm there may be no valid one."""
        return self.config(self.first_values(), self.seeds[0])

    def arms(self) -> Iterator[Values]:
        """Yield every arm of the grid; none of a search."""
        if self.search is None:
            for combination in itertools.product(*self.axes.values()):
                yield dict(zip(self.axes, combination, strict=True))

    def first_values(self) -> Values:
        """Return the first arm; of a search, the first corner of its space."""
        if self.search is None:
            return next(self.arms())
        return {path: dimension.ends[0] for path, dimension in self.search.space.items()}

    def config(self, values: Values, seed: int) -> RunConfig:
        """Return the configuration of a trial.

        Recipe, protocol, base, variant, values: the later counts. What names a learner brings that
        learner's own settings with it.

        Raises:
            ConfigError: if a value breaks its field's rule.
        """
        own = {path: value for path, value in values.items() if path != VARIANT}
        variant = self.variants.get(values.get(VARIANT, ""), {})
        merged: dict[str, Any] = {**protocol_values(self.protocol, self.recipe)}
        for layer in (self.base, variant, own):
            merged |= {**learner_values(layer), **layer}
        return with_values(RECIPES[self.recipe](), {**merged, "seed": seed})


_SPEC = TypeAdapter(SweepSpec)
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "name": (),
    "recipe": tuple(RECIPES),
    "protocol": tuple(PROTOCOLS),
    "base": (),
    "seeds": (),
    "grid": (),
    "variants": (),
    "search": (),
    "search.trials": (),
    "search.hours": (),
    "search.sampler": ("tpe", "random"),
    "search.pruner": ("none", "asha", "hyperband", "median"),
    "search.objectives": tuple(OBJECTIVES),
    "search.space": (),
}
_DIMENSION = tuple(field.name for field in dataclasses.fields(Dimension))


# --- in and out ------------------------------------------------------------------------------


def read_spec(path: Path) -> SweepSpec:
    """Read a sweep from a TOML file; its name is the file's unless it gives one.

    Raises:
        ConfigError: naming the first thing that is wrong, and its remedy.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"sweep file {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"sweep file {path} is no TOML: {error}; mend it there") from None
    if not tree:
        raise ConfigError(f"sweep file {path} is empty, must name a recipe and a grid or a search")
    return spec_of({"name": path.stem, **tree})


def spec_of(tree: Mapping[str, Any]) -> SweepSpec:
    """Return the sweep that nested plain values describe, checked.

    Raises:
        ConfigError: naming the first thing that is wrong, and its remedy.
    """
    flat = dict(tree)
    for group in ("base", "grid"):
        if isinstance(flat.get(group), Mapping):
            flat[group] = _flat(flat[group])
    if isinstance(variants := flat.get("variants"), Mapping):
        flat["variants"] = {
            name: _flat(x) if isinstance(x, Mapping) else x for name, x in variants.items()
        }
    search = flat.get("search")
    if isinstance(search, Mapping) and isinstance(search.get("space"), Mapping):
        flat["search"] = {**search, "space": _flat(search["space"], _DIMENSION)}
    try:
        spec = _SPEC.validate_python(flat)
    except ValidationError as error:
        raise ConfigError(_explained(error)) from None
    _check(spec)
    return _canonical(spec)


def to_tree(spec: SweepSpec) -> dict[str, Any]:
    """Return the sweep as nested plain values, fit for JSON and for ``spec_of``."""
    tree: dict[str, Any] = _SPEC.dump_python(spec, mode="json", exclude_none=True)
    return tree


def _flat(tree: Mapping[str, Any], leaf: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    """Return values by dotted field: ``train.batches = 5`` is a table in a table to TOML."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = prefix + key
        is_group = isinstance(value, Mapping) and path not in _FIELDS and not set(value) & set(leaf)
        flat |= _flat(value, leaf, f"{path}.") if is_group and value else {path: value}
    return flat


def _explained(error: ValidationError) -> str:
    first = error.errors()[0]
    place = tuple(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "missing":
        return f"{'.'.join(place)} is missing; give it"
    if place[:2] == ("search", "space"):
        inside = {".".join((*place[:3], name)): () for name in _DIMENSION}
        return explain(first, inside)
    if first["type"] in ("tuple_type", "dict_type", "dataclass_type"):
        kind = "a list" if first["type"] == "tuple_type" else "a table"
        return f"{'.'.join(place) or 'sweep'} is {shown(first['input'])}, must be {kind}"
    if first["type"] == "too_short":
        return f"{'.'.join(place)} is empty, must hold at least one value"
    return explain(first, _CHOICES)


# --- rules between fields --------------------------------------------------------------------


def _check(spec: SweepSpec) -> None:
    check_name("sweep", spec.name)
    for field, value, known in (
        ("recipe", spec.recipe, RECIPES),
        ("protocol", spec.protocol, PROTOCOLS),
    ):
        if value not in known:
            raise ConfigError(
                f"{field} is {shown(value)}, must be one of {', '.join(known)}{near(value, known)}"
            )
    protocol_values(spec.protocol, spec.recipe)
    if bool(spec.axes) == (spec.search is not None):
        one = "[variants]" if spec.variants else "[grid]"
        found = f"both {one} and [search]" if spec.axes else "neither [grid] nor [search]"
        raise ConfigError(f"sweep {spec.name} has {found}; give one of them")
    if len(set(spec.seeds)) < len(spec.seeds):
        raise ConfigError(f"seeds is {shown(spec.seeds)}, which has one twice; remove it")
    varied = dict.fromkeys(path for path in spec.varied if path != VARIANT)
    groups = {"base": spec.base, "the sweep": varied}
    groups |= {f"variants.{name}": fields for name, fields in spec.variants.items()}
    for group, fields in groups.items():
        for path in fields:
            _check_field(spec, group, path)
    for name, fields in spec.variants.items():
        check_name("variant", name)
        if both := sorted(set(fields) & set(spec.grid)):
            raise ConfigError(
                f"{both[0]} is both in variants.{name} and varied; remove one of them"
            )
    if spec.search:
        _check_search(spec, spec.search)
    else:
        _check_grid(spec)


def _check_field(spec: SweepSpec, group: str, path: str) -> None:
    if path == "seed":
        raise ConfigError(f"seed is in {group}; list the seeds of all arms under seeds instead")
    if path not in _FIELDS:
        raise ConfigError(f"unknown field {path} in {group}{near(path, _FIELDS)}")
    if path in spec.base and path in spec.varied:
        raise ConfigError(f"{path} is both in base and varied; remove one of them")


def _check_grid(spec: SweepSpec) -> None:
    for path, values in spec.grid.items():
        if not values:
            raise ConfigError(f"grid.{path} is empty, must hold at least one value")
    trials = math.prod(len(values) for values in spec.axes.values()) * len(spec.seeds)
    if trials > MAX_TRIALS:
        raise ConfigError(f"the grid has {trials} trials, must have at most {MAX_TRIALS}")
    for arm in spec.arms():
        _check_config(spec.config(arm, spec.seeds[0]))


def _check_config(config: RunConfig) -> None:
    if config.scenario == "nns" and config.openset.chunks > 1:
        raise ConfigError(
            f"openset.chunks is {config.openset.chunks}, must be 1 in a sweep, whose trials keep "
            "all workers busy; give supsup run a stream in chunks"
        )


def _check_search(spec: SweepSpec, search: SearchSpec) -> None:
    if len(spec.seeds) > 1:
        raise ConfigError(
            f"seeds is {shown(spec.seeds)}, must be one seed in a search; "
            "compare what it finds over seeds by a grid"
        )
    for path, dimension in search.space.items():
        for value in dimension.choices or dimension.ends:
            config = spec.config({**spec.first_values(), path: value}, spec.seeds[0])
            _check_config(config)
            _check_objectives(search, config)
        if dimension.choices is None:
            _check_range(path, dimension, get_field(spec.first(), path))


def _check_objectives(search: SearchSpec, config: RunConfig) -> None:
    if (unmeasured := _UNMEASURED.get(config.scenario)) in search.objectives:
        raise ConfigError(
            f"objectives has {unmeasured}, which scenario {config.scenario} doesn't measure; "
            "remove it"
        )


def _check_range(path: str, dimension: Dimension, value: Any) -> None:
    """Check a range against a value that its field has."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"search.space.{path} is no number; give it choices, not a range")
    step = dimension.step
    if step is not None and isinstance(value, int) and not step.is_integer():
        raise ConfigError(
            f"search.space.{path}.step is {step:g}, must be a whole number, as {path} is"
        )


# --- values in one form ----------------------------------------------------------------------


def _canonical(spec: SweepSpec) -> SweepSpec:
    """Return the sweep with values as fields have them: "5" is 5, a list is its text.

    Raises:
        ConfigError: if two values of a field are the same.
    """
    grid = {path: _values(spec, path, values) for path, values in spec.grid.items()}
    if spec.search is None:
        return dataclasses.replace(spec, grid=grid)
    space = {
        path: dataclasses.replace(dimension, choices=_values(spec, path, dimension.choices))
        if dimension.choices
        else dimension
        for path, dimension in spec.search.space.items()
    }
    return dataclasses.replace(spec, search=dataclasses.replace(spec.search, space=space))


def _values(spec: SweepSpec, path: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    found = []
    for value in values:
        # A field's rule may need another field's value: that was checked arm by arm.
        own = get_field(_alone(spec, path, value), path)
        own = as_text(own) if isinstance(own, tuple) else own
        if own in found:
            raise ConfigError(f"{path} has the value {shown(own)} twice; remove one of them")
        found.append(own)
    return tuple(found)


def _alone(spec: SweepSpec, path: str, value: Any) -> RunConfig:
    for arm in spec.arms():
        if arm[path] == value:
            return spec.config(arm, spec.seeds[0])
    return spec.config({path: value}, spec.seeds[0])
