"""Out-of-distribution scores (higher = more OOD) and the metrics that judge them."""

from ebm_guard.ood.combination import Combined, combine
from ebm_guard.ood.feature_scores import (
    FDBD,
    KNN,
    EnergyReAct,
    EnergyScale,
    FeatureScore,
    GMMEnergy,
    KMeansEnergy,
    Mahalanobis,
    NNGuide,
    PCAEnergy,
    ViM,
)
from ebm_guard.ood.gradient_scores import approximate_mass
from ebm_guard.ood.logit_scores import GEN, MSP, Energy, MaxLogit
from ebm_guard.ood.metrics import OODMetrics, RocCurve, ood_metrics, roc_curve
from ebm_guard.ood.plugin import PluginScore, as_score
from ebm_guard.ood.score import SCORE_FAMILIES, Score, make_score, score_class
from ebm_guard.ood.sklearn_face import as_sklearn

__all__ = [
    "FDBD",
    "GEN",
    "KNN",
    "MSP",
    "SCORE_FAMILIES",
    "Combined",
    "Energy",
    "EnergyReAct",
    "EnergyScale",
    "FeatureScore",
    "GMMEnergy",
    "KMeansEnergy",
    "Mahalanobis",
    "MaxLogit",
    "NNGuide",
    "OODMetrics",
    "PCAEnergy",
    "PluginScore",
    "RocCurve",
    "Score",
    "ViM",
    "approximate_mass",
    "as_score",
    "as_sklearn",
    "combine",
    "make_score",
    "ood_metrics",
    "roc_curve",
    "score_class",
]
