"""Calibration: does 90 % confidence mean 90 % right, and what to do where it does not."""

from ebm_guard.calibration.calibrators import Calibrator, TemperatureScaling, make_calibrator
from ebm_guard.calibration.metrics import (
    CalibrationMetrics,
    CalibrationStream,
    ReliabilityCurve,
    calibration_metrics,
    reliability_curve,
)
from ebm_guard.calibration.rows import RowStatistics, row_statistics

__all__ = [
    "CalibrationMetrics",
    "CalibrationStream",
    "Calibrator",
    "ReliabilityCurve",
    "RowStatistics",
    "TemperatureScaling",
    "calibration_metrics",
    "make_calibrator",
    "reliability_curve",
    "row_statistics",
]
