"""Values of a configuration in and out: by dotted path, as plain values, and checked.

Every field has a rule and a line of help (supsup.config); the command line is made from them.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from supsup.config import RunConfig
from supsup.errors import ConfigError, near, shown


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
    known = {info.path for info in config_fields()}
    lists = {info.path for info in config_fields() if info.is_list}
    for path, given in values.items():
        if path not in known:
            raise ConfigError(f"unknown field {path}{near(path, known)}")
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
