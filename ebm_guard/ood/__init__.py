"""Out-of-distribution scores (higher = more OOD) and the metrics that judge them."""

from ebm_guard.ood.logit_scores import GEN, MSP, Energy, MaxLogit, Score, make_score
from ebm_guard.ood.metrics import OODMetrics, RocCurve, ood_metrics, roc_curve

__all__ = [
    "GEN",
    "MSP",
    "Energy",
    "MaxLogit",
    "OODMetrics",
    "RocCurve",
    "Score",
    "make_score",
    "ood_metrics",
    "roc_curve",
]
