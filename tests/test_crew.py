"""The crew by a script, without Ray: actors that die, hang or find no room."""

import pytest

from orchestrator.crew import Call, Crew
from orchestrator.jobs import HeadLost, PoolBroken
from supsup.errors import RunFailed
from tests.acting import Script


def crew_of(script, size=2, notes=None):
    note = notes.append if notes is not None else lambda text: None
    return Crew(None, size, note, start_seconds=300.0, actors=script, clock=script.clock)


def call(worker, *args):
    return Call(worker, "act", lambda: args)


def test_calls_are_made_side_by_side_and_answered_in_order():
    script = Script()
    crew = crew_of(script)
    assert list(crew.map([call(i % 2, "ok", 2.0) for i in range(4)])) == [0, 1, 0, 1]
    assert script.now == 4.0


def test_a_call_whose_actor_dies_is_made_again_with_what_it_needs_then():
    script, notes, sent = Script(), [], []
    crew = crew_of(script, notes=notes)

    def args():
        sent.append(crew.lives[0])
        return ("die",) if len(sent) == 1 else ("ok",)

    assert list(crew.map([Call(0, "act", args), call(1, "ok")])) == [0, 1]
    assert sent == [0, 1]
    assert crew.lives == [1, 0]
    assert notes == ["act: tried again, since its worker died"]


def test_what_fails_again_and_again_ends_the_run():
    script = Script()
    crew = crew_of(script)
    with pytest.raises(RunFailed, match=r"act failed, given up: its worker died; Ray says: killed"):
        list(crew.map([call(0, "die")]))
    assert len(script.killed) == 3


def test_a_hung_actor_is_replaced():
    script, sent = Script(), []
    crew = crew_of(script)
    for _ in range(3):
        list(crew.map([call(0, "ok", 20.0)]))

    def args():
        sent.append(script.now)
        return ("hang",) if len(sent) == 1 else ("ok", 20.0)

    assert list(crew.map([Call(0, "act", args)])) == [0]
    assert crew.lives == [1, 0]
    assert 300 < sent[1] - sent[0] < 320


def test_the_clock_of_a_call_starts_when_its_actor_is_up():
    script, sent = Script(), []
    crew = crew_of(script)
    for _ in range(3):
        list(crew.map([call(0, "ok", 20.0)]))
    script.births = 250.0

    def args():
        sent.append(script.now)
        return ("die",) if len(sent) == 1 else ("ok", 200.0)

    assert list(crew.map([Call(0, "act", args)])) == [0]
    assert crew.lives == [1, 0]


def test_long_calls_among_short_ones_do_not_hang():
    """What another call waited for seems to have taken no time itself."""
    script = Script()
    crew = crew_of(script, size=20)
    for _ in range(3):
        found = list(crew.map([call(i, "ok", 400.0) for i in range(20)]))
        assert found == list(range(20))
    assert crew.lives == [0] * 20


def test_an_actor_that_finds_no_room_is_not_waited_for_for_ever():
    script = Script(space=2)
    crew = crew_of(script)
    script.at(0.5, lambda: script.resize(1))
    with pytest.raises(PoolBroken, match=r"no room for a worker for 5 minutes.*fewer --workers"):
        list(crew.map([call(0, "ok"), call(1, "ok")]))
    assert script.now < 320


def test_a_head_that_is_gone_ends_the_run():
    script = Script()
    crew = crew_of(script)
    script.at(7.0, lambda: setattr(script, "gone", "the head is gone"))
    with pytest.raises(HeadLost, match="the head is gone"):
        list(crew.map([call(0, "hang")]))
    assert script.now < 20
