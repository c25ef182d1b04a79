"""The gate: accept or refuse each prediction, with a finite-sample guarantee."""

from ebm_guard.gate.choice import Choice, choose_score, synthetic_outliers
from ebm_guard.gate.class_conditional import ClassConditionalThreshold
from ebm_guard.gate.decision import ACCEPT, INVALID, REJECT, Decision
from ebm_guard.gate.drift import DriftMonitor
from ebm_guard.gate.guard import Guard, wrap
from ebm_guard.gate.risk_rule import RiskRule
from ebm_guard.gate.screening import Screening, screen_batch
from ebm_guard.gate.shadow import ShadowComparison, compare
from ebm_guard.gate.thresholds import Threshold, minimum_rows

__all__ = [
    "ACCEPT",
    "INVALID",
    "REJECT",
    "Choice",
    "ClassConditionalThreshold",
    "Decision",
    "DriftMonitor",
    "Guard",
    "RiskRule",
    "Screening",
    "ShadowComparison",
    "Threshold",
    "choose_score",
    "compare",
    "minimum_rows",
    "screen_batch",
    "synthetic_outliers",
    "wrap",
]
