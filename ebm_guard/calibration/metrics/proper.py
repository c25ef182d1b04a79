"""Accuracy, the proper scores NLL and Brier, and mean overconfidence: means over rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.intervals import (
    LEVEL,
    Metric,
    mean,
    normal_quantile,
    proportion,
    wilson_share,
)

Floats = NDArray[np.float64]


def accuracy(rows: RowStatistics) -> Metric:
    """Compute the share of right predictions, with Wilson's interval.

    With sample weights the share is weighted and n in Wilson's formula is Kish's effective n.
    """
    if rows.weight is None:
        return proportion(int(rows.correct.sum()), len(rows))
    return weighted_share(rows.correct, rows.weight)


def weighted_share(hits: NDArray[np.bool_], weight: Floats) -> Metric:
    """Return a weighted share with Wilson's interval at the effective n.

    Args:
        hits: (N,).
        weight: (N,) >= 0.

    Example:
        >>> weighted_share(np.array([True, False]), np.array([3.0, 1.0])).value
        0.75
    """
    share = float(weight @ hits / weight.sum())
    effective = float(weight.sum() ** 2 / (weight @ weight))
    low, high = wilson_share(share, effective)
    return Metric(share, low, high, len(hits), f"Wilson, effective n {effective:,.0f}")


def weighted_mean(values: Floats, weight: Floats | None) -> Metric:
    """Return a mean with its normal-theory interval; weights are taken as given, not as counts.

    The variance of a weighted mean m is sum w^2 (x - m)^2 / (sum w)^2 (linearisation).

    Args:
        values: (N,), finite.
        weight: (N,) >= 0, or None for equal weights.

    Example:
        >>> weighted_mean(np.array([1.0, 3.0]), np.array([1.0, 1.0])).value
        2.0
    """
    if weight is None:
        return mean(values)
    from scipy import stats

    n = len(values)
    value = float(weight @ values / weight.sum())
    if n < 2 or not math.isfinite(value):
        reason = "none: one row" if n < 2 else "none: the mean is not finite"
        return Metric(value, None, None, n, reason)
    spread = math.sqrt(float(np.square(weight * (values - value)).sum()) * n / (n - 1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * spread / float(weight.sum())
    return Metric(value, value - half, value + half, n, "Student t, weighted")


def nll(rows: RowStatistics) -> Metric:
    """Compute the mean negative log-likelihood of the labels, in nats."""
    return weighted_mean(rows.nll, rows.weight)


def brier(rows: RowStatistics) -> Metric:
    """Compute the multiclass Brier score, mean sum_k (p_k - 1[y = k])^2 in [0, 2]."""
    return weighted_mean(rows.brier, rows.weight)


def overconfidence(rows: RowStatistics) -> Metric:
    """Compute mean confidence - accuracy; positive means overconfident.

    ``null95`` bounds its absolute value: 1.96 sqrt(sum c (1 - c)) / n for a perfect model.
    """
    found = weighted_mean(rows.gaps, rows.weight)
    noise = np.square(rows.weights) * rows.confidence * (1 - rows.confidence)
    deviation = math.sqrt(float(noise.sum())) / float(rows.weights.sum())
    return replace(found, null95=normal_quantile(0.975) * deviation)


def brier_top_label(rows: RowStatistics) -> Metric:
    """Compute the Brier score of the top label, mean (confidence - correct)^2 in [0, 1]."""
    return weighted_mean(np.square(rows.gaps), rows.weight)
