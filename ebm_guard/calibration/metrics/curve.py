"""The reliability diagram's numbers: accuracy by bins of confidence, with bars and a null band."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ebm_guard.calibration.cells import DRAWS, N_BINS, CellTable
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.intervals import wilson_share


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin (lo, hi] of the reliability diagram; empty bins hold None.

    Args:
        lo: lower edge, excluded.
        hi: upper edge, included.
        count: rows.
        confidence: their mean confidence.
        accuracy: their accuracy.
        low: lower end of its Wilson interval.
        high: upper end.
        band_low: 2.5 % quantile of the accuracy of a perfectly calibrated model in this bin.
        band_high: 97.5 % quantile.
    """

    lo: float
    hi: float
    count: int
    confidence: float | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    band_low: float | None = None
    band_high: float | None = None


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against accuracy, by equal-width bins of the top-label confidence."""

    n_bins: int
    bins: tuple[ReliabilityBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON types."""
        return {"n_bins": self.n_bins, "bins": [asdict(item) for item in self.bins]}


def reliability_curve(
    rows: RowStatistics | CellTable, n_bins: int = N_BINS, *, draws: int = DRAWS, seed: int = 0
) -> ReliabilityCurve:
    """Compute the reliability diagram's points, at the bins' mean confidence.

    Args:
        rows: row statistics, or their cell table (then ``n_bins`` is the table's).
        n_bins: equal-width bins.
        draws: simulations of a perfect model, for the consistency band.
        seed: of the simulation's own generator.

    Returns:
        All bins in order, empty ones included, with Wilson intervals of the accuracy (at the
        effective n, with sample weights) and the consistency band of a perfect model.

    References:
        Band: Bröcker and Smith, Increasing the Reliability of Reliability Diagrams, 2007.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> curve = reliability_curve(row_statistics(np.array([[9.0, 0.0]]), np.array([0])))
        >>> curve.bins[-1].count
        1
    """
    table = rows if isinstance(rows, CellTable) else CellTable.of(rows, n_bins)
    null = table.null(draws, seed + 1)
    weight = table.by_bin(null.weight)
    safe = np.where(weight > 0, weight, 1.0)
    perfect = np.quantile(table.by_bin(null.right) / safe, [0.025, 0.975], axis=0)
    return ReliabilityCurve(
        table.n_bins,
        tuple(
            _bin(table, index, *np.clip(perfect[:, index], 0.0, 1.0).tolist())
            for index in range(table.n_bins)
        ),
    )


def _bin(table: CellTable, index: int, band_low: float, band_high: float) -> ReliabilityBin:
    edges = (index / table.n_bins, (index + 1) / table.n_bins)
    cells = slice(*(table.count.shape[1] // table.n_bins * at for at in (index, index + 1)))
    count = int(table.count[:, cells].sum())
    weight = float(table.weight[:, cells].sum())
    if not weight:
        return ReliabilityBin(*edges, count)
    accuracy = min(1.0, float(table.weight[1, cells].sum()) / weight)
    effective = weight**2 / float(table.weight_squared[:, cells].sum())
    low, high = wilson_share(accuracy, effective)
    confidence = float(table.confidence[:, cells].sum()) / weight
    return ReliabilityBin(
        *edges, count, min(1.0, confidence), accuracy, low, high, band_low, band_high
    )
