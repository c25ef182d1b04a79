"""Row statistics and the values of the calibration metrics, against loops and other libraries.

Intervals and null levels are in test_calibration_intervals.py.
"""

import itertools
import json
import math
import tracemalloc
from dataclasses import replace

import calibration_oracles as truths
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from ebm_guard.calibration import rows as rows_module
from ebm_guard.calibration.cells import CellTable, bin_index, mass_index
from ebm_guard.calibration.metrics import (
    CalibrationStream,
    ClassSums,
    accuracy,
    aurc,
    benjamini_hochberg,
    best_aurc,
    brier,
    brier_parts,
    brier_top_label,
    calibration_metrics,
    class_table,
    e_aurc,
    ece,
    ece_adaptive,
    ece_classwise,
    ece_l2_debiased,
    mce,
    nll,
    overconfidence,
    reliability_curve,
    smooth_ece,
)
from ebm_guard.calibration.rows import RowStatistics, row_statistics
from ebm_guard.errors import InvalidInputError, NotFittedError

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


def value_of(rows, metric=ece, **settings):
    return metric(rows, draws=2, **settings).value


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
    monkeypatch.setattr(rows_module, "_CHUNK", chunk)
    parts = row_statistics(logits, labels, 1.3)
    joined = RowStatistics.concatenate(
        [
            row_statistics(logits[:123], labels[:123], 1.3),
            row_statistics(logits[123:], labels[123:], 1.3),
        ]
    )
    for name in ("confidence", "predicted", "correct", "nll", "brier"):
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
    with pytest.raises(InvalidInputError, match=r"1 of 2 rows.*0\.\.2"):
        row_statistics(np.zeros((2, 3)), np.array([0, label]))
    with pytest.raises(InvalidInputError, match=r"1 of 2 rows.*0\.\.2"):
        ece_classwise(np.zeros((2, 3)), np.array([0, label]))


def test_no_rows_are_refused():
    with pytest.raises(InvalidInputError, match="row"):
        row_statistics(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


def spread_rows(name, n=200, ties=False, weighted=False):
    """Rows of an overconfident model, with ties at 1.0 on request."""
    rng = oracles.generator("spread", name, ties, weighted)
    confidence = rng.uniform(0.2, 1, n)
    if ties:
        confidence = np.round(confidence, 1)
    correct = rng.random(n) < confidence**1.5
    nothing = np.zeros(n)
    weight = rng.integers(0, 4, n).astype(float) if weighted else None
    predicted = rng.integers(0, 3, n)
    return RowStatistics(confidence, predicted, correct, nothing, nothing, weight)


def columns(rows):
    return rows.confidence.tolist(), rows.correct.tolist(), rows.weights.tolist()


GOLDEN = {  # accuracy, ECE, NLL, smooth ECE of the last 5,000 rows
    "densenet_bc100_cifar100": (0.7580, 0.13991, 1.2263, 0.1399),
    "wrn16_4_cifar10": (0.9152, 0.05121, 0.3571, 0.0510),
    "wrn16_4_cifar100": (0.7534, 0.05652, 0.9576, 0.0547),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_stored_softmax_outputs_give_the_known_numbers(data_dir, name):
    with np.load(data_dir / f"softmax_{name}.npz") as stored:
        probs, labels = stored["probs"].astype(np.float64), stored["labels"].astype(np.int64)
    tested = np.random.default_rng(0).permutation(len(labels))[5000:]
    rows = row_statistics(np.log(np.clip(probs[tested], 1e-12, None)), labels[tested])
    found = (
        round(accuracy(rows).value, 4),
        round(value_of(rows), 5),
        round(nll(rows).value, 4),
        round(value_of(rows, smooth_ece), 4),
    )
    assert found == GOLDEN[name]
    if name == "densenet_bc100_cifar100":
        # Overconfident in every bin, so no smoothing can exceed the mean gap; relplot gives 0.1663.
        assert value_of(rows, smooth_ece) <= overconfidence(rows).value + 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_bins", [1, 4, 15])
def test_adaptive_ece_and_aurc_equal_their_loops(n_bins, ties, weighted):
    rows = spread_rows("loops", 60, ties, weighted)
    confidence, correct, weights = columns(rows)
    bins = truths.mass_bins(confidence, weights, n_bins)
    assert mass_index(rows, n_bins).tolist() == bins
    expected = truths.ece_of_bins(confidence, correct, bins, weights)
    assert value_of(rows, ece_adaptive, n_bins=n_bins) == pytest.approx(expected, abs=1e-12)
    expected = truths.aurc(confidence, correct, weights)
    assert value_of(rows, aurc) == pytest.approx(expected, abs=1e-12)


@oracles.QUICK
@given(judged, st.sampled_from([1, 3, 15]))
def test_bins_of_equal_mass_never_split_ties(pairs, n_bins):
    rows = rows_of(pairs)
    index = mass_index(rows, n_bins)
    assert index.tolist() == truths.mass_bins(rows.confidence.tolist(), [1] * len(rows), n_bins)
    for value in set(rows.confidence.tolist()):
        assert len(set(index[rows.confidence == value].tolist())) == 1


def split_ties(rows, n_bins=15):
    """The wrong rule: cut the sorted rows, wherever ties fall."""
    order = np.argsort(rows.confidence, kind="stable")
    return sum(abs(part.sum()) for part in np.array_split(rows.gaps[order], n_bins)) / len(rows)


def test_adaptive_ece_ignores_the_order_of_ties_and_common_code_does_not():
    rows = spread_rows("order", 300, ties=True)
    sorted_rows = rows.select(np.argsort(rows.correct, kind="stable"))
    assert value_of(sorted_rows, ece_adaptive) == pytest.approx(value_of(rows, ece_adaptive))
    assert split_ties(sorted_rows) != pytest.approx(split_ties(rows), abs=1e-3)


@oracles.QUICK
@given(judged)
def test_aurc_and_its_excess_equal_their_loops(pairs):
    rows = rows_of(pairs)
    confidence, correct, weights = columns(rows)
    area = truths.aurc(confidence, correct, weights)
    assert value_of(rows, aurc) == pytest.approx(area, abs=1e-12)
    best = truths.best_aurc(correct)
    wrong = len(correct) - sum(correct)
    assert best_aurc(wrong / len(correct), len(correct)) == pytest.approx(best, abs=1e-12)
    assert value_of(rows, e_aurc) == pytest.approx(max(0, area - best), abs=1e-12)


def test_the_best_aurc_tends_to_its_limit():
    assert best_aurc(0.3) == pytest.approx(0.3 + 0.7 * math.log(0.7))
    assert best_aurc(0.3, 10_000_000) == pytest.approx(best_aurc(0.3), abs=1e-6)
    assert best_aurc(1.0) == best_aurc(1.0, 7) == 1.0
    assert best_aurc(0.0) == best_aurc(0.0, 7) == 0.0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_bins", [1, 4, 15])
def test_debiased_l2_and_mce_equal_their_loops(n_bins, ties):
    rows = spread_rows("l2", 150, ties)
    confidence, correct, weights = columns(rows)
    bins = truths.mass_bins(confidence, weights, n_bins)
    expected = truths.debiased_l2(confidence, correct, bins)
    assert value_of(rows, ece_l2_debiased, n_bins=n_bins) == pytest.approx(expected, abs=1e-12)
    width = bin_index(rows.confidence, n_bins).tolist()
    for least in (1, 10):
        expected = truths.mce(confidence, correct, width, least)
        found = value_of(rows, mce, n_bins=n_bins, min_count=least)
        assert found == pytest.approx(expected, abs=1e-12)


def test_what_has_too_few_rows_is_not_a_number_and_says_why():
    rows = rows_of([(0.9, True)] * 3)
    assert math.isnan(mce(rows).value)
    assert mce(rows).method == "none: no bin of 15 has 30 rows"
    lonely = rows_of([(0.9, True), (0.1, False)])
    assert math.isnan(ece_l2_debiased(lonely).value)
    assert ece_l2_debiased(lonely).to_dict()["value"] is None


@pytest.mark.parametrize("ties", [False, True])
def test_smooth_ece_equals_sums_over_reflected_kernels(ties):
    rows = spread_rows("smooth", 40, ties)
    confidence, correct, _ = columns(rows)
    expected = truths.smooth_ece(confidence, correct)
    assert value_of(rows, smooth_ece) == pytest.approx(expected, abs=2e-6)


def test_smooth_ece_counts_confidence_one_once():
    # All overconfident: whatever the kernel, the integral is the mean gap.
    rows = rows_of([(1.0, False)] * 3 + [(1.0, True)] * 97)
    assert value_of(rows, smooth_ece) == pytest.approx(0.03, abs=1e-6)
    doubled = truths.smooth_error([1.0, 1.0], [0.03, 0.03], 0.03)
    assert doubled == pytest.approx(0.03, abs=1e-4)


@oracles.QUICK
@given(judged)
def test_smooth_ece_lies_between_the_mean_gap_and_the_mean_absolute_gap(pairs):
    rows = rows_of(pairs)
    found = value_of(rows, smooth_ece)
    assert abs(rows.gaps.mean()) - 1e-6 <= found <= np.abs(rows.gaps).mean() + 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_the_brier_score_splits_as_scikit_learns_isotonic_regression_says(ties, weighted):
    rows = spread_rows("parts", 200, ties, weighted)
    c, y, w = rows.confidence, rows.correct.astype(float), rows.weights
    recalibrated = IsotonicRegression().fit(c, y, sample_weight=w).predict(c)
    base = np.average(y, weights=w)

    def score(forecast):
        return np.average(np.square(forecast - y), weights=w)

    mcb, dsc, unc = brier_parts(rows, draws=2)
    assert mcb.value == pytest.approx(score(c) - score(recalibrated), abs=1e-12)
    assert dsc.value == pytest.approx(score(base) - score(recalibrated), abs=1e-12)
    assert unc.value == pytest.approx(base * (1 - base), abs=1e-12)
    total = brier_top_label(rows).value
    assert total == pytest.approx(score(c), abs=1e-12)
    assert total == pytest.approx(mcb.value - dsc.value + unc.value, abs=1e-12)


@oracles.QUICK
@given(judged)
def test_the_parts_of_the_brier_score_add_up(pairs):
    rows = rows_of(pairs)
    mcb, dsc, unc = brier_parts(rows, draws=2)
    assert mcb.value >= 0
    assert 0 <= dsc.value <= unc.value + 1e-12
    total = mcb.value - dsc.value + unc.value
    assert total == pytest.approx(brier_top_label(rows).value, abs=1e-12)


def test_multiclass_brier_equals_scikit_learn():
    logits, labels = sample("multiclass brier")
    p = special.softmax(logits, axis=1)
    found = brier(row_statistics(logits, labels)).value
    assert found == pytest.approx(brier_score_loss(labels, p, labels=np.arange(7)), rel=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("n_bins", [1, 15])
def test_classwise_ece_equals_its_loop(n_bins, classes):
    logits, labels = sample("classwise", n=80, classes=classes)
    p = special.softmax(logits / 1.5, axis=1)
    expected = np.mean([oracles.ece(p[:, k], labels == k, n_bins) for k in range(classes)])
    found = ece_classwise(logits, labels, 1.5, n_bins=n_bins)
    assert found.value == pytest.approx(expected, abs=1e-12)
    state = ClassSums(n_bins)
    for part in (slice(0, 33), slice(33, 80)):
        state.add(logits[part] / 1.5, labels[part], transform=lambda block: block)
    assert state.metric().value == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InvalidInputError, match="classes after"):
        state.add(np.zeros((3, classes + 1)), labels[:3])


def test_class_states_without_rows_and_bad_rows_are_refused():
    with pytest.raises(NotFittedError):
        ClassSums().metric()
    logits, labels = sample("bad classes")
    logits[[3, 50]] = math.nan
    with pytest.raises(InvalidInputError, match="2 rows with NaN"):
        ece_classwise(logits, labels)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_p_values_of_classes_equal_enumeration(n):
    rng = oracles.generator("enumerate", n)
    confidence = rng.uniform(0.3, 1, n)
    masses = truths.poisson_binomial(confidence.tolist())
    for right in range(n + 1):
        rows = rows_of([(c, i < right) for i, c in enumerate(confidence)])
        tail = min(math.fsum(masses[: right + 1]), math.fsum(masses[right:]))
        assert class_table(rows, 1)[0].p_value == pytest.approx(min(1, 2 * tail), rel=1e-9)


def test_tiny_p_values_keep_their_digits():
    rows = rows_of([(0.1, True)] * 40)
    assert class_table(rows, 1)[0].p_value == pytest.approx(2 * 0.1**40, rel=1e-9)
    rows = rows_of([(0.9, False)] * 40)
    assert class_table(rows, 1)[0].p_value == pytest.approx(2 * 0.1**40, rel=1e-6)


@pytest.mark.parametrize("confidence", [0.7, 0.9995])
def test_large_classes_take_a_limit_that_is_close_to_the_exact_test(confidence):
    n = 30_000
    mean, deviation = n * confidence, math.sqrt(n * confidence * (1 - confidence))
    for away in (-3, -1, 1, 2):
        right = round(mean + away * deviation)
        rows = rows_of([(confidence, i < right) for i in range(n)])
        tails = stats.binom.cdf(right, n, confidence), stats.binom.sf(right - 1, n, confidence)
        assert class_table(rows, 1)[0].p_value == pytest.approx(2 * min(tails), rel=0.05)


@oracles.QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([0.01, 0.05, 0.5]))
def test_benjamini_hochberg_equals_scipy(p_values, level):
    adjusted = stats.false_discovery_control(p_values)
    # Decisions on the very border may round either way.
    near = np.isclose(adjusted, level, rtol=1e-9)
    found = np.array(benjamini_hochberg(p_values, level))
    assert np.array_equal(found[~near], (adjusted <= level)[~near])


def test_the_class_table_lists_every_class_once_and_the_clearest_first():
    rng = oracles.generator("table")
    n = 3000
    confidence, predicted = rng.uniform(0.5, 1, n), rng.integers(0, 9, n)
    correct = rng.random(n) < np.where(predicted == 4, confidence - 0.3, confidence)
    nothing = np.zeros(n)
    rows = RowStatistics(confidence, predicted, correct, nothing, nothing)
    table = class_table(rows, 10)
    assert sorted(row.index for row in table) == list(range(10))
    assert table[0].index == 4
    assert table[0].flagged
    assert table[-1].to_dict() == {
        "index": 9,
        "n": 0,
        "accuracy": None,
        "overconfidence": None,
        "p_value": None,
        "flagged": False,
    }
    assert sum(row.n for row in table) == n
    json.dumps([row.to_dict() for row in table], allow_nan=False)


VALUES = (ece, ece_adaptive, smooth_ece, aurc, accuracy, overconfidence, brier_top_label)


def value(metric, rows):
    return metric(rows).value if metric in VALUES[4:] else value_of(rows, metric)


@oracles.QUICK
@given(judged, st.data())
def test_whole_weights_equal_repeated_rows(pairs, data):
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs)))
    if not sum(counts):
        counts[0] = 1
    repeated = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    weighted = replace(rows_of(pairs), weight=np.array(counts, dtype=float))
    scaled = replace(weighted, weight=weighted.weight * 0.37)
    for metric in VALUES:
        expected = value(metric, rows_of(repeated))
        assert value(metric, weighted) == pytest.approx(expected, abs=2e-6)
        assert value(metric, scaled) == pytest.approx(expected, abs=2e-6)
    expected = brier_parts(rows_of(repeated), draws=2)
    for part, truth in zip(brier_parts(weighted, draws=2), expected, strict=True):
        assert part.value == pytest.approx(truth.value, abs=1e-12)


def test_scaled_weights_change_no_interval_and_equal_weights_nothing():
    rows = spread_rows("scaled", 300, weighted=True)
    # A power of two, so that no sum is rounded.
    first = calibration_metrics(rows).to_dict()
    second = calibration_metrics(replace(rows, weight=rows.weight * 4)).to_dict()
    assert first == second
    equal = calibration_metrics(replace(rows, weight=np.full(300, 2.0))).to_dict()
    plain = calibration_metrics(replace(rows, weight=None)).to_dict()
    for name in ("ece", "ece_adaptive", "smooth_ece", "aurc", "miscalibration"):
        for key in ("value", "low", "high"):
            assert equal[name][key] == pytest.approx(plain[name][key], abs=1e-9)


def test_weights_are_checked_and_the_two_metrics_without_a_weighted_form_refuse():
    logits, labels = sample("weights", n=4)
    for bad, message in (
        ([1, 2, 3], "shape"),
        ([1, 2, -1, 0], "1 negative"),
        ([1, math.nan, math.inf, 0], "2 negative or non-finite"),
        ([0, 0, 0, 0], "only weights of 0"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            row_statistics(logits, labels, sample_weight=np.array(bad))
    rows = row_statistics(logits, labels, sample_weight=np.arange(4))
    for metric in (ece_l2_debiased, CalibrationStream().update):
        with pytest.raises(InvalidInputError, match="weights"):
            metric(rows)
    with pytest.raises(InvalidInputError, match="weights"):
        class_table(rows, 7)


def test_parts_are_selected_and_joined_with_their_weights():
    rows = spread_rows("joined", 50, weighted=True)
    parts = [rows.select(np.arange(20)), rows.select(np.arange(50) >= 20)]
    joined = RowStatistics.concatenate(parts)
    for name in RowStatistics.__dataclass_fields__:
        assert np.array_equal(getattr(joined, name), getattr(rows, name))
    with pytest.raises(InvalidInputError, match="with and without"):
        RowStatistics.concatenate([rows, replace(rows, weight=None)])
    with pytest.raises(InvalidInputError, match="no parts"):
        RowStatistics.concatenate([])
    assert replace(rows, weight=np.array([1.0] * 10 + [0.0] * 40)).effective_n == 10


def states_of(rows, cuts):
    ends = [0, *cuts, len(rows)]
    return [
        CalibrationStream().update(rows.select(np.arange(a, b)))
        for a, b in itertools.pairwise(ends)
    ]


def test_streams_equal_batches_and_shards_in_any_order():
    logits, labels = sample("stream", n=400)
    rows = row_statistics(logits, labels)
    whole = CalibrationStream().update(rows)
    streamed = CalibrationStream()
    for at in range(0, 400, 7):
        streamed.update(rows.select(np.arange(at, min(at + 7, 400))))
    merged = [streamed]
    for order in itertools.permutations(states_of(rows, (13, 200))):
        state = CalibrationStream()
        for part in order:
            state = state.merge(part)
        merged.append(state)
    expected = calibration_metrics(rows)
    for state in (whole, *merged):
        assert len(state) == 400
        assert state.accuracy() == expected.accuracy
        for name in ("nll", "brier", "overconfidence", "ece"):
            found, truth = getattr(state, name)(), getattr(expected, name)
            for key in ("value", "low", "high", "null95"):
                number = getattr(truth, key)
                assert getattr(found, key) == (
                    None if number is None else pytest.approx(number, abs=1e-9)
                )
            assert (found.n, found.method) == (truth.n, truth.method)
        counts = [item.count for item in state.curve().bins]
        assert counts == [item.count for item in expected.curve.bins]


def test_streams_that_do_not_fit_are_refused():
    with pytest.raises(NotFittedError):
        CalibrationStream().ece()
    with pytest.raises(InvalidInputError, match="15 and 10 bins"):
        CalibrationStream().merge(CalibrationStream(10))
    rows = spread_rows("tables")
    table = CellTable.of(rows)
    for other in (CellTable.of(rows, 10), CellTable.of(spread_rows("w", weighted=True))):
        with pytest.raises(InvalidInputError, match="one kind"):
            table.merge(other)
    with pytest.raises(InvalidInputError, match="concatenate"):
        table.merge(CellTable.of(rows, by_mass=True))
    for metric in (ece_adaptive, aurc, brier_parts):
        with pytest.raises(InvalidInputError, match="mass"):
            metric(rows, table=table)
    with pytest.raises(InvalidInputError, match="equal width"):
        smooth_ece(rows, table=CellTable.of(rows, by_mass=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_merged_tables_count_what_one_table_counts(weighted):
    rows = spread_rows("merge", 500, weighted=weighted)
    whole = CellTable.of(rows)
    parts = [CellTable.of(rows.select(np.arange(at, 500, 3))) for at in range(3)]
    for order in itertools.permutations(parts):
        merged = order[0].merge(order[1]).merge(order[2])
        assert np.array_equal(merged.count, whole.count)
        for name in ("weight", "confidence", "gap", "null_variance", "weight_squared"):
            assert np.allclose(getattr(merged, name), getattr(whole, name), atol=1e-12)
        assert merged.effective_n == pytest.approx(rows.effective_n)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("confidence", [1.0, 0.5, 0.0])
def test_all_right_and_all_wrong(confidence, right):
    rows = rows_of([(confidence, right)] * 50)
    found = calibration_metrics(rows)
    gap = abs(confidence - right)
    for name in ("ece", "ece_adaptive"):
        assert getattr(found, name).value == pytest.approx(gap)
    assert found.smooth_ece.value == pytest.approx(gap, abs=1e-6)
    assert found.aurc.value == 1 - right
    assert found.e_aurc.value == pytest.approx(0, abs=1e-12)
    assert found.discrimination.value == found.uncertainty.value == 0
    # Rows without a single error show no noise, so no interval can be read off them.
    for name in ("ece", "ece_adaptive", "smooth_ece", "aurc", "e_aurc", "miscalibration"):
        metric = getattr(found, name)
        assert (metric.low, metric.high) == (None, None)
        assert metric.method.startswith(f"none: no {'wrong' if right else 'right'} row")
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("classes", [2, 3, 7, 1000])
def test_confidence_stays_between_one_over_the_number_of_classes_and_one(classes):
    rng = oracles.generator("range", classes)
    scale = 10.0 ** rng.uniform(-17, 3, size=(200, 1))
    logits = rng.normal(size=(200, classes)) * scale
    rows = row_statistics(logits, np.zeros(200, np.int64))
    assert rows.confidence.max() <= 1
    assert rows.confidence.min() >= 1 / classes
    # The wrong way round: dividing first and adding up afterwards leaves the range.
    assert (rows.brier >= 0).all()
    assert (rows.nll >= 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e3, 1e-300, 1e300])
def test_extreme_temperatures_give_the_limits(temperature):
    logits, labels = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), np.array([0, 2])
    rows = row_statistics(logits, labels, temperature)
    cold = temperature < 1
    assert rows.confidence == pytest.approx([1.0, 1.0] if cold else [1 / 3, 1 / 3], abs=1e-2)
    assert rows.nll == pytest.approx([0.0, 0.0] if cold else [math.log(3)] * 2, abs=1e-2)


def test_an_infinite_nll_has_no_interval_and_is_null_in_json():
    logits = np.array([[2e10, 0.0], [0.0, 1.0], [1.0, 0.0]])
    rows = row_statistics(logits, np.array([1, 1, 0]), 1e-300)
    found = nll(rows)
    assert found.value == math.inf
    assert (found.low, found.method) == (None, "none: the mean is not finite")
    assert found.to_dict()["value"] is None
    assert CalibrationStream().update(rows).nll().method == found.method


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_are_not_positive_are_refused(bad):
    logits, labels = sample("temperature")
    for function in (row_statistics, ece_classwise):
        with pytest.raises(InvalidInputError, match="temperature"):
            function(logits, labels, bad)


def test_one_class_and_labels_that_are_not_whole_are_refused():
    with pytest.raises(InvalidInputError, match="at least 2"):
        row_statistics(np.zeros((3, 1)), np.zeros(3, np.int64))
    with pytest.raises(InvalidInputError, match="float64"):
        row_statistics(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(InvalidInputError, match="2 rows with a confidence outside"):
        ece(rows_of([(1.5, True), (math.nan, True), (0.5, False)]))
    for function in (ece, ece_adaptive):
        with pytest.raises(InvalidInputError, match="bins"):
            function(rows_of([(0.5, True)]), n_bins=0)


def test_any_layout_and_dtype_of_logits_gives_the_same_rows(tmp_path):
    whole = oracles.generator("layout").integers(-9, 9, size=(60, 8))
    labels = np.arange(60) % 4
    expected = row_statistics(whole[:, ::2].astype(np.float64), labels)
    np.save(tmp_path / "logits.npy", whole[:, ::2].astype(np.float32))
    for logits in (
        whole[:, ::2],
        whole[:, ::2].astype(np.float16),
        np.asfortranarray(whole[:, ::2]).astype(np.float32),
        np.load(tmp_path / "logits.npy", mmap_mode="r"),
    ):
        before = logits.copy()
        found = row_statistics(logits, labels.astype(np.uint8))
        assert np.array_equal(found.nll, expected.nll)
        assert np.array_equal(found.confidence, expected.confidence)
        assert np.array_equal(logits, before)


def test_labels_of_a_single_class_are_no_problem():
    logits, _ = sample("single")
    rows = row_statistics(logits, np.zeros(500, np.int64))
    found = calibration_metrics(rows)
    assert found.accuracy.value == np.mean(logits.argmax(axis=1) == 0)
    json.dumps(found.to_dict(), allow_nan=False)


def test_transforms_keep_the_prediction_unless_they_are_said_to_move_it():
    logits = np.array([[2.0, 1.0], [0.0, 3.0]])

    def swapped(block):
        return block[:, ::-1]

    labels = np.array([0, 1])
    kept = row_statistics(logits, labels, transform=swapped)
    assert kept.correct.all()
    assert (kept.confidence < 0.5).all()
    moved = row_statistics(logits, labels, transform=swapped, keeps_prediction=False)
    assert not moved.correct.any()
    assert (moved.confidence > 0.5).all()


@pytest.mark.slow
def test_imagenet_sized_logits_need_little_beyond_themselves():
    rng = oracles.generator("memory")
    logits = rng.standard_normal((50_000, 1000), dtype=np.float32)
    labels = rng.integers(0, 1000, 50_000)
    tracemalloc.start()
    try:
        rows = row_statistics(logits, labels)
        calibration_metrics(rows)
        ece_classwise(logits, labels)
        class_table(rows, 1000)
        peak = tracemalloc.get_traced_memory()[1]
        # The wrong way: all probabilities at once.
        special.softmax(logits.astype(np.float64), axis=1)
        naive = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e9 / 2
    assert naive > 1e9 / 2
