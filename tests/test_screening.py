"""Screening: the rule by a naive loop, its FDR over re-draws, and rules that break it."""

import json

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebm_guard.errors import EbmGuardWarning, InvalidInputError
from ebm_guard.gate.screening import needed_calibration_rows, screen_batch
from ebm_guard.gate.thresholds import Threshold

FDR = 0.1
RUNS = 2000


def naive_rule(p_values, fdr):
    """Flag all p-values up to the largest p_(i) <= fdr i / m, by trying every i."""
    m = len(p_values)
    cut = max(
        (p for i, p in enumerate(sorted(p_values), 1) if p <= fdr * i / m * (1 + 1e-12)), default=-1
    )
    return [p <= cut for p in p_values]


@oracles.QUICK
@given(st.lists(st.integers(1, 50), max_size=30), st.sampled_from([0.05, 0.2, 0.5]))
def test_flags_equal_a_naive_loop(ranks, fdr):
    p_values = np.array(ranks, float) / 50
    assert screen_batch(p_values, fdr).mask.tolist() == naive_rule(p_values.tolist(), fdr)


def p_values(calibration, scores):
    return Threshold.fit(calibration, "marginal", 0.5).p_value(torch.from_numpy(scores)).numpy()


def draw(rng, size, ties):
    values = rng.normal(size=size)
    return np.round(values) if ties else values


def any_flag(rule, ties, *, in_sample=False):
    """Count the batches of inliers only in which anything is flagged: there FDR is that chance."""
    count = 0
    for run in range(RUNS):
        rng = oracles.generator("fdr", ties, run)
        if in_sample:
            # A Mahalanobis score in 20 dimensions, calibrated on the 60 rows it was fitted on.
            rows = rng.normal(size=(110, 20))
            mean, inverse = rows[:60].mean(0), np.linalg.inv(np.cov(rows[:60].T))
            values = np.einsum("ij,jk,ik->i", rows - mean, inverse, rows - mean)
        else:
            values = draw(rng, 110, ties)
        count += bool(rule(p_values(values[:60], values[60:])).any())
    return count


def kept(count):
    return stats.binomtest(count, RUNS, FDR, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("ties", [False, True])
def test_false_discoveries_among_inliers_only(ties):
    assert kept(any_flag(lambda p: screen_batch(p, FDR).mask, ties))


def test_the_gate_rule_is_no_screening():
    assert not kept(any_flag(lambda p: p <= FDR, ties=False))


@pytest.mark.slow
def test_in_sample_p_values_break_the_rule():
    assert not kept(any_flag(lambda p: screen_batch(p, FDR).mask, ties=False, in_sample=True))


@pytest.mark.parametrize("ties", [False, True])
def test_false_discovery_proportion_with_outliers(ties):
    shares, wrong, found = [], [], 0
    for run in range(RUNS):
        rng = oracles.generator("mixed", ties, run)
        inside, outside = draw(rng, 700, ties), draw(rng, 10, ties) + 5
        p = p_values(inside[:600], np.concatenate([inside[600:], outside]))
        for mask, target in ((screen_batch(p, FDR).mask, shares), (p <= FDR, wrong)):
            target.append(mask[:100].sum() / max(1, mask.sum()))
        found += int(screen_batch(p, FDR).mask[100:].sum())
    assert stats.ttest_1samp(shares, FDR, alternative="greater").pvalue > 1e-3
    assert stats.ttest_1samp(wrong, FDR, alternative="greater").pvalue < 1e-3
    assert found > 0.5 * 10 * RUNS


@pytest.mark.parametrize("m", [1, 3, 7, 49, 100, 997])
@pytest.mark.parametrize("fdr", [0.01, 0.05, 0.1, 0.3])
def test_a_lone_outlier_needs_enough_calibration_rows(m, fdr):
    n = needed_calibration_rows(m, fdr)
    rest = np.ones(m - 1)
    enough = screen_batch(np.concatenate([[1 / (n + 1)], rest]), fdr, n=n)
    assert enough.mask.tolist() == [True, *[False] * (m - 1)]
    assert enough.can_flag_one
    if n > 1:
        with pytest.warns(EbmGuardWarning, match=f"needs {n:,}"):
            few = screen_batch(np.concatenate([[1 / n], rest]), fdr, n=n - 1)
        assert not few.mask.any()
        assert "cannot be flagged" in few.sentence


def test_invalid_rows_are_flagged_and_take_no_part():
    with_invalid = screen_batch(np.array([0.0, 0.03, 0.9, 0.0]), 0.05)
    assert with_invalid.mask.tolist() == [True, False, False, True]
    assert (with_invalid.tested, with_invalid.flagged, with_invalid.invalid) == (2, 0, 2)
    # Counted as discoveries, they would have carried the 0.03 over the line.
    assert naive_rule([0.0, 0.03, 0.9, 0.0], 0.05)[1]
    json.dumps(with_invalid.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("values", "fdr", "words"),
    [
        (np.array([0.5, np.nan]), 0.05, "NaN"),
        (np.array([1.5]), 0.05, "outside"),
        (np.array([-0.1]), 0.05, "outside"),
        (np.ones((2, 2)), 0.05, "shape"),
        (np.ones(2), 0.0, "fdr"),
        (np.ones(2), 1.0, "fdr"),
    ],
)
def test_malformed_input_is_refused(values, fdr, words):
    with pytest.raises(InvalidInputError, match=words):
        screen_batch(values, fdr)


def test_tensors_and_empty_batches():
    assert screen_batch(torch.tensor([0.001, 0.9])).mask.tolist() == [True, False]
    empty = screen_batch(np.empty(0))
    assert (empty.tested, empty.flagged) == (0, 0)
