"""Selective prediction: what is gained by letting the model answer only where it is sure.

Everything here takes one number a row (an order: higher = less trusted) and whether the row was
wrong; it knows no model. Areas under the curve are calibration metrics and live there; what can be
*promised* about a cut is in :mod:`ebm_guard.calibration.certificates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, Array, Metric, proportion, wilson

POINTS = 200
COVERAGES = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class AccuracyAt:
    """Accuracy of the most trusted rows.

    Args:
        coverage: the share of rows that was asked for.
        realised: the share that is answered: the first tie boundary at or above ``coverage``.
        cut: the largest order that is answered (order <= cut).
        accuracy: share of right rows among them.
    """

    coverage: float
    realised: float
    cut: float
    accuracy: Metric

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "coverage": self.coverage,
            "realised": self.realised,
            "cut": self.cut,
            "accuracy": self.accuracy.to_dict(),
        }


@dataclass(frozen=True)
class RiskCoverage:
    """Risk against coverage, one point for each distinct order.

    Args:
        n: rows, those of weight 0 left out.
        cut: (G,) distinct orders, ascending; point g answers all rows with order <= cut[g].
        accepted: (G,) int64, rows answered.
        errors: (G,) int64, wrong rows among them.
        coverage: (G,) share answered, by weight; the last is 1.
        risk: (G,) share wrong among the answered, by weight.
        effective: (G,) rows that the interval counts: ``accepted``, or Kish's (sum w)^2 / sum w^2.
    """

    n: int
    cut: NDArray[np.float64]
    accepted: NDArray[np.int64]
    errors: NDArray[np.int64]
    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    effective: NDArray[np.float64]

    def accuracy_at(self, coverage: float) -> AccuracyAt:
        """Compute the accuracy of the most trusted share of the rows.

        A group of ties is answered as a whole or not at all: the cut is the smallest one that
        answers at least ``coverage``, and ``realised`` says how much that is.

        Args:
            coverage: share in (0, 1].

        Raises:
            InvalidInputError: the share is out of range.
        """
        if not 0 < coverage <= 1:
            raise InvalidInputError(f"got coverage {coverage!r}; needed a share in (0, 1]")
        # The tolerance keeps 0.95 from asking for one row more than 19 of 20.
        at = int(np.searchsorted(self.coverage, coverage - 1e-12))
        return AccuracyAt(
            coverage, float(self.coverage[at]), float(self.cut[at]), self._accuracy(at)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return at most 200 points, evenly spread in coverage, the last one included.

        Without weights a point is two counts out of n, so nothing is lost by writing it down.
        """
        wanted = np.arange(1, POINTS + 1) / POINTS
        kept = np.unique(np.searchsorted(self.coverage, wanted - 1e-12).clip(max=len(self.cut) - 1))
        ends = [self._accuracy(int(at)) for at in kept]
        return {
            "n": self.n,
            "distinct": len(self.cut),
            "level": LEVEL,
            "method": ends[-1].method,
            "accepted": self.accepted[kept].tolist(),
            "errors": self.errors[kept].tolist(),
            "coverage": self.coverage[kept].tolist(),
            "risk": self.risk[kept].tolist(),
            "low": [None if end.high is None else 1 - end.high for end in ends],
            "high": [None if end.low is None else 1 - end.low for end in ends],
        }

    def _accuracy(self, at: int) -> Metric:
        accepted, errors = int(self.accepted[at]), int(self.errors[at])
        if self.effective[at] == accepted:
            return proportion(accepted - errors, accepted)
        rows = max(1, round(float(self.effective[at])))
        value = 1 - float(self.risk[at])
        low, high = wilson(round(value * rows), rows)
        # Rounded to whole rows, the interval may just miss the value.
        return Metric(
            value, min(low, value), max(high, value), accepted, "Wilson, Kish effective rows"
        )


def risk_coverage(order: Array, errors: Array, sample_weight: Array | None = None) -> RiskCoverage:
    """Compute the risk-coverage curve of a ranking.

    With rows sorted by order, coverage(c) = #{order <= c} / N and
    risk(c) = #{order <= c and wrong} / #{order <= c}. Equal orders are one point, so the curve
    does not depend on the order of the rows.

    Args:
        order: (N,), finite, higher = less trusted, such as -confidence or the energy.
        errors: (N,) bool, or 0 and 1: whether the row is wrong.
        sample_weight: (N,), >= 0, not all 0; rows of weight 0 are left out.

    Raises:
        InvalidInputError: shapes that differ, no rows, or values out of range.

    References:
        El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, JMLR 2010.
        Differs: ties are grouped; common code lets the row order decide among them.

    Example:
        >>> curve = risk_coverage(np.array([0.0, 0.0, 1.0, 2.0]), np.array([0, 1, 0, 1]))
        >>> curve.coverage.tolist(), curve.risk.round(3).tolist()
        ([0.5, 0.75, 1.0], [0.5, 0.333, 0.5])
    """
    values, wrong = check_rows(order, errors)
    weights = _weights(sample_weight, len(values))
    kept = weights > 0
    values, wrong, weights = values[kept], wrong[kept], weights[kept]
    cut, where = np.unique(values, return_inverse=True)
    accepted = np.cumsum(np.bincount(where))
    mistakes = np.cumsum(np.bincount(where, wrong)).astype(np.int64)
    if sample_weight is None:
        mass, lost = accepted.astype(np.float64), mistakes.astype(np.float64)
        effective = mass
    else:
        mass = np.cumsum(np.bincount(where, weights))
        lost = np.cumsum(np.bincount(where, weights * wrong))
        effective = mass**2 / np.cumsum(np.bincount(where, weights**2))
    return RiskCoverage(
        n=len(values),
        cut=cut,
        accepted=accepted.astype(np.int64),
        errors=mistakes,
        coverage=mass / mass[-1],
        risk=lost / mass,
        effective=effective,
    )


def check_rows(order: Array, errors: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Check an order and its errors, and return them as float64 and bool.

    Raises:
        InvalidInputError: shapes that differ, no rows, non-finite orders, errors beside 0 and 1.

    Example:
        >>> check_rows(np.array([1, 2]), np.array([0, 1]))[1]
        array([False,  True])
    """
    values, wrong = np.asarray(order, dtype=np.float64), np.asarray(errors)
    if values.ndim != 1 or wrong.shape != values.shape or not len(values):
        raise InvalidInputError(
            f"got orders of shape {values.shape} and errors of shape {wrong.shape}; needed (N,) "
            "for both, with N >= 1"
        )
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InvalidInputError(
            f"got {bad} of {len(values)} orders that are not finite; a gate refuses such rows, so "
            "remove them first"
        )
    if wrong.dtype != np.bool_ and not np.isin(wrong, (0, 1)).all():
        raise InvalidInputError("got errors beside 0 and 1; needed whether each row is wrong")
    return values, wrong.astype(bool)


def _weights(sample_weight: Array | None, n: int) -> NDArray[np.float64]:
    if sample_weight is None:
        return np.ones(n)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InvalidInputError(
            f"got sample weights of shape {weights.shape}, or negative or non-finite ones; needed "
            f"({n},), each >= 0"
        )
    if not weights.any():
        raise InvalidInputError("got sample weights that are all 0; needed one that is positive")
    return weights
