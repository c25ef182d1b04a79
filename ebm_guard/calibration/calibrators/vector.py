"""Vector scaling: one scale and one bias per class."""

from __future__ import annotations

from ebm_guard.calibration.calibrators.base import Rows, require_rows
from ebm_guard.calibration.calibrators.crossval import VECTOR_GRID, CrossValidation, Searched
from ebm_guard.calibration.calibrators.penalised import PenalisedCalibration

ROWS_PER_CLASS = 10


class VectorScaling(PenalisedCalibration):
    """Scale and shift each class: p(y|x) = softmax(w * l + b), l = log softmax(f/T).

    First T by temperature scaling, then w and b, (C,) each, as the one minimum of::

        mean NLL + penalty/2 (sum_k (w_k - 1)^2 + sum_k b_k^2)

    w = 1 and b = 0 is temperature scaling, so a strong penalty falls back on it, and a class with
    few or no rows stays near it. The penalty is the best of 1, 0.1, 0.01, 0.001 by 5-fold
    cross-validated NLL. The predicted class may change.

    Different scales per class make w * f depend on a constant added to a row of logits, which the
    softmax ignores. l does not: of the ways to take the constant out, subtracting T logsumexp(f/T)
    (the row's energy, up to sign) leaves the winner's l near 0, so its bias alone speaks where the
    net is sure; subtracting the row's mean measured worse on 100 classes.

    ``status``: ``converged``; those of temperature scaling, when T has no optimum: the plain
    softmax is then kept, with a warning; ``not_converged``: temperature scaling is kept.

    Attributes:
        temperature: () float64 buffer, T; ``standard_error`` is of T alone.
        weight: (C,) float64 buffer, w.
        bias: (C,) float64 buffer, b.
        penalty: the chosen strength.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
        Differs: on log softmax(f/T) instead of f, with a penalty towards the temperature.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> logits, labels = rng.normal(size=(400, 3)), rng.integers(0, 3, 400)
        >>> logits[np.arange(400), labels] += 1.0
        >>> VectorScaling().fit(logits + [0.0, 2.0, 0.0], labels).bias.argmin()
        tensor(1)
    """

    name = "vector"
    full = False
    grid = VECTOR_GRID

    @staticmethod
    def require(rows: Rows) -> None:
        """Refuse fewer than 10 rows per class.

        Raises:
            TooFewRowsError: with the number needed.
        """
        needed = ROWS_PER_CLASS * rows.num_classes
        require_rows(rows, needed, "vector", f"{ROWS_PER_CLASS} for each class")

    @staticmethod
    def search(folds: CrossValidation) -> Searched:
        """Choose the penalty by held-out NLL."""
        return folds.vector
