"""AUROC, DeLong, AUPR and both FPR95 against pair counts, loops and scikit-learn."""

import json
import math

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import auc, average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from ebm_guard.errors import InvalidInputError
from ebm_guard.ood import metrics
from ebm_guard.ood.metrics import (
    aupr_in,
    aupr_out,
    auroc,
    auroc_difference,
    fpr95,
    fpr95_ood_positive,
    ood_metrics,
    placements,
    roc_curve,
)

NAMES = ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_ood_positive")
Z = stats.norm.ppf(0.975)


def scores(low=-4, high=4, min_size=1, max_size=30):
    """Whole numbers in a small range: ties everywhere."""
    numbers = st.lists(st.integers(low, high), min_size=min_size, max_size=max_size)
    return numbers.map(lambda values: np.array(values, dtype=np.float64))


def truth_of(inside, outside):
    return np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])


def values_of(inside, outside):
    found = ood_metrics(inside, outside, draws=1)
    return {name: getattr(found, name).value for name in NAMES}


@oracles.QUICK
@given(scores(), scores())
def test_auroc_equals_pair_count_and_scikit_learn(inside, outside):
    found = auroc(inside, outside).value
    assert found == pytest.approx(oracles.auroc(inside, outside), abs=1e-12)
    assert found == pytest.approx(roc_auc_score(*truth_of(inside, outside)), abs=1e-12)


@oracles.QUICK
@given(scores(), scores())
def test_aupr_equals_scikit_learn_and_a_loop(inside, outside):
    found = ood_metrics(inside, outside, draws=1)
    truth, joined = truth_of(inside, outside)
    n, m = len(inside), len(outside)
    assert found.aupr_out.value == pytest.approx(average_precision_score(truth, joined))
    assert found.aupr_in.value == pytest.approx(average_precision_score(1 - truth, -joined))
    assert found.aupr_out.value == pytest.approx(oracles.average_precision(outside, inside))
    assert found.aupr_in.value == pytest.approx(oracles.average_precision(-inside, -outside))
    assert found.aupr_out.base_rate == pytest.approx(m / (n + m))
    assert found.aupr_in.base_rate == pytest.approx(n / (n + m))
    balance = np.where(truth == 1, n / m, 1.0)
    assert found.aupr_out.balanced == pytest.approx(
        average_precision_score(truth, joined, sample_weight=balance)
    )
    assert found.aupr_in.balanced == pytest.approx(
        average_precision_score(1 - truth, -joined, sample_weight=balance)
    )


@oracles.QUICK
@given(scores(max_size=60), scores(max_size=60))
def test_both_fpr95_equal_their_loops(inside, outside):
    found = values_of(inside, outside)
    assert found["fpr95"] == pytest.approx(oracles.fpr95(inside, outside), abs=1e-12)
    assert found["fpr95_ood_positive"] == pytest.approx(
        oracles.fpr95_ood_positive(inside, outside), abs=1e-12
    )


@pytest.mark.parametrize("n", [20, 40, 100, 1000, 7000])
def test_exactly_95_percent_is_enough(n):
    # 19 of 20 is 95 %: the first cut that reaches the share, not the first beyond it.
    inside = np.arange(n, dtype=np.float64)
    outside = np.array([0.95 * n - 1, 0.95 * n - 0.5])
    assert fpr95(inside, outside).value == 0.5
    assert fpr95_ood_positive(-outside, -inside).value == 0.5


def test_the_two_fpr95_differ():
    # Half of ID lies above all OOD: accepting 95 % of ID accepts all OOD, but catching 95 % of OOD
    # refuses the upper half of ID only.
    inside = np.concatenate([np.zeros(50), np.full(50, 10.0)])
    outside = np.full(30, 5.0)
    assert fpr95(inside, outside).value == 1.0
    assert fpr95_ood_positive(inside, outside).value == 0.5


def test_a_strict_cut_would_not_count_ties():
    inside = np.array([0.0] * 90 + [1.0] * 10)
    outside = np.array([1.0] * 40 + [2.0] * 60)
    assert fpr95(inside, outside).value == 0.4
    assert float((outside < 1.0).mean()) == 0.0


@oracles.QUICK
@given(scores(), scores())
def test_increasing_transforms_change_nothing(inside, outside):
    before = values_of(inside, outside)
    for transform in (lambda s: 3 * s - 7, np.exp, lambda s: s**3, np.arctan):
        assert values_of(transform(inside), transform(outside)) == before


@oracles.QUICK
@given(scores(), scores(), st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing(inside, outside, random):
    mixed_in, mixed_out = list(inside), list(outside)
    random.shuffle(mixed_in)
    random.shuffle(mixed_out)
    again = values_of(np.array(mixed_in), np.array(mixed_out))
    assert again == pytest.approx(values_of(inside, outside), abs=1e-12)


@oracles.QUICK
@given(scores(), scores())
def test_swapping_the_roles(inside, outside):
    plain = values_of(inside, outside)
    # The opposite score with the sets exchanged asks the same questions of the other class.
    mirrored = values_of(-outside, -inside)
    assert mirrored["auroc"] == pytest.approx(plain["auroc"], abs=1e-12)
    assert mirrored["aupr_in"] == pytest.approx(plain["aupr_out"], abs=1e-12)
    assert mirrored["aupr_out"] == pytest.approx(plain["aupr_in"], abs=1e-12)
    assert mirrored["fpr95"] == pytest.approx(plain["fpr95_ood_positive"], abs=1e-12)
    assert mirrored["fpr95_ood_positive"] == pytest.approx(plain["fpr95"], abs=1e-12)
    assert auroc(outside, inside).value == pytest.approx(1 - plain["auroc"], abs=1e-12)
    assert auroc(-inside, -outside).value == pytest.approx(1 - plain["auroc"], abs=1e-12)


@oracles.QUICK
@given(scores(), scores(), st.integers(2, 3))
def test_copies_of_all_rows_change_nothing(inside, outside, copies):
    again = values_of(np.tile(inside, copies), np.tile(outside, copies))
    assert again == pytest.approx(values_of(inside, outside), abs=1e-12)


@oracles.QUICK
@given(scores(min_size=2), scores(min_size=2))
def test_interval_of_the_auroc_is_delongs(inside, outside):
    found = auroc(inside, outside)
    areas, ood_part, id_part = oracles.delong([inside], [outside])
    area, deviation = areas[0], math.sqrt(ood_part[0, 0] + id_part[0, 0])
    id_places, ood_places = placements(inside, outside)
    assert id_places.mean() == pytest.approx(area)
    assert ood_places.mean() == pytest.approx(area)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assume(0 < area < 1)
    half = Z * deviation / (area * (1 - area))
    centre = math.log(area / (1 - area))
    ends = [1 / (1 + math.exp(-(centre + sign * half))) for sign in (-1, 1)]
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-9)


@pytest.mark.parametrize("n", [2, 10, 300])
def test_perfect_separation_keeps_an_interval(n):
    low, high = np.arange(n, dtype=np.float64), np.arange(n, dtype=np.float64) + 1000
    perfect, reversed_ = auroc(low, high), auroc(high, low)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(1 - min(1, 3 / n))
    assert (reversed_.value, reversed_.low) == (0.0, 0.0)
    assert reversed_.high == pytest.approx(min(1, 3 / n))


def test_one_row_has_no_interval():
    found = auroc(np.array([0.0]), np.array([1.0, 2.0, 0.0]))
    assert found.value == pytest.approx(2.5 / 3)
    assert (found.low, found.high, found.method) == (None, None, "none: one row")


def coverage_misses(variance, runs=600, n=60, shift=1.2):
    """How often an interval on the logit scale misses the true AUROC of two normals."""
    truth = stats.norm.cdf(shift / math.sqrt(2))
    rng = oracles.generator("coverage")
    misses = 0
    for _ in range(runs):
        inside, outside = rng.normal(size=n), rng.normal(shift, 1, size=2 * n)
        low, high = variance(inside, outside)
        misses += not low <= truth <= high
    return misses, runs


def test_delong_interval_covers_the_truth():
    def ours(inside, outside):
        found = auroc(inside, outside)
        return found.low, found.high

    misses, runs = coverage_misses(ours)
    assert not oracles.fails_guarantee(misses, runs, 0.07)


def test_an_interval_that_forgets_the_id_rows_fails_the_same_test():
    def half(inside, outside):
        _, ood_part = placements(inside, outside)
        area = ood_part.mean()
        deviation = math.sqrt(ood_part.var(ddof=1) / len(ood_part))
        centre, spread = math.log(area / (1 - area)), Z * deviation / (area * (1 - area))
        return tuple(1 / (1 + math.exp(-(centre + sign * spread))) for sign in (-1, 1))

    misses, runs = coverage_misses(half)
    assert oracles.fails_guarantee(misses, runs, 0.07)


def paired(name, n=40, sizes=(30,)):
    """Two scores of the same rows, the second with more noise."""
    rng = oracles.generator("paired", name)
    columns = []
    for shift, rows in [(0.0, n), *((1.0 + k, size) for k, size in enumerate(sizes))]:
        base = rng.normal(shift, 1, rows)
        columns.append((base.round(1), (base + rng.normal(0, 1, rows)).round(1)))
    (id_first, id_second), *ood = columns
    return id_first, id_second, [pair[0] for pair in ood], [pair[1] for pair in ood]


def test_difference_of_two_scores_is_paired_delong():
    id_first, id_second, ood_first, ood_second = paired("one set")
    found = auroc_difference(id_first, id_second, ood_first, ood_second)
    areas, ood_part, id_part = oracles.delong([id_first, id_second], [ood_first[0], ood_second[0]])
    contrast = np.array([1, -1])
    deviation = math.sqrt(contrast @ (ood_part + id_part) @ contrast)
    assert found.value == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert found.low == pytest.approx(found.value - Z * deviation, abs=1e-9)
    assert found.high == pytest.approx(found.value + Z * deviation, abs=1e-9)
    # Forgetting that the rows are the same gives a much wider interval.
    unpaired = math.sqrt(np.trace(ood_part + id_part))
    assert found.high - found.low < 0.95 * 2 * Z * unpaired


def test_difference_over_several_ood_sets_shares_the_id_rows():
    sizes = (30, 17, 8)
    id_first, id_second, ood_first, ood_second = paired("three sets", sizes=sizes)
    found = auroc_difference(id_first, id_second, ood_first, ood_second)
    # All six AUROCs at once: OOD parts are independent between sets, ID parts are not.
    contrast, variance, value = np.array([1, -1]), 0.0, 0.0
    for first, second in zip(ood_first, ood_second, strict=True):
        areas, ood_part, _ = oracles.delong([id_first, id_second], [first, second])
        value += (areas[0] - areas[1]) / 3
        variance += contrast @ ood_part @ contrast / 9
    id_differences = [
        np.mean(
            [
                np.mean([oracles._kernel(o, a) for o in first])
                - np.mean([oracles._kernel(o, b) for o in second])
                for first, second in zip(ood_first, ood_second, strict=True)
            ]
        )
        for a, b in zip(id_first, id_second, strict=True)
    ]
    variance += np.var(id_differences, ddof=1) / len(id_first)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * Z * math.sqrt(variance), rel=1e-9)
    assert found.n == len(id_first) + sum(sizes)


def test_difference_has_the_sign_of_the_better_score():
    rng = oracles.generator("sign")
    inside, outside = rng.normal(size=200), rng.normal(3, 1, size=200)
    noise_in, noise_out = rng.normal(size=200), rng.normal(size=200)
    better = auroc_difference(inside, noise_in, [outside], [noise_out])
    worse = auroc_difference(noise_in, inside, [noise_out], [outside])
    assert better.low > 0
    assert worse.high < 0
    assert worse.value == pytest.approx(-better.value)
    same = auroc_difference(inside, inside, [outside], [outside])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_more_comparisons_widen_the_interval():
    arguments = paired("comparisons")
    for comparisons in (1, 3, 20):
        found = auroc_difference(*arguments, comparisons=comparisons)
        one = auroc_difference(*arguments)
        ratio = stats.norm.ppf(1 - 0.025 / comparisons) / Z
        assert found.high - found.low == pytest.approx(ratio * (one.high - one.low))
        assert (f"Bonferroni over {comparisons}" in found.method) == (comparisons > 1)


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_difference_refuses_non_finite_scores(where, bad):
    id_first, id_second, ood_first, ood_second = paired("bad")
    columns = [id_first, id_second, ood_first[0], ood_second[0]]
    columns[where] = columns[where].copy()
    columns[where][1] = bad
    with pytest.raises(InvalidInputError, match="not finite"):
        auroc_difference(columns[0], columns[1], [columns[2]], [columns[3]])


@oracles.QUICK
@given(scores(), scores())
def test_roc_curve_equals_scikit_learn(inside, outside):
    curve = roc_curve(inside, outside)
    fpr, tpr, _ = sklearn_roc_curve(*truth_of(inside, outside), drop_intermediate=False)
    assert np.allclose(curve.fpr, fpr, atol=1e-12)
    assert np.allclose(curve.tpr, tpr, atol=1e-12)
    assert (np.diff(curve.fpr) >= 0).all()
    assert (np.diff(curve.tpr) >= 0).all()
    area = auc(curve.fpr, curve.tpr)
    assert area == pytest.approx(auroc(inside, outside).value, abs=1e-12)


def test_roc_curve_is_thinned_with_its_ends():
    rng = oracles.generator("thin")
    curve = roc_curve(rng.normal(size=3000), rng.normal(1, 1, size=2000))
    thin = curve.to_dict(points=100)
    assert 50 <= len(thin["fpr"]) <= 100
    assert (thin["fpr"][0], thin["tpr"][0]) == (0.0, 0.0)
    assert (thin["fpr"][-1], thin["tpr"][-1]) == (1.0, 1.0)
    kept = set(zip(curve.fpr.tolist(), curve.tpr.tolist(), strict=True))
    assert set(zip(thin["fpr"], thin["tpr"], strict=True)) <= kept
    assert auc(thin["fpr"], thin["tpr"]) == pytest.approx(auc(curve.fpr, curve.tpr), abs=0.01)
    assert len(curve.to_dict(points=10_000)["fpr"]) == len(curve.fpr)


@oracles.QUICK
@given(scores(), scores())
def test_intervals_hold_their_value(inside, outside):
    found = ood_metrics(inside, outside, draws=1)
    for name in NAMES[1:]:
        metric = getattr(found, name)
        assert 0 <= metric.low <= metric.value <= metric.high <= 1
        assert metric.n == len(inside) + len(outside)
    for name in ("fpr95", "fpr95_ood_positive"):
        metric = getattr(found, name)
        # A share of 0 or 1 is not known for certain from a few rows.
        assert metric.low < metric.high
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_bootstrap_resamples_each_set():
    rng = oracles.generator("bootstrap")
    inside, outside = rng.normal(size=90).round(1), rng.normal(1.5, 1, size=60).round(1)
    found = ood_metrics(inside, outside)
    draws = {name: [] for name in NAMES[1:]}
    for _ in range(500):
        picked_in = inside[rng.integers(0, 90, 90)]
        picked_out = outside[rng.integers(0, 60, 60)]
        draws["aupr_in"].append(oracles.average_precision(-picked_in, -picked_out))
        draws["aupr_out"].append(oracles.average_precision(picked_out, picked_in))
        draws["fpr95"].append(oracles.fpr95(picked_in, picked_out))
        draws["fpr95_ood_positive"].append(oracles.fpr95_ood_positive(picked_in, picked_out))
    for name, values in draws.items():
        metric = getattr(found, name)
        # A 2.5 % quantile of 500 draws is off by 0.12 sd if they are normal; FPR95 jumps.
        tolerance = (0.8 if name.startswith("aupr") else 1.5) * np.std(values)
        low, high = np.quantile(values, [0.025, 0.975])
        assert metric.low == pytest.approx(low, abs=tolerance)
        assert metric.high == pytest.approx(high, abs=tolerance)


def test_results_repeat_and_leave_the_global_generator_alone():
    rng = oracles.generator("repeat")
    inside, outside = rng.normal(size=200), rng.normal(1, 1, size=100)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert ood_metrics(inside, outside) == ood_metrics(inside, outside)
    assert ood_metrics(inside, outside) != ood_metrics(inside, outside, seed=1)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_chunks_of_the_bootstrap_do_not_matter_to_the_values(monkeypatch):
    rng = oracles.generator("chunks")
    inside, outside = rng.normal(size=200), rng.normal(1, 1, size=100)
    whole = ood_metrics(inside, outside)
    monkeypatch.setattr(metrics, "_CHUNK", 1)
    parts = ood_metrics(inside, outside)
    for name in NAMES:
        assert getattr(parts, name).value == getattr(whole, name).value
        assert getattr(parts, name).low == pytest.approx(getattr(whole, name).low, abs=0.1)


@pytest.mark.parametrize(
    "function",
    [auroc, aupr_in, aupr_out, fpr95, fpr95_ood_positive, ood_metrics, roc_curve],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused_with_their_number(function, bad):
    good, broken = np.arange(5.0), np.array([bad, 0.0, bad])
    with pytest.raises(InvalidInputError, match="2 of 3 OOD scores that are not finite"):
        function(good, broken)
    with pytest.raises(InvalidInputError, match="2 of 3 ID scores that are not finite"):
        function(broken, good)


@pytest.mark.parametrize("function", [auroc, ood_metrics, roc_curve])
@pytest.mark.parametrize("wrong", [np.zeros(0), np.zeros((3, 1)), np.float64(1)])
def test_wrong_shapes_are_refused(function, wrong):
    with pytest.raises(InvalidInputError, match=r"\(N,\), N >= 1"):
        function(wrong, np.zeros(3))
    with pytest.raises(InvalidInputError, match=r"\(N,\), N >= 1"):
        function(np.zeros(3), wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_other_number_types_are_read_as_float64(dtype):
    inside, outside = np.array([0, 1, 2], dtype=dtype), np.array([1, 3], dtype=dtype)
    assert auroc(inside, outside).value == oracles.auroc(inside, outside)
