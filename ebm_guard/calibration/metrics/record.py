"""All calibration metrics of a set of rows, as one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ebm_guard.calibration.cells import CellTable
from ebm_guard.calibration.metrics.binned import ece, ece_adaptive
from ebm_guard.calibration.metrics.curve import ReliabilityCurve, reliability_curve
from ebm_guard.calibration.metrics.decomposition import brier_parts
from ebm_guard.calibration.metrics.proper import (
    accuracy,
    brier,
    brier_top_label,
    nll,
    overconfidence,
)
from ebm_guard.calibration.metrics.ranking import aurc_parts
from ebm_guard.calibration.metrics.smooth import smooth_ece
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.intervals import Metric


@dataclass(frozen=True)
class CalibrationMetrics:
    """The calibration metrics of one set of predictions."""

    accuracy: Metric
    nll: Metric
    brier: Metric
    brier_top_label: Metric
    miscalibration: Metric
    discrimination: Metric
    uncertainty: Metric
    ece: Metric
    ece_adaptive: Metric
    smooth_ece: Metric
    overconfidence: Metric
    aurc: Metric
    e_aurc: Metric
    curve: ReliabilityCurve

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            name: getattr(self, name).to_dict() for name in CalibrationMetrics.__dataclass_fields__
        }


def calibration_metrics(rows: RowStatistics, seed: int = 0) -> CalibrationMetrics:
    """Compute the default calibration metrics of a set of rows.

    Args:
        rows: row statistics.
        seed: of the draws' own generators.

    Example:
        >>> import numpy as np
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 1]))
        >>> calibration_metrics(rows).accuracy.value
        1.0
    """
    table, by_mass = CellTable.of(rows), CellTable.of(rows, by_mass=True)
    miscalibration, discrimination, uncertainty = brier_parts(rows, seed=seed, table=by_mass)
    area, excess = aurc_parts(rows, seed=seed, table=by_mass)
    return CalibrationMetrics(
        accuracy=accuracy(rows),
        nll=nll(rows),
        brier=brier(rows),
        brier_top_label=brier_top_label(rows),
        miscalibration=miscalibration,
        discrimination=discrimination,
        uncertainty=uncertainty,
        ece=ece(table, seed=seed),
        ece_adaptive=ece_adaptive(rows, seed=seed, table=by_mass),
        smooth_ece=smooth_ece(rows, seed=seed, table=table),
        overconfidence=overconfidence(rows),
        aurc=area,
        e_aurc=excess,
        curve=reliability_curve(table, seed=seed),
    )
