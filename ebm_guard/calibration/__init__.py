"""Calibration: does 90 % confidence mean 90 % right, and what to do where it does not."""

from ebm_guard.calibration.calibrators import Calibrator, TemperatureScaling, make_calibrator
from ebm_guard.calibration.certificates import Certificate, Order, certify
from ebm_guard.calibration.conformal import APS, LAC
from ebm_guard.calibration.metrics import (
    CalibrationMetrics,
    CalibrationStream,
    ReliabilityCurve,
    calibration_metrics,
    reliability_curve,
)
from ebm_guard.calibration.rows import RowStatistics, row_statistics
from ebm_guard.calibration.selective import RiskCoverage, risk_coverage

__all__ = [
    "APS",
    "LAC",
    "CalibrationMetrics",
    "CalibrationStream",
    "Calibrator",
    "Certificate",
    "Order",
    "ReliabilityCurve",
    "RiskCoverage",
    "RowStatistics",
    "TemperatureScaling",
    "calibration_metrics",
    "certify",
    "make_calibrator",
    "reliability_curve",
    "risk_coverage",
    "row_statistics",
]
