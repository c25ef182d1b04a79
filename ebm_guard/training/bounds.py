"""Upper bounds of a loss of accuracy, both nets on the same rows."""

from __future__ import annotations

import math

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, normal_quantile

_BISECTIONS = 60


def loss_upper(lost: int, gained: int, n: int, level: float = LEVEL) -> float:
    """Compute the upper bound of the loss (lost - gained) / n of paired proportions.

    Tango's bound. Where no row was gained, the larger of it and the exact bound of Clopper and
    Pearson, the d with P(at most b lost | loss d) = 1 - level: the score bound alone is too low
    there, so that at the fewest rows a loss of the limit would pass 6.8 % of the time.

    Args:
        lost: b, rows that were right and became wrong.
        gained: c, the other way round.
        n: rows, b + c <= n.
        level: of the one-sided bound.

    Raises:
        InvalidInputError: counts out of range.

    References:
        Tango, Statistics in Medicine 1998 (see :func:`tango_upper`); Clopper and Pearson, The Use
        of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, Biometrika 1934.

    Example:
        >>> round(loss_upper(0, 0, 299), 5), round(tango_upper(0, 0, 299), 5)
        (0.00997, 0.00897)
    """
    bound = tango_upper(lost, gained, n, level)
    if gained or lost == n:
        return bound
    from scipy import stats

    return max(bound, float(stats.beta.ppf(level, lost + 1, n - lost)))


def tango_upper(lost: int, gained: int, n: int, level: float = LEVEL) -> float:
    """Compute the upper score bound of the loss (lost - gained) / n of paired proportions.

    The bound is the largest d with (b - c - n d) / sqrt(n (2 q + d (1 - d))) >= -z, where b rows
    were right and became wrong, c the other way round, and q is the maximum-likelihood estimate of
    the chance of c under a loss of d:
    q = (sqrt(B^2 - 4 A C) - B) / (2 A), A = 2 n, B = (2 n - b + c) d - b - c, C = -c d (1 - d).

    Args:
        lost: b.
        gained: c.
        n: rows, b + c <= n.
        level: of the one-sided bound.

    Raises:
        InvalidInputError: counts out of range.

    References:
        Tango, Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design, Statistics in Medicine 1998, eq. 9 and section 3.

    Example:
        >>> round(tango_upper(0, 0, 268), 5)
        0.00999
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise InvalidInputError(f"got {lost} lost and {gained} gained of {n} rows")
    z = normal_quantile(level)
    low, high = (lost - gained) / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = _tango_statistic(lost, gained, n, middle) >= -z
        low, high = (middle, high) if inside else (low, middle)
    return high


def rows_needed(max_acc_drop: float, level: float = LEVEL) -> int:
    """Return the fewest acceptance rows with which a net that loses nothing can pass.

    With no row changed the exact bound is 1 - (1 - level)^(1/n), which is the larger one: the
    smallest n with (1 - max_acc_drop)^n <= 1 - level.

    Example:
        >>> rows_needed(0.01), rows_needed(0.02)
        (299, 149)
    """
    n = 1
    if max_acc_drop < 1:
        n = max(n, math.ceil(math.log(1 - level) / math.log1p(-max_acc_drop)))
    # By the bound itself: the last bits of the logarithms must not decide.
    while loss_upper(0, 0, n, level) > max_acc_drop:
        n += 1
    return n


def _tango_statistic(lost: int, gained: int, n: int, loss: float) -> float:
    a = 2 * n
    b = (2 * n - lost + gained) * loss - lost - gained
    c = -gained * loss * (1 - loss)
    # The same root in the form that does not cancel.
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    q = (root - b) / (2 * a) if b <= 0 else -2 * c / (root + b)
    variance = n * (2 * q + loss * (1 - loss))
    above = lost - gained - n * loss
    if variance <= 0:
        return 0.0 if above == 0 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)
