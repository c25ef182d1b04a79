"""Scores that are fitted, in the report: no row is judged by a detector that has seen it."""

import json

import numpy as np
import oracles
import pytest
from scipy import stats
from test_report_build import built

from ebm_guard import Predictions
from ebm_guard.data import two_folds
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate import Threshold
from ebm_guard.ood import make_score
from ebm_guard.ood.contrasts import auroc_contrasts, max_t
from ebm_guard.ood.metrics import auroc_difference
from ebm_guard.predictions import LinearHead
from ebm_guard.report import Settings

CLASSES, WIDTH = 4, 12
HEAD = LinearHead(oracles.generator("head").normal(size=(CLASSES, WIDTH)).astype(np.float32))


def with_features(n, key, shift=0.0):
    """Rows whose features lie around the head's class directions, and their logits."""
    rng = oracles.generator(key)
    labels = np.arange(n) % CLASSES
    features = HEAD.weight[labels] + rng.normal(size=(n, WIDTH)) * 0.8 + shift
    features = np.abs(features).astype(np.float32)
    logits = HEAD.logits(features).astype(np.float32)
    return Predictions(logits, features=features, labels=labels, head=HEAD)


@pytest.fixture(scope="module")
def rows():
    return with_features(400, "evaluation")


@pytest.fixture(scope="module")
def foreign():
    return with_features(150, "foreign", shift=1.5)


def settings(score):
    return Settings(score=score, false_reject_rate=0.1, assurance=0.9)


@pytest.mark.slow
def test_fit_rows_give_the_detectors_their_statistics(rows, foreign):
    fit = with_features(300, "fit")
    report = built(rows, ood={"far_x": foreign}, fit=fit)
    score = make_score("mahalanobis").fit(fit)
    found = report["ood"]["far_x"]["scores"]["mahalanobis"]["auroc"]["value"]
    own, other = score.of(rows), score.of(foreign)
    wins = (other[:, None] > own).mean() + (other[:, None] == own).mean() / 2
    assert found == pytest.approx(wins, rel=1e-12)
    assert report["data"]["fit"]["n"] == 300
    assert any("300 rows of the role fit" in line for line in report["meta"]["protocol"])


def test_without_fit_rows_each_half_is_judged_by_the_other(rows, foreign):
    report = built(rows, ood={"far_x": foreign})
    first, second = two_folds(len(rows), rows.labels, 0)
    own = np.empty(len(rows))
    detectors = [make_score("vim").fit(rows.select(part)) for part in (first, second)]
    own[second], own[first] = (
        detector.of(rows.select(part))
        for detector, part in zip(detectors, (second, first), strict=True)
    )
    dealt = np.random.default_rng([0, len(foreign)]).permutation(len(foreign))
    other = np.empty(len(foreign))
    for detector, part in zip(detectors, (dealt[:75], dealt[75:]), strict=True):
        other[part] = detector.of(foreign.select(part))
    wins = (other[:, None] > own).mean() + (other[:, None] == own).mean() / 2
    found = report["ood"]["far_x"]["scores"]["vim"]["auroc"]["value"]
    assert found == pytest.approx(wins, rel=1e-12)
    seen = make_score("vim").fit(rows)
    assert not np.array_equal(seen.of(rows), own)


@pytest.mark.slow
def test_a_gate_on_a_fitted_score_measures_coverage_on_new_rows(rows, foreign):
    report = built(rows, ood={"far_x": foreign}, settings=settings("mahalanobis"))
    first, second = two_folds(len(rows), rows.labels, 0)
    accepted = np.zeros(len(rows), bool)
    for fit, test in ((first, second), (second, first)):
        detector = make_score("mahalanobis").fit(rows.select(fit))
        scores = detector.of(rows.select(test))
        halves = two_folds(len(test), rows.labels[test], 1)
        for cut_on, judged in (halves, halves[::-1]):
            cut = float(Threshold.fit(scores[cut_on], "pac", 0.1, 0.9).cut)
            accepted[test[judged]] = scores[judged] <= cut
    assert report["gate"]["coverage"]["value"] == pytest.approx(accepted.mean())
    detector = make_score("mahalanobis").fit(rows.select(first))
    cut = float(Threshold.fit(detector.of(rows.select(second)), "pac", 0.1, 0.9).cut)
    assert report["gate"]["threshold"] == pytest.approx(cut, rel=1e-12)
    passed = (detector.of(foreign) <= cut).mean()
    assert report["gate"]["accepted_ood"]["far_x"]["value"] == pytest.approx(passed)


def test_calibration_rows_are_shared_between_detector_and_threshold(rows, foreign):
    calibration = with_features(300, "calibration")
    report = built(rows, ood={"far_x": foreign}, calibration=calibration, settings=settings("vim"))
    first, second = two_folds(300, calibration.labels, 0)
    detector = make_score("vim").fit(calibration.select(first))
    cut = float(Threshold.fit(detector.of(calibration.select(second)), "pac", 0.1, 0.9).cut)
    assert report["gate"]["n"] == 150
    assert report["gate"]["threshold"] == pytest.approx(cut, rel=1e-12)
    assert report["gate"]["coverage"]["value"] == pytest.approx((detector.of(rows) <= cut).mean())


def test_a_score_that_cannot_run_says_why(foreign):
    bare = Predictions(with_features(200, "bare").logits, labels=np.arange(200) % CLASSES)
    report = built(bare, ood={"far_x": Predictions(foreign.logits)}, settings=settings("knn"))
    for name in ("vim", "mahalanobis", "knn"):
        assert "features" in report["ood"]["far_x"]["scores"][name]["not_run"]
    assert "a gate on knn is not available: needs features" in report["gate"]["not_run"]
    assert report["energy"]["ranking"]["of"] == 4


def test_fit_rows_must_not_be_evaluation_rows(rows):
    with pytest.raises(DataError, match="evaluation"):
        built(rows, fit=rows.select(np.arange(100)))
    calibration = with_features(300, "calibration")
    with pytest.raises(DataError, match="fit"):
        built(rows, calibration=calibration, fit=calibration)


@pytest.mark.slow
def test_shifted_sets_are_shown_but_neither_ranked_nor_called_foreign(rows, foreign):
    shifted = with_features(100, "shifted", shift=0.1)
    both = built(rows, ood={"far_x": foreign, "shifted_dark": shifted}, requirements=["auroc>=0.5"])
    alone = built(rows, ood={"far_x": foreign})
    assert both["ood"]["shifted_dark"]["role"] == "shifted"
    assert both["energy"]["ranking"] == alone["energy"]["ranking"]
    assert both["requirements"][0]["path"].startswith("ood.far_x.")
    text = both["gate"]["verdict"]["sentence"]
    assert "shifted_dark" in text.partition("Familiar inputs under other conditions")[2]
    assert "shifted_dark" not in text.partition("Familiar inputs under other conditions")[0]


# --- intervals of all leads at once


def correlated(rng, n, m, rivals, noise):
    """Scores that share most of their value, on ID and OOD rows."""
    base_id, base_ood = rng.normal(size=n), rng.normal(1, 1, size=m)
    names = ["base", *(f"r{at}" for at in range(rivals))]
    ids = {name: base_id + noise * rng.normal(size=n) for name in names}
    oods = {name: [base_ood + noise * rng.normal(size=m)] for name in names}
    return ids, oods


def test_one_rival_is_the_paired_delong_interval():
    ids, oods = correlated(oracles.generator("one"), 300, 200, 1, 0.5)
    found = auroc_contrasts(ids, oods, "base")["r0"]
    plain = auroc_difference(ids["r0"], ids["base"], oods["r0"], oods["base"])
    assert found.value == pytest.approx(plain.value, rel=1e-12)
    # The quantile is simulated from 20,000 draws.
    assert found.low == pytest.approx(plain.low, abs=0.03 * (plain.high - plain.low))
    assert found.high == pytest.approx(plain.high, abs=0.03 * (plain.high - plain.low))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95])
def test_critical_value_is_the_quantile_of_the_largest(rho):
    size = 4
    covariance = np.full((size, size), rho) + (1 - rho) * np.eye(size)
    critical = max_t(covariance)
    box = stats.multivariate_normal(cov=covariance, allow_singular=True, seed=0)
    inside = box.cdf(np.full(size, critical), lower_limit=np.full(size, -critical))
    assert inside == pytest.approx(0.95, abs=0.006)
    assert critical < stats.norm.isf(0.025 / size) + 0.03


@pytest.mark.slow
def test_all_intervals_hold_together_and_unadjusted_ones_do_not():
    rng = oracles.generator("contrasts")
    runs, hold, unadjusted = 400, 0, 0
    for run in range(runs):
        ids, oods = correlated(rng, 150, 150, 8, 1.0)
        found = auroc_contrasts(ids, oods, "base", seed=run)
        # All scores are exchangeable, so every true difference is 0.
        hold += all(item.low <= 0 <= item.high for item in found.values())
        single = [auroc_difference(ids[k], ids["base"], oods[k], oods["base"]) for k in found]
        unadjusted += all(item.low <= 0 <= item.high for item in single)
    assert stats.binomtest(hold, runs, 0.95, alternative="less").pvalue > 1e-3
    assert stats.binomtest(unadjusted, runs, 0.95, alternative="less").pvalue < 1e-3


def test_contrasts_refuse_what_cannot_be_compared():
    ids = {"a": np.zeros(3)}
    with pytest.raises(InvalidInputError, match="another score"):
        auroc_contrasts(ids, {"a": [np.zeros(2)]}, "a")
    with pytest.raises(InvalidInputError, match="compare with 'b'"):
        auroc_contrasts(ids, {"a": [np.zeros(2)]}, "b")
    json.dumps(
        {
            name: item.to_dict()
            for name, item in auroc_contrasts(
                {"a": np.zeros(3), "b": np.zeros(3)}, {"a": [np.ones(2)], "b": [np.ones(2)]}, "a"
            ).items()
        },
        allow_nan=False,
    )


def test_calibration_rows_that_stand_in_are_named_so(rows, foreign):
    report = built(rows, ood={"far_x": foreign}, calibration=with_features(300, "calibration"))
    told = [line for line in report["meta"]["protocol"] if "150 rows of the role" in line]
    assert told
    assert "role calibration" in told[0]


def test_accuracy_is_that_of_the_prediction_that_is_deployed():
    rng = oracles.generator("shifted classes")
    labels = rng.integers(0, 3, 900)
    # A constant in favour of class 0: vector scaling takes it off, and predictions change.
    logits = rng.normal(size=(900, 3)) + 3 * np.eye(3)[labels] + np.array([2.0, 0, 0])
    part = Predictions(logits, labels=labels, groups=np.zeros(900, np.int64))
    report = built(part, settings=Settings(calibrator="vector"))
    after = report["calibration"]["after"]["accuracy"]["value"]
    gate = report["gate"]
    assert after > report["calibration"]["before"]["accuracy"]["value"]
    sides = [gate["accuracy_accepted"], gate["accuracy_rejected"]]
    right = sum(side["value"] * side["n"] for side in sides if side)
    assert right / 900 == pytest.approx(after)
    assert report["groups"]["groups"][0]["accuracy"]["value"] == pytest.approx(after)
