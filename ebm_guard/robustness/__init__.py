"""Robustness of a classifier and of its gate: attacks, corruptions, and what they do not show."""

from ebm_guard.robustness.evaluate import evaluate_robustness
from ebm_guard.robustness.options import AttackOptions, Images
from ebm_guard.robustness.purify import Purification, Purifier, Refined, refine
from ebm_guard.robustness.records import Robustness
from ebm_guard.robustness.threat import Threat

__all__ = [
    "AttackOptions",
    "Images",
    "Purification",
    "Purifier",
    "Refined",
    "Robustness",
    "Threat",
    "evaluate_robustness",
    "refine",
]
