"""How far recent traffic lies from the reference: reject rate, PSI with its null, and KS."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, Array, Metric

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
N_BINS = 10
# Beyond this many pairs the exact distribution of KS takes seconds and its limit is as good.
_EXACT_PAIRS = 1_000_000


def clopper_pearson(successes: int, n: int, level: float = LEVEL) -> Metric:
    """Return a share with its exact binomial interval, which never covers less than its level.

    Args:
        successes: 0 <= successes <= n.
        n: trials, >= 1.
        level: coverage in (0, 1).

    Raises:
        InvalidInputError: counts are out of range.

    References:
        Clopper and Pearson, Biometrika 1934.

    Example:
        >>> share = clopper_pearson(0, 59)
        >>> share.low, round(share.high, 4)
        (0.0, 0.0606)
    """
    from scipy.stats import beta

    if not 0 <= successes <= n or n < 1:
        raise InvalidInputError(f"got {successes} of {n}; needed 0 <= successes <= n and n >= 1")
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.isf(tail, successes + 1, n - successes)) if successes < n else 1.0
    return Metric(successes / n, low, high, n, "Clopper-Pearson", level)


@dataclass(frozen=True)
class PSI:
    """The population stability index and what it shows by chance.

    Args:
        value: the index.
        expected: its mean where nothing has drifted, at these two sample sizes.
        null95: what it stays below in 95 % of cases where nothing has drifted.
        n_bins: bins; fewer than asked for where the reference has ties.
        n: traffic scores.
        n_reference: reference scores.
    """

    value: float
    expected: float
    null95: float
    n_bins: int
    n: int
    n_reference: int

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self)


class QuantileBins:
    """Bins (lo, hi] between the quantiles of a reference, the outer ones open.

    Args:
        reference: (n,) finite.
        n_bins: bins of equal reference share; bins that ties would leave empty are merged.

    Example:
        >>> bins = QuantileBins(np.arange(100.0), 4)
        >>> bins.edges.tolist(), bins.reference.tolist()
        ([24.0, 49.0, 74.0], [25, 25, 25, 25])
    """

    def __init__(self, reference: Floats, n_bins: int = N_BINS) -> None:
        values = np.sort(np.asarray(reference, dtype=np.float64))
        places = np.arange(1, n_bins) * len(values) // n_bins
        edges = np.unique(values[places[places > 0] - 1])
        # Nothing of the reference lies above its largest score.
        self.edges = edges[edges < values[-1]]
        self.reference = self.count(values)

    def count(self, scores: Floats) -> Counts:
        """Count finite scores (B,) by bin."""
        where = self.edges.searchsorted(scores, "left")
        return np.bincount(where, minlength=len(self.edges) + 1).astype(np.int64)


def psi_value(reference: Array, traffic: Array) -> Floats:
    """Compute PSI = sum_b (p_b - q_b) ln(p_b / q_b) from counts, half a count added to each bin.

    The half count keeps an empty bin from making the index infinite.

    Args:
        reference: (b,) counts.
        traffic: (..., b) counts.

    Returns:
        (...,).

    References:
        Lewis, An Introduction to Credit Scoring, 1992; as a symmetric Kullback-Leibler divergence:
        Jeffreys, Proc. R. Soc. A 1946.

    Example:
        >>> float(psi_value(np.array([5, 5]), np.array([5, 5])))
        0.0
    """
    shares = []
    for counts in (reference, traffic):
        padded = np.asarray(counts, dtype=np.float64) + 0.5
        shares.append(padded / padded.sum(axis=-1, keepdims=True))
    q, p = shares
    value: Floats = ((p - q) * np.log(p / q)).sum(axis=-1)
    return value


def psi(reference: Counts, traffic: Counts, *, draws: int = 2000, seed: int = 0) -> PSI:
    """Compute the population stability index, and what it shows where nothing has drifted.

    The usual marks (0.1 and 0.25) ignore the sample sizes: with B bins, n and m scores the index is
    about (B - 1)(1/n + 1/m) by chance alone, 0.1 with 10 bins and 180 scores each. The null is
    drawn: the true shares between order statistics of n continuous scores are Dirichlet
    distributed, the counts of m new scores multinomial given them. With ties in the reference it
    is an approximation.

    Args:
        reference: (b,) counts of :class:`QuantileBins`.
        traffic: (b,) counts, at least one.
        draws: draws of the null.
        seed: of their own generator.

    Raises:
        InvalidInputError: no traffic.

    References:
        Yurdakul and Naranjo, Statistical Properties of the Population Stability Index, 2020 (the
        mean and the chi-square limit).

    Example:
        >>> result = psi(np.full(10, 20), np.full(10, 18))
        >>> round(result.expected, 1), result.value < result.null95
        (0.1, True)
    """
    n, m = int(reference.sum()), int(traffic.sum())
    if m < 1:
        raise InvalidInputError("got no traffic scores; PSI needs at least one")
    generator = np.random.default_rng(seed)
    # The n reference scores leave n + 1 gaps, and the top bin holds one more than its scores.
    gaps = reference.astype(np.float64)
    gaps[-1] += 1
    counts = generator.multinomial(m, generator.dirichlet(gaps, draws))
    null = psi_value(reference, counts)
    return PSI(
        value=float(psi_value(reference, traffic)),
        expected=float(null.mean()),
        null95=float(np.quantile(null, 0.95)),
        n_bins=len(reference),
        n=m,
        n_reference=n,
    )


@dataclass(frozen=True)
class KS:
    """A two-sample Kolmogorov-Smirnov test.

    Args:
        value: the largest distance between the two distribution functions, in [0, 1].
        p_value: of "both samples have one continuous distribution"; too large with ties.
        method: ``exact`` or ``asymptotic``.
        ties: share of the pooled scores that equal another one.
        n: traffic scores.
        n_reference: reference scores.
    """

    value: float
    p_value: float
    method: str
    ties: float
    n: int
    n_reference: int

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self)


def ks(reference: Floats, traffic: Floats) -> KS:
    """Compare two samples by Kolmogorov and Smirnov's distance D = max_x |F_n(x) - G_m(x)|.

    Args:
        reference: (n,) finite.
        traffic: (m,) finite, at least one.

    Returns:
        The distance and its two-sided p-value for one look: exact up to a million pairs n m, the
        limit beyond. Both assume continuous scores; ties make the p-value larger than it should
        be, never smaller.

    Raises:
        InvalidInputError: no traffic.

    References:
        Hodges, The Significance Probability of the Smirnov Two-sample Test, 1958.

    Example:
        >>> result = ks(np.arange(50.0), np.arange(50.0) + 40)
        >>> round(result.value, 3), result.p_value < 1e-6, result.method
        (0.8, True, 'exact')
    """
    from scipy.stats import ks_2samp

    n, m = len(reference), len(traffic)
    if m < 1:
        raise InvalidInputError("got no traffic scores; KS needs at least one")
    exact = n * m <= _EXACT_PAIRS
    result = ks_2samp(reference, traffic, method="exact" if exact else "asymp")
    _, sizes = np.unique(np.concatenate([reference, traffic]), return_counts=True)
    return KS(
        value=float(result.statistic),
        p_value=min(1.0, float(result.pvalue)),
        method="exact" if exact else "asymptotic",
        ties=float(sizes[sizes > 1].sum()) / (n + m),
        n=m,
        n_reference=n,
    )
