"""The top-label Brier score in parts, by isotonic regression: no bins to choose or to game."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.cells import DRAWS, CellTable, Resamples
from ebm_guard.calibration.intervals import no_interval
from ebm_guard.calibration.metrics.proper import accuracy
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, Metric, basic_interval

Floats = NDArray[np.float64]
# Curves of miscalibration, as multiples of the measured one: simulated, and looked at.
_SIMULATED = (0.0, 1.0, 2.0)
_LOOKED_AT = np.linspace(0.0, 4.0, 401)
# Each costs an isotonic regression for every draw; 400 place a 2.5 % quantile well enough.
_MOST_SIMULATIONS = 400


def miscalibration(rows: RowStatistics, *, draws: int = DRAWS, seed: int = 0) -> Metric:
    """Compute the miscalibration MCB of the top-label Brier score; see :func:`brier_parts`.

    Args:
        rows: row statistics.
        draws: bootstrap and null draws.
        seed: of the draws' own generators.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> miscalibration(row_statistics(np.zeros((9, 2)), np.zeros(9, np.int64))).value
        0.25
    """
    return brier_parts(rows, draws=draws, seed=seed)[0]


def discrimination(rows: RowStatistics, *, draws: int = DRAWS, seed: int = 0) -> Metric:
    """Compute the discrimination DSC of the top-label Brier score; see :func:`brier_parts`.

    Args:
        rows: row statistics.
        draws: bootstrap draws.
        seed: of the draws' own generators.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> discrimination(row_statistics(np.zeros((9, 2)), np.zeros(9, np.int64))).value
        0.0
    """
    return brier_parts(rows, draws=draws, seed=seed)[1]


def uncertainty(rows: RowStatistics) -> Metric:
    """Compute the uncertainty UNC = a (1 - a) of the top-label Brier score, a the accuracy.

    Args:
        rows: row statistics.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> uncertainty(row_statistics(np.zeros((4, 2)), np.array([0, 0, 1, 1]))).value
        0.25
    """
    return _uncertainty(accuracy(rows))


def brier_parts(
    rows: RowStatistics,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    table: CellTable | None = None,
) -> tuple[Metric, Metric, Metric]:
    """Split the top-label Brier score: miscalibration - discrimination + uncertainty.

    With S the Brier score, c the confidence, r the recalibrated confidence (isotonic regression of
    correct on c, by pool adjacent violators; ties in c share one value) and a the accuracy:
    MCB = S(c) - S(r), DSC = S(a) - S(r), UNC = S(a) = a (1 - a). MCB and DSC are biased upwards,
    as r follows the noise too: compare MCB with its ``null95``.

    Args:
        rows: row statistics.
        draws: bootstrap and null draws.
        seed: of the draws' own generators.
        table: the rows' cells by mass, where they are at hand: their draws are shared.

    Returns:
        Miscalibration >= 0, discrimination >= 0 and uncertainty in [0, 1/4].

    References:
        Dimitriadis, Gneiting and Jordan, Stable Reliability Diagrams for Probabilistic Classifiers
        (CORP), PNAS 2021. The interval of MCB is ours: the multiples s of the measured curve,
        c + s (r - c), under which the value lies in the central 95 %; simulated at s = 0, 1, 2 and
        interpolated by a parabola, as MCB is quadratic in s.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> from ebm_guard.calibration.metrics import brier_top_label
        >>> rows = row_statistics(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
        >>> mcb, dsc, unc = brier_parts(rows)
        >>> round(mcb.value - dsc.value + unc.value - brier_top_label(rows).value, 12)
        0.0
    """
    table = table or CellTable.of(rows, by_mass=True)
    if not table.by_mass:
        raise InvalidInputError(
            "got cells of equal width; needed cells by mass: ranks are compared"
        )
    tied, n = rows.tied, len(rows)
    kept = tied.weight > 0
    mcb, dsc = _split(tied.confidence[kept], tied.weight[kept], tied.right[kept])
    # Cells tie rows that the data does not: draws are compared with the parts of the cells, and
    # what that leaves out is known.
    coarse = np.array(_split_cells(table, *table.weight))
    offset = np.array([mcb, dsc]) - coarse
    null = _split_draws(table, table.null(draws, seed + 1))[:, 0]
    null95 = float(np.quantile(null, 0.95) + offset[0])
    unc = uncertainty(rows)
    reason = no_interval(n, int(rows.correct.sum()))
    if reason:
        return (
            Metric(mcb, None, None, n, reason, null95=null95),
            Metric(dsc, None, None, n, reason),
            unc,
        )
    drawn = table.bootstrap(draws, seed)
    simulated = drawn.weight[:_MOST_SIMULATIONS]
    low, high = _miscalibration_interval(coarse[0], table, null, simulated, seed)
    method = f"simulated multiples of the measured curve, {len(simulated):,} draws"
    discriminations = _split_draws(table, drawn)[:, 1] + offset[1]
    reflected = basic_interval(dsc, discriminations, low=0.0, high=0.25)
    return (
        Metric(mcb, min(low, mcb), max(high, mcb), n, method, null95=null95),
        Metric(dsc, *reflected, n, f"cell bootstrap, reflected, {draws:,} draws"),
        unc,
    )


def _miscalibration_interval(
    value: float, table: CellTable, null: Floats, drawn: Floats, seed: int
) -> tuple[float, float]:
    """Find the multiples of the measured curve that explain the value, all at the cells."""
    from scipy.optimize import isotonic_regression

    weight = table.weight.sum(axis=0)
    kept = weight > 0
    centres, weight = table.centres, weight[kept]
    curve = centres.copy()
    curve[kept] = isotonic_regression(table.weight[1, kept] / weight, weights=weight).x

    def accuracy_at(multiple: float) -> Floats:
        return np.asarray(np.clip(centres + multiple * (curve - centres), 0.0, 1.0))

    def truth(multiple: float) -> float:
        return _split(centres[kept], weight, weight * accuracy_at(multiple)[kept])[0]

    simulated = [null] + [
        _split_draws(table, table.simulate(drawn, accuracy_at(multiple), seed + 2))[:, 0]
        for multiple in _SIMULATED[1:]
    ]
    tail = (1 - LEVEL) / 2
    ends = []
    for quantile in (1 - tail, tail):
        parabola = np.polyfit(
            _SIMULATED, [np.quantile(values, quantile) for values in simulated], 2
        )
        reached = np.maximum.accumulate(np.polyval(parabola, _LOOKED_AT)) >= value
        at = int(reached.argmax()) if reached.any() else -1
        ends.append(truth(float(_LOOKED_AT[at])))
    return min(ends[0], value), max(ends[1], value)


def _uncertainty(share: Metric) -> Metric:
    """Map accuracy's interval through a (1 - a), which has its top at 1/2."""
    ends = [end for end in (share.low, share.high) if end is not None]
    images = [end * (1 - end) for end in ends]
    top = 0.25 if min(ends) <= 0.5 <= max(ends) else max(images)
    value = share.value * (1 - share.value)
    return Metric(value, min(images), top, share.n, f"accuracy's: {share.method}")


def _split(confidence: Floats, weight: Floats, right: Floats) -> tuple[float, float]:
    """Return MCB and DSC of groups with one confidence each, in rising order."""
    from scipy.optimize import isotonic_regression

    total = weight.sum()
    share = right / weight
    recalibrated = isotonic_regression(share, weights=weight).x
    # S(c) - S(r) per group: the spread of correct around its mean cancels.
    error = weight @ np.square(recalibrated - share)
    miscalibration = (weight @ np.square(confidence - share) - error) / total
    discrimination = (weight @ np.square(right.sum() / total - share) - error) / total
    return max(0.0, float(miscalibration)), max(0.0, float(discrimination))


def _split_draws(table: CellTable, drawn: Resamples) -> Floats:
    """Return (R, 2) MCB and DSC of each draw, at the cells' mean confidence."""
    pairs = zip(drawn.wrong, drawn.right, strict=True)
    return np.array([_split_cells(table, wrong, right) for wrong, right in pairs])


def _split_cells(table: CellTable, wrong: Floats, right: Floats) -> tuple[float, float]:
    """Return MCB and DSC of cells with these weights of wrong and right rows."""
    weight = wrong + right
    kept = weight > 0
    return _split(table.centres[kept], weight[kept], right[kept])
