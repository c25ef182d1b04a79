"""Intervals and null levels: their pieces against exact draws, their promises by simulation.

The coverages are printed with `pytest -s -m slow tests/test_calibration_intervals.py`.
"""

import json
import math

import calibration_oracles as truths
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebm_guard import intervals
from ebm_guard.calibration.cells import CellTable, bin_index
from ebm_guard.calibration.intervals import L1, GapNorm, gap_interval, no_interval
from ebm_guard.calibration.metrics import (
    aurc,
    aurc_parts,
    brier_parts,
    calibration_metrics,
    class_table,
    ece,
    ece_adaptive,
    ece_classwise,
    ece_l2_debiased,
    mce,
    reliability_curve,
    smooth_ece,
)
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import (
    Metric,
    basic_interval,
    mean,
    normal_quantile,
    resample_counts,
    wilson,
    wilson_share,
)


@oracles.QUICK
@given(st.integers(1, 2000), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_equals_scipy(n, data, level):
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n, level)
    truth = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((truth.low, truth.high), abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(InvalidInputError, match="0 <= successes <= n"):
        wilson(successes, n)


@oracles.QUICK
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_mean_equals_scipy(values):
    found = mean(np.array(values))
    scale = stats.sem(values)
    assert found.value == pytest.approx(math.fsum(values) / len(values), abs=1e-6)
    assert found.low <= found.value <= found.high
    if scale > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), scale)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-6)


@oracles.QUICK
@given(
    st.floats(0, 1),
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
)
def test_reflected_interval_holds_the_value_inside_its_range(value, draws):
    low, high = basic_interval(value, np.array(draws), low=0.0, high=1.0)
    assert 0 <= low <= value <= high <= 1
    bottom, top = np.quantile(draws, [0.025, 0.975])
    assert low == pytest.approx(min(value, max(0, 2 * value - top)))
    assert high == pytest.approx(max(value, min(1, 2 * value - bottom)))


@pytest.mark.parametrize("n", [1, 5, 2_000_001])
def test_resamples_are_counts_of_n_rows(n):
    rng = oracles.generator("counts")
    sums = resample_counts(n, 3, rng, lambda counts: np.stack([counts.sum(1), counts[:, 0]], 1))
    assert sums.shape == (3, 2)
    assert (sums[:, 0] == n).all()


def test_resampled_counts_are_multinomial():
    n, draws = 6, 4000
    counts = resample_counts(n, draws, oracles.generator("counts"), lambda block: block)
    # Each count is Binomial(n, 1/n); compare with its probabilities by chi-square.
    observed = np.bincount(counts[:, 2].astype(int), minlength=n + 1)
    expected = draws * stats.binom.pmf(np.arange(n + 1), n, 1 / n)
    observed = np.append(observed[:4], observed[4:].sum())
    expected = np.append(expected[:4], expected[4:].sum())
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@oracles.QUICK
@given(st.floats(0, 1), st.floats(0.5, 1e6), st.floats(1.01, 100))
def test_wilson_of_a_share_narrows_with_the_effective_n(share, n, more):
    low, high = wilson_share(share, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    narrow = wilson_share(share, n * more)
    assert narrow[1] - narrow[0] < high - low
    z = normal_quantile(0.975)
    for end in {low, high} - {0.0, 1.0}:
        # Wilson's ends are the shares from which the measured one is z standard errors away.
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, abs=1e-9)


def test_the_mean_of_one_value_and_an_infinite_mean_have_no_interval():
    assert mean(np.array([2.0])).method == "none: one row"
    found = mean(np.array([1.0, math.inf]))
    assert (found.low, found.method) == (None, "none: the mean is not finite")


def rows_of(confidence, correct, weight=None):
    nothing = np.zeros(len(confidence))
    return RowStatistics(
        confidence, nothing.astype(np.int64), np.asarray(correct), nothing, nothing, weight
    )


def world_rows(name, n, rng):
    confidence, accuracy = truths.world(name, n, rng)
    return rows_of(confidence, rng.random(n) < accuracy)


def weights_of(kind, n, rng):
    if kind == "none":
        return None
    return rng.integers(1, 5, n).astype(float) if kind == "whole" else rng.gamma(2.0, size=n)


def same_distribution(one, other):
    return stats.ks_2samp(one, other).pvalue > 1e-3


def ece_of(confidence, correct, weight):
    gaps = np.bincount(bin_index(confidence), weight * (confidence - correct), minlength=15)
    return np.abs(gaps).sum() / weight.sum()


@pytest.mark.parametrize("weights", ["none", "whole", "gamma"])
@pytest.mark.parametrize("name", ["over by 5 points", "spike at 1.0", "error in one bin"])
def test_cell_bootstrap_equals_the_bootstrap_of_rows(name, weights):
    rng = oracles.generator("bootstrap", name, weights)
    rows = world_rows(name, 400, rng)
    rows = rows_of(rows.confidence, rows.correct, weights_of(weights, 400, rng))
    exact = []
    for _ in range(1000):
        picked = rng.integers(0, 400, 400)
        part = rows.select(picked)
        exact.append(
            (
                ece_of(part.confidence, part.correct, part.weights),
                np.average(part.correct, weights=part.weights),
                np.average(part.gaps, weights=part.weights),
            )
        )
    table = CellTable.of(rows)
    drawn = table.bootstrap(1000, seed=3)
    gaps = table.by_bin(drawn.gap) / drawn.total[:, None]
    right = drawn.right.sum(axis=1) / drawn.total
    found = (np.abs(gaps).sum(axis=1), right, gaps.sum(axis=1))
    for one, other in zip(np.array(exact).T, found, strict=True):
        assert same_distribution(one, other)
    # Resamples of a quarter of the rows would be twice as wide, and fail the same test.
    wider = np.array(exact)[:, 1].mean() + 2 * (right - right.mean())
    assert not same_distribution(np.array(exact)[:, 1], wider)


@pytest.mark.parametrize("name", ["over by 5 points", "spike at 1.0"])
def test_bootstrapped_areas_equal_those_of_rows(name):
    rng = oracles.generator("areas", name)
    rows = world_rows(name, 300, rng)
    exact = []
    for _ in range(800):
        part = rows.select(rng.integers(0, 300, 300))
        order = np.argsort(-part.confidence, kind="stable")
        ends = np.searchsorted(-part.confidence[order], -part.confidence, side="right")
        exact.append((np.cumsum(~part.correct[order])[ends - 1] / ends).mean())
    found = aurc(rows, draws=2000)
    low, high = basic_interval(found.value, np.array(exact))
    # Both ends are quantiles of about 1,000 draws of this spread.
    assert found.low == pytest.approx(low, abs=0.35 * np.std(exact))
    assert found.high == pytest.approx(high, abs=0.35 * np.std(exact))


@pytest.mark.parametrize("weights", ["none", "whole", "gamma"])
@pytest.mark.parametrize("by_mass", [False, True])
def test_null_draws_equal_a_simulation_of_a_perfect_model(by_mass, weights):
    rng = oracles.generator("null", by_mass, weights)
    rows = world_rows("spike at 1.0", 400, rng)
    rows = rows_of(rows.confidence, rows.correct, weights_of(weights, 400, rng))
    w, c = rows.weights, rows.confidence
    table = CellTable.of(rows, by_mass=by_mass)
    bins = bin_index(c) if not by_mass else np.array(truths.mass_bins(c.tolist(), w.tolist(), 15))
    exact = []
    for _ in range(1000):
        gaps = np.bincount(bins, w * (c - (rng.random(400) < c)), minlength=15) / w.sum()
        exact.append((np.abs(gaps).sum(), gaps.sum(), np.square(gaps).sum()))
    drawn = table.null(1000, seed=5)
    gaps = table.by_bin(drawn.gap) / drawn.total[:, None]
    found = (np.abs(gaps).sum(axis=1), gaps.sum(axis=1), np.square(gaps).sum(axis=1))
    for one, other in zip(np.array(exact).T, found, strict=True):
        assert same_distribution(one, other)
    assert not same_distribution(np.array(exact)[:, 0], found[0] * 0.9)


def test_simulated_models_have_the_accuracy_asked_for():
    rows = world_rows("perfect", 3000, oracles.generator("simulate"))
    table = CellTable.of(rows)
    weight = table.bootstrap(500, 0).weight
    drawn = table.simulate(weight, np.full(table.count.shape[1], 0.7), 1)
    assert np.array_equal(drawn.weight, weight)
    share = drawn.right.sum(axis=1) / drawn.total
    assert stats.kstest((share - 0.7) / math.sqrt(0.21 / 3000), "norm").pvalue > 1e-3


def test_draws_are_kept_and_repeat():
    rows = world_rows("wave", 500, oracles.generator("kept"))
    table = CellTable.of(rows)
    assert table.bootstrap(50, 1) is table.bootstrap(50, 1)
    assert np.array_equal(table.bootstrap(50, 1).gap, CellTable.of(rows).bootstrap(50, 1).gap)
    assert not np.array_equal(table.bootstrap(50, 1).gap, table.bootstrap(50, 2).gap)
    assert not np.array_equal(table.null(50, 1).right, table.bootstrap(50, 1).right)


def test_the_curve_has_wilson_bars_and_the_band_of_a_perfect_model():
    rng = oracles.generator("curve")
    rows = world_rows("perfect", 1500, rng)
    curve = reliability_curve(rows, draws=2000)
    where = bin_index(rows.confidence)
    for index, item in enumerate(curve.bins):
        inside = rows.confidence[where == index]
        if not len(inside):
            assert (item.accuracy, item.band_low, item.band_high) == (None, None, None)
            continue
        assert (item.low, item.high) == wilson_share(item.accuracy, len(inside))
        # Simulated counts are whole: compare with the quantiles next to them.
        simulated = (rng.random((2000, len(inside))) < inside).mean(axis=1)
        for found, tail in ((item.band_low, 0.025), (item.band_high, 0.975)):
            ends = np.quantile(simulated, [max(0, tail - 0.015), min(1, tail + 0.015)])
            assert ends[0] - 1e-12 <= found <= ends[1] + 1e-12


def test_weighted_bars_take_the_effective_number_of_rows():
    rows = rows_of(np.full(40, 0.9), np.arange(40) < 30, np.repeat([3.0, 1.0], 20))
    item = reliability_curve(rows).bins[13]
    share = (20 * 3 + 10) / 80
    assert (item.accuracy, item.count) == (pytest.approx(share), 40)
    assert (item.low, item.high) == pytest.approx(wilson_share(share, 80**2 / (20 * 9 + 20)))


@oracles.QUICK
@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=15), st.integers(0, 2**32 - 1))
def test_gap_intervals_hold_their_value(gaps, seed):
    gaps = np.array(gaps)
    noise = np.random.default_rng(seed).normal(0, 0.02, (100, len(gaps)))
    low, high = gap_interval(gaps, noise)
    assert 0 <= low <= np.abs(gaps).sum() <= high


def test_gap_intervals_of_one_gap_are_the_normal_interval():
    """Far from 0 a single gap is a plain normal measurement."""
    noise = np.random.default_rng(0).normal(0, 0.01, (20_000, 1))
    low, high = gap_interval(np.array([0.2]), noise)
    assert (low, high) == pytest.approx((0.2 - 0.0196, 0.2 + 0.0196), abs=5e-4)


def test_gap_intervals_of_pure_noise_begin_at_zero():
    rng = oracles.generator("pure noise")
    draws = rng.normal(0, 0.01, (2000, 15))
    lows = [gap_interval(gaps, draws)[0] for gaps in rng.normal(0, 0.01, (200, 15))]
    # The lower end is above 0 in 2.5 % of cases.
    assert not oracles.fails_guarantee(sum(low > 0 for low in lows), 200, 0.025)


def test_statistics_that_are_cut_at_zero_would_lose_their_upper_end():
    """A debiased value of 0 has an interval only because the statistic may be negative."""

    def debiased(gaps):
        return np.square(gaps).sum(axis=-1) - 15 * 1e-4

    whole = GapNorm(lambda gaps: float(np.square(gaps).sum()), debiased)
    cut = GapNorm(whole.of_gaps, lambda gaps: np.maximum(debiased(gaps), 0.0))
    rng = oracles.generator("cut")
    noise = rng.normal(0, 0.01, (2000, 15))
    gaps = np.full(15, 0.008) * rng.choice([-1, 1], 15)
    assert debiased(gaps) < 0
    assert gap_interval(gaps, noise, whole)[1] > 1e-4
    assert gap_interval(gaps, noise, cut)[1] == 0


@pytest.mark.parametrize(
    ("n", "right", "reason"),
    [
        (29, 15, "none: 29 rows, and an interval needs 30"),
        (1, 1, "none: 1 row, and an interval needs 30"),
        (300, 300, "none: no wrong rows, and an interval needs 5"),
        (300, 1, "none: 1 right row, and an interval needs 5"),
        (300, 296, "none: 4 wrong rows, and an interval needs 5"),
        (30, 25, None),
    ],
)
def test_too_few_rows_have_no_interval(n, right, reason):
    assert no_interval(n, right) == reason
    confidence = np.linspace(0.5, 0.99, n)
    found = calibration_metrics(rows_of(confidence, np.arange(n) < right))
    for name in ("ece", "ece_adaptive", "smooth_ece", "aurc", "e_aurc", "miscalibration"):
        metric = getattr(found, name)
        assert (metric.low is None) == (metric.high is None) == (reason is not None)
        assert metric.method == reason or reason is None


def test_intervals_hold_their_value_and_repeat():
    rows = world_rows("over by 2 points", 500, oracles.generator("hold"))
    first, second = calibration_metrics(rows), calibration_metrics(rows)
    assert first == second
    assert first != calibration_metrics(rows, seed=1)
    for name, metric in vars(first).items():
        if name != "curve":
            assert metric.low <= metric.value <= metric.high
            assert (metric.n, metric.level) == (500, 0.95)
            assert metric.method
    for metric in (ece_l2_debiased(rows), mce(rows, min_count=10)):
        assert metric.low <= metric.value <= metric.high
    json.dumps(first.to_dict(), allow_nan=False)


def test_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    rows = world_rows("wave", 300, oracles.generator("state"))
    calibration_metrics(rows)
    class_table(rows, 1)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_perfect_model_does_not_get_zero_and_its_level_falls_with_n():
    rng = oracles.generator("bias")
    confidence = rng.uniform(0.1, 1, 8000)
    levels = [
        ece(rows_of(confidence[:n], np.zeros(n, bool)), draws=500).null95 for n in (500, 2000, 8000)
    ]
    # The noise of the gaps falls as 1 / sqrt(n).
    assert levels[0] / levels[1] == pytest.approx(2, rel=0.15)
    assert levels[1] / levels[2] == pytest.approx(2, rel=0.15)


def test_classwise_levels_of_two_classes_are_those_of_one():
    """Two classes mirror each other: their mean is as noisy as one, and not less."""
    rng = oracles.generator("two")
    logits = rng.normal(0, 1.5, (3000, 2))
    found = ece_classwise(logits, oracles.draw_labels(logits, rng))
    p = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    simulated = [ece_of(p, rng.random(3000) < p, np.ones(3000)) for _ in range(600)]
    above = sum(value > found.null95 for value in simulated)
    assert stats.binomtest(above, 600, 0.05).pvalue > 1e-4


METRICS = (
    "ece",
    "ece_adaptive",
    "smooth_ece",
    "ece_l2_debiased",
    "miscalibration",
    "aurc",
)
SIZES, REPEATS, DRAWS = (2000, 10_000), 16, 200


def measure(rows, seed):
    """All metrics that have a bootstrap interval, from two shared tables."""
    table, by_mass = CellTable.of(rows), CellTable.of(rows, by_mass=True)
    settings = {"draws": DRAWS, "seed": seed}
    return {
        "ece": ece(table, **settings),
        "ece_adaptive": ece_adaptive(rows, **settings, table=by_mass),
        "smooth_ece": smooth_ece(rows, **settings, table=table),
        "ece_l2_debiased": ece_l2_debiased(rows, **settings),
        "miscalibration": brier_parts(rows, **settings, table=by_mass)[0],
        "aurc": aurc_parts(rows, **settings, table=by_mass)[0],
    }, percentile(table, seed)


def percentile(table, seed):
    """The wrong rule: quantiles of the bootstrapped ECE itself, which has the bias twice."""
    drawn = table.bootstrap(DRAWS, seed)
    values = L1.of_draws(table.by_bin(drawn.gap) / drawn.total[:, None])
    low, high = np.quantile(values, [0.025, 0.975])
    return Metric(0.0, low, high, table.n, "percentile")


@pytest.fixture(scope="module")
def hits():
    """Whether each interval held the truth: (metric, world) -> booleans over sizes and repeats."""
    found = {}
    for name in truths.WORLDS:
        truth = truths.truths(name)
        for n in SIZES:
            rng = oracles.generator("coverage", name, n)
            for repeat in range(REPEATS):
                metrics, wrong = measure(world_rows(name, n, rng), repeat)
                for metric, interval in (*metrics.items(), ("percentile", wrong)):
                    aim = truth["ece" if metric == "percentile" else metric]
                    # The truths of smooth ECE and AURC are themselves numerical.
                    held = interval.low - 1e-4 <= aim <= interval.high + 1e-4
                    found.setdefault((metric, name), []).append(held)
    print(f"\n{'coverage of 95 % intervals':28}", *(f"{metric:>15}" for metric in METRICS))
    for name in truths.WORLDS:
        row = [f"{np.mean(found[metric, name]):15.3f}" for metric in METRICS]
        print(f"{name:28}", *row)
    return found


def undercovers(held):
    """Whether the exact binomial test rejects "it covers in at least 90 % of cases"."""
    return oracles.fails_guarantee(len(held) - sum(held), len(held), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_intervals_cover_the_truth(hits, metric):
    assert not [name for name in truths.WORLDS if undercovers(hits[metric, name])]
    assert not undercovers([held for name in truths.WORLDS for held in hits[metric, name]])


@pytest.mark.slow
def test_the_percentile_bootstrap_fails_the_same_test(hits):
    assert undercovers(hits["percentile", "perfect"])
    assert undercovers(hits["percentile", "over by 1 point"])
    assert undercovers([held for name in truths.WORLDS for held in hits["percentile", name]])


@pytest.mark.slow
def test_the_null_test_rejects_a_perfect_model_in_about_five_percent():
    rng = oracles.generator("null level")
    above = {name: 0 for name in METRICS if name != "aurc"}
    half, repeats = 0, 120
    for repeat in range(repeats):
        found, _ = measure(world_rows("perfect", SIZES[repeat % 2], rng), repeat)
        for name in above:
            above[name] += found[name].value > found[name].null95
        # The wrong rule: the level of a model with twice as many rows.
        half += found["ece"].value > found["ece"].null95 / math.sqrt(2)
    print("\nnull tests that reject:", {name: count / repeats for name, count in above.items()})
    for count in above.values():
        # 200 draws put their 95 % quantile at 5.4 % on average.
        assert stats.binomtest(count, repeats, 0.054).pvalue > 1e-3
    assert stats.binomtest(half, repeats, 0.054).pvalue < 1e-3


def test_metric_records_are_json():
    record = Metric(math.nan, None, math.inf, 3, "none").to_dict()
    assert record["value"] is None
    assert record["high"] is None
    assert intervals.proportion(9, 10).to_dict()["value"] == 0.9
