"""The acceptance test: its bounds against oracles, its level by simulation, bad nets refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from ebm_guard.errors import InvalidInputError
from ebm_guard.training import finishing
from ebm_guard.training.acceptance import (
    accept,
    accuracy_test,
    nll_test,
)
from ebm_guard.training.bounds import loss_upper, rows_needed, tango_upper
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.safeguard import harm, within_limits
from ebm_guard.training.selection import Evaluation, Look
from ebm_guard.training.temperatures import Temperatures

RUNS = 2000


def score_statistic(lost, gained, n, loss):
    """Tango's statistic with the nuisance parameter found by a numerical search."""

    def misfit(q):
        cells = ((gained, q), (lost, q + loss), (n - lost - gained, 1 - 2 * q - loss))
        return -sum(count * np.log(max(share, 1e-300)) for count, share in cells if count)

    low, high = max(0.0, -loss), (1 - loss) / 2
    q = optimize.minimize_scalar(
        misfit, bounds=(low, high), method="bounded", options={"xatol": 1e-14}
    ).x
    variance = n * (2 * q + loss * (1 - loss))
    return (lost - gained - n * loss) / np.sqrt(variance)


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(5, 3, 200), (20, 1, 300), (1, 20, 300), (2, 2, 50), (40, 30, 100)]
)
def test_tango_bound_solves_the_score_equation(lost, gained, n):
    bound = tango_upper(lost, gained, n)
    assert score_statistic(lost, gained, n, bound) == pytest.approx(-1.6448536, abs=2e-3)


def test_tango_bound_without_changes_has_a_closed_form():
    z2 = stats.norm.ppf(0.95) ** 2
    for n in (10, 268, 5000):
        assert tango_upper(0, 0, n) == pytest.approx(z2 / (n + z2))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tango_bound_is_above_the_estimate_and_grows_with_losses(data):
    n = data.draw(st.integers(2, 500))
    lost = data.draw(st.integers(0, n - 1))
    gained = data.draw(st.integers(0, n - 1 - lost))
    bound = tango_upper(lost, gained, n)
    assert (lost - gained) / n <= bound <= 1
    assert tango_upper(lost + 1, gained, n) >= bound - 1e-9


def test_rows_needed_is_the_first_number_that_can_pass():
    for drop in (0.005, 0.01, 0.05):
        n = rows_needed(drop)
        assert loss_upper(0, 0, n) <= drop < loss_upper(0, 0, n - 1)
        assert (1 - drop) ** n <= 0.05 < (1 - drop) ** (n - 1)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(lost, gained, n):
    with pytest.raises(InvalidInputError):
        tango_upper(lost, gained, n)


def simulated(rule, limit, n=400):
    """How often a rule passes nets that lose exactly the limit."""
    generator = np.random.default_rng(11)
    passes = 0
    for _ in range(RUNS):
        # Lost 3 %, gained 1 %: a true loss of 2 points.
        kinds = generator.choice(4, n, p=[0.03, 0.01, 0.88, 0.08])
        start, candidate = np.isin(kinds, (0, 2)), np.isin(kinds, (1, 2))
        passes += bool(rule(start, candidate, limit))
    return passes


def level_is_kept(passes):
    return stats.binomtest(passes, RUNS, 0.05, alternative="greater").pvalue > 1e-3


def test_level_of_the_accuracy_test():
    passes = simulated(lambda *args: accuracy_test(*args).passed, 0.02)
    assert level_is_kept(passes)


def test_the_point_estimate_alone_does_not_keep_the_level():
    passes = simulated(lambda a, b, limit: a.mean() - b.mean() <= limit, 0.02)
    assert not level_is_kept(passes)


def test_an_unpaired_bound_refuses_what_the_paired_one_can_prove():
    start = np.arange(1000) >= 100
    candidate = start.copy()
    candidate[100] = False
    p, q, n = start.mean(), candidate.mean(), len(start)
    unpaired = p - q + 1.645 * np.sqrt((p * (1 - p) + q * (1 - q)) / n)
    assert accuracy_test(start, candidate, 0.01).passed
    assert unpaired > 0.01


def test_level_of_the_nll_test():
    generator = np.random.default_rng(12)
    start = generator.exponential(size=(RUNS, 200))
    rise = generator.normal(0.02, 0.1, size=(RUNS, 200))
    checks = [nll_test(a, a + b, 0.02) for a, b in zip(start, rise, strict=True)]
    assert level_is_kept(sum(check.passed for check in checks))
    assert not level_is_kept(sum(check.difference <= 0.02 for check in checks))


def test_nll_bound_equals_scipys_one_sided_paired_t():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 50))
    interval = stats.ttest_rel(second, first, alternative="less").confidence_interval(0.95)
    assert nll_test(first, second, 0.1).bound == pytest.approx(interval.high)


def look(n=600, seed=0, wrong=0.05, outside_shift=0.0):
    """A net whose energies separate two OOD sets."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    logits = generator.normal(size=(n, 4))
    logits[np.arange(n), labels] += 8
    bad = np.arange(n) < wrong * n
    logits[bad] = np.roll(logits[bad], 1, axis=1)
    energies = -np.log(np.exp(logits).sum(axis=1))
    outside = {
        name: generator.normal(shift + outside_shift, 1, 150)
        for name, shift in (("rotation", -6.0), ("paste", -7.0))
    }
    return Look(logits, labels, energies, outside)


def judged(candidate, start=None, **settings):
    limits = {"max_acc_drop": 0.01, "max_nll_rise": 0.05} | settings
    roles = {"rotation": "guard", "paste": "guard"}
    return accept(
        start or look(), candidate, temperatures=Temperatures(1.0, 1.0), roles=roles, **limits
    )


def test_the_same_net_passes():
    result = judged(look())
    assert result.passed
    assert [test.name for test in result.tests] == ["accuracy", "nll", "auroc"]
    assert result.auroc["paste"]["difference"]["value"] == 0
    assert len(result.story) == 3
    assert all("met" in line for line in result.story)


@pytest.mark.parametrize(
    ("worse", "failed"),
    [
        (look(wrong=0.08), {"accuracy", "nll"}),
        (look(outside_shift=-0.5), {"auroc"}),
    ],
)
def test_a_net_made_worse_by_hand_fails(worse, failed):
    result = judged(worse)
    assert not result.passed
    assert {test.name for test in result.tests if not test.passed} == failed
    assert any("not met" in line for line in result.story)


def test_a_net_whose_probabilities_are_worse_fails_on_the_nll_alone():
    start = look()
    flat = Look(start.logits / 10, start.labels, start.energies, start.outside)
    result = judged(flat, start)
    assert {test.name for test in result.tests if not test.passed} == {"nll"}


def test_logits_that_are_not_finite_fail():
    broken = look()
    broken.logits[3, 1] = np.nan
    result = judged(broken)
    assert not result.passed
    assert result.tests[0].name == "finite"


def test_the_record_is_json_and_signs_are_those_of_candidate_minus_start():
    import json

    record = json.loads(json.dumps(judged(look(wrong=0.08)).to_dict()))
    accuracy, nll, auroc = record["tests"]
    assert accuracy["difference"] == pytest.approx(-0.03)
    assert accuracy["bound"] < accuracy["difference"] < 0
    assert accuracy["limit"] == -0.01
    assert nll["bound"] > nll["difference"] > 0
    assert auroc["bound"] <= auroc["difference"]
    assert record["n"] == 600


# The exact bound where no row was gained


def pass_rate(bound, limit, n, gains):
    """Compute how often a net passes that loses exactly the limit, by summing over all outcomes."""
    counts = np.arange(25)
    most = [max((b for b in range(25) if bound(b, c, n) <= limit), default=-1) for c in range(25)]
    lost = stats.binom.cdf(most, n - counts, (gains + limit) / (1 - gains))
    return float((stats.binom.pmf(counts, n, gains) * np.where(np.array(most) < 0, 0, lost)).sum())


def test_level_at_the_fewest_rows_is_exact_where_nothing_is_gained():
    for limit in (0.01, 0.02, 0.05):
        n = rows_needed(limit)
        assert pass_rate(loss_upper, limit, n, 0.0) <= 0.05
        assert pass_rate(loss_upper, limit, n, 0.02) <= 0.053
    # Tango's bound alone would let a net pass at 268 rows, 6.8 % of the time.
    assert tango_upper(0, 0, 268) <= 0.01
    assert pass_rate(tango_upper, 0.01, 268, 0.0) > 0.065


def test_level_near_the_fewest_rows_by_simulation():
    generator = np.random.default_rng(13)
    n, runs = rows_needed(0.01), 20_000
    lost = generator.binomial(n, 0.01, size=runs)

    def passes(bound, rows):
        passing = {int(b): bound(int(b), 0, rows) <= 0.01 for b in np.unique(lost)}
        return sum(passing[int(b)] for b in lost)

    start = np.ones(n, dtype=bool)
    for b in (0, 1, 5):
        assert accuracy_test(start, np.arange(n) >= b, 0.01).passed == (loss_upper(b, 0, n) <= 0.01)
    assert stats.binomtest(passes(loss_upper, n), runs, 0.05, alternative="greater").pvalue > 1e-3
    lost = generator.binomial(268, 0.01, size=runs)
    wrong = passes(tango_upper, 268)
    assert stats.binomtest(wrong, runs, 0.05, alternative="greater").pvalue < 1e-6


def test_the_exact_bound_is_clopper_and_pearsons():
    for lost, n in ((0, 299), (3, 800), (7, 90)):
        interval = stats.binomtest(lost, n).proportion_ci(0.9, method="exact")
        assert loss_upper(lost, 0, n) == pytest.approx(max(interval.high, tango_upper(lost, 0, n)))
        assert loss_upper(lost, 0, n) >= interval.high - 1e-9
    assert loss_upper(3, 1, 300) == tango_upper(3, 1, 300)
    assert loss_upper(4, 0, 4) == 1


# Temperatures


def sure(n=110, wrong=0, seed=3, classes=8):
    """Logits that are right but for the first rows."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes))
    at = np.where(np.arange(n) < wrong, (labels + 1) % classes, labels)
    logits[np.arange(n), at] += 20
    energies = -np.log(np.exp(logits).sum(axis=1))
    return Look(logits, labels, energies, {"paste": generator.normal(size=50)})


def test_a_temperature_that_was_not_found_never_decides_the_comparison():
    """The same net on both sides: only the fits on the selection rows differ."""
    separable, fitted = sure().fit, sure(wrong=1).fit
    assert (separable.status, fitted.status) == ("separable", "converged")
    assert fitted.temperature > 2
    rows = sure(n=600, wrong=6, seed=4)
    for pair in (Temperatures.of(separable, fitted), Temperatures.of(fitted, separable)):
        assert pair.start == pair.candidate == fitted.temperature
        result = accept(
            rows,
            rows,
            temperatures=pair,
            max_acc_drop=0.01,
            max_nll_rise=0.02,
            roles={"paste": "guard"},
        )
        assert result.passed
        assert result.tests[1].difference == 0
        assert "separable" not in result.story[0]
        assert result.story[0].startswith("No temperature could be fitted on the selection rows")
        record = result.to_dict()["temperature"]
        assert record == {
            "start": fitted.temperature,
            "candidate": fitted.temperature,
            "note": result.story[0],
        }
    # What was wrong: T = 1 beside a fitted T, at equal logits.
    gap = float((rows.nll(1.0) - rows.nll(fitted.temperature)).mean())
    assert abs(gap) > 0.02


def test_each_side_has_its_own_temperature_where_both_were_found_and_1_where_none():
    one, two, none = sure(wrong=1).fit, sure(wrong=5).fit, sure().fit
    pair = Temperatures.of(one, two)
    assert (pair.start, pair.candidate) == (one.temperature, two.temperature)
    assert pair.note == ""
    neither = Temperatures.of(none, none)
    assert (neither.start, neither.candidate) == (1.0, 1.0)
    assert "T = 1" in neither.note


def test_choosing_a_state_uses_the_common_temperature_too():
    options = FineTuneOptions(max_nll_rise=0.02, max_acc_drop=0.05)
    start, found = sure(wrong=1), sure()
    # The better net has no temperature. At T = 1 against the other's fitted T its calibration
    # would look much better than it is, and the other way round much worse.
    assert harm(found, found, options) is None
    pair = Temperatures.of(start.fit, found.fit)
    before, after = Evaluation.of(start, pair.start), Evaluation.of(found, pair.candidate)
    assert before.temperature == after.temperature == start.fit.temperature
    assert (before.temperature_status, after.temperature_status) == ("converged", "separable")
    assert Temperatures.of(start.fit, after.fit) == pair
    assert within_limits(before, after, options)
    again = after.with_numbers(after.numbers())
    assert again == after


def test_a_net_that_became_right_everywhere_is_no_harm_for_want_of_a_temperature():
    start, found = (
        replace(look, logits=look.logits / 10) for look in (sure(n=400, wrong=1), sure(n=400))
    )
    assert (start.fit.status, found.fit.status) == ("converged", "separable")
    options = FineTuneOptions(max_nll_rise=0.02, max_acc_drop=0.05)
    # Each at its own T, or at 1: the better net would look far worse on every row.
    rise = found.nll(1.0) - start.nll(start.fit.temperature)
    low = rise.mean() - 1.65 * rise.std(ddof=1) / np.sqrt(len(rise))
    assert low > 3 * options.max_nll_rise
    assert not within_limits(Evaluation.of(start), Evaluation.of(found), options)
    assert harm(start, found, options) is None
    pair = Temperatures.of(start.fit, found.fit)
    assert within_limits(
        Evaluation.of(start, pair.start), Evaluation.of(found, pair.candidate), options
    )


def test_the_end_of_a_run_pairs_the_temperatures():
    selected, rows = sure(wrong=1), sure(n=600, wrong=6, seed=4)
    prepared = SimpleNamespace(
        on_selection=sure(),
        on_acceptance=rows,
        acceptance=SimpleNamespace(roles={"paste": "guard"}),
        options=FineTuneOptions(),
    )
    result = finishing._accept(prepared, rows, Evaluation.of(selected))
    assert result.passed
    assert result.temperature.start == result.temperature.candidate == selected.fit.temperature
