"""The gate: accept or refuse each prediction, with a finite-sample guarantee."""

from ebm_guard.gate.decision import ACCEPT, INVALID, REJECT, Decision
from ebm_guard.gate.guard import Guard, wrap
from ebm_guard.gate.thresholds import Threshold, minimum_rows

__all__ = [
    "ACCEPT",
    "INVALID",
    "REJECT",
    "Decision",
    "Guard",
    "Threshold",
    "minimum_rows",
    "wrap",
]
