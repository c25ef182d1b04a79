"""Dirichlet calibration: a full linear map of the log-probabilities, kept near the diagonal."""

from __future__ import annotations

from ebm_guard.calibration.calibrators.base import Rows, require_rows
from ebm_guard.calibration.calibrators.crossval import (
    OFF_DIAGONAL_GRID,
    CrossValidation,
    Searched,
)
from ebm_guard.calibration.calibrators.penalised import PenalisedCalibration
from ebm_guard.calibration.calibrators.vector import ROWS_PER_CLASS

FEW_CLASSES = 100
ROWS_PER_ENTRY = 20


class DirichletCalibration(PenalisedCalibration):
    """Map all log-probabilities: p(y|x) = softmax(W l + b), l = log softmax(f/T).

    First T by temperature scaling, then W (C, C) and b (C,) as the one minimum of::

        mean NLL + off/2 sum_{k != j} W_kj^2 + diag/2 (sum_k (W_kk - 1)^2 + sum_k b_k^2)

    W = I and b = 0 is temperature scaling. ``diag`` is the penalty that vector scaling chooses (the
    same map without off-diagonal entries), ``off`` the best of 1, 0.3, 0.1, ... 0.0001 given that,
    both by 5-fold cross-validated NLL, from strong to weak until the first that does not help. The
    predicted class may change.

    Up to 100 classes, or with 20 rows for each of the C^2 entries; refused otherwise, because
    penalties cannot be told apart on fewer rows.

    ``status``: ``converged``; those of temperature scaling, when T has no optimum: the plain
    softmax is then kept, with a warning; ``not_converged``: temperature scaling is kept.

    Attributes:
        temperature: () float64 buffer, T; ``standard_error`` is of T alone.
        weight: (C, C) float64 buffer, W.
        bias: (C,) float64 buffer, b.
        penalty: the chosen strengths.

    References:
        Kull et al., Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities
        with Dirichlet calibration, NeurIPS 2019, section 4 and its ODIR (off-diagonal and intercept
        regularisation). Differs: on log softmax(f/T) instead of log p, so that the result does not
        depend on the scale of the logits; strengths per entry, where the paper divides the
        off-diagonal sum by C(C - 1) and the bias's by C; the diagonal is drawn to 1 as the bias is
        to 0, since for a class without rows it has no optimum of its own.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> logits, labels = rng.normal(size=(400, 3)), rng.integers(0, 3, 400)
        >>> logits[np.arange(400), labels] += 1.0
        >>> DirichletCalibration().fit(logits, labels).weight.shape
        torch.Size([3, 3])
    """

    name = "dirichlet"
    full = True
    grid = OFF_DIAGONAL_GRID

    @staticmethod
    def require(rows: Rows) -> None:
        """Refuse fewer than 10 rows per class, and above 100 classes fewer than 20 C^2 rows.

        Raises:
            TooFewRowsError: with the number needed.
        """
        classes = rows.num_classes
        needed, why = ROWS_PER_CLASS * classes, f"{ROWS_PER_CLASS} for each class"
        if classes > FEW_CLASSES:
            needed = ROWS_PER_ENTRY * classes * classes
            why = f"{ROWS_PER_ENTRY} for each of the {classes} x {classes} entries"
        require_rows(rows, needed, "dirichlet", why)

    @staticmethod
    def search(folds: CrossValidation) -> Searched:
        """Choose the penalties by held-out NLL."""
        return folds.dirichlet
