"""Accuracy, NLL, Brier and ECE from one pass over the logits, five numbers a row.

Metrics know no models: they take row statistics, which come from logits and a temperature, or
from any probabilities. Rows must be finite; callers count and remove invalid rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import (
    Array,
    Metric,
    basic_interval,
    mean,
    proportion,
    resample_counts,
    wilson,
)

N_BINS = 15
DRAWS = 1000
# Bounds the bootstrap's work at about 2e7 row visits; the draws needed shrink as rows grow.
_ROW_VISITS = 20_000_000
_CHUNK = 2_000_000


@dataclass(frozen=True)
class RowStatistics:
    """What the calibration metrics need of each row, instead of N x C probabilities.

    Args:
        confidence: (N,) float64, probability of the predicted class.
        predicted: (N,) int64, argmax of the logits (first class on ties).
        correct: (N,) bool.
        nll: (N,) float64, -log p(y|x).
        brier: (N,) float64, sum_k (p_k - 1[y = k])^2.
    """

    confidence: NDArray[np.float64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    nll: NDArray[np.float64]
    brier: NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.confidence)

    def select(self, rows: NDArray[Any]) -> RowStatistics:
        """Return the statistics of some rows, by index or mask."""
        return RowStatistics(
            *(getattr(self, name)[rows] for name in RowStatistics.__dataclass_fields__)
        )

    @staticmethod
    def concatenate(parts: list[RowStatistics]) -> RowStatistics:
        """Join the statistics of several sets of rows (exact, for folds and shards)."""
        return RowStatistics(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in RowStatistics.__dataclass_fields__
            )
        )


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin (lo, hi] of the reliability diagram; empty bins hold None."""

    lo: float
    hi: float
    count: int
    confidence: float | None
    accuracy: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against accuracy, by equal-width bins of the top-label confidence."""

    n_bins: int
    bins: tuple[ReliabilityBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON types."""
        return {"n_bins": self.n_bins, "bins": [asdict(item) for item in self.bins]}


@dataclass(frozen=True)
class CalibrationMetrics:
    """The calibration metrics of one set of predictions."""

    accuracy: Metric
    nll: Metric
    brier: Metric
    ece: Metric
    overconfidence: Metric
    curve: ReliabilityCurve

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            name: getattr(self, name).to_dict() for name in CalibrationMetrics.__dataclass_fields__
        }


def row_statistics(
    logits: Array,
    labels: NDArray[np.int64],
    temperature: float = 1.0,
    *,
    transform: Callable[[Array], Array] | None = None,
) -> RowStatistics:
    """Compute the row statistics of p = softmax(f/T), in float64 and in chunks.

    Args:
        logits: (N, C), finite.
        labels: (N,) in 0..C-1.
        temperature: T > 0.
        transform: maps a block of logits (B, C) to (log-)probability scores (B, C) first, as a
            calibrator's ``transform`` does.

    Raises:
        InvalidInputError: non-finite logits, or shapes that do not match.

    Example:
        >>> row_statistics(np.array([[2.0, 0.0]]), np.array([0])).correct
        array([ True])
    """
    if logits.ndim != 2 or labels.shape != (len(logits),):
        raise InvalidInputError(
            f"got logits of shape {logits.shape} and labels of shape {labels.shape}; needed (N, C) "
            "and (N,)"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= logits.shape[1]:
        found = f"{labels.min()}..{labels.max()}" if len(labels) else "no rows"
        raise InvalidInputError(
            f"got labels {found}; needed at least one row, and labels in 0..{logits.shape[1] - 1}"
        )
    step = max(1, _CHUNK // logits.shape[1])
    parts = [
        _chunk_statistics(
            logits[at : at + step] if transform is None else transform(logits[at : at + step]),
            labels[at : at + step],
            temperature,
        )
        for at in range(0, len(logits), step)
    ]
    return RowStatistics.concatenate(parts)


def _chunk_statistics(
    logits: Array, labels: NDArray[np.int64], temperature: float
) -> RowStatistics:
    values = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise InvalidInputError(
            f"got {bad} rows with NaN or infinite logits; remove them first (Predictions.invalid)"
        )
    predicted = values.argmax(axis=1)
    rows = np.arange(len(values))
    shifted = (values - values[rows, predicted][:, None]) / temperature
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    weights /= total[:, None]
    of_label = weights[rows, labels]
    # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_y + 1
    brier = np.einsum("nc,nc->n", weights, weights) - 2 * of_label + 1
    return RowStatistics(
        confidence=1 / total,
        predicted=predicted,
        correct=predicted == labels,
        nll=np.log(total) - shifted[rows, labels],
        brier=np.maximum(brier, 0.0),
    )


def accuracy(rows: RowStatistics) -> Metric:
    """Compute the share of right predictions, with Wilson's interval."""
    return proportion(int(rows.correct.sum()), len(rows))


def nll(rows: RowStatistics) -> Metric:
    """Compute the mean negative log-likelihood of the labels, in nats."""
    return mean(rows.nll)


def brier(rows: RowStatistics) -> Metric:
    """Compute the multiclass Brier score, mean sum_k (p_k - 1[y = k])^2 in [0, 2]."""
    return mean(rows.brier)


def overconfidence(rows: RowStatistics) -> Metric:
    """Compute mean confidence - accuracy; positive means overconfident."""
    return mean(rows.confidence - rows.correct)


def bin_index(confidence: NDArray[np.float64], n_bins: int = N_BINS) -> NDArray[np.int64]:
    """Put confidences into equal-width bins (lo, hi]; 0.0 goes to the first, 1.0 to the last.

    Args:
        confidence: (N,) in [0, 1].
        n_bins: number of bins.

    Returns:
        (N,) in 0..n_bins-1, by comparison with the edges i / n_bins.

    Example:
        >>> bin_index(np.array([0.0, 0.1, 0.5, 1.0]), n_bins=10)
        array([0, 0, 4, 9])
    """
    edges = np.arange(1, n_bins) / n_bins
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def ece(rows: RowStatistics, *, n_bins: int = N_BINS, draws: int = DRAWS, seed: int = 0) -> Metric:
    """Compute the expected calibration error of the top label.

    ECE = sum_b |sum_{i in b} (conf_i - correct_i)| / n over equal-width bins (lo, hi]. The plug-in
    estimate is biased upwards for small n: a perfect model does not get 0.

    Args:
        rows: row statistics.
        n_bins: equal-width bins.
        draws: bootstrap resamples of rows; fewer are drawn when n > 20,000.
        seed: of the bootstrap's own generator.

    Returns:
        The value in [0, 1] with a reflected bootstrap interval.

    References:
        Naeini et al., AAAI 2015; Guo et al., ICML 2017, eq. 3.

    Example:
        >>> ece(row_statistics(np.array([[0.0, 0.0], [0.0, 0.0]]), np.array([0, 1]))).value
        0.0
    """
    n = len(rows)
    where = bin_index(rows.confidence, n_bins)
    gaps = rows.confidence - rows.correct
    value = float(np.abs(np.bincount(where, gaps, minlength=n_bins)).sum() / n)
    draws = max(100, min(draws, _ROW_VISITS // n))
    by_bin = np.zeros((n, n_bins))
    by_bin[np.arange(n), where] = gaps
    generator = np.random.default_rng(seed)
    resampled = resample_counts(
        n, draws, generator, lambda counts: np.abs(counts @ by_bin).sum(axis=1) / n
    )
    low, high = basic_interval(value, resampled, low=0.0, high=1.0)
    return Metric(value, low, high, n, f"reflected bootstrap, {draws} draws")


def perfect_ece(
    rows: RowStatistics, *, n_bins: int = N_BINS, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Simulate the ECE of a perfectly calibrated model with these confidences.

    Args:
        rows: row statistics; only the confidences are used.
        n_bins: equal-width bins.
        draws: simulations of correct ~ Bernoulli(confidence).
        seed: of the simulation's own generator.

    Returns:
        Mean and 95 % quantile of the simulated ECE.

    References:
        Bröcker and Smith, Increasing the Reliability of Reliability Diagrams, 2007 (consistency
        resampling).

    Example:
        >>> rows = row_statistics(np.zeros((50, 2)), np.zeros(50, dtype=np.int64))
        >>> perfect_ece(rows)[0] > 0
        True
    """
    generator = np.random.default_rng(seed)
    where = bin_index(rows.confidence, n_bins)
    simulated = []
    for _ in range(draws):
        gaps = rows.confidence - (generator.random(len(rows)) < rows.confidence)
        simulated.append(np.abs(np.bincount(where, gaps, minlength=n_bins)).sum() / len(rows))
    return float(np.mean(simulated)), float(np.quantile(simulated, 0.95))


def reliability_curve(rows: RowStatistics, n_bins: int = N_BINS) -> ReliabilityCurve:
    """Compute the reliability diagram's points, at the bins' mean confidence.

    Args:
        rows: row statistics.
        n_bins: equal-width bins.

    Returns:
        All bins in order, empty ones included, with Wilson intervals of the accuracy.

    Example:
        >>> curve = reliability_curve(row_statistics(np.array([[9.0, 0.0]]), np.array([0])))
        >>> curve.bins[-1].count
        1
    """
    where = bin_index(rows.confidence, n_bins)
    counts = np.bincount(where, minlength=n_bins)
    confidence = np.bincount(where, rows.confidence, minlength=n_bins)
    right = np.bincount(where, rows.correct, minlength=n_bins)
    bins = []
    for index, count in enumerate(counts.tolist()):
        edges = (index / n_bins, (index + 1) / n_bins)
        if not count:
            bins.append(ReliabilityBin(*edges, 0, None, None, None, None))
            continue
        low, high = wilson(int(right[index]), count)
        centre, height = float(confidence[index]) / count, float(right[index]) / count
        bins.append(ReliabilityBin(*edges, count, centre, height, low, high))
    return ReliabilityCurve(n_bins, tuple(bins))


def calibration_metrics(rows: RowStatistics, seed: int = 0) -> CalibrationMetrics:
    """Compute all calibration metrics of a set of rows."""
    return CalibrationMetrics(
        accuracy=accuracy(rows),
        nll=nll(rows),
        brier=brier(rows),
        ece=ece(rows, seed=seed),
        overconfidence=overconfidence(rows),
        curve=reliability_curve(rows),
    )
