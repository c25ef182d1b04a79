"""The scikit-learn face: one sign turned once, and scikit-learn itself accepts it."""

import numpy as np
import pytest
from sklearn.base import is_outlier_detector
from sklearn.exceptions import NotFittedError
from sklearn.metrics import RocCurveDisplay, roc_auc_score
from sklearn.utils.validation import check_is_fitted
from test_feature_scores import clusters

from ebm_guard.errors import InvalidInputError
from ebm_guard.ood import Energy, Mahalanobis, as_sklearn


def side_by_side(rows):
    return np.concatenate([rows.logits, rows.features], axis=1)


def test_the_sign_turns_once():
    rows = clusters("rows", 50)
    energies = Energy().of(rows)
    detector = as_sklearn(Energy(), threshold=-3.0)
    assert np.array_equal(detector.score_samples(rows.logits), -energies)
    assert np.allclose(detector.decision_function(rows.logits), -3.0 - energies)
    assert np.array_equal(detector.predict(rows.logits), np.where(energies <= -3.0, 1, -1))
    # The cut itself is accepted, as by the gate.
    exact = as_sklearn(Energy(), threshold=float(energies[7]))
    assert exact.predict(rows.logits)[7] == 1


def test_features_come_beside_the_logits():
    fit, rows = clusters("fit"), clusters("new", 40)
    detector = as_sklearn(Mahalanobis(), num_classes=4)
    assert detector.fit(side_by_side(fit), fit.labels) is detector
    truth = Mahalanobis().fit(fit).of(rows)
    assert np.array_equal(detector.score_samples(side_by_side(rows)), -truth)
    assert np.array_equal(detector.score_samples(rows), -truth)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_the_offset_refuses_that_share_of_the_fit_rows(rate):
    fit = clusters("fit")
    detector = as_sklearn(Energy(), false_reject_rate=rate).fit(fit.logits)
    assert (detector.predict(fit.logits) == -1).mean() == pytest.approx(rate, abs=1 / len(fit))
    assert (as_sklearn(Energy(), false_reject_rate=rate).fit_predict(fit.logits) == -1).sum() == (
        detector.predict(fit.logits) == -1
    ).sum()


def test_scikit_learn_accepts_it():
    fit = clusters("fit")
    detector = as_sklearn(Energy())
    assert is_outlier_detector(detector)
    assert "ScoreDetector" in repr(detector)
    assert detector.get_params(deep=False)["false_reject_rate"] == 0.05
    with pytest.raises(NotFittedError):
        check_is_fitted(detector)
    with pytest.raises(NotFittedError, match="no threshold"):
        detector.predict(fit.logits)
    detector.fit(fit.logits)
    check_is_fitted(detector)
    check_is_fitted(as_sklearn(Energy(), threshold=0.0))
    inlier = np.arange(len(fit)) % 2
    area = roc_auc_score(inlier, detector.decision_function(fit.logits))
    display = RocCurveDisplay.from_predictions(inlier, detector.score_samples(fit.logits))
    assert display.roc_auc == pytest.approx(area)


def test_nan_is_an_outlier():
    logits = np.zeros((2, 3))
    logits[0, 0] = np.nan
    assert as_sklearn(Energy(), threshold=10.0).predict(logits).tolist() == [-1, 1]


def test_what_is_no_table_is_refused():
    detector = as_sklearn(Energy(), threshold=0.0)
    for wrong in (np.zeros(3), np.array([["a", "b"]]), np.zeros((2, 2, 2))):
        with pytest.raises(InvalidInputError, match="got X of shape"):
            detector.predict(wrong)
    with pytest.raises(InvalidInputError, match="false_reject_rate"):
        as_sklearn(Energy(), false_reject_rate=1.0).fit(np.eye(3))
