"""What the recipes are, as text."""

from collections.abc import Callable

from supsup.config import RunConfig
from supsup.fields import as_text, config_fields, get_field
from supsup.recipes import RECIPES, summary


def all_recipes() -> str:
    """Return every recipe with a line about it, and one of its main settings."""
    blocks = [f"{name}\n    {summary(r)}\n    {_settings(r())}" for name, r in RECIPES.items()]
    return "\n\n".join([*blocks, "All settings of a recipe: supsup recipes NAME"])


def _settings(config: RunConfig) -> str:
    train, evaluation = config.train, config.eval
    decide = f"{config.scenario} by {evaluation.methods[0]}"
    if config.scenario == "gg":
        decide = "gg"
    elif evaluation.batch > 1:
        decide += f" from {evaluation.batch} images"
    return (
        f"{config.tasks} tasks of {config.dataset}; {config.model.name}, s = "
        f"{config.model.output_size}; {config.mask.algorithm}; {train.batches} x "
        f"{train.batch_size}, {train.optimizer} {train.learning_rate:g} {train.schedule}; {decide}"
    )


def one_recipe(name: str, recipe: Callable[[], RunConfig]) -> str:
    """Return all values of a recipe, a line each; a star marks what it sets itself."""
    config, plain = recipe(), RunConfig()
    lines = [f"{name}: {summary(recipe)}", "", "* set by the recipe; the others are the defaults"]
    for info in config_fields():
        value = get_field(config, info.path)
        star = " " if value == get_field(plain, info.path) else "*"
        lines.append(f"{star} {info.path:26} {as_text(value)}")
    return "\n".join(lines)
