"""Accuracy, NLL, Brier, ECE and the intervals against loops, scikit-learn and scipy."""

import json
import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from ebm_guard import intervals
from ebm_guard.calibration import metrics
from ebm_guard.calibration.metrics import (
    RowStatistics,
    accuracy,
    bin_index,
    brier,
    calibration_metrics,
    ece,
    nll,
    overconfidence,
    perfect_ece,
    reliability_curve,
    row_statistics,
)
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Metric, basic_interval, mean, resample_counts, wilson

confidences = st.one_of(
    st.floats(0, 1),
    st.integers(0, 15).map(lambda k: k / 15),
    st.sampled_from([0.0, 1.0, 0.5, 1 - 2**-53]),
)
judged = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=40)


def rows_of(pairs):
    """Row statistics with given confidences; what ECE does not read is left empty."""
    confidence = np.array([float(pair[0]) for pair in pairs])
    correct = np.array([bool(pair[1]) for pair in pairs])
    nothing = np.zeros(len(pairs))
    return RowStatistics(confidence, nothing.astype(np.int64), correct, nothing, nothing)


def value_of(rows, **settings):
    return ece(rows, draws=1, **settings).value


def sample(name, n=500, classes=7, scale=3.0):
    rng = oracles.generator(name)
    logits = rng.normal(0, scale, size=(n, classes))
    return logits, oracles.draw_labels(logits / 2, rng)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_row_metrics_equal_scikit_learn(classes, temperature):
    logits, labels = sample("sklearn", classes=classes)
    rows = row_statistics(logits, labels, temperature)
    p = special.softmax(logits / temperature, axis=1)
    names = np.arange(classes)
    assert accuracy(rows).value == accuracy_score(labels, p.argmax(axis=1))
    assert nll(rows).value == pytest.approx(log_loss(labels, p, labels=names), rel=1e-12)
    one_hot = np.eye(classes)[labels]
    assert brier(rows).value == pytest.approx(((p - one_hot) ** 2).sum(axis=1).mean(), rel=1e-12)
    if classes == 2:
        # scikit-learn's binary score is half of the paper's.
        half = brier_score_loss(labels, p[:, 1])
        assert brier(rows).value == pytest.approx(2 * half, rel=1e-12)
    gap = p.max(axis=1).mean() - accuracy_score(labels, p.argmax(axis=1))
    assert overconfidence(rows).value == pytest.approx(gap, rel=1e-12)


def test_row_metrics_equal_a_loop_in_decimal_arithmetic():
    logits, labels = sample("decimal", n=60)
    rows = row_statistics(logits, labels, 1.7)
    for row, (p, label) in enumerate(zip(oracles.softmax(logits, 1.7), labels, strict=True)):
        assert rows.confidence[row] == pytest.approx(max(p), rel=1e-13)
        assert rows.nll[row] == pytest.approx(-math.log(p[label]), rel=1e-11, abs=1e-13)
        brier_of_row = sum((p[k] - (k == label)) ** 2 for k in range(len(p)))
        assert rows.brier[row] == pytest.approx(brier_of_row, rel=1e-10, abs=1e-14)
        assert rows.predicted[row] == p.argmax()
        assert rows.correct[row] == (p.argmax() == label)


def test_nll_of_a_saturated_row_is_exact_and_the_log_of_the_softmax_is_infinite():
    logits, labels = np.array([[1000.0, 0.0], [0.0, 1000.0]]), np.array([1, 1])
    rows = row_statistics(logits, labels)
    assert rows.nll.tolist() == [1000.0, 0.0]
    assert rows.brier.tolist() == [2.0, 0.0]
    assert rows.confidence.tolist() == [1.0, 1.0]
    with np.errstate(divide="ignore"):
        assert np.isinf(-np.log(special.softmax(logits, axis=1)[0, 1]))


def test_ties_in_the_argmax_go_to_the_first_class():
    logits = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    rows = row_statistics(logits, np.array([0, 2, 0]))
    assert rows.predicted.tolist() == [0, 1, 0]
    assert rows.correct.tolist() == [True, False, True]
    assert rows.confidence[2] == pytest.approx(1 / 3)


@oracles.QUICK
@given(judged, st.sampled_from([1, 2, 10, 15, 100]))
def test_ece_equals_a_loop_over_the_bins(pairs, n_bins):
    rows = rows_of(pairs)
    truth = oracles.ece(rows.confidence, rows.correct, n_bins)
    assert value_of(rows, n_bins=n_bins) == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("n_bins", [3, 10, 15, 49])
def test_edges_belong_to_the_bin_below(n_bins):
    edges = np.arange(n_bins + 1) / n_bins
    assert bin_index(edges, n_bins).tolist() == [0, *range(n_bins)]
    above = np.nextafter(edges[:-1], 2)
    assert bin_index(above, n_bins).tolist() == list(range(n_bins))
    below = np.nextafter(edges[1:], 0)
    assert bin_index(below, n_bins).tolist() == list(range(n_bins))


def dropped_last(rows):
    """The wrong rule: bins [lo, hi), so that confidence 1.0 is in none."""
    where = np.minimum((rows.confidence * 15).astype(int), 15)
    sums = np.bincount(where, rows.confidence - rows.correct, minlength=16)
    return np.abs(sums[:15]).sum() / len(rows)


def phantom_bin(rows):
    """Another wrong rule: confidence 1.0 gets a sixteenth bin of its own (torchmetrics 1.9)."""
    where = np.minimum((rows.confidence * 15).astype(int), 15)
    sums = np.bincount(where, rows.confidence - rows.correct, minlength=16)
    return np.abs(sums).sum() / len(rows)


def test_confidence_one_is_in_the_last_bin():
    # In the last bin the gaps of 1.0 (wrong, +1) and 0.95 (right, -0.05 each) partly cancel.
    rows = rows_of([(1.0, False)] + [(0.95, True)] * 10)
    truth = (1 - 10 * 0.05) / 11
    assert value_of(rows) == pytest.approx(truth)
    assert oracles.ece(rows.confidence, rows.correct) == pytest.approx(truth)
    assert phantom_bin(rows) == pytest.approx((1 + 10 * 0.05) / 11)
    assert dropped_last(rows) == pytest.approx(10 * 0.05 / 11)
    assert reliability_curve(rows).bins[-1].count == 11


def test_confidence_zero_is_in_the_first_bin():
    rows = rows_of([(0.0, True), (0.05, False), (0.05, False)])
    assert value_of(rows) == pytest.approx((1 - 0.1) / 3)
    assert reliability_curve(rows).bins[0].count == 3


def test_bins_with_the_number_of_the_logits():
    # Real logits reach confidence exactly 1.0, so the edge case is not academic.
    logits = np.array([[800.0, 0.0], [40.0, 0.0], [0.0, 0.0]])
    rows = row_statistics(logits, np.array([1, 0, 0]))
    assert rows.confidence.tolist() == [1.0, 1.0, 0.5]
    assert value_of(rows) == pytest.approx(abs((1 + 0) / 3) + abs(-0.5 / 3))


def test_one_row():
    rows = row_statistics(np.array([[2.0, 0.0]]), np.array([1]))
    p = 1 / (1 + math.exp(-2))
    found = calibration_metrics(rows)
    assert found.ece.value == pytest.approx(p)
    assert found.accuracy.value == 0.0
    assert found.nll.value == pytest.approx(2 - math.log(p))
    assert (found.nll.low, found.nll.high) == (None, None)
    assert found.nll.method == "none: one row"
    json.dumps(found.to_dict(), allow_nan=False)


@oracles.QUICK
@given(judged, st.randoms(use_true_random=False), st.integers(2, 4))
def test_ece_ignores_the_order_and_the_number_of_copies(pairs, random, copies):
    before = value_of(rows_of(pairs))
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert value_of(rows_of(shuffled)) == pytest.approx(before, abs=1e-12)
    assert value_of(rows_of(pairs * copies)) == pytest.approx(before, abs=1e-12)


@oracles.QUICK
@given(judged)
def test_ece_is_between_the_mean_gap_and_one(pairs):
    rows = rows_of(pairs)
    assert abs((rows.confidence - rows.correct).mean()) - 1e-12 <= value_of(rows) <= 1


@oracles.QUICK
@given(st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4), st.randoms(use_true_random=False))
def test_row_statistics_ignore_a_shift_and_the_order_of_classes(seed, shift, random):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, size=(20, 5)), rng.integers(0, 5, 20)
    order = list(range(5))
    random.shuffle(order)
    plain = row_statistics(logits, labels)
    # Label y sits in the column where `order` holds y.
    moved = row_statistics((logits + shift)[:, order], np.argsort(order)[labels])
    for name in ("confidence", "nll", "brier"):
        assert np.allclose(getattr(moved, name), getattr(plain, name), atol=1e-9)
    assert np.array_equal(moved.correct, plain.correct)


@oracles.QUICK
@given(judged, st.sampled_from([1, 10, 15]))
def test_the_reliability_curve_adds_up_to_the_ece(pairs, n_bins):
    rows = rows_of(pairs)
    curve = reliability_curve(rows, n_bins)
    assert len(curve.bins) == curve.n_bins == n_bins
    assert sum(item.count for item in curve.bins) == len(pairs)
    filled = [item for item in curve.bins if item.count]
    total = sum(item.count * abs(item.accuracy - item.confidence) for item in filled)
    assert total / len(pairs) == pytest.approx(value_of(rows, n_bins=n_bins), abs=1e-12)
    for index, item in enumerate(curve.bins):
        assert (item.lo, item.hi) == (index / n_bins, (index + 1) / n_bins)
        inside = [
            (c, right) for c, right in pairs if item.lo < c <= item.hi or (index == 0 and c == 0.0)
        ]
        assert item.count == len(inside)
        if not inside:
            assert (item.confidence, item.accuracy, item.low, item.high) == (None,) * 4
            continue
        right = sum(ok for _, ok in inside)
        assert item.accuracy == pytest.approx(right / len(inside))
        assert item.confidence == pytest.approx(sum(c for c, _ in inside) / len(inside))
        truth = stats.binomtest(right, len(inside)).proportion_ci(method="wilson")
        assert (item.low, item.high) == pytest.approx((truth.low, truth.high), abs=1e-9)
    json.dumps(curve.to_dict(), allow_nan=False)


@pytest.mark.parametrize("chunk", [1, 7, 700, 3500])
def test_chunks_equal_one_go(monkeypatch, chunk):
    logits, labels = sample("chunks")
    whole = row_statistics(logits, labels, 1.3)
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    parts = row_statistics(logits, labels, 1.3)
    joined = RowStatistics.concatenate(
        [
            row_statistics(logits[:123], labels[:123], 1.3),
            row_statistics(logits[123:], labels[123:], 1.3),
        ]
    )
    for name in RowStatistics.__dataclass_fields__:
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
        assert np.array_equal(getattr(joined, name), getattr(whole, name))
        assert getattr(parts, name).dtype == getattr(whole, name).dtype


def test_half_precision_logits_are_computed_in_float64():
    logits, labels = sample("half")
    small = logits.astype(np.float16)
    found, truth = row_statistics(small, labels), row_statistics(small.astype(np.float64), labels)
    assert found.confidence.dtype == np.float64
    assert np.array_equal(found.nll, truth.nll)


def test_transform_is_applied_first():
    logits, labels = sample("transform")
    direct = row_statistics(logits, labels, 2.0)
    by_transform = row_statistics(
        logits, labels, transform=lambda block: special.log_softmax(block / 2.0, axis=1)
    )
    assert np.allclose(direct.nll, by_transform.nll, rtol=1e-12)
    assert np.allclose(direct.confidence, by_transform.confidence, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_refused_with_their_number(bad):
    logits, labels = sample("bad")
    logits[[3, 50, 51], [0, 2, 6]] = bad
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(InvalidInputError, match="3 rows with NaN or infinite"),
    ):
        row_statistics(logits, labels)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_cause_no_other_warning(bad):
    logits, labels = sample("bad")
    logits[3] = bad
    with pytest.raises(InvalidInputError, match="1 rows with NaN or infinite"):
        row_statistics(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros(3), np.zeros(3, dtype=np.int64)),
        (np.zeros((3, 2)), np.zeros(2, dtype=np.int64)),
        (np.zeros((3, 2)), np.zeros((3, 1), dtype=np.int64)),
    ],
)
def test_shapes_that_do_not_match_are_refused(logits, labels):
    with pytest.raises(InvalidInputError, match=r"needed \(N, C\) and \(N,\)"):
        row_statistics(logits, labels)


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_labels_out_of_range_are_refused(label):
    # numpy would read -1 as the last class and give a plausible number.
    with pytest.raises(InvalidInputError, match=r"labels.*0\.\.2"):
        row_statistics(np.zeros((2, 3)), np.array([0, label]))


def test_no_rows_are_refused():
    with pytest.raises(InvalidInputError, match="row"):
        row_statistics(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


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


def test_the_ece_interval_is_the_reflected_bootstrap():
    logits, labels = sample("interval", n=300)
    rows = row_statistics(logits, labels)
    rng = oracles.generator("bootstrap")
    draws = []
    for _ in range(1500):
        picked = rng.integers(0, len(rows), len(rows))
        gaps = (rows.confidence - rows.correct)[picked]
        sums = np.bincount(bin_index(rows.confidence[picked]), gaps, minlength=15)
        draws.append(np.abs(sums).sum() / len(rows))
    low, high = basic_interval(ece(rows).value, np.array(draws), low=0.0, high=1.0)
    found = ece(rows)
    # Both ends are quantiles of about 1,000 draws of spread sd.
    tolerance = 0.35 * np.std(draws)
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)


def test_intervals_hold_their_value_and_repeat():
    logits, labels = sample("hold")
    rows = row_statistics(logits, labels)
    first, second = calibration_metrics(rows), calibration_metrics(rows)
    assert first == second
    assert first != calibration_metrics(rows, seed=1)
    for name in ("accuracy", "nll", "brier", "ece", "overconfidence"):
        metric = getattr(first, name)
        assert metric.low <= metric.value <= metric.high
        assert metric.n == len(rows)
        assert metric.level == 0.95


def test_global_random_state_is_left_alone():
    logits, labels = sample("state")
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    rows = row_statistics(logits, labels)
    ece(rows)
    perfect_ece(rows)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_perfect_ece_equals_an_independent_simulation(n):
    rng = oracles.generator("perfect", n)
    rows = rows_of([(c, True) for c in rng.uniform(0.3, 1, n)])
    found, null95 = perfect_ece(rows, draws=400)
    simulated = [
        oracles.ece(rows.confidence, rng.random(n) < rows.confidence)
        for _ in range(max(40, 20_000 // n))
    ]
    deviation = np.std(simulated)
    error = deviation * math.sqrt(1 / len(simulated) + 1 / 400)
    assert abs(found - np.mean(simulated)) < 4 * error
    above = sum(value > null95 for value in simulated)
    # The 95 % quantile of 400 draws is itself off by about 1 %.
    assert stats.binomtest(above, len(simulated), 0.05).pvalue > 1e-4
    assert 0 < found < null95


def test_a_perfect_model_does_not_get_zero_and_the_bias_shrinks_with_n():
    rng = oracles.generator("bias")
    confidence = rng.uniform(0.1, 1, 5000)
    found = [
        perfect_ece(rows_of([(c, True) for c in confidence[:n]]))[0] for n in (200, 1000, 5000)
    ]
    assert found[0] > found[1] > found[2] > 0.005
    # sqrt(n) rule: the plug-in value of a perfect model falls as 1 / sqrt(n).
    assert found[0] / found[2] == pytest.approx(5, rel=0.2)


def test_metric_records_are_json():
    record = Metric(math.nan, None, math.inf, 3, "none").to_dict()
    assert record["value"] is None
    assert record["high"] is None
    assert intervals.proportion(9, 10).to_dict()["value"] == 0.9
