"""How well a score separates OOD from ID: exact with ties, every number with an interval.

All functions take scores with higher = more OOD. AUROC and ``aupr_out`` have OOD as the positive
class, ``aupr_in`` has ID; the two FPR95 differ by which class is fixed at 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import (
    LEVEL,
    Array,
    Metric,
    PrecisionMetric,
    normal_quantile,
    wilson,
)

DRAWS = 500
_TARGET = 0.95
# Bounds the bootstrap's work on huge sets; what it costs is proportional to rows times draws.
_ROW_VISITS = 50_000_000
_CHUNK = 2_000_000


@dataclass(frozen=True)
class RocCurve:
    """OOD positive: ``tpr`` is the share of OOD caught, ``fpr`` the share of ID refused."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]

    def to_dict(self, points: int = 200) -> dict[str, list[float]]:
        """Return at most about ``points`` points, evenly spaced along the curve, ends kept."""
        if len(self.fpr) <= points:
            keep = np.arange(len(self.fpr))
        else:
            length = self.fpr + self.tpr
            keep = np.searchsorted(length, np.linspace(0, 2, points))
            keep = np.unique(np.clip(keep, 0, len(length) - 1))
        return {"fpr": self.fpr[keep].tolist(), "tpr": self.tpr[keep].tolist()}


@dataclass(frozen=True)
class OODMetrics:
    """The metrics of one score on one pair of ID and OOD sets."""

    auroc: Metric
    aupr_in: PrecisionMetric
    aupr_out: PrecisionMetric
    fpr95: Metric
    fpr95_ood_positive: Metric

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {name: getattr(self, name).to_dict() for name in OODMetrics.__dataclass_fields__}


def auroc(id_scores: Array, ood_scores: Array) -> Metric:
    """Compute P(s_ood > s_id) + P(s_ood = s_id)/2, with DeLong's interval on the logit scale.

    Args:
        id_scores: (N,), finite, higher = more OOD.
        ood_scores: (M,), finite.

    Raises:
        InvalidInputError: an empty set or a non-finite score.

    References:
        DeLong et al., Biometrics 1988; logit transform: Pepe, 2003.

    Example:
        >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0])).value
        0.875
    """
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    id_part, ood_part = placements(id_scores, ood_scores)
    value = float(ood_part.mean())
    n = len(id_scores) + len(ood_scores)
    if min(len(id_scores), len(ood_scores)) < 2:
        return Metric(value, None, None, n, "none: one row")
    deviation = float(np.sqrt(_variance(id_part, ood_part)))
    low, high = _logit_interval(value, deviation, len(id_scores), len(ood_scores))
    return Metric(value, low, high, n, "DeLong, logit scale")


def placements(
    id_scores: Array, ood_scores: Array
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute DeLong's structural components; the mean of each is the AUROC.

    Args:
        id_scores: (N,).
        ood_scores: (M,).

    Returns:
        For each ID row the share of OOD rows above it, (N,), and for each OOD row the share of ID
        rows below it, (M,); ties count 1/2.
    """
    id_sorted, ood_sorted = np.sort(id_scores), np.sort(ood_scores)
    below = np.searchsorted(id_sorted, ood_scores, "left")
    at_most = np.searchsorted(id_sorted, ood_scores, "right")
    ood_below = np.searchsorted(ood_sorted, id_scores, "left")
    ood_at_most = np.searchsorted(ood_sorted, id_scores, "right")
    ood_part = (below + at_most) / (2 * len(id_scores))
    id_part = 1 - (ood_below + ood_at_most) / (2 * len(ood_scores))
    return id_part, ood_part


def auroc_difference(
    id_first: Array,
    id_second: Array,
    ood_first: list[Array],
    ood_second: list[Array],
    comparisons: int = 1,
) -> Metric:
    """Compute the paired difference of two scores' mean AUROC over OOD sets.

    Args:
        id_first: (N,) scores of the first method on the ID rows.
        id_second: (N,) scores of the second method on the same rows.
        ood_first: scores of the first method on each OOD set.
        ood_second: scores of the second method on the same sets.
        comparisons: Bonferroni factor, the number of differences that were looked at.

    Returns:
        First minus second, with DeLong's interval at level 1 - 0.05/comparisons.
    """
    id_parts, values, variance = [], [], 0.0
    for first, second in zip(ood_first, ood_second, strict=True):
        _checked(id_first, first)
        _checked(id_second, second)
        id_a, ood_a = placements(id_first, first)
        id_b, ood_b = placements(id_second, second)
        id_parts.append(id_a - id_b)
        difference = ood_a - ood_b
        values.append(float(difference.mean()))
        variance += _mean_variance(difference) / len(ood_first) ** 2
    # The ID rows are the same for every OOD set, so their parts are averaged before the variance.
    variance += _mean_variance(np.mean(id_parts, axis=0))
    value = float(np.mean(values))
    tail = (1 - LEVEL) / comparisons
    half = normal_quantile(1 - tail / 2) * float(np.sqrt(variance))
    n = len(id_first) + sum(map(len, ood_first))
    method = "paired DeLong" + (f", Bonferroni over {comparisons}" if comparisons > 1 else "")
    return Metric(value, value - half, value + half, n, method)


def aupr_in(id_scores: Array, ood_scores: Array) -> PrecisionMetric:
    """Compute the average precision with ID as the positive class."""
    return ood_metrics(id_scores, ood_scores).aupr_in


def aupr_out(id_scores: Array, ood_scores: Array) -> PrecisionMetric:
    """Compute the average precision with OOD as the positive class."""
    return ood_metrics(id_scores, ood_scores).aupr_out


def fpr95(id_scores: Array, ood_scores: Array) -> Metric:
    """Compute the share of OOD accepted at the smallest cut that accepts 95 % of ID."""
    return ood_metrics(id_scores, ood_scores).fpr95


def fpr95_ood_positive(id_scores: Array, ood_scores: Array) -> Metric:
    """Compute the share of ID refused at the largest cut that catches 95 % of OOD."""
    return ood_metrics(id_scores, ood_scores).fpr95_ood_positive


def ood_metrics(
    id_scores: Array, ood_scores: Array, *, draws: int = DRAWS, seed: int = 0
) -> OODMetrics:
    """Compute all OOD metrics of one score.

    Args:
        id_scores: (N,), finite, higher = more OOD.
        ood_scores: (M,), finite.
        draws: stratified bootstrap resamples for AUPR and FPR95; fewer on huge sets.
        seed: of the bootstrap's own generator.

    Raises:
        InvalidInputError: an empty set or a non-finite score.

    Example:
        >>> result = ood_metrics(np.array([0.0, 1.0]), np.array([2.0, 3.0]))
        >>> result.auroc.value, result.fpr95.value
        (1.0, 0.0)
    """
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    n_id, n_ood = len(id_scores), len(ood_scores)
    values, where = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_at, ood_at = where[:n_id], where[n_id:]
    id_counts = np.bincount(id_at, minlength=len(values)).astype(np.float64)
    ood_counts = np.bincount(ood_at, minlength=len(values)).astype(np.float64)
    found = _curve_areas(id_counts[None], ood_counts[None])[:, 0]
    draws = max(100, min(draws, _ROW_VISITS // (n_id + n_ood)))
    resampled = _resample(id_at, ood_at, len(values), draws, np.random.default_rng(seed))
    tail = (1 - LEVEL) / 2
    lows, highs = np.quantile(resampled, [tail, 1 - tail], axis=1)
    lows, highs = np.minimum(lows, found[:4]), np.maximum(highs, found[:4])
    # Resamples of a share of 0 or 1 hardly vary; Wilson's end is the honest one there.
    for index, rows in ((2, n_ood), (3, n_id)):
        if found[index] in (0.0, 1.0):
            low, high = wilson(round(float(found[index]) * rows), rows)
            lows[index], highs[index] = min(lows[index], low), max(highs[index], high)
    n, method = n_id + n_ood, f"percentile bootstrap, {draws} stratified draws"
    share = n_ood / n

    def metric(index: int) -> Metric:
        return Metric(float(found[index]), float(lows[index]), float(highs[index]), n, method)

    def area(index: int, base_rate: float, balanced: float) -> PrecisionMetric:
        plain = metric(index)
        return PrecisionMetric(
            plain.value, plain.low, plain.high, n, method, base_rate=base_rate, balanced=balanced
        )

    return OODMetrics(
        auroc=auroc(id_scores, ood_scores),
        aupr_in=area(0, 1 - share, float(found[4])),
        aupr_out=area(1, share, float(found[5])),
        fpr95=metric(2),
        fpr95_ood_positive=metric(3),
    )


def roc_curve(id_scores: Array, ood_scores: Array) -> RocCurve:
    """Compute the ROC curve, OOD positive, one point per distinct score.

    Args:
        id_scores: (N,), finite.
        ood_scores: (M,), finite.

    Returns:
        The curve from (0, 0) to (1, 1).

    Example:
        >>> roc_curve(np.array([0.0]), np.array([1.0])).tpr
        array([0., 1., 1.])
    """
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    cuts = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]
    fpr = 1 - np.searchsorted(np.sort(id_scores), cuts, "left") / len(id_scores)
    tpr = 1 - np.searchsorted(np.sort(ood_scores), cuts, "left") / len(ood_scores)
    return RocCurve(np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr]))


def _curve_areas(id_counts: Array, ood_counts: Array) -> Array:
    """Return AUPR-in, AUPR-out, both FPR95, and the AUPRs at 1:1, each (R,).

    Rows are resamples; columns are the distinct scores in ascending order, so that ties move
    together and no order of equal scores can change a number.
    """
    id_up, ood_up = id_counts.cumsum(axis=1), ood_counts.cumsum(axis=1)
    n_id, n_ood = id_up[:, -1:], ood_up[:, -1:]
    id_down, ood_down = n_id - id_up + id_counts, n_ood - ood_up + ood_counts
    ratio = n_id / n_ood
    return np.stack(
        [
            _average_precision(id_counts, id_up, ood_up),
            _average_precision(ood_counts, ood_down, id_down),
            _accepted_at(id_up, n_id, ood_up / n_ood, from_end=False),
            _accepted_at(ood_down, n_ood, id_down / n_id, from_end=True),
            _average_precision(id_counts, id_up, ood_up * ratio),
            _average_precision(ood_counts, ood_down * ratio, id_down),
        ]
    )


def _average_precision(gained: Array, true: Array, false: Array) -> Array:
    """Sum precision times the gain in recall; ``gained`` is in counts of the positive class."""
    precision = true / np.maximum(true + false, 1e-300)
    return np.asarray((gained * precision).sum(axis=1) / gained.sum(axis=1))


def _accepted_at(kept: Array, total: Array, other: Array, *, from_end: bool) -> Array:
    """Return ``other`` at the first cut that keeps 95 % of ``kept``."""
    enough = kept >= _TARGET * total
    last = enough.shape[1] - 1
    where = last - enough[:, ::-1].argmax(axis=1) if from_end else enough.argmax(axis=1)
    return np.asarray(other[np.arange(len(other)), where])


def _resample(
    id_at: NDArray[np.int64],
    ood_at: NDArray[np.int64],
    n_values: int,
    draws: int,
    generator: np.random.Generator,
) -> Array:
    chunk = max(1, _CHUNK // n_values)
    parts = []
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        id_counts = _drawn(id_at, n_values, rows, generator)
        ood_counts = _drawn(ood_at, n_values, rows, generator)
        parts.append(_curve_areas(id_counts, ood_counts)[:4])
    return np.concatenate(parts, axis=1)


def _drawn(
    at: NDArray[np.int64], n_values: int, rows: int, generator: np.random.Generator
) -> Array:
    picks = at[generator.integers(0, len(at), size=(rows, len(at)))]
    picks = picks + np.arange(rows)[:, None] * n_values
    counts = np.bincount(picks.ravel(), minlength=rows * n_values)
    return counts.reshape(rows, n_values).astype(np.float64)


def _variance(id_part: Array, ood_part: Array) -> float:
    return _mean_variance(id_part) + _mean_variance(ood_part)


def _mean_variance(part: Array) -> float:
    return float(np.var(part, ddof=1)) / len(part) if len(part) > 1 else 0.0


def _logit_interval(value: float, deviation: float, n: int, m: int) -> tuple[float, float]:
    if value in (0.0, 1.0):
        # DeLong's variance is 0 there; by the rule of three the true miss may be 3 in the smaller
        # set, which is a plain bound and not an exact one.
        miss = min(1.0, 3 / min(n, m))
        return (1 - miss, 1.0) if value == 1.0 else (0.0, miss)
    centre = np.log(value / (1 - value))
    half = normal_quantile(0.5 + LEVEL / 2) * deviation / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-np.array([centre - half, centre + half])))
    return float(low), float(high)


def _checked(id_scores: Array, ood_scores: Array) -> tuple[Array, Array]:
    checked = []
    for name, scores in (("ID", id_scores), ("OOD", ood_scores)):
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1 or not len(values):
            raise InvalidInputError(
                f"got {name} scores of shape {values.shape}; needed (N,), N >= 1"
            )
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise InvalidInputError(
                f"got {bad} of {len(values)} {name} scores that are not finite; the gate refuses "
                "such rows, count and remove them before measuring"
            )
        checked.append(values)
    return checked[0], checked[1]
