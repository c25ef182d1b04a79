"""The metric record and the intervals that go with a number.

Every number that a report prints is a :class:`Metric`: a value, its 95 % interval, how the
interval was made, and n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError

LEVEL = 0.95
Array = NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Args:
        value: the number.
        low: lower end of the interval, or None where none exists.
        high: upper end.
        level: probability that the interval is built for.
        method: how the interval was made.
        n: rows that the number was computed from.
        null95: what a perfect model of this size stays below in 95 % of cases, or None.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    method: str
    level: float = LEVEL
    null95: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types; a non-finite number becomes None."""
        return {
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "level": self.level,
            "method": self.method,
            "n": self.n,
            "null95": _finite(self.null95),
        }


@dataclass(frozen=True)
class PrecisionMetric(Metric):
    """An area under a precision-recall curve, which means nothing without its base rate.

    Args:
        base_rate: share of the positive class, which is the value of a random score.
        balanced: the same area with both classes weighted 1:1.
    """

    base_rate: float = math.nan
    balanced: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types, base rate and balanced value included."""
        extra = {"base_rate": _finite(self.base_rate), "balanced": _finite(self.balanced)}
        return super().to_dict() | extra


def wilson(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion.

    Args:
        successes: 0 <= successes <= n.
        n: trials, >= 1.
        level: coverage in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        InvalidInputError: counts are out of range.

    References:
        Wilson, Probable Inference, JASA 1927.

    Example:
        >>> tuple(round(end, 4) for end in wilson(9, 10))
        (0.5958, 0.9821)
    """
    if not 0 <= successes <= n or n < 1:
        raise InvalidInputError(f"got {successes} of {n}; needed 0 <= successes <= n and n >= 1")
    return wilson_share(successes / n, n, level)


def wilson_share(share: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Compute Wilson's interval of a share, for an effective n that need not be whole.

    Args:
        share: in [0, 1].
        n: effective trials, > 0.
        level: coverage in (0, 1).

    References:
        Wilson, Probable Inference, JASA 1927; effective n: Kish, Survey Sampling, 1965.

    Example:
        >>> wilson_share(0.9, 10) == wilson(9, 10)
        True
    """
    z = normal_quantile(0.5 + level / 2)
    z2 = z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if share <= 0 else max(0.0, centre - half)
    high = 1.0 if share >= 1 else min(1.0, centre + half)
    return low, high


def proportion(successes: int, n: int) -> Metric:
    """Return a share with its Wilson interval.

    Example:
        >>> proportion(9, 10).value
        0.9
    """
    low, high = wilson(successes, n)
    return Metric(successes / n, low, high, n, "Wilson")


def mean(values: Array) -> Metric:
    """Return a mean with its normal-theory interval (Student's t, sample variance).

    Args:
        values: (N,).

    Example:
        >>> mean(np.array([1.0, 2.0, 3.0])).value
        2.0
    """
    from scipy import stats

    n = len(values)
    value = float(np.mean(values, dtype=np.float64))
    if n < 2 or not math.isfinite(value):
        reason = "none: one row" if n < 2 else "none: the mean is not finite"
        return Metric(value, None, None, n, reason)
    spread = float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * spread
    return Metric(value, value - half, value + half, n, "Student t")


def basic_interval(
    value: float, draws: Array, *, low: float = -math.inf, high: float = math.inf
) -> tuple[float, float]:
    """Reflect bootstrap draws around the value: [2v - q_high, 2v - q_low].

    Plug-in ECE is biased upwards, and so are its draws: the percentile interval covers the truth
    in 38 % of cases at n = 500, the reflected one in 85 %. It is clipped to the metric's range and
    widened to hold the value where the bias pushed it out.

    Args:
        value: the metric on the data.
        draws: (R,), the metric on R resamples.
        low: smallest possible value of the metric.
        high: largest possible value.

    Returns:
        Lower and upper end, low <= lower <= value <= upper <= high.

    References:
        Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 5.2.

    Example:
        >>> ends = basic_interval(1.0, np.array([0.5, 1.0, 1.0, 2.0]), low=0.0)
        >>> [round(end, 4) for end in ends]
        [0.075, 1.4625]
    """
    tail = (1 - LEVEL) / 2
    bottom, top = np.quantile(draws, [tail, 1 - tail])
    lower = min(value, max(low, 2 * value - float(top)))
    upper = max(value, min(high, 2 * value - float(bottom)))
    return lower, upper


def resample_counts(
    n: int, draws: int, generator: np.random.Generator, consume: Callable[[Array], Array]
) -> Array:
    """Draw bootstrap resamples as row counts, and stack what ``consume`` makes of them.

    Args:
        n: rows in the data.
        draws: resamples.
        generator: source of randomness.
        consume: maps counts (R, n), float64, to statistics (R, ...).

    Returns:
        (draws, ...), in chunks of at most about 4 million counts, so memory is bounded.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> resample_counts(5, 3, generator, lambda counts: counts.sum(axis=1))
        array([5., 5., 5.])
    """
    chunk = max(1, 4_000_000 // max(n, 1))
    parts = []
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        picks = generator.integers(0, n, size=(rows, n), dtype=np.int64)
        picks += np.arange(rows, dtype=np.int64)[:, None] * n
        counts = np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(consume(counts.astype(np.float64)))
    return np.concatenate(parts)


def normal_quantile(probability: float) -> float:
    """Return the standard normal quantile.

    Example:
        >>> round(normal_quantile(0.975), 4)
        1.96
    """
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
