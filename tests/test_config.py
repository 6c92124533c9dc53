import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supsup.config import RunConfig, checkpoints
from supsup.errors import ConfigError
from supsup.fields import config_fields, from_dict, get_field, to_dict, with_values
from supsup.identity import fingerprint, resolve, training_fields
from supsup.recipes import RECIPES, protocol_values

DATA = "0" * 64


def resolved(config: RunConfig) -> RunConfig:
    return resolve(config, device="cpu", native_bf16=True, sparse=())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_survive_json(recipe):
    config = RECIPES[recipe]()
    assert from_dict(to_dict(config)) == config


def test_the_papers_protocol_is_what_the_paper_has_of_a_recipe():
    assert protocol_values("default", "permuted-mnist") == {}
    paper = with_values(RECIPES["permuted-mnist"](), protocol_values("paper", "permuted-mnist"))
    assert (paper.train.learning_rate, paper.train.schedule) == (1e-4, "constant")
    assert (paper.eval.batch, paper.eval.group, paper.eval.depth) == (1, 128, 0)
    told = protocol_values("paper-code", "permuted-digits")
    assert told["openset.boundaries"] == "told"
    for as_it_is in ("rotated-mnist", "split-cifar100", "split-imagenet", "hop-split-mnist"):
        assert protocol_values("paper", as_it_is) == {}
    for other in ("split-mnist", "split-images"):
        with pytest.raises(ConfigError, match=f"no experiment like recipe {other}"):
            protocol_values("paper", other)


def test_a_value_of_no_field_is_one_line():
    for path in ("foo.bar", "eval.at.x", "train"):
        with pytest.raises(ConfigError, match=f"unknown field {path}"):
            with_values(RunConfig(), {path: 1})
    with pytest.raises(ConfigError, match=r"did you mean train\.batches"):
        with_values(RunConfig(), {"train.batch": 1})


def test_every_field_has_help():
    assert all(info.help for info in config_fields())
    assert len({info.path for info in config_fields()}) == len(config_fields())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tasks", "0", "tasks is 0, must be at least 1"),
        ("tasks", "ten", "tasks is ten, must be a whole number"),
        ("tasks", "1.5", "tasks is 1.5, must be a whole number"),
        ("seed", "-1", "seed is -1, must be at least 0"),
        ("seed", str(2**64), "seed is 18446744073709551616, must be less than"),
        ("train.learning_rate", "nan", "train.learning_rate is nan, must be a finite number"),
        ("train.learning_rate", "inf", "train.learning_rate is inf, must be a finite number"),
        ("train.learning_rate", "0", "must be greater than 0"),
        ("train.batches", "-3", "train.batches is -3, must be at least 1"),
        (
            "scenario",
            "gnuu",
            "scenario is gnuu, must be one of gg, gns, gnu, nns; did you mean gnu?",
        ),
        ("model.name", "lenet", "model.name is lenet, must be one of lenet-300-100"),
        ("eval.methods", "h-oneshot", "did you mean h-one-shot?"),
        ("eval.methods", "", "eval.methods is empty"),
        ("eval.at", "10,zero", "eval.at is zero, must be a whole number"),
        ("eval.at", "0", "eval.at is 0, must be at least 1"),
        ("eval.group", "1", "group is 1, must be 0 or at least batch"),
        ("dataset", "mnst", "did you mean mnist?"),
    ],
)
def test_a_broken_rule_is_one_line(field, value, said):
    config = with_values(RunConfig(), {"eval.batch": 8}) if field == "eval.group" else RunConfig()
    with pytest.raises(ConfigError) as caught:
        with_values(config, {field: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_field_names_the_near_one():
    tree = to_dict(RunConfig())
    tree["train"]["batchs"] = 3
    with pytest.raises(ConfigError, match=r"unknown field train\.batchs.*train\.batches"):
        from_dict(tree)


@given(st.sampled_from(config_fields()), st.text(max_size=20))
def test_rubbish_is_a_config_error_or_a_value(info, text):
    try:
        config = with_values(RunConfig(), {info.path: text})
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert get_field(config, info.path) is not None


def test_the_fingerprint_is_of_what_shapes_the_masks_alone():
    base = resolved(RunConfig())
    same = {
        "tasks": 2500,
        "block_size": 3,
        "scenario": "gns",
        "image_size": 8,
        "eval.images": 7,
        "eval.methods": "g-one-shot",
        "train.momentum": 0.5,
        "mask.keep_fraction": 0.1,
        "mask.budget": "erdos-renyi",
        "degrees": 45,
        "classes_per_task": 5,
        "class_order": "sorted",
    }
    for field, value in same.items():
        assert fingerprint(with_values(base, {field: value}), DATA) == fingerprint(base, DATA)
    other = {
        "seed": 1,
        "dataset": "digits",
        "model.output_size": 101,
        "model.name": "fc-1024-1024",
        "train.batches": 7,
        "train.batch_size": 7,
        "train.learning_rate": 1e-3,
        "train.schedule": "constant",
        "train.alpha": 0.9,
        "train.epsilon": 1e-6,
        "train.precision": "fp32",
        "train.device": "cuda",
        "train.optimizer": "adam",
        "train.weight_decay": 0.1,
        "mask.algorithm": "edge-popup",
        "mask.transfer": "previous",
        "family": "rotated",
        "learner": "psp",
    }
    prints = {fingerprint(with_values(base, {f: v}), DATA) for f, v in other.items()}
    prints |= {fingerprint(base, DATA), fingerprint(base, "1" * 64)}
    assert len(prints) == len(other) + 2
    trains = {f"train.{field.name}" for field in dataclasses.fields(base.train)}
    assert trains - {"train.momentum", "train.trunk_learning_rate"} <= set(training_fields(base))


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ({"train.optimizer": "sgd"}, {"train.momentum": 0.5}),
        ({"mask.algorithm": "edge-popup"}, {"mask.keep_fraction": 0.1}),
        ({"mask.algorithm": "edge-popup"}, {"mask.budget": "erdos-renyi"}),
        ({"learner": "batche"}, {"train.trunk_learning_rate": 1e-4}),
        ({"family": "rotated"}, {"degrees": 45}),
        ({"family": "split"}, {"classes_per_task": 5}),
        ({"family": "split"}, {"class_order": "sorted"}),
    ],
)
def test_some_fields_count_only_beside_others(setting, counts):
    base = resolved(with_values(RunConfig(), setting))
    assert fingerprint(with_values(base, counts), DATA) != fingerprint(base, DATA)


def test_only_the_general_engine_trains_what_the_fast_ones_are_not_made_for():
    here = {"device": "cpu", "native_bf16": False, "sparse": ("fp32",)}
    for special in ({"family": "split"}, {"model.name": "bnnet"}, {"train.schedule": "cosine"}):
        config = with_values(RunConfig(), special)
        assert resolve(config, **here).train.engine == "general"
        with pytest.raises(ConfigError, match="not made for"):
            resolve(with_values(config, {"train.engine": "dense"}), **here)


def test_banks_from_before_a_field_was_there_keep_their_fingerprint():
    values = {"scenario": "nns", "train.device": "cpu", "train.precision": "fp32"}
    base = with_values(RunConfig(), {**values, "train.engine": "sparse"})
    old = "c00893935696d03c63a5556738c0f083fc3043e0c9dc526c24e305f37b28cbf0"
    assert fingerprint(base, "0" * 64) == old
    assert fingerprint(with_values(base, {"openset.depth": 1}), "0" * 64) != old


def test_the_fingerprint_needs_a_resolved_configuration():
    with pytest.raises(ValueError, match="resolve"):
        fingerprint(RunConfig(), DATA)


@pytest.mark.parametrize(
    ("tasks", "at", "expected"),
    [
        (1, "", (1,)),
        (9, "", (9,)),
        (50, "", (10, 25, 50)),
        (100, "", (10, 25, 50, 100)),
        (2500, "", (10, 25, 50, 100, 250, 500, 1000, 2500)),
        (50, "10,50,70", (10, 50)),
        (50, "30", (30, 50)),
    ],
)
def test_checkpoints(tasks, at, expected):
    assert checkpoints(with_values(RunConfig(), {"tasks": tasks, "eval.at": at})) == expected


def test_a_block_is_larger_on_a_gpu_unless_its_size_is_given():
    def size(config, device):
        return resolve(config, device=device, native_bf16=True, sparse=()).block_size

    assert [size(RunConfig(), device) for device in ("cpu", "cuda")] == [10, 250]
    assert size(RunConfig(block_size=7), "cuda") == 7


def test_the_sparse_engine_is_for_cpus_in_the_precisions_that_they_have():
    def engine(sparse, **train):
        config = with_values(RunConfig(), {f"train.{key}": v for key, v in train.items()})
        return resolve(config, device="cpu", native_bf16=True, sparse=sparse).train.engine

    assert engine(["bf16"]) == engine(["fp32"], precision="fp32") == "sparse"
    assert engine(["bf16"], precision="fp32") == engine(["bf16"], device="cuda") == "dense"
    assert engine([]) == "dense"
    with pytest.raises(ConfigError, match=r"train\.engine is sparse.*not cuda"):
        engine(["bf16"], engine="sparse", device="cuda")
