"""Calibrators: fitted on held-out logits and labels, they turn logits into honest probabilities.

Energies and OOD scores are always read from the raw logits, never from calibrated ones.
"""

from __future__ import annotations

from ebm_guard import registry
from ebm_guard.calibration.calibrators.auto import AutoCalibrator
from ebm_guard.calibration.calibrators.base import Calibrator, describe_facts
from ebm_guard.calibration.calibrators.dirichlet import DirichletCalibration
from ebm_guard.calibration.calibrators.isotonic import IsotonicCalibration
from ebm_guard.calibration.calibrators.temperature import TemperatureScaling
from ebm_guard.calibration.calibrators.vector import VectorScaling


def make_calibrator(name: str) -> Calibrator:
    """Make an unfitted calibrator by its registered name.

    Raises:
        InvalidInputError: no such calibrator; near names are suggested.

    Example:
        >>> make_calibrator("temperature").status
        'not fitted'
    """
    made: Calibrator = registry.get("calibrator", name).load()()
    return made


__all__ = [
    "AutoCalibrator",
    "Calibrator",
    "DirichletCalibration",
    "IsotonicCalibration",
    "TemperatureScaling",
    "VectorScaling",
    "describe_facts",
    "make_calibrator",
]
