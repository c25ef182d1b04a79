"""A score with scikit-learn's outlier interface: the one place where the sign turns."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.ood.score import Score
from ebm_guard.predictions import Predictions


def as_sklearn(
    score: Score,
    *,
    threshold: float | None = None,
    num_classes: int | None = None,
    false_reject_rate: float = 0.05,
) -> Any:
    """Return a scikit-learn outlier detector around a score.

    ``score_samples(X)`` = -s(x), high = normal; ``decision_function`` = score_samples - offset_,
    with offset_ = -threshold; ``predict`` = +1 where decision_function >= 0 (s(x) <= threshold, as
    the gate accepts), else -1. NaN scores are -1.

    Args:
        score: any score; ``fit`` fits it where it needs that.
        threshold: the cut on s(x), such as ``guard.threshold.cut``; None: ``fit`` takes the
            smallest cut that accepts 1 - ``false_reject_rate`` of its own rows, without a promise.
        num_classes: C, for arrays X (N, C + D) of logits and features side by side; None where X
            holds logits alone. X may always be :class:`~ebm_guard.predictions.Predictions`.
        false_reject_rate: share of the fit rows refused where no threshold is given.

    Example:
        >>> from ebm_guard.ood import Energy
        >>> detector = as_sklearn(Energy(), threshold=-2.0)
        >>> detector.predict(np.array([[5.0, 0.0], [0.0, 0.0]])).tolist()
        [1, -1]
    """
    return _detector_class()(score, threshold, num_classes, false_reject_rate)


@cache
def _detector_class() -> type[Any]:
    """Make the class on first use: scikit-learn is slow to import."""
    from sklearn.base import BaseEstimator, OutlierMixin

    class ScoreDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
        """A score as a scikit-learn outlier detector; see :func:`as_sklearn`."""

        def __init__(
            self,
            score: Score,
            threshold: float | None = None,
            num_classes: int | None = None,
            false_reject_rate: float = 0.05,
        ) -> None:
            self.score = score
            self.threshold = threshold
            self.num_classes = num_classes
            self.false_reject_rate = false_reject_rate

        # X and y are scikit-learn's names for data and labels.
        def fit(self, X: Any, y: Any = None) -> Any:  # noqa: N803
            """Fit the score where it needs that, and take the offset from the same rows."""
            rows = _rows(X, y, self.num_classes)
            self.score.fit(rows)
            self.offset_ = _offset(self.score, rows, self.threshold, self.false_reject_rate)
            return self

        def score_samples(self, X: Any) -> Any:  # noqa: N803
            """Return -s(x), (N,); high = normal."""
            return -self.score.of(_rows(X, None, self.num_classes))

        def decision_function(self, X: Any) -> Any:  # noqa: N803
            """Return score_samples - offset_, (N,); below 0 = outlier."""
            return self.score_samples(X) - _known_offset(self)

        def predict(self, X: Any) -> Any:  # noqa: N803
            """Return +1 for rows that are accepted and -1 for outliers, (N,)."""
            return np.where(self.decision_function(X) >= 0, 1, -1)

        def __sklearn_is_fitted__(self) -> bool:
            return self.threshold is not None or hasattr(self, "offset_")

    return ScoreDetector


def _offset(score: Score, rows: Predictions, threshold: float | None, rate: float) -> float:
    if threshold is not None:
        return -float(threshold)
    if not 0 <= rate < 1:
        raise InvalidInputError(f"got false_reject_rate {rate}; needed one in [0, 1)")
    return -float(np.quantile(score.of(rows), 1 - rate, method="inverted_cdf"))


def _known_offset(detector: Any) -> float:
    from sklearn.exceptions import NotFittedError

    if hasattr(detector, "offset_"):
        return float(detector.offset_)
    if detector.threshold is None:
        raise NotFittedError("this detector has no threshold: call fit(X), or give threshold=")
    return -float(detector.threshold)


def _rows(values: Any, labels: Any, num_classes: int | None) -> Predictions:
    if isinstance(values, Predictions):
        return values
    array: NDArray[Any] = np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.number):
        raise InvalidInputError(
            f"got X of shape {array.shape} and dtype {array.dtype}; needed Predictions, or an "
            "array (N, C) of logits, or (N, C + D) of logits and features with num_classes=C"
        )
    array = array if array.dtype == np.float64 else array.astype(np.float32)
    split = array.shape[1] if num_classes is None else num_classes
    features = array[:, split:] if split < array.shape[1] else None
    known = None if labels is None else np.asarray(labels, dtype=np.int64)
    return Predictions(array[:, :split], features=features, labels=known, source="X")
