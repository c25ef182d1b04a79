"""Attacks on a classifier in pixel space, one engine under all of them."""

from ebm_guard.attacks.apgd import APGD
from ebm_guard.attacks.engine import Goal, Query, StepRule, climb
from ebm_guard.attacks.foreign import autoattack, judge_callable
from ebm_guard.attacks.goals import Misclassify, TargetedMisclassify
from ebm_guard.attacks.gradient import FGSM, PGD
from ebm_guard.attacks.minimal import minimal_distance
from ebm_guard.attacks.rows import Examples, Outcome
from ebm_guard.attacks.square import Square
from ebm_guard.model.isolation import pixel_forward, untouched

__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "Examples",
    "Goal",
    "Misclassify",
    "Outcome",
    "Query",
    "Square",
    "StepRule",
    "TargetedMisclassify",
    "autoattack",
    "climb",
    "judge_callable",
    "minimal_distance",
    "pixel_forward",
    "untouched",
]
