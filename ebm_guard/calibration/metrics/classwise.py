"""Calibration class by class: classwise ECE, and a table of the predicted classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.cells import N_BINS, bin_index
from ebm_guard.calibration.intervals import GapNorm, gap_interval, no_interval
from ebm_guard.calibration.metrics.proper import overconfidence
from ebm_guard.calibration.rows import RowStatistics, check_rows
from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.intervals import Array, Metric, proportion

Floats = NDArray[np.float64]
_CHUNK = 2_000_000
_NUMBERS = 30_000_000
# The exact test takes a pass over (rows x rarer outcomes) numbers, one call of numpy a row.
_EXACT_ROWS = 20_000
_EXACT_NUMBERS = 20_000_000
# Below this variance the count of the rarer outcome is Poisson rather than normal.
_NORMAL_VARIANCE = 100.0
LEVEL = 0.05


def ece_classwise(
    logits: Array,
    labels: NDArray[np.int64],
    temperature: float = 1.0,
    *,
    transform: Callable[[Array], Array] | None = None,
    n_bins: int = N_BINS,
    draws: int = 200,
    seed: int = 0,
) -> Metric:
    """Compute the classwise ECE: the mean over classes of the ECE of p(y = k).

    ECE_cw = (1/C) sum_k sum_b |sum_{i: p_ik in b} (p_ik - 1[y_i = k])| / n. With many classes most
    p_ik are near 0, so the mean is small whatever the model does: compare it with ``null95`` and
    with itself, never with the top-label ECE.

    Args:
        logits: (N, C), finite.
        labels: (N,) in 0..C-1.
        temperature: T > 0, used without ``transform``.
        transform: a calibrator's ``transform``: logits (B, C) to log-probabilities (B, C).
        n_bins: equal-width bins.
        draws: draws of the gaps; fewer for many classes, so that memory is bounded.
        seed: of the draws' own generators.

    Returns:
        The mean over classes (some papers print the sum: times C). Interval and null level take
        the gaps of different bins and classes as independent normal variables.

    References:
        Kull et al., Beyond Temperature Scaling, NeurIPS 2019, eq. 3 (there the mean too).

    Example:
        >>> ece_classwise(np.zeros((4, 2)), np.array([0, 0, 0, 1])).value
        0.25
    """
    sums = ClassSums(n_bins).add(logits, labels, temperature, transform=transform)
    return sums.metric(draws=draws, seed=seed)


class ClassSums:
    """The fixed-size state of the classwise ECE: C times n_bins sums, added up over chunks.

    Args:
        n_bins: equal-width bins.

    Example:
        >>> sums = ClassSums().add(np.zeros((3, 2)), np.array([0, 0, 0]))
        >>> sums.add(np.zeros((1, 2)), np.array([1])).metric().value
        0.25
    """

    def __init__(self, n_bins: int = N_BINS) -> None:
        self.n_bins = n_bins
        self.n = 0
        self._sums: Floats | None = None

    def add(
        self,
        logits: Array,
        labels: NDArray[np.int64],
        temperature: float = 1.0,
        *,
        transform: Callable[[Array], Array] | None = None,
    ) -> ClassSums:
        """Add rows (N, C) with labels (N,), and return itself.

        Raises:
            InvalidInputError: as :func:`~ebm_guard.calibration.row_statistics`, or another number
                of classes than before.
        """
        check_rows(logits, labels, temperature)
        if self._sums is not None and self._sums.shape[1] != logits.shape[1] * self.n_bins:
            had = self._sums.shape[1] // self.n_bins
            raise InvalidInputError(f"got {logits.shape[1]} classes after {had}; needed the same")
        step = max(1, _CHUNK // logits.shape[1])
        for at in range(0, len(logits), step):
            part = logits[at : at + step]
            _check_finite(part)
            scores = np.asarray(part if transform is None else transform(part), np.float64)
            scores = scores if transform is not None else scores / temperature
            sums = _class_sums(scores, labels[at : at + step], self.n_bins)
            self._sums = sums if self._sums is None else self._sums + sums
        self.n += len(labels)
        return self

    def metric(self, *, draws: int = 200, seed: int = 0) -> Metric:
        """Return the classwise ECE of the rows so far.

        Raises:
            NotFittedError: no rows yet.
        """
        if self._sums is None:
            raise NotFittedError("no rows were added yet; call add(logits, labels) first")
        n, classes = self.n, self._sums.shape[1] // self.n_bins
        gap, squared, null_variance = self._sums / n
        deviation = np.sqrt(np.maximum(squared - np.square(gap), 0.0) / n)
        draws = max(50, min(draws, _NUMBERS // len(gap)))
        norm = GapNorm(
            of_gaps=lambda gaps: float(np.abs(gaps).sum()) / classes,
            of_draws=lambda gaps: np.asarray(np.abs(gaps).sum(axis=-1)) / classes,
        )
        standard = np.random.default_rng(seed).standard_normal((draws, len(gap)))
        if classes == 2:
            # Two classes have one gap, seen from both sides.
            standard[:, self.n_bins :] = -standard[:, self.n_bins - 1 :: -1]
        null95 = float(np.quantile(norm.of_draws(standard * np.sqrt(null_variance / n)), 0.95))
        value = norm.of_gaps(gap)
        # Every row has a class and C - 1 others: both outcomes are always there.
        reason = no_interval(n, n // 2)
        if reason:
            return Metric(value, None, None, n, reason, null95=null95)
        low, high = gap_interval(gap, standard * deviation, norm)
        method = f"normal gaps, bias-corrected, {draws:,} draws"
        return Metric(value, low, high, n, method, null95=null95)


def _check_finite(logits: Array) -> None:
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise InvalidInputError(
            f"got {bad} rows with NaN or infinite logits; remove them first (Predictions.invalid)"
        )


def _class_sums(scores: Floats, labels: NDArray[np.int64], n_bins: int) -> Floats:
    """Return (3, C n_bins): sums of the gap, of its square and of p (1 - p)."""
    with np.errstate(over="ignore"):
        scores = scores - scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    n, classes = scores.shape
    size = classes * n_bins
    where = bin_index(scores, n_bins) + n_bins * np.arange(classes)
    gap = scores.copy()
    gap[np.arange(n), labels] -= 1.0
    flat = where.ravel()
    return np.stack(
        [
            np.bincount(flat, values.ravel(), minlength=size)
            for values in (gap, np.square(gap), scores * (1 - scores))
        ]
    )


@dataclass(frozen=True)
class ClassCalibration:
    """Calibration of the rows that were predicted to be of one class.

    Args:
        index: the class.
        n: rows predicted to be of it.
        accuracy: share of them that are right (precision), None where there are none.
        overconfidence: mean confidence - accuracy, None where there are none.
        p_value: of the hypothesis that right ~ Bernoulli(confidence) in these rows, two-sided.
        flagged: rejected by Benjamini-Hochberg at 5 % over all classes with rows.
    """

    index: int
    n: int
    accuracy: Metric | None
    overconfidence: Metric | None
    p_value: float | None
    flagged: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "index": self.index,
            "n": self.n,
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "overconfidence": None
            if self.overconfidence is None
            else self.overconfidence.to_dict(),
            "p_value": self.p_value,
            "flagged": self.flagged,
        }


def class_table(rows: RowStatistics, num_classes: int) -> list[ClassCalibration]:
    """Measure the calibration of each predicted class, the clearest miscalibration first.

    The hypothesis "when the model says k with confidence c, it is right with probability c" is
    tested for each k by the exact distribution of the number of right rows, a sum of Bernoulli
    variables (beyond 20,000 rows its normal or Poisson limit), and the classes are flagged by
    Benjamini and Hochberg's rule, so that at most 5 % of the flags are false on average.

    Args:
        rows: row statistics without sample weights.
        num_classes: C.

    Returns:
        One row a class, by p-value; classes that were never predicted last.

    Raises:
        InvalidInputError: sample weights.

    References:
        Gupta and Ramdas, Top-label Calibration and Multiclass-to-binary Reductions, ICLR 2022;
        Benjamini and Hochberg, JRSS B 1995.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> table = class_table(row_statistics(np.array([[9.0, 0]] * 9), np.ones(9, np.int64)), 2)
        >>> [(row.index, row.n, row.flagged) for row in table]
        [(0, 9, True), (1, 0, False)]
    """
    if rows.weight is not None:
        raise InvalidInputError("the table of classes has no form for sample weights")
    order = np.argsort(rows.predicted, kind="stable")
    ends = np.searchsorted(rows.predicted[order], np.arange(num_classes + 1))
    parts = [
        rows.select(order[ends[index] : ends[index + 1]]) if ends[index] < ends[index + 1] else None
        for index in range(num_classes)
    ]
    p_values = [None if part is None else _p_value(part) for part in parts]
    flagged = benjamini_hochberg([value for value in p_values if value is not None])
    flags = iter(flagged)
    table = [
        ClassCalibration(
            index=index,
            n=0 if part is None else len(part),
            accuracy=None if part is None else proportion(int(part.correct.sum()), len(part)),
            overconfidence=None if part is None else overconfidence(part),
            p_value=p_value,
            flagged=p_value is not None and next(flags),
        )
        for index, (part, p_value) in enumerate(zip(parts, p_values, strict=True))
    ]
    return sorted(table, key=lambda row: (row.p_value is None, row.p_value or 0.0, row.index))


def benjamini_hochberg(p_values: list[float], level: float = LEVEL) -> list[bool]:
    """Return which hypotheses are rejected at a false discovery rate of ``level``.

    Example:
        >>> benjamini_hochberg([0.001, 0.2, 0.03, 0.04])
        [True, False, False, False]
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not len(values):
        return []
    order = np.argsort(values, kind="stable")
    allowed = level * np.arange(1, len(values) + 1) / len(values)
    below = np.flatnonzero(values[order] <= allowed)
    cut = values[order[below[-1]]] if len(below) else -1.0
    return [bool(value <= cut) for value in values]


def _p_value(rows: RowStatistics) -> float:
    """Test the number of right rows against a sum of Bernoulli(confidence), two-sided."""
    right, n = int(rows.correct.sum()), len(rows)
    # The rarer outcome is counted: small counts need few terms.
    if 2 * right <= n:
        count, chances = right, rows.confidence
    else:
        count, chances = n - right, 1 - rows.confidence
    if n <= _EXACT_ROWS and n * count <= _EXACT_NUMBERS:
        at_most, at_least = _poisson_binomial(chances, count)
    else:
        at_most, at_least = _limit(chances, count)
    return min(1.0, 2 * min(at_most, at_least))


def _limit(chances: Floats, count: int) -> tuple[float, float]:
    """Return P(X <= count) and P(X >= count) by the normal or the Poisson limit."""
    from scipy.stats import norm, poisson

    mean, variance = float(chances.sum()), float((chances * (1 - chances)).sum())
    if variance < _NORMAL_VARIANCE:
        return float(poisson.cdf(count, mean)), float(poisson.sf(count - 1, mean))
    away, deviation = count - mean, variance**0.5
    return float(norm.cdf((away + 0.5) / deviation)), float(norm.sf((away - 0.5) / deviation))


def _poisson_binomial(chances: Floats, count: int) -> tuple[float, float]:
    """Return P(X <= count) and P(X >= count) of a sum X of independent Bernoulli variables.

    Each tail is added up from its own terms, so that tiny ones keep their digits.
    """
    below = np.zeros(count + 1)
    below[0], at_least = 1.0, 0.0 if count else 1.0
    for chance in chances.tolist():
        # What leaves the last place kept below ``count`` arrives at ``count`` for good.
        if count:
            at_least += below[count - 1] * chance
        stay = below * (1 - chance)
        stay[1:] += below[:-1] * chance
        below = stay
    return float(min(1.0, below.sum())), float(min(1.0, at_least))
