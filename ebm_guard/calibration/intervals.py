"""Intervals for calibration errors, which are norms of noisy gaps and so biased upwards.

A perfect model of n rows does not score 0: each bin's gap has noise, and the norm adds up its
absolute value. Percentile intervals of the bootstrap double that bias, reflected ones subtract it
once for all; both miss. Here the interval is the set of true gaps that explain the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebm_guard.intervals import LEVEL

Floats = NDArray[np.float64]
_STEPS = 40
_INFLATION = 4.0
# Below these, a draw of the rows says nothing of their distribution: the bootstrap of three errors
# has no error at all in one draw of twenty, and that of none never has one.
FEWEST_ROWS = 30
FEWEST_OF_EACH = 5


@dataclass(frozen=True)
class GapNorm:
    """A calibration error as a norm of gaps.

    Args:
        of_gaps: maps true gaps (G,) to the error of a model that has them.
        of_draws: maps measured gaps (R, G) to the statistic (R,); differs from ``of_gaps`` where
            the statistic subtracts its own bias. It may then be negative, and must not be cut at 0:
            values that are all 0 cannot be told apart.
    """

    of_gaps: Callable[[Floats], float]
    of_draws: Callable[[Floats], Floats]


L1 = GapNorm(
    of_gaps=lambda gaps: float(np.abs(gaps).sum()),
    of_draws=lambda gaps: np.asarray(np.abs(gaps).sum(axis=-1)),
)


def no_interval(n: int, right: int) -> str | None:
    """Return why these rows are too few for a bootstrap interval, or None where they are not.

    Args:
        n: rows.
        right: right rows among them.

    Example:
        >>> no_interval(100, 50) is None, no_interval(100, 99)
        (True, 'none: 1 wrong row, and an interval needs 5')
    """
    if n < FEWEST_ROWS:
        return f"none: {_plural(n, '')}, and an interval needs {FEWEST_ROWS}"
    for count, kind in ((n - right, "wrong "), (right, "right ")):
        if count < FEWEST_OF_EACH:
            return f"none: {_plural(count, kind)}, and an interval needs {FEWEST_OF_EACH}"
    return None


def _plural(count: int, kind: str) -> str:
    return f"{count or 'no'} {kind}row{'' if count == 1 else 's'}"


def gap_interval(gaps: Floats, noise: Floats, norm: GapNorm = L1) -> tuple[float, float]:
    """Invert the test "these true gaps explain the value" along a path of shrunken gaps.

    With measured gaps g, their noise e (bootstrap draws minus g) and its standard deviation s, the
    candidates are mu(t) = sign(g) max(|g| - t s, 0), from all zero (t large) over g itself (t = 0)
    to inflated ones (t < 0). A candidate explains the value v = |g| if v lies in the central 95 %
    of |mu + e|. The interval holds the norms |mu| of all candidates that do.

    Soft thresholding removes the noise of the small gaps first, so that a model whose error sits in
    one bin is on the path too; shrinking all gaps by one factor misses such a model.

    Args:
        gaps: (G,) measured.
        noise: (R, G) bootstrap draws minus ``gaps``.
        norm: the statistic.

    Returns:
        Lower and upper end of the true norm, lower <= max(value, 0) <= upper.

    References:
        Test inversion: Davison and Hinkley, Bootstrap Methods and their Application, 1997,
        section 5.4; soft thresholding: Donoho and Johnstone, Biometrika 1994.

    Example:
        >>> noise = np.random.default_rng(0).normal(0, 0.01, size=(1000, 15))
        >>> low, high = gap_interval(np.full(15, 0.02), noise)
        >>> low < 0.3 < high
        True
    """
    deviation = noise.std(axis=0)
    value = float(norm.of_draws(gaps[None])[0])
    moving = deviation > 0
    # A little more than the largest ratio, so that rounding leaves no rest of the gap.
    largest = 1e-9 + 1.000001 * float(np.max(np.abs(gaps[moving]) / deviation[moving], initial=0.0))

    def candidate(shrink: float) -> Floats:
        return np.asarray(np.sign(gaps) * np.maximum(np.abs(gaps) - shrink * deviation, 0.0))

    def end(quantile: float) -> float:
        """Find the candidate whose quantile is the value; quantiles fall as ``shrink`` grows."""
        low, high = -_INFLATION, largest
        if np.quantile(norm.of_draws(candidate(high) + noise), quantile) >= value:
            return norm.of_gaps(candidate(high))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            drawn = np.quantile(norm.of_draws(candidate(middle) + noise), quantile)
            low, high = (middle, high) if drawn >= value else (low, middle)
            if high - low < 1e-4:
                break
        return norm.of_gaps(candidate((low + high) / 2))

    tail, shown = (1 - LEVEL) / 2, max(value, 0.0)
    return min(end(1 - tail), shown), max(end(tail), shown)
