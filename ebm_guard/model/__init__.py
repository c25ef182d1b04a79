"""Any classifier, wrapped untouched: logits, verified features, pixel space, weight hash."""

from ebm_guard.model.classifier import ClassifierOutput, EnergyClassifier
from ebm_guard.model.ensemble import EnergyEnsemble
from ebm_guard.model.head import Head
from ebm_guard.model.pixels import Preprocessing

__all__ = ["ClassifierOutput", "EnergyClassifier", "EnergyEnsemble", "Head", "Preprocessing"]
