import math

import numpy as np
import pytest

from supsup.measures import (
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    confusion_matrix,
    forgetting,
    forward_transfer,
)

NAN = math.nan
#: Three tasks; the first is forgotten, then partly comes back; the second gets better.
MATRIX = AccuracyMatrix.of_rows(
    [(1, np.array([0.9])), (2, np.array([0.5, 0.6])), (3, np.array([0.7, 0.8, 0.4]))]
)


def test_measures_of_a_small_matrix_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((0.7 + 0.8 + 0.4) / 3)
    # Best before the last: 0.9 and 0.6. When learned: 0.9 and 0.6, too.
    assert forgetting(MATRIX) == pytest.approx((0.2 - 0.2) / 2)
    assert backward_transfer(MATRIX) == pytest.approx((-0.2 + 0.2) / 2)


def test_forgetting_is_from_the_best_and_backward_transfer_from_the_first():
    rising = AccuracyMatrix.of_rows(
        [(1, np.array([0.5])), (2, np.array([0.9, 0.6])), (3, np.array([0.7, 0.6, 0.4]))]
    )
    assert forgetting(rising) == pytest.approx((0.2 + 0) / 2)
    assert backward_transfer(rising) == pytest.approx((0.2 + 0) / 2)


def test_rows_stand_where_the_tasks_are():
    expected = [[0.9, NAN, NAN], [0.5, 0.6, NAN], [0.7, 0.8, 0.4]]
    np.testing.assert_array_equal(MATRIX.accuracy_KT, expected)
    assert [k for k, _ in MATRIX.rows()] == [1, 2, 3]


def test_what_can_not_forget_does_not():
    matrix = AccuracyMatrix.unchanging((2, 3), np.array([0.9, 0.8, 0.7, 0.6]))
    np.testing.assert_array_equal(matrix.accuracy_KT, [[0.9, 0.8, NAN], [0.9, 0.8, 0.7]])
    assert average_accuracy(matrix) == pytest.approx(0.8)
    assert forgetting(matrix) == 0
    assert backward_transfer(matrix) == 0


def test_tasks_that_were_not_asked_about_do_not_count():
    sampled = AccuracyMatrix.of_rows(
        [(2, np.array([NAN, 0.8])), (3, np.array([0.9, NAN, 0.5])), (4, np.array([0.7, 0.6, NAN]))]
    )
    assert average_accuracy(sampled) == pytest.approx(0.65)
    assert forgetting(sampled) == pytest.approx((0.2 + 0.2) / 2)
    nothing_twice = AccuracyMatrix.of_rows([(1, np.array([0.9]))])
    assert math.isnan(forgetting(nothing_twice))
    assert math.isnan(backward_transfer(nothing_twice))


def test_forward_transfer_is_what_the_tasks_before_gave():
    learned, alone = np.array([0.5, 0.9, 0.8]), np.array([0.6, 0.7, 0.9, 0.1])
    assert forward_transfer(learned, alone) == pytest.approx((0.2 - 0.1) / 2)
    assert math.isnan(forward_transfer(learned[:1], alone))


def test_confusions_are_parts_of_a_tasks_decisions():
    found = confusion_matrix(3, np.array([[0, 2, 5], [2, 0, 1]]), np.array([15, 0, 3]))
    expected = [[0.75, 0, 0.25], [NAN, NAN, NAN], [0.25, 0, 0.75]]
    np.testing.assert_array_equal(found, expected)
