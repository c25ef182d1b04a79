"""Smooth ECE: kernel smoothing instead of bins, with no width to choose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.cells import DRAWS, CellTable
from ebm_guard.calibration.intervals import gap_interval, no_interval
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Metric

Floats = NDArray[np.float64]
_GRID = 4096
# The draws' grid: errors of 1/512 in place are far below any width that noise allows.
_COARSE = 512
_STEPS = 30
# A null level is good to 1e-5, its draws to far less.
_NULL_STEPS = 16


def smooth_ece(
    rows: RowStatistics,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    table: CellTable | None = None,
) -> Metric:
    """Compute the smooth ECE of the top label.

    smECE_s = integral over t in [0, 1] of |mean_i K_s(t, conf_i) (conf_i - correct_i)| dt with K_s
    the Gaussian kernel of width s reflected at 0 and 1; the result is the fixed point
    smECE_s = s. The sum over rows is a discrete cosine transform on 4,097 grid points, so it takes
    one pass over the rows.

    Args:
        rows: row statistics.
        draws: bootstrap and null draws of the cells.
        seed: of the draws' own generators.
        table: the rows' cells of equal width, where they are at hand: their draws are shared.

    Returns:
        The value in [0, 1], its bias-corrected interval at the width found, and the null level of
        the whole procedure, width included.

    References:
        Błasiok and Nakkiran, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing,
        ICLR 2024, section 3. Differs from its package (relplot 1.0.3), which counts confidences of
        exactly 1 twice: on a network that is overconfident everywhere, smECE is mean confidence -
        accuracy, and the package gives more.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> round(smooth_ece(row_statistics(np.zeros((9, 2)), np.zeros(9, np.int64))).value, 6)
        0.5
    """
    width = smooth_ece_value(rows)
    table = table or CellTable.of(rows)
    if table.by_mass:
        raise InvalidInputError(
            "got cells by mass; needed cells of equal width: values are compared"
        )
    null = table.null(draws, seed + 1)
    onto = _projector(table)
    drawn = null.gap @ onto / null.total[:, None]
    null95 = float(np.quantile(_fixed_point(_cosines(drawn), _NULL_STEPS), 0.95))
    n = len(rows)
    reason = no_interval(n, int(rows.correct.sum()))
    if reason:
        return Metric(width, None, None, n, reason, null95=null95)
    low, high = _interval(table, onto, width, draws, seed)
    method = f"cell bootstrap at width {width:.3g}, bias-corrected, {draws:,} draws"
    return Metric(width, min(low, width), max(high, width), n, method, null95=null95)


def smooth_ece_value(rows: RowStatistics) -> float:
    """Compute the smooth ECE alone, without the draws of its interval and null level.

    Args:
        rows: row statistics.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.zeros((9, 2)), np.zeros(9, np.int64))
        >>> round(smooth_ece_value(rows), 6)
        0.5
    """
    gaps = rows.gaps if rows.weight is None else rows.weight * rows.gaps
    total = len(rows) if rows.weight is None else rows.weight.sum()
    mass = _on_grid(rows.confidence, gaps / total)
    return float(_fixed_point(_cosines(mass[None]), _STEPS)[0])


def _interval(
    table: CellTable, onto: Floats, width: float, draws: int, seed: int
) -> tuple[float, float]:
    resamples = table.bootstrap(draws, seed)
    one = table.gap.sum(axis=0)[None] @ onto / table.total
    many = resamples.gap @ onto / resamples.total[:, None]
    # The integral's weights go into the gaps, so that the error is their plain L1 norm.
    step = _trapezoid(onto.shape[1] - 1)
    gaps = _density(_cosines(one), width)[0] * step
    return gap_interval(gaps, _density(_cosines(many), width) * step - gaps)


def _projector(table: CellTable) -> Floats:
    """Return the matrix (cells, points) that puts cells on a coarser grid, for the draws."""
    place = table.centres * _COARSE
    left = np.minimum(place.astype(np.int64), _COARSE - 1)
    onto = np.zeros((len(place), _COARSE + 1))
    rows = np.arange(len(place))
    onto[rows, left], onto[rows, left + 1] = 1 - (place - left), place - left
    return onto


def _on_grid(confidence: Floats, values: Floats, grid: int = _GRID) -> Floats:
    """Share each value between its two neighbours on the grid 0, 1/grid, ..., 1."""
    place = confidence * grid
    left = np.minimum(place.astype(np.int64), grid - 1)
    part = place - left
    at_left = np.bincount(left, values * (1 - part), minlength=grid + 1)
    return np.asarray(at_left + np.bincount(left + 1, values * part, minlength=grid + 1))


def _cosines(mass: Floats) -> Floats:
    """Return the cosine coefficients (R, M + 1) of point masses (R, M + 1) reflected at 0 and 1."""
    from scipy.fft import dct

    # In the even extension a point on the border meets its own mirror image.
    doubled = mass.copy()
    doubled[:, 0] *= 2
    doubled[:, -1] *= 2
    return np.asarray(dct(doubled, type=1, axis=1))


def _density(cosines: Floats, width: float | Floats) -> Floats:
    """Smooth with Gaussians of the given widths (a number or (R, 1)); values on the grid."""
    from scipy.fft import dct

    waves = np.pi * np.arange(cosines.shape[1])
    damped = cosines * np.exp(-0.5 * np.square(waves * width))
    return np.asarray(dct(damped, type=1, axis=1)) / 2


def _trapezoid(grid: int) -> Floats:
    step = np.full(grid + 1, 1.0 / grid)
    step[[0, -1]] /= 2
    return step


def _fixed_point(cosines: Floats, steps: int) -> Floats:
    """Solve smECE_s = s for each row by bisection: smECE_s falls as s grows."""
    step = _trapezoid(cosines.shape[1] - 1)
    low, high = np.zeros(len(cosines)), np.ones(len(cosines))
    for _ in range(steps):
        middle = (low + high) / 2
        error = np.abs(_density(cosines, middle[:, None])) @ step
        low, high = np.where(error > middle, middle, low), np.where(error > middle, high, middle)
    return (low + high) / 2
