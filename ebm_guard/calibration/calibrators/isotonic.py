"""Isotonic calibration of the top label's confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.calibrators.base import (
    EXPLANATIONS,
    Calibrator,
    Rows,
    log_softmax,
    require_rows,
    rows_of,
)
from ebm_guard.energy import check_logits, log_odds
from ebm_guard.intervals import Array

ROWS, MANY_ROWS = 100, 1000
FLOOR = 1e-6


class IsotonicCalibration(Calibrator):
    """Replace the confidence by a non-decreasing step-like function of it, fitted by PAV.

    With y = argmax f and s = f_y - logsumexp_{k != y} f_k, the log-odds of the raw confidence::

        p(y|x) = g(s),   g = argmin over non-decreasing g of sum_i w_i (1[y_i right] - g(s_i))^2
        p(k|x) = (1 - g(s)) softmax(f without y)_k   for k != y

    g is clipped to [1e-6, 1 - 1e-6], linear between the fitted rows and constant outside. The rest
    of the mass keeps its raw proportions, in logits, so that it is right also where the raw
    confidence rounds to 1. The predicted class stays argmax f, even where another class's share
    gets larger.

    ``status``: ``converged``; ``separable`` (every row is right) and ``worse_than_uniform`` (every
    row is wrong): a confidence of 1 or 0 for all is more than n rows can show, so the plain softmax
    is kept, with a warning.

    Attributes:
        log_odds: (m,) float64 buffer, the corners of g.
        values: (m,) float64 buffer, g there.

    References:
        Zadrozny and Elkan, Transforming classifier scores into accurate multiclass probability
        estimates, KDD 2002. Differs: top label only, not one-vs-rest; over the log-odds, which is
        the same fit as over the confidence without the ties at 1.0.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> logits, labels = 9 * rng.normal(size=(400, 3)), rng.integers(0, 3, 400)
        >>> float(IsotonicCalibration().fit(logits, labels).values.max()) < 1
        True
    """

    name = "isotonic"
    log_odds: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_odds", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("values", torch.zeros(0, dtype=torch.float64))

    def fit(
        self, logits: Array, labels: NDArray[np.int64], sample_weight: Array | None = None
    ) -> Self:
        """Fit g on the log-odds of held-out rows and whether they are right.

        Args:
            logits: (N, C), finite, any floating dtype.
            labels: (N,) in 0..C-1.
            sample_weight: (N,) >= 0; only their ratios count.

        Raises:
            InvalidInputError: non-finite logits, labels out of range, or weights that are negative,
                not finite or all zero.
            TooFewRowsError: fewer than 100 rows.
        """
        from sklearn.isotonic import IsotonicRegression

        rows = rows_of(logits, labels, sample_weight)
        require_rows(rows, ROWS, self.name, "a free curve needs them")
        odds, right = _top_label(rows)
        self.n, self.status = len(rows), "converged"
        self.log_odds = self.values = torch.zeros(0, dtype=torch.float64)
        if right.all() or not right.any():
            self.status = "separable" if right.all() else "worse_than_uniform"
            self._warn("The plain softmax is kept")
            return self
        curve = IsotonicRegression(y_min=FLOOR, y_max=1 - FLOOR).fit(odds, right, rows.weights)
        self.log_odds = torch.from_numpy(np.array(curve.X_thresholds_, dtype=np.float64))
        self.values = torch.from_numpy(np.array(curve.y_thresholds_, dtype=np.float64))
        return self

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to log-probabilities (B, C), float32 or float64.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        self._require_fitted()
        check_logits(logits)
        if not len(self.values):
            return log_softmax(logits, torch.ones((), dtype=torch.float64, device=logits.device))
        # In float64: the curve may be steep, and must give the same at the fit and afterwards.
        exact, top = logits.double(), logits.argmax(dim=-1, keepdim=True)
        others = exact.scatter(-1, top, -math.inf)
        rest = torch.logsumexp(others, dim=-1, keepdim=True)
        share = self._curve(exact.gather(-1, top) - rest)
        log_p = (others - rest + torch.log1p(-share)).scatter(-1, top, share.log())
        return log_p if logits.dtype == torch.float64 else log_p.float()

    def _curve(self, odds: Tensor) -> Tensor:
        """Interpolate g."""
        if len(self.values) == 1:
            return self.values.expand_as(odds)
        right = torch.searchsorted(self.log_odds, odds.detach()).clamp(1, len(self.values) - 1)
        left = right - 1
        start, end = self.log_odds[left], self.log_odds[right]
        at = ((odds - start) / (end - start)).clamp(0.0, 1.0)
        return torch.lerp(self.values[left], self.values[right], at)

    def facts(self) -> dict[str, Any]:
        """Return name, status, n, the number of corners and a sentence on them."""
        if self.status != "converged":
            return super().facts() | {"note": f"{EXPLANATIONS[self.status]}: plain softmax"}
        corners = len(self.values)
        note = f"a curve of {corners} corners on the top label; only the confidence changes"
        if self.n < MANY_ROWS:
            note += f"; below {MANY_ROWS:,} rows it follows the noise"
        return super().facts() | {"corners": corners, "note": note}

    def settings(self) -> dict[str, Any]:
        """Return status and n."""
        return {"status": self.status, "n": self.n}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild from the buffers and the settings."""
        calibrator = cls()
        odds, values = tensors["log_odds"], tensors["values"]
        if odds.ndim != 1 or odds.shape != values.shape:
            raise ValueError(f"corners of shapes {tuple(odds.shape)} and {tuple(values.shape)}")
        calibrator.log_odds, calibrator.values = odds.clone(), values.clone()
        calibrator.status, calibrator.n = str(settings["status"]), int(settings["n"])
        return calibrator


def _top_label(rows: Rows) -> tuple[Array, NDArray[np.bool_]]:
    """Return the log-odds (n,) of the raw confidence, and whether argmax f is the label."""
    odds, right = np.empty(len(rows)), np.empty(len(rows), dtype=bool)
    for part, labels, _, place in rows.parts():
        odds[place] = -log_odds(torch.from_numpy(part)).numpy()
        right[place] = part.argmax(axis=1) == labels
    return odds, right
