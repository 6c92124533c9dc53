"""How long a sweep takes: chains are no faster for more workers."""

import pytest

from supsup.identity import training_fields
from sweeps.plan import Cell, cost_key, is_chain, line, most_seconds, plan
from sweeps.spec import spec_of

TASKS, BATCHES, RATE = 6, 10, 2.0
ALONE = TASKS * BATCHES * RATE
CHAINS = [
    {"mask.transfer": "previous"},
    {"learner": "psp"},
    {"learner": "lower-bound"},
]


def planned(base, **grid):
    """Return the plan of a grid of which nothing is trained, each arm with its own bank."""
    fields = {"tasks": TASKS, "train.batches": BATCHES, **base}
    fields = {path: value for path, value in fields.items() if path not in grid}
    spec = spec_of({"name": "s", "recipe": "permuted-digits", "base": fields, "grid": grid})
    cells, rates = [], {}
    for number, arm in enumerate(spec.arms()):
        config = spec.config(arm, 0)
        mark = str(config.train.learning_rate)
        cells.append(Cell(values=arm, seed=number, config=config, fingerprint=mark, mask_bytes=1))
        rates[cost_key(training_fields(config))] = RATE
    return plan(spec, cells, {cell.fingerprint: ("bank", ()) for cell in cells}, (), rates)


def test_blocks_are_for_all_workers():
    found = planned({}, **{"train.learning_rate": [1e-3, 2e-3]})
    assert found.seconds == 2 * ALONE
    assert found.seconds_on(2) == ALONE
    assert found.seconds_on(8) == ALONE / 4


@pytest.mark.parametrize("base", CHAINS)
def test_a_chain_takes_as_long_as_on_one_worker(base):
    found = planned(base, **{"train.learning_rate": [1e-3, 2e-3, 3e-3]})
    assert found.seconds_on(1) == 3 * ALONE
    assert found.seconds_on(2) == 1.5 * ALONE
    assert found.seconds_on(8) == ALONE
    assert line(found, 8).endswith(f"about {ALONE / 60:.1f} min of training")


def test_arms_of_one_bank_are_one_chain():
    found = planned({"mask.transfer": "previous"}, tasks=[TASKS, 2 * TASKS])
    assert found.seconds_on(8) == found.seconds == 2 * ALONE


def test_a_stream_is_a_chain(open_config, quick):
    assert is_chain(open_config)
    assert not is_chain(quick)


@pytest.mark.parametrize(("base", "seconds"), [({}, ALONE), (CHAINS[0], 2 * ALONE)])
def test_a_search_takes_as_long_as_its_dearest_corner(base, seconds):
    space = {"train.batches": {"low": BATCHES, "high": 2 * BATCHES}}
    tree = {"name": "s", "recipe": "permuted-digits", "base": {"tasks": TASKS, **base}}
    spec = spec_of({**tree, "search": {"trials": 4, "space": space}})
    ends = [spec.config({"train.batches": batches}, 0) for batches in (BATCHES, 2 * BATCHES)]
    rates = {cost_key(training_fields(config)): RATE for config in ends}
    assert most_seconds(spec, ends, rates, workers=8) == seconds
    assert most_seconds(spec, ends, {}, workers=8) is None
