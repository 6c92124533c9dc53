"""A study whose database goes away: nothing is lost, nothing is done twice, patience has an end."""

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from sweeps.patient import PatientStorage, StorageAway


class Time:
    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def clock(self):
        return self.now


class Flaky:
    """Breaks calls of a storage's sessions, before they commit or after."""

    def __init__(self, storage, monkeypatch):
        self.left, self.after = 0, False
        commit = storage.scoped_session.session_factory.class_.commit
        outer = self

        def breaking(session):
            if outer.left > 0 and outer.after:
                commit(session)
            if outer.left > 0:
                outer.left -= 1
                raise OperationalError("commit", {}, Exception("server closed the connection"))
            commit(session)

        monkeypatch.setattr(storage.scoped_session.session_factory.class_, "commit", breaking)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def storage(tmp_path, time):
    url = f"sqlite:///{tmp_path}/study.db"
    return PatientStorage(url, {}, seconds=60.0, sleep=time.sleep, clock=time.clock)


@pytest.mark.parametrize("after", [False, True])
def test_a_database_that_was_away_has_every_trial_once(storage, monkeypatch, time, after):
    study = optuna.create_study(storage=storage, direction="maximize")
    flaky = Flaky(storage, monkeypatch)
    flaky.after = after
    told = []
    for number in range(4):
        study.enqueue_trial({"x": number})
    for _ in range(4):
        trial = study.ask()
        x = trial.suggest_int("x", 0, 9)
        flaky.left = 3
        with pytest.warns(UserWarning, match=r"database is away \(.*server closed"):
            study.tell(trial, float(x))
        told.append(x)
    done = [t for t in study.get_trials() if t.state == TrialState.COMPLETE]
    assert [t.value for t in done] == [float(x) for x in told] == [0.0, 1.0, 2.0, 3.0]
    assert len(study.get_trials()) == 4
    assert time.now > 0


def test_patience_has_an_end_and_says_how_to_go_on(storage, monkeypatch, time):
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    Flaky(storage, monkeypatch).left = 10**6
    with (
        pytest.warns(UserWarning, match="waiting for it, at most 1 minutes"),
        pytest.raises(StorageAway, match=r"away for \d+ s .*supsup sweep resume"),
    ):
        study.tell(trial, 1.0)
    assert 60 < time.now < 70


def test_a_wrong_question_is_not_asked_again(storage, time):
    with pytest.raises(KeyError):
        storage.get_study_id_from_name("nothing")
    assert time.now == 0
