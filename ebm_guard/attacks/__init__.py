"""Attacks on a classifier in pixel space, one engine under all of them."""

from ebm_guard.attacks.engine import Goal, Query, StepRule, climb
from ebm_guard.attacks.goals import Misclassify, TargetedMisclassify
from ebm_guard.attacks.gradient import FGSM, PGD
from ebm_guard.attacks.isolation import pixel_forward, untouched
from ebm_guard.attacks.rows import Examples, Outcome

__all__ = [
    "FGSM",
    "PGD",
    "Examples",
    "Goal",
    "Misclassify",
    "Outcome",
    "Query",
    "StepRule",
    "TargetedMisclassify",
    "climb",
    "pixel_forward",
    "untouched",
]
