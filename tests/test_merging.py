from supsup.merging import groups, join_errors, kept


def test_masks_are_joined_where_both_learners_agree():
    found = {
        (0, 1): [1, None, 0],  # what learner 0 says of learner 1's masks
        (1, 0): [1, 0],  # 0's mask 0 is called 1, which is not mutual; 1 is mutual
        (0, 2): [None],
        (2, 0): [0, None],
        (1, 2): [2],
        (2, 1): [None, None, 0],
    }
    joined = groups([2, 3, 1], found)
    assert joined == [[(0, 0)], [(0, 1), (1, 0)], [(1, 1)], [(1, 2), (2, 0)]]


def test_joins_chain_over_several_learners():
    found = {(a, b): [0] for a in range(3) for b in range(3) if a != b}
    assert groups([1, 1, 1], found) == [[(0, 0), (1, 0), (2, 0)]]


def test_the_mask_trained_longest_stays_and_the_budget_holds():
    joined = [[(0, 0)], [(0, 1), (1, 0)], [(1, 1), (2, 0)]]
    batches = {(0, 0): 5, (0, 1): 10, (1, 0): 30, (1, 1): 20, (2, 0): 20}
    assert kept(joined, batches, 9) == [(0, 0), (1, 0), (1, 1)]
    assert kept(joined, batches, 2) == [(1, 0), (1, 1)]


def test_wrong_and_missed_joins_are_counted():
    joined = [[(0, 0), (1, 0)], [(0, 1)], [(1, 1)], [(1, 2), (2, 0), (2, 1)]]
    owners = {(0, 0): 7, (1, 0): 7, (0, 1): 8, (1, 1): 8, (1, 2): 9, (2, 0): 9, (2, 1): 3}
    assert join_errors(joined, owners) == {"joined": 3, "wrong_joins": 1, "missed_joins": 1}
