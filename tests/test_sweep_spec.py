import pytest

from supsup.errors import ConfigError
from sweeps.presets import NAMES, preset
from sweeps.resuming import differences
from sweeps.spec import read_spec, spec_of, to_tree

GRID = {"name": "s", "recipe": "permuted-digits", "grid": {"train.batches": [5, 10]}}
SPACE = {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
SEARCH = {"name": "s", "recipe": "permuted-digits", "search": {"trials": 3, "space": SPACE}}


def search(**values):
    return {**SEARCH, "search": {**SEARCH["search"], **values}}


def space(path="train.learning_rate", **dimension):
    return search(space={path: dimension})


def test_a_file_is_a_sweep_by_its_name(tmp_path):
    file = tmp_path / "rates.toml"
    file.write_text("""
recipe = "permuted-digits"
seeds = [0, 7]
[base]
tasks = 12
train.batches = 30          # a table in a table to TOML
"eval.methods" = ["h-one-shot", "g-one-shot"]
[grid]
"train.learning_rate" = [1e-3, "2e-3"]
scenario = ["gnu", "gns"]
""")
    spec = read_spec(file)
    assert spec.name == "rates"
    assert spec.base == {
        "tasks": 12, "train.batches": 30, "eval.methods": ["h-one-shot", "g-one-shot"]
    }  # fmt: skip
    assert spec.grid["train.learning_rate"] == (1e-3, 2e-3)
    arms = list(spec.arms())
    assert len(arms) == 4
    config = spec.config(arms[3], 7)
    assert (config.train.learning_rate, config.scenario, config.seed) == (2e-3, "gns", 7)
    assert (config.tasks, config.train.batches) == (12, 30)
    assert spec_of(to_tree(spec)) == spec


def test_lists_are_one_value_of_a_field():
    spec = spec_of({**GRID, "grid": {"eval.methods": [["h-one-shot", "g-one-shot"], "h-sketch"]}})
    assert spec.grid["eval.methods"] == ("h-one-shot,g-one-shot", "h-sketch")
    assert spec.config(next(spec.arms()), 0).eval.methods == ("h-one-shot", "g-one-shot")


BAD = [
    ({}, "recipe is missing"),
    ({**GRID, "gird": {}}, "unknown field gird; did you mean grid?"),
    ({**GRID, "recipe": "permuted-digit"}, "did you mean permuted-digits?"),
    ({**GRID, "protocol": "papper"}, "must be one of default, paper, paper-code; did you mean"),
    ({**GRID, "name": "../up"}, "sweep name is '../up'"),
    ({**GRID, "name": ".hidden"}, "no leading dot"),
    ({**GRID, "seeds": []}, "seeds is empty"),
    ({**GRID, "seeds": [-1]}, "seeds is -1, must be at least 0"),
    ({**GRID, "seeds": [2**53]}, "must be less than"),
    ({**GRID, "seeds": [1, 1]}, "has one twice"),
    ({**GRID, "seeds": 3}, "seeds is 3, must be a list"),
    ({**GRID, "grid": {}}, "neither [grid] nor [search]"),
    ({**GRID, "grid": [1]}, "grid is [1], must be a table"),
    ({**GRID, "search": SEARCH["search"]}, "both [grid] and [search]"),
    ({**GRID, "grid": {"train.batches": 5}}, "grid.train.batches is 5, must be a list"),
    ({**GRID, "grid": {"train.batches": []}}, "grid.train.batches is empty"),
    ({**GRID, "grid": {"train.batches": [5, 5.0]}}, "has the value 5 twice"),
    ({**GRID, "grid": {"train.batches": [5, 0]}}, "train.batches is 0, must be at least 1"),
    ({**GRID, "grid": {"train.batchs": [5]}}, "did you mean train.batches?"),
    ({**GRID, "grid": {"train.learning_rate": [float("nan")]}}, "must be a finite number"),
    ({**GRID, "grid": {"seed": [1]}}, "list the seeds of all arms under seeds"),
    (
        {**GRID, "recipe": "open-digits", "grid": {"openset.chunks": [1, 2]}},
        "openset.chunks is 2, must be 1 in a sweep",
    ),
    (
        {"name": "s", "recipe": "open-digits", "search": {
            "trials": 2, "space": {"openset.epsilon": {"low": 0.1, "high": 0.2}},
            "objectives": ["gg_accuracy"],
        }},
        "objectives has gg_accuracy, which scenario nns doesn't measure",
    ),
    (
        {**SEARCH, "base": {"scenario": "gg"},
         "search": {**SEARCH["search"], "objectives": ["task_accuracy"]}},
        "objectives has task_accuracy, which scenario gg doesn't measure",
    ),
    ({**GRID, "base": {"train.batches": 3}}, "both in base and varied"),
    ({**GRID, "base": {"train": {"rate": 3}}}, "unknown field train.rate in base"),
    ({**GRID, "base": {"tasks": "many"}}, "tasks is many, must be a whole number"),
    (
        {**GRID, "seeds": list(range(500)), "grid": {"train.batches": list(range(1, 500))}},
        "must have at most 100000",
    ),
    (search(trials=0), "search.trials is 0, must be at least 1"),
    (search(hours=0), "search.hours is 0, must be greater than 0"),
    (search(sampler="tpee"), "must be one of tpe, random; did you mean tpe?"),
    (search(pruner="ashe"), "did you mean asha?"),
    (search(triels=5), "did you mean search.trials?"),
    (search(objectives=[]), "objectives is empty"),
    (search(objectives=["accuracy", "accuracy"]), "names one twice"),
    (search(objectives=None), "search.objectives is None, must be a list"),
    (search(objectives="accuracy"), "search.objectives is accuracy, must be a list"),
    (search(objectives=[float("inf")]), "search.objectives is inf, must be one of accuracy"),
    (search(objectives=["acuracy"]), "did you mean accuracy?"),
    (search(space={}), "space is empty"),
    ({**SEARCH, "seeds": [0, 1]}, "must be one seed in a search"),
    (space(low=2, high=1), "low is 2, must be less than high, which is 1"),
    (space(low=0, high=1, log=True), "low is 0, must be greater than 0 on a log scale"),
    (space(low=0.1, high=1, step=0), "step is 0, must be greater than 0"),
    (space(low=0.1, high=1, step=0.1, log=True), "both step and log"),
    (
        space("train.batches", low=3, high=9, step=0.5),
        "search.space.train.batches.step is 0.5, must be a whole number",
    ),
    (space("train.batches", low=3, high=9, step=1.5), "step is 1.5, must be a whole number"),
    (space(low=0.1), "must have low and high, or choices"),
    (space(choices=[]), "choices is empty"),
    (space(choices=[1.0], low=0.1, high=1), "both choices and a range"),
    (space(lo=0.1, high=1), "did you mean search.space.train.learning_rate.low?"),
    (space(low=float("nan"), high=1), "must be a finite number"),
    (space("train.learning_rat", low=0.1, high=1), "did you mean train.learning_rate?"),
    (space("train.schedule", low=0.1, high=1), "train.schedule is 0.1, must be one of"),
    (space("train.schedule", choices=["linear", "cubic"]), "train.schedule is cubic"),
    (space(low=0.0, high=1), "train.learning_rate is 0.0, must be greater than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "said"), BAD)
def test_bad_sweeps_are_one_line(tree, said):
    with pytest.raises(ConfigError) as caught:
        spec_of({"name": "s", **tree})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, must name a recipe"),
        (b"[1, 2]", "is no TOML"),
        (b"name = 'a'\nname = 'b'\n", "is no TOML: Cannot overwrite a value"),
        (b"\xff\xfe", "is no TOML"),
        (None, "can't be read: No such file"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, said):
    file = tmp_path / "sweep.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        read_spec(file)


def test_fields_that_need_one_another_are_valid_in_every_arm_or_nowhere():
    """A group must not be smaller than the batch, which is 128 without an arm."""
    batch = {"recipe": "rotated-mnist", "name": "s", "base": {"eval.group": 64}}
    grid = spec_of({**batch, "grid": {"eval.batch": [1, 16, 64]}})
    assert (grid.first().eval.batch, grid.first().eval.group) == (1, 64)
    rates = {"low": 1e-4, "high": 1e-2}
    space = {"train.learning_rate": rates, "eval.batch": {"choices": [16, 64]}}
    search = spec_of({**batch, "search": {"trials": 3, "space": space}})
    assert (search.first().eval.batch, search.first().train.learning_rate) == (16, 1e-4)
    with pytest.raises(ConfigError, match="group is 64, must be 0 or at least batch"):
        spec_of({**batch, "grid": {"eval.batch": [1, 128]}})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [False, True])
def test_presets_are_sweeps(name, quick):
    spec = preset(name, quick)
    assert len(list(spec.arms())) > 1
    datasets = {spec.config(arm, 0).dataset for arm in spec.arms()}
    assert all(name.startswith("digits") == quick for name in datasets), datasets


def test_an_unknown_preset_names_the_near_one():
    with pytest.raises(ConfigError, match="did you mean fig6-lenet"):
        preset("fig6-lene")


def test_several_objectives_are_not_pruned():
    assert spec_of(search(pruner="asha")).search.pruned
    assert not spec_of(search(pruner="asha", objectives=["accuracy", "bytes"])).search.pruned


def test_what_keeps_two_sweeps_apart_is_named():
    old = spec_of(GRID)
    assert differences(old, spec_of({**GRID, "seeds": [0, 1]})) == []
    assert differences(spec_of({**GRID, "seeds": [0, 1]}), old) == ["seeds lacks [1]"]
    changed = spec_of({**GRID, "base": {"tasks": 5}, "grid": {"train.batches": [5, 20]}})
    assert differences(old, changed) == [
        "base.tasks None there, 5 here",
        "grid.train.batches [5, 10] there, [5, 20] here",
    ]
    more = differences(spec_of(SEARCH), spec_of(search(trials=9, hours=2.0)))
    assert more == []
    (line,) = differences(spec_of(SEARCH), spec_of(space(low=1e-4, high=1.0, log=True)))
    assert line == "search.space.train.learning_rate.high 0.01 there, 1.0 here"


VARIANTS = {
    "name": "s",
    "recipe": "permuted-digits",
    "base": {"train.batches": 7, "train.learning_rate": 0.5},
    "variants": {
        "supsup": {"eval": {"methods": "g-one-shot"}},
        "psp": {"learner": "psp"},
        "batche": {"learner": "batche", "train.learning_rate": 0.25},
    },
}


def test_variants_are_settings_under_a_name():
    spec = spec_of({**VARIANTS, "grid": {"tasks": [3, 4]}})
    assert spec.varied == ("variant", "tasks")
    arms = list(spec.arms())
    assert arms[0] == {"variant": "supsup", "tasks": 3}
    assert len(arms) == 6
    configs = {arm["variant"]: spec.config(arm, 5) for arm in arms}
    assert {c.tasks for c in configs.values()} == {4}
    assert {c.train.batches for c in configs.values()} == {7}
    assert configs["supsup"].eval.methods == ("g-one-shot",)
    # A learner brings its own settings, which base doesn't know of; the variant itself knows more.
    assert (configs["psp"].scenario, configs["psp"].train.learning_rate) == ("gg", 1e-4)
    assert (configs["batche"].scenario, configs["batche"].train.optimizer) == ("gnu", "adam")
    assert configs["batche"].train.learning_rate == 0.25
    assert spec_of(to_tree(spec)) == spec


def test_a_learner_of_all_trials_leaves_base_the_last_word():
    spec = spec_of({**GRID, "base": {"learner": "batche", "train.learning_rate": 0.5}})
    config = spec.config(next(spec.arms()), 0)
    assert (config.train.learning_rate, config.train.trunk_learning_rate) == (0.5, 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"learner": ["psp", "heads"]}}, "learner is both in variants.psp and varied"),
        ({"variants": {"a b": {}}}, "variant name is 'a b'"),
        ({"variants": {"x": {"learnr": "psp"}}}, "unknown field learnr in variants.x; did you"),
        ({"variants": {"x": 3}}, "must be a table"),
        ({"variants": {"x": {"learner": "pps"}}}, "did you mean psp"),
        ({"search": {"trials": 3, "space": SPACE}}, r"both \[variants\] and \[search\]"),
    ],
)
def test_variants_that_make_no_sense_are_one_line(change, message):
    with pytest.raises(ConfigError, match=message):
        spec_of({**VARIANTS, **change})
