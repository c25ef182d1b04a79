"""Scores that are fitted on the features of ID rows; higher = more out-of-distribution."""

from ebm_guard.ood.feature_scores.activations import EnergyReAct, EnergyScale
from ebm_guard.ood.feature_scores.base import FeatureScore
from ebm_guard.ood.feature_scores.fdbd import FDBD
from ebm_guard.ood.feature_scores.free_energy import KMeansEnergy
from ebm_guard.ood.feature_scores.mahalanobis import Mahalanobis
from ebm_guard.ood.feature_scores.mixture import GMMEnergy
from ebm_guard.ood.feature_scores.neighbours import KNN, NNGuide
from ebm_guard.ood.feature_scores.pca import PCAEnergy
from ebm_guard.ood.feature_scores.vim import ViM

__all__ = [
    "FDBD",
    "KNN",
    "EnergyReAct",
    "EnergyScale",
    "FeatureScore",
    "GMMEnergy",
    "KMeansEnergy",
    "Mahalanobis",
    "NNGuide",
    "PCAEnergy",
    "ViM",
]
