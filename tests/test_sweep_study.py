import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from supsup.errors import ConfigError
from sweeps import leases
from sweeps.leases import Leases, is_alive, my_lease
from sweeps.spec import spec_of
from sweeps.storage import JOURNAL, open_storage, repair
from sweeps.study import SweepStudy, in_turn, latest

GRID = {
    "name": "s", "recipe": "permuted-digits", "seeds": [0, 1],
    "grid": {"train.batches": [5, 10], "eval.methods": ["h-one-shot", "g-one-shot"]},
}  # fmt: skip
SPACE = {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
SEARCH = {"name": "s", "recipe": "permuted-digits", "search": {"trials": 3, "space": SPACE}}


def cells(spec):
    return [{**arm, "seed": seed} for arm in spec.arms() for seed in spec.seeds]


def open_study(folder, tree, url=None):
    spec = spec_of(tree)
    if url is None:
        repair(folder)
    study = SweepStudy(spec, open_storage(url, folder), (2, 4, 8), shared=url is not None)
    study.enqueue(cells(spec) if spec.search is None else [])
    return study


def finish(study, trial, value=0.5):
    return study.finish(trial.number, "done", {8: {"accuracy": value}}, [value])


@pytest.fixture(params=["journal", "sqlite"])
def url(request, tmp_path):
    return None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


def test_a_grid_is_done_once_with_its_seeds_among_the_parameters(tmp_path, url):
    study = open_study(tmp_path, GRID, url)
    seen = []
    while trial := study.next():
        seen.append({**trial.values, "seed": trial.seed})
        finish(study, trial)
    assert seen == cells(spec_of(GRID))
    again = open_study(tmp_path, GRID, url)
    assert again.next() is None
    assert [record.state for record in again.records()] == ["done"] * 8
    assert again.is_settled()
    assert again.records()[3].curve == {8: {"accuracy": 0.5}}


def test_more_seeds_add_their_trials_alone(tmp_path, url):
    study = open_study(tmp_path, GRID, url)
    while trial := study.next():
        finish(study, trial)
    more = open_study(tmp_path, {**GRID, "seeds": [0, 1, 9]}, url)
    seeds = []
    while trial := more.next():
        seeds.append(trial.seed)
        finish(more, trial)
    assert seeds == [9] * 4


def test_a_failed_trial_of_a_grid_is_tried_again_by_the_next_run(tmp_path):
    study = open_study(tmp_path, GRID)
    bad = study.next()
    study.finish(bad.number, "failed", {}, reason="no luck")
    while trial := study.next():
        finish(study, trial)
    assert sum(record.state == "failed" for record in latest(study.records())) == 1
    again = open_study(tmp_path, GRID)
    trial = again.next()
    assert (trial.values, trial.seed) == (bad.values, bad.seed)
    assert trial.number == 8
    finish(again, trial)
    assert again.next() is None
    assert [record.state for record in latest(again.records())] == ["done"] * 8
    assert "no luck" in [record.reason for record in again.records()]


def test_a_failed_trial_of_a_search_is_tried_again_once_by_each_run(tmp_path):
    study = open_study(tmp_path, SEARCH)
    bad = study.next()
    study.finish(bad.number, "failed", {}, reason="no luck")
    finish(study, study.next())
    # Stopped with one trial of three yet to be drawn: trying again takes none of them.
    again = open_study(tmp_path, SEARCH)
    assert again.retry_failed() == 1
    assert open_study(tmp_path, SEARCH).retry_failed() == 0
    retried = again.next()
    assert (retried.number, retried.values) == (2, bad.values)
    again.finish(retried.number, "failed", {}, reason="no luck either")
    finish(again, again.next())
    assert again.next() is None
    assert again.is_settled()
    last = open_study(tmp_path, SEARCH)
    assert last.retry_failed() == 1
    assert not last.is_settled()
    retried = last.next()
    assert (retried.number, retried.values) == (4, bad.values)
    finish(last, retried)
    assert last.next() is None
    assert [record.number for record in latest(last.records())] == [1, 3, 4]
    assert last.retry_failed() == 0


def test_a_search_draws_nothing_for_a_retry_that_another_driver_took(tmp_path, monkeypatch):
    tree = {**SEARCH, "search": {**SEARCH["search"], "trials": 1}}
    study = open_study(tmp_path, tree)
    study.finish(study.next().number, "failed", {}, reason="no luck")
    study.retry_failed()
    monkeypatch.setattr(study.optuna, "_pop_waiting_trial_id", lambda: None)
    assert study.next() is None
    assert [record.state for record in study.records()] == ["failed", "waiting"]


def test_trials_of_a_search_have_its_seed(tmp_path):
    study = open_study(tmp_path, {**SEARCH, "seeds": [7]})
    trial = study.next()
    finish(study, trial)
    assert (trial.seed, study.records()[0].seed) == (7, 7)


def test_another_space_is_refused_by_its_keys(tmp_path, url):
    open_study(tmp_path, SEARCH, url)
    other = {**SEARCH["search"], "space": {"train.learning_rate": {"low": 1e-3, "high": 1e-2}}}
    with pytest.raises(ConfigError) as caught:
        open_study(tmp_path, {**SEARCH, "search": other}, url)
    for part in ("learning_rate.low 0.0001 there, 0.001 here", "learning_rate.log True there"):
        assert part in str(caught.value)
    other = {**SEARCH["search"], "objectives": ["bytes"]}
    with pytest.raises(ConfigError, match=r"search\.objectives"):
        open_study(tmp_path, {**SEARCH, "search": other}, url)


def _die_while_running(folder, tree, url):
    study = open_study(folder, tree, url)
    finish(study, study.next())
    study.next()
    study.next()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("tree", [GRID, SEARCH])
def test_what_a_dead_driver_left_running_goes_on_under_its_number(tmp_path, url, tree):
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_running, args=(tmp_path, tree, url)
    )
    process.start()
    process.join()
    before = {r.number: r.values for r in open_study(tmp_path, tree, url).records()}
    study = open_study(tmp_path, tree, url)
    taken = []
    while trial := study.next():
        taken.append(trial)
        finish(study, trial)
    assert [trial.number for trial in taken if trial.adopted] == [1, 2]
    records = study.records()
    assert {record.state for record in records} == {"done"}
    assert len(records) == len({record.number for record in records}) == (8 if tree is GRID else 3)
    assert all(before[r.number] == r.values for r in records if r.number in before)


def _live_with_a_trial(folder, url, told):
    open_study(folder, GRID, url).next()
    told.send("running")
    told.recv()


def test_a_living_drivers_trials_are_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_live_with_a_trial, args=(tmp_path, url, there))
    process.start()
    assert here.recv() == "running"
    second = open_study(tmp_path, GRID, url)
    others = []
    while trial := second.next():
        others.append(trial.number)
        finish(second, trial)
    here.send("enough")
    process.join()
    assert others == [1, 2, 3, 4, 5, 6, 7]
    assert [r.state for r in second.records()] == ["running"] + ["done"] * 7


def test_a_notebook_goes_on_with_what_it_stopped_before(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    stopped = open_study(tmp_path, GRID, url)
    left = stopped.next()
    again = open_study(tmp_path, GRID, url)
    trial = again.next()
    assert (trial.number, trial.adopted) == (left.number, True)
    # The earlier driver has lost it, running or ended, and writes nothing.
    assert not stopped.holds(left.number)
    assert not finish(stopped, left, 0.1)
    assert finish(again, trial, 0.9)
    assert again.records()[0].objectives == (0.9,)


def test_a_trial_that_another_driver_ended_meanwhile_is_let_go(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/study.db"
    tree = {**SEARCH, "search": {**SEARCH["search"], "pruner": "median"}}
    first = open_study(tmp_path, tree, url)
    left = first.next()
    second = open_study(tmp_path, tree, url)
    finish(second, second.next(), 0.9)
    # As if the other had ended it just after the lease was read.
    monkeypatch.setattr(Leases, "holds", lambda *_: True)
    first.note(left.number, "fingerprint", "f")
    assert not first.should_prune(left.number, 2, 0.1)
    assert not finish(first, left, 0.1)
    assert first.records()[0].objectives == (0.9,)


@pytest.fixture
def orphan(tmp_path):
    """Return a shared study, and a trial in it whose driver is gone."""
    study = open_study(tmp_path, GRID, f"sqlite:///{tmp_path}/study.db")
    study.next()
    return study.optuna, lambda: study.optuna.get_trials(deepcopy=False)[0]


def test_of_two_drivers_that_claim_an_orphan_one_takes_it(orphan, monkeypatch):
    study, trial = orphan
    first, second = Leases(study, shared=True), Leases(study, shared=True)
    answers = []

    def while_the_first_waits(_seconds):
        monkeypatch.setattr(leases.time, "sleep", lambda _: None)
        answers.append(second.claim(trial()))

    monkeypatch.setattr(leases.time, "sleep", while_the_first_waits)
    answers.append(first.claim(trial()))
    assert answers == [True, False]


def test_a_claim_that_comes_too_late_takes_nothing(orphan, monkeypatch):
    study, trial = orphan
    monkeypatch.setattr(leases.time, "sleep", lambda _: None)
    first, second = Leases(study, shared=True), Leases(study, shared=True)
    seen = trial()
    assert second.is_orphan(seen)
    assert first.claim(trial())
    study._storage.set_trial_user_attr(seen._trial_id, "lease", my_lease())
    assert not second.claim(seen)


def test_a_driver_signs_now_and_then(orphan, monkeypatch):
    study, _ = orphan
    now = 0.0
    monkeypatch.setattr(leases.time, "monotonic", lambda: now)
    monkeypatch.setattr(leases.time, "time", lambda: 1000.0 + now)
    own = Leases(study, shared=True)
    signs = []
    for now in (0.0, 10.0, 31.0, 60.0, 62.0):  # noqa: B007
        own.sign()
        signs.append(study.user_attrs[leases.lease_name(own._mine)])
    assert signs == [1000.0, 1000.0, 1031.0, 1031.0, 1062.0]


def test_a_lease_is_alive_with_its_process_or_by_its_signs():
    lease = my_lease()
    assert is_alive(lease, lease, last_sign=0, now=1e9)
    assert not is_alive(my_lease(), lease, last_sign=1e9, now=1e9)
    parent = {**lease, "pid": os.getppid(), "driver": "another"}
    assert not is_alive({**parent, "began": "1"}, lease, last_sign=1e9, now=1e9)
    parent["began"] = leases._process_start(os.getppid())
    assert is_alive(parent, lease, last_sign=0, now=1e9)
    elsewhere = {**lease, "host": "elsewhere"}
    assert is_alive(elsewhere, lease, last_sign=1e9 - 60, now=1e9)
    assert not is_alive(elsewhere, lease, last_sign=1e9 - 3601, now=1e9)


def test_half_a_line_and_a_lock_of_a_killed_driver_are_mended(tmp_path):
    study = open_study(tmp_path, GRID)
    finish(study, study.next())
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    Path(f"{journal}.lock").symlink_to(journal)
    again = open_study(tmp_path, GRID)
    while trial := again.next():
        finish(again, trial)
    assert [record.state for record in again.records()] == ["done"] * 8


def test_a_resumed_sampler_draws_other_values(tmp_path):
    tree = {**SEARCH, "search": {**SEARCH["search"], "trials": 6, "sampler": "random"}}
    rates = []
    for _ in range(2):
        study = open_study(tmp_path, tree)
        for _ in range(3):
            trial = study.next()
            rates.append(trial.values["train.learning_rate"])
            finish(study, trial)
    assert len(set(rates)) == 6
    assert study.next() is None


@pytest.mark.parametrize("pruner", ["asha", "median", "hyperband"])
def test_poor_trials_are_stopped(tmp_path, pruner):
    tree = {**SEARCH, "search": {**SEARCH["search"], "trials": 12, "pruner": pruner}}
    study = open_study(tmp_path, tree)
    pruned = []
    for value in [0.9] * 8 + [0.1] * 4:
        trial = study.next()
        told = [study.should_prune(trial.number, step, value) for step in (2, 4, 8)]
        stopped = any(told)
        pruned.append(stopped)
        state = "pruned" if stopped else "done"
        study.finish(trial.number, state, {}, [] if stopped else [value])
    assert any(pruned[8:])
    assert not any(pruned[:4])


def test_several_objectives_are_never_pruned(tmp_path):
    tree = {**SEARCH, "search": {**SEARCH["search"], "objectives": ["accuracy", "bytes"]}}
    study = open_study(tmp_path, tree)
    trial = study.next()
    assert not study.should_prune(trial.number, 2, 0.0)
    study.finish(trial.number, "done", {}, [0.5, 100.0])
    assert study.records()[0].objectives == (0.5, 100.0)


def test_trials_of_a_bank_come_far_apart():
    keys = ["a", "a", "a", "b", "b", "c"]
    assert [keys[i] for i in in_turn(keys)] == ["a", "b", "c", "a", "b", "a"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be postgresql://"),
        ("nonsense", "must be postgresql://"),
        ("postgresql://user:p@ss:word@h:port/db", "must be postgresql://"),
        ("oracle9://h/db", "must be postgresql://"),
        ("mysql://user:secret@h/db", "is mysql, must be postgresql or sqlite"),
        ("sqlite:///relative.db", "must be absolute"),
        ("sqlite:////no/such/folder/s.db", "folder /no/such/folder doesn't exist"),
        ("sqlite:///{tmp}/text", "is no SQLite database"),
        ("postgresql+nodriver://user:secret@h/db", "must be postgresql://"),
    ],
)
def test_bad_storages_are_one_line_without_passwords(tmp_path, url, said):
    (tmp_path / "text").write_text("not a database")
    with pytest.raises(ConfigError, match=said) as caught:
        open_storage(url.replace("{tmp}", str(tmp_path)), tmp_path)
    for secret in ("secret", "p@ss"):
        assert secret not in str(caught.value)


def test_a_missing_or_unreachable_database_is_one_line(tmp_path, free_port):
    url = f"postgresql://user:secret@127.0.0.1:{free_port}/db"
    with pytest.raises(ConfigError, match=r"needs the driver|can't be used") as caught:
        open_storage(url, tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
