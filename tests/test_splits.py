"""Folds, disjointness and class names."""

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebm_guard.data.splits import check_disjoint, match_classes, two_folds
from ebm_guard.errors import DataError, InvalidInputError

label_lists = st.lists(st.integers(0, 5), min_size=2, max_size=80)
seeds = st.integers(0, 2**32 - 1)


@oracles.QUICK
@given(st.integers(2, 300), seeds)
def test_folds_cover_all_rows_once(n, seed):
    first, second = two_folds(n, seed=seed)
    assert sorted([*first, *second]) == list(range(n))
    assert abs(len(first) - len(second)) <= 1
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()


@oracles.QUICK
@given(label_lists, seeds)
def test_folds_are_stratified(values, seed):
    labels = np.array(values, dtype=np.int64)
    first, second = two_folds(len(labels), labels, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert abs(len(first) - len(second)) <= 1
    counts = [np.bincount(labels[fold], minlength=6) for fold in (first, second)]
    assert (np.abs(counts[0] - counts[1]) <= 1).all()


def test_an_unstratified_split_fails_the_same_test():
    labels = np.repeat(np.arange(6), 50)
    first, second = two_folds(len(labels))
    counts = [np.bincount(labels[fold], minlength=6) for fold in (first, second)]
    assert (np.abs(counts[0] - counts[1]) > 1).any()


def test_folds_repeat_differ_by_seed_and_leave_the_global_generator_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    labels = np.arange(200) % 4
    assert np.array_equal(two_folds(200, labels)[0], two_folds(200, labels)[0])
    assert not np.array_equal(two_folds(200, labels)[0], two_folds(200, labels, seed=1)[0])
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_every_row_is_as_likely_in_either_fold():
    # A fold that always starts with the same rows of a class would not be random.
    labels = np.repeat(np.arange(3), 11)
    runs = 400
    counts = np.zeros(len(labels))
    for seed in range(runs):
        counts[two_folds(len(labels), labels, seed)[0]] += 1
    share = 17 / 33
    spread = np.sqrt(share * (1 - share) / runs)
    assert (np.abs(counts / runs - share) < 5 * spread).all()


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_are_refused(n):
    with pytest.raises(InvalidInputError, match=f"got {n} rows; two folds need at least 2"):
        two_folds(n)


def hashes(*values):
    return np.array(values, dtype=np.uint64)


def test_disjoint_sets_pass_in_silence():
    assert check_disjoint(hashes(1, 2, 3), hashes(4, 5), ("a", "b")) is None
    assert check_disjoint(hashes(), hashes(4, 5), ("a", "b")) is None


def test_a_few_duplicates_are_a_sentence():
    first, second = np.arange(300, dtype=np.uint64), np.arange(298, 598, dtype=np.uint64)
    assert check_disjoint(first, second, ("fit", "test")) == "fit and test share 2 identical rows"


@pytest.mark.parametrize("shared", [1, 2, 50, 100])
def test_more_than_one_percent_of_the_smaller_set_is_an_error(shared):
    first = np.arange(1000, dtype=np.uint64)
    second = np.arange(1000 - shared, 1100 - shared, dtype=np.uint64)
    if shared <= 1:
        assert "share 1 identical" in check_disjoint(first, second, ("a", "b"))
    else:
        with pytest.raises(DataError, match=f"a and b share {shared} rows.*disjoint"):
            check_disjoint(first, second, ("a", "b"))


@pytest.mark.parametrize("copies", [1, 50, 101, 1000])
@pytest.mark.parametrize("distinct", [1, 3, 100])
def test_a_set_is_never_disjoint_from_itself(copies, distinct):
    # Also where the set itself holds the same row many times.
    values = list(range(distinct)) * copies
    with pytest.raises(DataError, match="share"):
        check_disjoint(hashes(*values), hashes(*values), ("a", "b"))


def test_equal_names_need_no_mapping():
    names = ["cat", "dog", "fox"]
    mapping, sentence = match_classes(names, names, 3)
    assert mapping is None
    assert "3 class names" in sentence
    assert "in order" in sentence


@oracles.QUICK
@given(st.permutations(range(6)))
def test_other_orders_are_mapped(order):
    model = [f"class {k}" for k in range(6)]
    mapping, sentence = match_classes([model[k] for k in order], model, 6)
    found = list(range(6)) if mapping is None else mapping.tolist()
    assert found == list(order)
    assert ("re-ordered" in sentence) == (list(order) != list(range(6)))


def test_a_subset_of_the_classes_is_mapped():
    mapping, _ = match_classes(["fox", "cat"], ["cat", "dog", "fox"], 3)
    assert mapping.tolist() == [2, 0]
    assert mapping.dtype == np.int64


def test_case_and_underscores_do_not_matter():
    mapping, _ = match_classes(["Red_Fox ", "CAT"], ["cat", "red fox"], 2)
    assert mapping.tolist() == [1, 0]


def test_names_that_fit_in_part_are_an_error():
    with pytest.raises(DataError, match=r"'wolf'.*does not name"):
        match_classes(["cat", "wolf"], ["cat", "dog"], 2)


def test_names_that_share_nothing_are_taken_by_order():
    mapping, sentence = match_classes(["n01", "n02"], ["cat", "dog"], 2)
    assert mapping is None
    assert "by their order" in sentence


@pytest.mark.parametrize(("data", "model"), [(None, ["a", "b"]), (["a", "b"], None), (None, None)])
def test_without_names_on_one_side_the_count_is_said(data, model):
    mapping, sentence = match_classes(data, model, 2)
    assert mapping is None
    assert "no class names" in sentence
    if data is not None:
        assert "2 of 2" in sentence


def test_too_many_classes_are_an_error():
    with pytest.raises(DataError, match="3 classes and a model with 2"):
        match_classes(["a", "b", "c"], None, 2)


def test_names_that_occur_twice_are_not_merged():
    # ImageNet has two "crane" (a bird and a machine) and two "maillot".
    names = ["crane", "dog", "crane"]
    mapping, _ = match_classes(names, names, 3)
    assert mapping is None or mapping.tolist() == [0, 1, 2]
