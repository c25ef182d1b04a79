"""Synthetic outliers and mild shifts, made from the user's own images.

Three groups share no kind: ``TRAINING_KINDS`` are negatives for fine-tuning, ``GUARD_KINDS`` choose
scores, guard checkpoints and stand in where the user has no OOD set, ``SHIFT_KINDS`` keep the
label. Each of the first two holds a kind that destroys the whole and one that destroys the local
texture.
"""

from ebm_guard.data.outliers.kinds import (
    GUARD_KINDS,
    SHIFT_KINDS,
    TRAINING_KINDS,
    Kind,
    get_kind,
    make_outliers,
)
from ebm_guard.data.outliers.source import OutlierSource

__all__ = [
    "GUARD_KINDS",
    "SHIFT_KINDS",
    "TRAINING_KINDS",
    "Kind",
    "OutlierSource",
    "get_kind",
    "make_outliers",
]
