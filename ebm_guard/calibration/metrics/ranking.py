"""How well confidence ranks right before wrong: AURC and its excess over the best ranking."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.cells import DRAWS, CellTable
from ebm_guard.calibration.intervals import no_interval
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Metric, basic_interval

Floats = NDArray[np.float64]


def aurc(
    rows: RowStatistics,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    table: CellTable | None = None,
) -> Metric:
    """Compute the area under the risk-coverage curve of the confidence; lower is better.

    AURC = mean_i risk({j: conf_j >= conf_i}), the selective risk averaged over the thresholds that
    the rows themselves give. Rows with the same confidence share a threshold, so the value does
    not depend on their order.

    Args:
        rows: row statistics.
        draws: bootstrap draws of the cells.
        seed: of the draws' own generator.
        table: the rows' cells by mass, where they are at hand: their draws are shared.

    Returns:
        The value in [0, 1].

    References:
        Geifman, Uziel and El-Yaniv, Bias-Reduced Uncertainty Estimation, ICLR 2019, eq. 2.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.array([[3.0, 0], [1, 0]]), np.array([0, 1]))
        >>> aurc(rows).value
        0.25
    """
    return aurc_parts(rows, draws=draws, seed=seed, table=table)[0]


def e_aurc(
    rows: RowStatistics,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    table: CellTable | None = None,
) -> Metric:
    """Compute the AURC minus that of the best ranking with the same accuracy.

    The best ranking puts all n - k right rows first: AURC* = (1/n) sum_{j=1}^{k} j / (n - k + j),
    about r + (1 - r) ln(1 - r) with r = k/n, which is used with sample weights.

    Args:
        rows: row statistics.
        draws: bootstrap draws of the cells.
        seed: of the draws' own generator.
        table: the rows' cells by mass, where they are at hand: their draws are shared.

    References:
        Geifman, Uziel and El-Yaniv, ICLR 2019, section 3. Differs: the exact sum, not its limit.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.array([[3.0, 0], [1, 0]]), np.array([0, 1]))
        >>> e_aurc(rows).value
        0.0
    """
    return aurc_parts(rows, draws=draws, seed=seed, table=table)[1]


def aurc_parts(
    rows: RowStatistics,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    table: CellTable | None = None,
) -> tuple[Metric, Metric]:
    """Compute :func:`aurc` and :func:`e_aurc` from the same draws.

    Args:
        rows: row statistics.
        draws: bootstrap draws of the cells.
        seed: of the draws' own generator.
        table: the rows' cells by mass, where they are at hand: their draws are shared.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.array([[3.0, 0], [1, 0]]), np.array([1, 0]))
        >>> [metric.value for metric in aurc_parts(rows)]
        [0.75, 0.5]
    """
    tied, n = rows.tied, len(rows)
    wrong = tied.weight - tied.right
    area = float(_area(tied.weight[None], wrong[None])[0])
    exact = None if rows.weight is not None else n
    excess = max(0.0, area - best_aurc(float(wrong.sum() / tied.weight.sum()), exact))
    reason = no_interval(n, int(rows.correct.sum()))
    if reason:
        return Metric(area, None, None, n, reason), Metric(excess, None, None, n, reason)
    table = table or CellTable.of(rows, by_mass=True)
    if not table.by_mass:
        raise InvalidInputError(
            "got cells of equal width; needed cells by mass: ranks are compared"
        )
    drawn = table.bootstrap(draws, seed)
    areas = _area(drawn.weight, drawn.wrong)
    risks = drawn.wrong.sum(axis=1) / drawn.total
    bests = np.array([best_aurc(risk, exact) for risk in risks.tolist()])
    # Cells tie rows that the data does not: their offset is known, and taken off.
    offset = float(_area(table.weight.sum(axis=0)[None], table.weight[:1])[0]) - area
    method = f"cell bootstrap, reflected, {draws:,} draws"
    ends = [
        basic_interval(value, values - offset, low=0.0, high=1.0)
        for value, values in ((area, areas), (excess, areas - bests))
    ]
    return Metric(area, *ends[0], n, method), Metric(excess, *ends[1], n, method)


def _area(weight: Floats, wrong: Floats) -> Floats:
    """Average the risk at each group's threshold; groups (R, G) in rising confidence."""
    covered = np.cumsum(weight[:, ::-1], axis=1)
    errors = np.cumsum(wrong[:, ::-1], axis=1)
    risk = np.divide(errors, covered, out=np.zeros_like(covered), where=covered > 0)
    return np.asarray((weight[:, ::-1] * risk).sum(axis=1) / covered[:, -1])


def best_aurc(risk: float, n: int | None = None) -> float:
    """Return the AURC of a ranking that puts all right rows before all wrong ones.

    Args:
        risk: share of wrong rows r in [0, 1].
        n: rows, for the exact sum; None gives the limit r + (1 - r) ln(1 - r).

    Example:
        >>> round(best_aurc(0.5, 2), 4), round(best_aurc(0.5), 4)
        (0.25, 0.1534)
    """
    if n is None:
        return risk if risk >= 1 else risk + (1 - risk) * math.log1p(-risk)
    from scipy.special import digamma

    wrong = round(risk * n)
    right = n - wrong
    if not right:
        return 1.0
    return float(wrong - right * (digamma(n + 1) - digamma(right + 1))) / n
