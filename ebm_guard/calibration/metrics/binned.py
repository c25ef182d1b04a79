"""Errors by bins of the top-label confidence: ECE, adaptive ECE, debiased L2, MCE."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.cells import DRAWS, N_BINS, CellTable, mass_index
from ebm_guard.calibration.intervals import L1, GapNorm, gap_interval, no_interval
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Metric

Floats = NDArray[np.float64]
MIN_COUNT = 30


def ece(
    rows: RowStatistics | CellTable, *, n_bins: int = N_BINS, draws: int = DRAWS, seed: int = 0
) -> Metric:
    """Compute the expected calibration error of the top label.

    ECE = sum_b |sum_{i in b} w_i (conf_i - correct_i)| / sum_i w_i over equal-width bins (lo, hi].
    The plug-in estimate is biased upwards: ``null95`` is what a perfectly calibrated model with
    these confidences stays below in 95 % of cases.

    Args:
        rows: row statistics, or their cell table (then ``n_bins`` is the table's).
        n_bins: equal-width bins.
        draws: bootstrap and null draws of the cells.
        seed: of the draws' own generators.

    Returns:
        The value in [0, 1]; the interval is bias-corrected (see
        :func:`~ebm_guard.calibration.intervals.gap_interval`).

    References:
        Naeini et al., AAAI 2015; Guo et al., ICML 2017, eq. 3.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> ece(row_statistics(np.array([[0.0, 0.0], [0.0, 0.0]]), np.array([0, 1]))).value
        0.0
    """
    table = rows if isinstance(rows, CellTable) else CellTable.of(rows, n_bins)
    return _gap_metric(_bin_gaps(table), table, draws, seed)


def ece_adaptive(
    rows: RowStatistics,
    *,
    n_bins: int = N_BINS,
    draws: int = DRAWS,
    seed: int = 0,
    table: CellTable | None = None,
) -> Metric:
    """Compute the ECE over bins of equal mass; rows with the same confidence are never split.

    Args:
        rows: row statistics.
        n_bins: bins at most; heavy ties make fewer.
        draws: bootstrap and null draws of the cells.
        seed: of the draws' own generators.
        table: the rows' table of ``n_bins`` bins by mass, where one is at hand.

    References:
        Nguyen and O'Connor, EMNLP 2015; Nixon et al., CVPR workshops 2019 (there per class).
        Differs: a group of ties goes to the bin in which it begins. Common code cuts the sorted
        rows, so that its value depends on the order of tied rows.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.zeros((4, 2)), np.array([0, 0, 0, 1]))
        >>> ece_adaptive(rows).value
        0.25
    """
    table = table or CellTable.of(rows, n_bins, by_mass=True)
    if not table.by_mass or table.n_bins != n_bins:
        raise InvalidInputError(f"got another table; needed one of {n_bins} bins by mass")
    return _gap_metric(_bin_gaps(table), table, draws, seed)


def ece_l2_debiased(
    rows: RowStatistics, *, n_bins: int = N_BINS, draws: int = DRAWS, seed: int = 0
) -> Metric:
    """Compute the debiased root mean squared calibration error over bins of equal mass.

    E^2 = sum_b n_b/n (g_b^2 - s_b^2 / n_b) with g_b the mean and s_b^2 the sample variance of
    confidence - correct in bin b; the result is sqrt(max(E^2, 0)). It is centred at 0 for a
    perfect model, where the plug-in value is not. Bins with one row are left out.

    Args:
        rows: row statistics without sample weights.
        n_bins: bins at most.
        draws: bootstrap and null draws of the cells.
        seed: of the draws' own generators.

    Raises:
        InvalidInputError: sample weights: the debiasing term needs equal weights.

    References:
        Kumar, Liang and Ma, Verified Uncertainty Calibration, NeurIPS 2019, section 5. Differs:
        the variance of confidence - correct instead of y (1 - y), which is the same where all rows
        of a bin share one confidence, and unbiased where they do not.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> ece_l2_debiased(row_statistics(np.zeros((9, 2)), np.zeros(9, np.int64))).value
        0.5
    """
    if rows.weight is not None:
        raise InvalidInputError(
            "ece_l2_debiased has no form for sample weights; use ece, ece_adaptive or smooth_ece"
        )
    table = CellTable.of(rows, n_bins, by_mass=True)
    where = mass_index(rows, n_bins)
    count = np.bincount(where, minlength=n_bins).astype(np.float64)
    total = np.bincount(where, rows.gaps, minlength=n_bins)
    squares = np.bincount(where, np.square(rows.gaps), minlength=n_bins)
    usable = count > 1
    n = float(count[usable].sum())
    if not n:
        return Metric(math.nan, None, None, len(rows), "none: no bin has two rows")
    spread = squares[usable] - total[usable] ** 2 / count[usable]
    # sum_b n_b/n s_b^2 / n_b
    bias = float((np.maximum(spread, 0.0) / (count[usable] - 1)).sum()) / n
    share = np.where(usable, count, 1.0) / n

    def squared(gaps: Floats) -> Floats:
        return np.asarray((np.square(gaps) / share * usable).sum(axis=-1))

    def signed_root(gaps: Floats) -> Floats:
        centred = squared(gaps) - bias
        return np.asarray(np.sign(centred) * np.sqrt(np.abs(centred)))

    norm = GapNorm(of_gaps=lambda gaps: math.sqrt(float(squared(gaps))), of_draws=signed_root)
    return _gap_metric(total / n, table, draws, seed, norm)


def mce(
    rows: RowStatistics,
    *,
    n_bins: int = N_BINS,
    min_count: int = MIN_COUNT,
    draws: int = DRAWS,
    seed: int = 0,
) -> Metric:
    """Compute the maximum calibration error over bins with at least ``min_count`` rows.

    MCE = max_b |mean of confidence - correct in b|. A bin with one row has a gap near 0.5 by luck;
    without a minimum count the maximum is mostly such bins.

    Args:
        rows: row statistics.
        n_bins: equal-width bins.
        min_count: rows that a bin needs to be looked at.
        draws: bootstrap and null draws of the cells.
        seed: of the draws' own generators.

    Returns:
        The value in [0, 1]; NaN where no bin has enough rows.

    References:
        Naeini et al., AAAI 2015. Differs: the minimum count.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> mce(row_statistics(np.zeros((40, 2)), np.zeros(40, np.int64))).value
        0.5
    """
    table = CellTable.of(rows, n_bins)
    kept = table.by_bin(table.count.sum(axis=0).astype(np.float64)) >= min_count
    if not kept.any():
        reason = f"none: no bin of {n_bins} has {min_count} rows"
        return Metric(math.nan, None, None, len(rows), reason)
    share = np.where(kept, table.by_bin(table.weight.sum(axis=0)), 1.0) / table.total

    def largest(gaps: Floats) -> Floats:
        return np.asarray(np.abs(gaps / share * kept).max(axis=-1))

    norm = GapNorm(of_gaps=lambda gaps: float(largest(gaps)), of_draws=largest)
    found = _gap_metric(_bin_gaps(table), table, draws, seed, norm)
    return replace(found, method=f"{found.method}; bins of {min_count} rows or more")


def _bin_gaps(table: CellTable) -> Floats:
    """Return the bins' gaps (n_bins,), as shares of the total weight."""
    return table.by_bin(table.gap.sum(axis=0)) / table.total


def _gap_metric(
    gaps: Floats, table: CellTable, draws: int, seed: int, norm: GapNorm = L1
) -> Metric:
    """Give a norm of the bins' gaps its interval and its null level."""
    value = max(0.0, float(norm.of_draws(gaps[None])[0]))
    null = table.null(draws, seed + 1)
    perfect = norm.of_draws(table.by_bin(null.gap) / null.total[:, None])
    null95 = max(0.0, float(np.quantile(perfect, 0.95)))
    reason = no_interval(table.n, int(table.count[1].sum()))
    if reason:
        return Metric(value, None, None, table.n, reason, null95=null95)
    drawn = table.bootstrap(draws, seed)
    noise = table.by_bin(drawn.gap) / drawn.total[:, None] - _bin_gaps(table)
    low, high = gap_interval(gaps, noise, norm)
    method = f"cell bootstrap, bias-corrected, {draws:,} draws"
    return Metric(value, low, high, table.n, method, null95=null95)
