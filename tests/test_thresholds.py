"""Thresholds: exact ranks, and simulations in which a wrong rule fails the same test."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.gate.class_conditional import require_threshold
from ebm_guard.gate.thresholds import (
    Threshold,
    marginal_rank,
    minimum_rows,
    pac_rank,
)

REJECTED = 0.05
ASSURANCE = 0.95
DRAWS = 2000


def searched_rank(n, rejected, assurance):
    """Try every k and ask the Beta distribution of the true coverage itself."""
    for k in range(1, n + 1):
        if stats.beta.sf(1 - rejected, k, n + 1 - k) >= assurance:
            return k
    return n + 1


@pytest.mark.parametrize(
    ("n", "k"), [(59, 59), (100, 99), (500, 484), (1000, 962), (5000, 4776), (10000, 9537)]
)
def test_published_pac_ranks(n, k):
    assert pac_rank(n, REJECTED, ASSURANCE) == k
    assert stats.beta.sf(1 - REJECTED, k, n + 1 - k) >= ASSURANCE
    assert stats.beta.sf(1 - REJECTED, k - 1, n + 2 - k) < ASSURANCE


@pytest.mark.parametrize("n", [1, 2, 5, 28, 29, 58, 59, 60, 93, 150, 299, 300, 611])
@pytest.mark.parametrize("rejected", [0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("assurance", [0.6, 0.9, 0.95, 0.999])
def test_pac_rank_equals_a_search(n, rejected, assurance):
    assert pac_rank(n, rejected, assurance) == searched_rank(n, rejected, assurance)


@oracles.QUICK
@given(st.integers(1, 400), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_pac_rank_is_the_smallest_that_keeps_the_promise(n, rejected, assurance):
    k = pac_rank(n, rejected, assurance)
    assert 1 <= k <= n + 1
    slack = 1e-9
    if k <= n:
        assert stats.beta.sf(1 - rejected, k, n + 1 - k) >= assurance - slack
    if k > 1:
        assert stats.beta.sf(1 - rejected, k - 1, n + 2 - k) < assurance + slack


@pytest.mark.parametrize(
    ("n", "k"), [(59, 57), (100, 96), (500, 476), (1000, 951), (5000, 4751), (10000, 9501)]
)
def test_published_marginal_ranks(n, k):
    assert marginal_rank(n, REJECTED) == k


@pytest.mark.parametrize("percent", range(1, 100))
def test_marginal_rank_in_whole_numbers(percent):
    for n in range(1, 400):
        # In floats (1 - 0.45) * 100 is 55.00000000000001, which would round up to 56.
        # ceil((n + 1)(100 - percent) / 100) without a float.
        assert marginal_rank(n, percent / 100) == -(-(n + 1) * (100 - percent) // 100)


@pytest.mark.parametrize("n", [100, 500, 1000, 10000])
def test_pac_is_stricter_than_marginal(n):
    assert pac_rank(n, REJECTED, ASSURANCE) > marginal_rank(n, REJECTED)


@pytest.mark.parametrize(("rejected", "n"), [(0.1, 29), (0.05, 59), (0.01, 299), (0.001, 2995)])
def test_published_minimum_rows(rejected, n):
    assert minimum_rows("pac", rejected, 0.95) == n
    assert pac_rank(n, rejected, 0.95) == n
    assert pac_rank(n - 1, rejected, 0.95) == n


@pytest.mark.parametrize("method", ["pac", "marginal"])
@pytest.mark.parametrize("rejected", [0.02, 0.05, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("assurance", [0.5, 0.9, 0.99])
def test_minimum_rows_is_the_first_that_fits(method, rejected, assurance):
    rule = {"pac": pac_rank, "marginal": marginal_rank}[method]
    first = next(n for n in itertools.count(1) if rule(n, rejected, assurance) <= n)
    assert minimum_rows(method, rejected, assurance) == first
    Threshold.fit(np.arange(float(first)), method, rejected, assurance)
    if first > 1:
        with pytest.raises(InvalidInputError, match=f"needs at least {first}"):
            Threshold.fit(np.arange(float(first - 1)), method, rejected, assurance)


@pytest.mark.parametrize(
    ("method", "rejected", "n", "needed"),
    [
        ("pac", 0.05, 58, 59),
        ("pac", 0.05, 0, 59),
        ("pac", 0.001, 2994, 2995),
        ("marginal", 0.05, 18, 19),
    ],
)
def test_too_few_rows_name_the_number_needed(method, rejected, n, needed):
    with pytest.raises(InvalidInputError, match=f"got {n} calibration rows.*at least {needed}"):
        Threshold.fit(np.zeros(n), method, rejected)


def pac_failures(rule, draw, coverage, n, accept=np.less_equal):
    """Over many calibration sets: how often the true coverage is below the target."""
    rng = oracles.generator("pac", n)
    failures = 0
    for _ in range(DRAWS):
        values = np.sort(draw(rng, n))
        cut = values[rule(n, REJECTED, ASSURANCE) - 1]
        failures += coverage(cut, accept) < 1 - REJECTED
    return failures


def continuous(rng, n):
    return rng.random(n)


def coverage_continuous(cut, accept):
    return cut


# P(score <= 2) = 0.945: just too little, and one step up is 0.985.
SHARES = np.array([0.40, 0.35, 0.195, 0.04, 0.015])


def tied(rng, n):
    return rng.choice(len(SHARES), size=n, p=SHARES).astype(np.float64)


def coverage_tied(cut, accept):
    return SHARES[accept(np.arange(len(SHARES)), cut)].sum() + 1e-12


CASES = [
    pytest.param(continuous, coverage_continuous, 100, id="continuous-100"),
    pytest.param(continuous, coverage_continuous, 500, id="continuous-500"),
    pytest.param(tied, coverage_tied, 500, id="ties-500"),
]


@pytest.mark.parametrize(("draw", "coverage", "n"), CASES)
def test_pac_keeps_its_promise(draw, coverage, n):
    failures = pac_failures(pac_rank, draw, coverage, n)
    assert not oracles.fails_guarantee(failures, DRAWS, 1 - ASSURANCE)


@pytest.mark.parametrize(("draw", "coverage", "n"), CASES)
def test_the_marginal_rank_sold_as_pac_fails_the_same_test(draw, coverage, n):
    failures = pac_failures(marginal_rank, draw, coverage, n)
    assert oracles.fails_guarantee(failures, DRAWS, 1 - ASSURANCE)


def test_the_rank_of_the_plain_quantile_fails_the_same_test():
    def plain(n, rejected, assurance):
        return math.ceil(n * (1 - rejected))

    failures = pac_failures(plain, continuous, coverage_continuous, 100)
    assert oracles.fails_guarantee(failures, DRAWS, 1 - ASSURANCE)


def test_refusing_at_the_cut_fails_the_same_test_with_ties():
    failures = pac_failures(pac_rank, tied, coverage_tied, 500, accept=np.less)
    assert oracles.fails_guarantee(failures, DRAWS, 1 - ASSURANCE)


@pytest.mark.parametrize("draw", [continuous, tied])
@pytest.mark.parametrize("n", [59, 100, 500])
def test_fitted_thresholds_keep_the_promise_on_fresh_rows(draw, n):
    """The same through Threshold itself, with the coverage measured on fresh rows."""
    rng = oracles.generator("fresh", n, draw.__name__)
    fresh = torch.from_numpy(draw(rng, 100_000))
    # Four standard errors of the measured coverage are allowed for.
    slack = 4 * math.sqrt(0.05 * 0.95 / len(fresh))
    failures = 0
    for _ in range(200):
        threshold = Threshold.fit(draw(rng, n))
        failures += threshold.accept(fresh).double().mean().item() < 0.95 - slack
    assert not oracles.fails_guarantee(failures, 200, 0.05)


def test_marginal_keeps_its_promise_on_average():
    # The mean coverage of Beta(k, n+1-k) is k / (n+1); here it is measured row by row.
    rng = oracles.generator("marginal")
    refused = 0
    for _ in range(DRAWS):
        threshold = Threshold.fit(rng.random(39), "marginal")
        refused += not threshold.accept(torch.tensor([rng.random()], dtype=torch.float64)).item()
    assert not oracles.fails_guarantee(refused, DRAWS, REJECTED)
    assert stats.binomtest(refused, DRAWS, 1 - marginal_rank(39, REJECTED) / 40).pvalue > 1e-3


def p_value_draws(draw, p_value, n=19, draws=4000):
    rng = oracles.generator("p-values", n, draw.__name__)
    return np.array([p_value(np.sort(draw(rng, n)), draw(rng, 1)) for _ in range(draws)])


def our_p_value(values, fresh):
    threshold = Threshold(torch.from_numpy(values), len(values), "pac", REJECTED, ASSURANCE)
    return threshold.p_value(torch.from_numpy(fresh)).item()


LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.9)


@pytest.mark.parametrize("draw", [continuous, tied])
def test_p_values_are_super_uniform(draw):
    found = p_value_draws(draw, our_p_value)
    for level in LEVELS:
        assert not oracles.fails_guarantee((found <= level + 1e-12).sum(), len(found), level)


def test_p_values_of_continuous_scores_are_uniform_on_their_grid():
    found = p_value_draws(continuous, our_p_value)
    counts = np.bincount(np.rint(found * 20).astype(int), minlength=21)[1:]
    assert counts.sum() == len(found)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_p_values_without_the_one_fail_the_same_test():
    found = p_value_draws(continuous, lambda values, fresh: (values >= fresh).mean())
    assert oracles.fails_guarantee((found <= 0.01).sum(), len(found), 0.01)


def test_p_values_that_do_not_count_ties_fail_the_same_test():
    found = p_value_draws(tied, lambda values, fresh: (1 + (values > fresh).sum()) / 20)
    assert any(
        oracles.fails_guarantee((found <= level + 1e-12).sum(), len(found), level)
        for level in LEVELS
    )


@oracles.QUICK
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.lists(st.integers(-4, 4), min_size=1, max_size=10),
)
def test_p_value_equals_a_count(calibration, fresh):
    values = torch.tensor(sorted(calibration), dtype=torch.float64)
    threshold = Threshold(values, 1, "pac", REJECTED, ASSURANCE)
    truth = [
        (1 + sum(value >= score for value in calibration)) / (len(calibration) + 1)
        for score in fresh
    ]
    found = threshold.p_value(torch.tensor(fresh, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(truth, abs=1e-12)


@oracles.QUICK
@given(st.lists(st.floats(-1e6, 1e6), min_size=59, max_size=120))
def test_the_cut_is_an_order_statistic_and_holds_its_calibration_rows(values):
    threshold = Threshold.fit(np.array(values))
    assert float(threshold.cut) == sorted(values)[threshold.rank - 1]
    assert threshold.n == len(values)
    accepted = threshold.accept(torch.tensor(values, dtype=torch.float64))
    assert accepted.sum() >= threshold.rank
    assert threshold.scores.dtype == threshold.cut.dtype == torch.float64


def test_order_of_the_calibration_rows_does_not_matter():
    values = oracles.generator("order").normal(size=200)
    shuffled = oracles.generator("shuffle").permutation(values)
    assert torch.equal(Threshold.fit(values).cut, Threshold.fit(shuffled).cut)
    assert torch.equal(Threshold.fit(values).scores, Threshold.fit(shuffled).scores)


def test_non_finite_scores():
    threshold = Threshold.fit(np.arange(100.0))
    score = torch.tensor([math.nan, math.inf, 98.0, 98.5, -1e300], dtype=torch.float64)
    assert threshold.accept(score).tolist() == [False, False, True, False, True]
    assert threshold.p_value(score[1:])[0] == pytest.approx(1 / 101)
    assert threshold.p_value(score[4:])[0] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_calibration_scores_are_refused_with_their_number(bad):
    values = np.arange(100.0)
    values[[3, 7]] = bad
    with pytest.raises(InvalidInputError, match="2 of 100 calibration scores that are not finite"):
        Threshold.fit(values)


def test_float32_scores_are_compared_in_float64():
    values = oracles.generator("float32").normal(size=100).astype(np.float32)
    threshold = Threshold.fit(values)
    scores = torch.from_numpy(values)
    above = torch.nextafter(scores[scores == threshold.cut][:1], torch.tensor(math.inf))
    assert threshold.accept(scores).sum() == threshold.rank
    assert not threshold.accept(above).item()
    half = threshold.half()
    assert half.cut.dtype == half.scores.dtype == torch.float64
    assert half.accept(scores).sum() == threshold.rank


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(InvalidInputError, match=r"false_reject_rate.*\(0, 1\)"):
        Threshold.fit(np.arange(100.0), false_reject_rate=rate)
    with pytest.raises(InvalidInputError, match=r"assurance.*\(0, 1\)"):
        Threshold.fit(np.arange(100.0), assurance=rate)


def test_unknown_methods_are_refused():
    with pytest.raises(InvalidInputError, match="did you mean 'marginal'"):
        Threshold.fit(np.arange(100.0), "marginel")


def test_the_promise_in_words():
    pac = Threshold.fit(np.arange(100.0), false_reject_rate=0.1, assurance=0.99).guarantee
    assert "probability 0.99" in pac
    assert "at least 0.9 of" in pac
    assert "100 calibration" in pac
    marginal = Threshold.fit(np.arange(100.0), "marginal").guarantee
    assert "On average" in marginal
    assert "may be less" in marginal
    assert "probability" not in marginal


@pytest.mark.parametrize("method", ["pac", "marginal"])
def test_state_survives(method):
    threshold = Threshold.fit(oracles.generator("state").normal(size=100), method, 0.1, 0.9)
    again = Threshold.from_state(dict(threshold.state_dict()), threshold.settings())
    assert again.settings() == threshold.settings()
    assert torch.equal(again.cut, threshold.cut)
    assert torch.equal(again.scores, threshold.scores)
    assert again.guarantee == threshold.guarantee


def test_a_guard_without_threshold_says_so():
    with pytest.raises(NotFittedError, match=r"guard\.fit"):
        require_threshold(None)
