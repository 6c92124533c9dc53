import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.recipe_list import all_recipes, one_recipe
from supsup.config import checkpoints
from supsup.errors import ConfigError
from supsup.fields import config_fields, with_values
from supsup.recipes import ANY_FOLDER, PROTOCOLS, RECIPES, quick, summary


@pytest.mark.parametrize("name", RECIPES)
def test_quick_is_small_and_leaves_the_rest(name):
    config = RECIPES[name]()
    small = with_values(config, quick(config))
    assert small.tasks <= 5
    assert small.train.batches * small.train.batch_size <= 200 * 128
    assert 0 < small.eval.images <= 256
    assert quick(small) == {}
    for kept in ("family", "model", "mask", "learner", "scenario", "dataset"):
        assert getattr(small, kept) == getattr(config, kept)
    assert checkpoints(small)[-1] == small.tasks


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_listed_with_what_it_sets(name):
    assert f"{name}\n    {summary(RECIPES[name])}" in all_recipes()
    text = one_recipe(name, RECIPES[name])
    assert all(re.search(rf"^[ *] {info.path} ", text, re.MULTILINE) for info in config_fields())
    assert re.search(rf"^\* tasks +{RECIPES[name]().tasks}$", text, re.MULTILINE) or (
        RECIPES[name]().tasks == 50
    )


def test_rotated_mnist_is_that_of_the_paper():
    """Figure 5 left: the rates of Section 4.2, which the protocol "paper" has, too."""
    config = RECIPES["rotated-mnist"]()
    assert config.tasks * config.degrees == 360
    for path, value in PROTOCOLS["paper"].items():
        if path.startswith("train."):
            assert with_values(config, {path: value}) == config


def test_the_document_has_every_recipe_in_its_table():
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    table = text.partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE)) == set(RECIPES)


def run(*words):
    from orchestrator.cli import cli

    return CliRunner().invoke(cli, words)


def test_a_recipe_without_data_says_what_to_give(tmp_path):
    result = run("run", "split-images", "--runs-dir", str(tmp_path / "runs"))
    assert "needs a data set: give --dataset images:DIR" in str(result.exception)
    assert RECIPES["split-images"]().dataset == ANY_FOLDER
    assert not (tmp_path / "runs").exists()


def test_quick_says_what_it_changes_and_leaves_what_was_given(tmp_path):
    words = ("--quick", "--tasks", "7", "--runs-dir", str(tmp_path / "runs"))
    result = run("run", "split-images", *words)
    assert "quick: train.batches 40 instead of 500" in result.stderr
    assert "tasks" not in result.stderr


def test_help_names_recipes_only_where_few_differ():
    text = re.sub(r"\s+", " ", run("run", "--help").output).replace("- ", "-")
    assert "tasks to learn [50; recipes differ: see supsup recipes NAME]" in text
    assert "[32; split-imagenet: 224]" in text


def test_an_unknown_recipe_suggests_the_near_one():
    assert "did you mean split-mnist?" in str(run("recipes", "split-mnst").exception)


def test_batch_norm_needs_more_than_one_image_at_a_time(digits):
    from orchestrator.session import check

    config = with_values(RECIPES["split-mnist"](), {"train.batch_size": 1})
    check(config, digits)
    with pytest.raises(ConfigError, match="must be at least 2 for bnnet, whose batch norm"):
        check(with_values(config, {"model.name": "bnnet"}), digits)
