"""Cuts whose risk is certified: the tests behind ``certificates.certify``.

A rule answers a row where every order is strictly below its cut. The cuts are order statistics
of the labelled rows, at ranks that are declared before the labels are seen. Why that is exact: let
the cut be the (z+1)-th smallest order. Given the cut and which rows lie below it, those m rows are
independent draws from the inputs below the cut, so their errors are Binomial(m, R) with R the true
risk of the rule. That is why the cut is strict: the row that sets it is not counted. The same
holds for a rectangle of two cuts, and under ties, where m is smaller than z. So

    p = P(Binomial(m, risk) <= errors)

is a p-value of "the risk of this rule is above ``risk``" for every declared rank.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Array

# Shares of rows that the declared cuts answer. One ranking can afford a fine grid.
ONE = tuple(step / 100 for step in range(1, 101))
FIRST = tuple(step / 20 for step in range(1, 21))
SECOND = (0.8, 0.9, 0.95, 0.98, 1.0)
STARTS = (0.2, 0.5, 0.8)

Cuts = NDArray[np.float64]
Found = tuple[Cuts | None, int]


def rows_needed(risk: float, delta: float) -> int:
    """Compute the fewest right answers in a row that certify a risk at level delta.

    m = ceil(ln(delta) / ln(1 - risk)), from (1 - risk)^m <= delta.

    Example:
        >>> rows_needed(0.01, 0.05), rows_needed(0.05, 0.05)
        (299, 59)
    """
    return max(1, math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9))


def binomial_p_value(errors: Array, accepted: Array, risk: float) -> NDArray[np.float64]:
    """Compute p = P(Binomial(accepted, risk) <= errors), 1 where nothing is accepted.

    Example:
        >>> binomial_p_value(np.array([0]), np.array([299]), 0.01).round(4).tolist()
        [0.0495]
    """
    from scipy.stats import binom

    return np.asarray(binom.cdf(errors, accepted, risk), dtype=np.float64)


def sgr(order: NDArray[np.float64], wrong: NDArray[np.bool_], risk: float, delta: float) -> Found:
    """Search for the most rows that can be answered, by at most k = ceil(log2(n + 1)) tests.

    Args:
        order: (n,), higher = less trusted.
        wrong: (n,) bool.
        risk: target.
        delta: 1 - assurance.

    Returns:
        The cut (1,) or None, and k, the number of tests that share delta.
    """
    n = len(order)
    sequence = np.argsort(order, kind="stable")
    ranked, mistakes = order[sequence], np.concatenate([[0], np.cumsum(wrong[sequence])])
    steps = math.ceil(math.log2(n + 1))
    low, high, found = 0, n, None
    while low < high:
        rank = (low + high + 1) // 2
        below = int(np.searchsorted(ranked, ranked[rank - 1], side="right"))
        cut = ranked[below] if below < n else math.inf
        p = float(binomial_p_value(mistakes[below : below + 1], np.array([below]), risk)[0])
        if p <= delta / steps:
            low, found = rank, np.array([cut])
        else:
            high = rank - 1
    return found, steps


def rank_grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place the cuts at declared ranks, (J, G, K)."""
    n, k = values.shape
    shares = (ONE,) if k == 1 else (FIRST, SECOND)
    cuts = []
    for column, wanted in zip(values.T, shares, strict=True):
        ranked = np.append(np.sort(column), math.inf)
        cuts.append(ranked[np.rint(np.array(wanted) * n).astype(int)])
    if k == 1:
        return np.asarray(cuts[0][None, :, None])
    first, second = np.meshgrid(cuts[0], cuts[1])
    return np.stack([first, second], axis=-1)


def checked_grid(declared: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return cuts that a caller declared, after a look at their shape.

    Raises:
        InvalidInputError: not (J, G, k), or NaN.
    """
    grid = np.asarray(declared, dtype=np.float64)
    if grid.ndim != 3 or grid.shape[2] != k or not grid.size or np.isnan(grid).any():
        raise InvalidInputError(
            f"got declared cuts of shape {grid.shape}; needed (J, G, {k}) without NaN, as "
            "declare() returns them"
        )
    return grid


def _counts(
    grid: NDArray[np.float64], values: NDArray[np.float64], wrong: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the rows below each rule's cuts, and the wrong ones among them, (J, G) each."""
    rules = grid.reshape(-1, grid.shape[2])
    accepted, errors = np.zeros((2, len(rules)), dtype=np.int64)
    for number, cuts in enumerate(rules):
        below = (values < cuts).all(axis=1)
        accepted[number], errors[number] = below.sum(), (below & wrong).sum()
    return accepted.reshape(grid.shape[:2]), errors.reshape(grid.shape[:2])


def bonferroni(
    grid: NDArray[np.float64],
    values: NDArray[np.float64],
    wrong: NDArray[np.bool_],
    risk: float,
    delta: float,
) -> Found:
    """Test every rule of a grid (J, G, K) at delta / (J G); return the largest certified one."""
    accepted, errors = _counts(grid, values, wrong)
    tests = accepted.size
    return _largest(
        grid, binomial_p_value(errors, accepted, risk) <= delta / tests, accepted
    ), tests


def fixed_sequence(
    grid: NDArray[np.float64],
    values: NDArray[np.float64],
    wrong: NDArray[np.bool_],
    risk: float,
    delta: float,
) -> Found:
    """Test chains of a grid (J, G, K) from strict to loose; return the largest certified rule.

    The first unsafe rule of a chain is fixed, and only a mistake on it can certify anything unsafe
    in that chain: each chain needs one level, whatever its length.
    """
    accepted, errors = _counts(grid, values, wrong)
    chains, length = accepted.shape
    starts = sorted({max(0, round(share * length) - 1) for share in STARTS})
    tests = chains * len(starts)
    passed = binomial_p_value(errors, accepted, risk) <= delta / tests
    certified = np.zeros_like(passed)
    for start in starts:
        certified[:, start:] |= np.logical_and.accumulate(passed[:, start:], axis=1)
    return _largest(grid, certified, accepted), tests


def _largest(
    grid: NDArray[np.float64], certified: NDArray[np.bool_], accepted: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Choose the certified rule that answers the most rows."""
    if not certified.any():
        return None
    best = int(np.where(certified, accepted, -1).argmax())
    return np.asarray(grid.reshape(-1, grid.shape[2])[best])


def least_rows(risk: float, delta: float, tests: int, method: str) -> int:
    """Compute the fewest rows with which a method certifies anything, all of them right."""
    if method != "sgr":
        return rows_needed(risk, delta / tests)
    n = 1
    # The search starts in the middle: half of the rows must do for its first step.
    while n < (least := 2 * rows_needed(risk, delta / math.ceil(math.log2(n + 1))) - 1):
        n = least
    return n
