"""Calibration metrics: each a record with its value, interval, null level and n."""

from ebm_guard.calibration.cells import N_BINS, CellTable, bin_index, mass_index
from ebm_guard.calibration.metrics.binned import (
    ece,
    ece_adaptive,
    ece_l2_debiased,
    mce,
)
from ebm_guard.calibration.metrics.classwise import (
    ClassCalibration,
    ClassSums,
    benjamini_hochberg,
    class_table,
    ece_classwise,
)
from ebm_guard.calibration.metrics.curve import (
    ReliabilityBin,
    ReliabilityCurve,
    reliability_curve,
)
from ebm_guard.calibration.metrics.decomposition import (
    brier_parts,
    discrimination,
    miscalibration,
    uncertainty,
)
from ebm_guard.calibration.metrics.proper import (
    accuracy,
    brier,
    brier_top_label,
    nll,
    overconfidence,
)
from ebm_guard.calibration.metrics.ranking import aurc, aurc_parts, best_aurc, e_aurc
from ebm_guard.calibration.metrics.record import CalibrationMetrics, calibration_metrics
from ebm_guard.calibration.metrics.smooth import smooth_ece, smooth_ece_value
from ebm_guard.calibration.metrics.streaming import CalibrationStream
from ebm_guard.calibration.rows import RowStatistics, row_statistics

__all__ = [
    "N_BINS",
    "CalibrationMetrics",
    "CalibrationStream",
    "CellTable",
    "ClassCalibration",
    "ClassSums",
    "ReliabilityBin",
    "ReliabilityCurve",
    "RowStatistics",
    "accuracy",
    "aurc",
    "aurc_parts",
    "benjamini_hochberg",
    "best_aurc",
    "bin_index",
    "brier",
    "brier_parts",
    "brier_top_label",
    "calibration_metrics",
    "class_table",
    "discrimination",
    "e_aurc",
    "ece",
    "ece_adaptive",
    "ece_classwise",
    "ece_l2_debiased",
    "mass_index",
    "mce",
    "miscalibration",
    "nll",
    "overconfidence",
    "reliability_curve",
    "row_statistics",
    "smooth_ece",
    "smooth_ece_value",
    "uncertainty",
]
