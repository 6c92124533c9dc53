"""Merging what several open-set learners learned from parts of a stream.

Masks of two learners are the same task if each learner, asked about a batch that the other gave to
its mask, finds its own: cross task-inference, and the answers must agree in both directions. Masks
that are the same task are joined: the one trained longest stays.

Shapes: K masks of a learner.
"""

import itertools
from collections.abc import Mapping, Sequence

#: A mask among all: its learner, and its number there.
Member = tuple[int, int]
#: For a learner and another one: which of its masks it finds for each mask of the other, if any.
Found = Mapping[tuple[int, int], Sequence[int | None]]


def groups(sizes: Sequence[int], found: Found) -> list[list[Member]]:
    """Return the masks of all learners, those of one task together, in order of appearance.

    Args:
        sizes: masks of each learner.
        found: ``found[a, b][j]`` is the mask of learner a for a batch of learner b's mask j.
    """
    members = [(a, i) for a, size in enumerate(sizes) for i in range(size)]
    root = {member: member for member in members}

    def leader(member: Member) -> Member:
        while root[member] != member:
            member = root[member]
        return member

    for a, b in itertools.combinations(range(len(sizes)), 2):
        for j, i in enumerate(found[a, b]):
            if i is not None and found[b, a][i] == j:
                first, second = sorted((leader((a, i)), leader((b, j))))
                root[second] = first
    joined: dict[Member, list[Member]] = {}
    for member in members:
        joined.setdefault(leader(member), []).append(member)
    return list(joined.values())


def kept(
    joined: Sequence[Sequence[Member]], batches: Mapping[Member, int], budget: int
) -> list[Member]:
    """Return the mask of each group that stays: the one trained longest, the first of several.

    If there are more groups than the budget, those trained longest stay.
    """
    best = [max(group, key=lambda member: (batches[member], -member[0])) for group in joined]
    total = [sum(batches[member] for member in group) for group in joined]
    order = sorted(range(len(best)), key=lambda place: (-total[place], place))[:budget]
    return [best[place] for place in sorted(order)]


def join_errors(joined: Sequence[Sequence[Member]], owners: Mapping[Member, int]) -> dict[str, int]:
    """Count joined masks, wrong joins (other task) and missed joins (a task in several groups).

    Args:
        joined: the groups.
        owners: the task that each mask belongs to; for scoring alone.
    """
    wrong, seen = 0, set()
    missed = 0
    for group in joined:
        tasks = [owners[member] for member in group]
        wrong += sum(task != tasks[0] for task in tasks[1:])
        missed += sum(task in seen for task in set(tasks))
        seen |= set(tasks)
    return {
        "joined": sum(len(group) - 1 for group in joined),
        "wrong_joins": wrong,
        "missed_joins": missed,
    }
