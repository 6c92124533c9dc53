from hypothesis import given
from hypothesis import strategies as st

from orchestrator.blocks import learned_prefix, remaining, split

done_blocks = st.lists(st.integers(0, 59), unique=True).map(
    lambda tasks: [range(task, task + 1) for task in tasks]
)


@given(st.integers(1, 60), st.integers(1, 13), done_blocks)
def test_what_remains_is_what_is_missing_on_the_grid(tasks, size, done):
    blocks = remaining(tasks, size, done)
    found = [task for block in blocks for task in block]
    missing = set(range(tasks)) - {task for block in done for task in block}
    assert found == sorted(missing)
    assert all(block[0] // size == block[-1] // size for block in blocks)


def test_a_bank_grows_by_its_missing_blocks():
    assert remaining(50, 10, []) == [range(i, i + 10) for i in range(0, 50, 10)]
    assert remaining(25, 10, [range(10)]) == [range(10, 20), range(20, 25)]
    assert remaining(10, 10, [range(3), range(7, 10)]) == [range(3, 7)]
    assert remaining(5, 10, [range(20)]) == []


def test_split_ends_at_multiples():
    assert list(split(range(3, 12), 5)) == [range(3, 5), range(5, 10), range(10, 12)]
    assert list(split(range(0), 5)) == []


def test_learned_prefix():
    assert learned_prefix([]) == 0
    assert learned_prefix([range(3, 6), range(3)]) == 6
    assert learned_prefix([range(3), range(4, 6)]) == 3
    assert learned_prefix([range(1, 3)]) == 0
