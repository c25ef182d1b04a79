"""Calibration: does 90 % confidence mean 90 % right, and what to do where it does not."""

from ebm_guard.calibration.calibrators import Calibrator, TemperatureScaling
from ebm_guard.calibration.metrics import (
    CalibrationMetrics,
    ReliabilityCurve,
    RowStatistics,
    calibration_metrics,
    reliability_curve,
    row_statistics,
)

__all__ = [
    "CalibrationMetrics",
    "Calibrator",
    "ReliabilityCurve",
    "RowStatistics",
    "TemperatureScaling",
    "calibration_metrics",
    "reliability_curve",
    "row_statistics",
]
