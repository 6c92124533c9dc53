import numpy as np

from supsup.openset import Step
from supsup.tally import Tally


def step(number: int, mask: int | None, new: bool = False, mixed: bool = False) -> Step:
    return Step(
        segment=number, mask=mask, new=new, mixed=mixed,
        margin=1.5, epsilon=0.1, decision_seconds=0.01,
        packed_B=None, state=None, batches=0,
    )  # fmt: skip


def truth(**images: int) -> np.ndarray:
    return np.concatenate([np.full(n, int(task[1:])) for task, n in images.items()])


def test_what_each_decision_was():
    tally = Tally()
    tally.add(step(0, 0, new=True), truth(t4=8), 4)
    tally.add(step(1, 0), truth(t4=8), 4)  # right
    tally.add(step(2, 0), truth(t5=4, t4=4), 4)  # task 5 came, and nobody noticed: late
    tally.add(step(3, 1, new=True), truth(t5=8), 4)  # noticed
    tally.add(step(4, 0), truth(t5=8), 4)  # wrong: task 5 has a mask
    tally.add(step(5, 2, new=True), truth(t4=8), 4)  # false: task 4 has one
    tally.add(step(6, None), truth(t6=8), 4)  # refused
    tally.add(step(7, None, mixed=True), truth(t5=4, t4=4), 4)
    counts = (tally.late, tally.wrong, tally.false_new, tally.refused, tally.mixed, tally.masks)
    assert counts == (1, 1, 1, 1, 1, 3)
    known = [False, True, False, False, True, True, False, True]
    assert [d.known for d in tally.decisions] == known
    assert [d.masks for d in tally.decisions] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert [d.task for d in tally.decisions] == [4, 4, 5, 5, 5, 4, 6, 5]
    assert tally.owners().tolist() == [4, 5, 4]
    assert tally.missed([4, 5]) == 0
    assert tally.missed([4, 5, 6]) == 1


def test_a_mask_belongs_to_the_task_that_gave_it_most():
    tally = Tally()
    tally.add(step(0, 0, new=True), truth(t1=6, t2=2), 4)
    tally.add(step(1, 0), truth(t2=3), 3)
    assert tally.owners().tolist() == [1]
    tally.add(step(2, 0), truth(t2=9), 4)
    assert tally.owners().tolist() == [2]
    assert tally.missed([1]) == 1
