"""Temperature scaling: one number, the root of the gradient of the NLL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.calibrators.base import Calibrator, Rows, log_softmax, rows_of
from ebm_guard.intervals import Array

_BOUND = math.log(1e3)
_MAX_STEPS = 100
# Newton's error is squared by each step, so the last step of 1e-6 leaves one of about 1e-12.
_LAST_STEP = 1e-6
# A start from a few rows saves passes over many.
_MANY, _FEW = 100_000, 20_000


class TemperatureScaling(Calibrator):
    """Scale the logits by one temperature: p(y|x) = softmax(f(x)/T).

    T minimises the NLL. With b = 1/T = exp(u) the NLL is convex in b; we find the root of its
    gradient g(b) = E[E_p f - f_y] by safeguarded Newton steps in u, in float64. Finding the root
    and not the minimum is what makes T right to rounding, instead of to its square root.

    ``status`` says what happened: ``converged``; ``at_bound`` (T outside [1e-3, 1e3]);
    ``separable`` (all rows right with T -> 0 still better); ``worse_than_uniform`` (the best T is
    infinite: the logits say nothing, or the opposite). Only ``converged`` changes T, all others
    keep T = 1 with a warning.

    Attributes:
        temperature: () float64 buffer, T.
        status: see above; ``not fitted`` before.
        standard_error: of T, T sqrt(sum w_i^2 h_i) / sum w_i h_i with h_i = Var_p(f/T) of row i and
            w_i its weight; with equal weights that is T / sqrt(n I(u)), I(u) the observed
            information in u = log(1/T). None unless converged.
        n: rows it was fitted on.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
        Differs: Newton in log T on the gradient instead of LBFGS on T, which stops at 1.92 where
        20 is right.

    Example:
        >>> logits, labels = np.array([[8.0, 0.0]] * 4), np.array([0, 0, 0, 1])
        >>> round(float(TemperatureScaling().fit(logits, labels).temperature), 3)
        7.282
    """

    name = "temperature"
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.standard_error: float | None = None

    def fit(
        self, logits: Array, labels: NDArray[np.int64], sample_weight: Array | None = None
    ) -> Self:
        """Fit T on held-out logits.

        Args:
            logits: (N, C), finite, any floating dtype.
            labels: (N,) in 0..C-1.
            sample_weight: (N,) >= 0; only their ratios count.

        Raises:
            InvalidInputError: fewer than 2 rows, non-finite logits, labels out of range, or
                weights that are negative, not finite or all zero.
        """
        rows = rows_of(logits, labels, sample_weight)
        found = best_temperature(rows)
        self.n, self.status, self.standard_error = len(rows), found.status, found.standard_error
        self.temperature.fill_(found.temperature)
        if self.status != "converged":
            self._warn("T = 1 is kept")
        return self

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to log softmax(f/T), (B, C), float32 or float64.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        self._require_fitted()
        return log_softmax(logits, self.temperature)

    def facts(self) -> dict[str, Any]:
        """Return name, status and n, the temperature and its standard error."""
        return super().facts() | {
            "temperature": float(self.temperature),
            "standard_error": self.standard_error,
        }

    def settings(self) -> dict[str, Any]:
        """Return status, standard error and n."""
        return {"status": self.status, "standard_error": self.standard_error, "n": self.n}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild from the buffer and the settings."""
        calibrator = cls()
        calibrator.temperature.copy_(tensors["temperature"])
        calibrator.status = str(settings["status"])
        error = settings["standard_error"]
        calibrator.standard_error = None if error is None else float(error)
        calibrator.n = int(settings["n"])
        return calibrator


@dataclass(frozen=True)
class BestTemperature:
    """The result of a fit: T (1 unless converged), its status and its standard error."""

    temperature: float
    status: str
    standard_error: float | None = None


def best_temperature(rows: Rows) -> BestTemperature:
    """Find T in [1e-3, 1e3] with zero gradient of the weighted mean NLL."""
    gradient, all_right = _at_infinite_temperature(rows)
    if gradient >= 0:
        return BestTemperature(1.0, "worse_than_uniform")
    # By the logits, and not by a gradient at a bound, which underflows to 0. Ties count: with the
    # label among the largest logits in every row the gradient is negative for every T.
    if all_right:
        return BestTemperature(1.0, "separable")
    start = 0.0
    if len(rows) > _MANY:
        few = rows.take(np.arange(0, len(rows), len(rows) // _FEW))
        start = _newton(few, 0.0)[0]
    u, (_, curvature, spread) = _newton(rows, start)
    if abs(u) == _BOUND:
        return BestTemperature(1.0, "at_bound")
    # se(T) = T se(u). Of a flat NLL, which rounding can make of extreme logits, there is none.
    flat = curvature <= 0
    error = None if flat else math.exp(-2 * u) * math.sqrt(spread) / curvature
    return BestTemperature(math.exp(-u), "converged", error)


def _centred(rows: Rows) -> Any:
    """Yield logits - their maximum with the classes first, labels' entries, and weights.

    Sums over the classes run along the rows then, which the vector units like.
    """
    for part, labels, weights, _ in rows.parts():
        values = np.ascontiguousarray(part.T)
        values -= values.max(axis=0)
        yield values, values[labels, np.arange(len(labels))], weights


def _at_infinite_temperature(rows: Rows) -> tuple[float, bool]:
    """Return the gradient of the mean NLL at b = 0, and whether every label is a largest logit."""
    gradient, all_right = 0.0, True
    for values, of_label, weights in _centred(rows):
        gap = values.mean(axis=0) - of_label
        gradient += float(gap.sum() if weights is None else weights @ gap)
        all_right = all_right and not of_label.any()
    return gradient / len(rows), all_right


def _derivatives(rows: Rows, b: float) -> tuple[float, float, float]:
    """Return sums of w g_i, w h_i and w^2 h_i: slope and curvature of row i's NLL in b = 1/T."""
    gradient = curvature = spread = 0.0
    for values, of_label, weights in _centred(rows):
        share = np.exp(b * values)
        total = share.sum(axis=0)
        share *= values
        mean = share.sum(axis=0) / total
        share *= values
        variance = share.sum(axis=0) / total - mean * mean
        slope = mean - of_label
        if weights is not None:
            slope, variance = weights * slope, weights * variance
        gradient += float(slope.sum())
        curvature += float(variance.sum())
        spread += float(variance.sum() if weights is None else weights @ variance)
    return gradient, curvature, spread


def _newton(rows: Rows, u: float) -> tuple[float, tuple[float, float, float]]:
    """Find u = log(1/T) with zero gradient, or the bound beyond which it lies."""
    low, high = -math.inf, math.inf
    found = (0.0, 0.0, 0.0)
    for _ in range(_MAX_STEPS):
        b = math.exp(u)
        found = _derivatives(rows, b)
        gradient, curvature, _ = found
        if gradient == 0 or (gradient < 0 and u == _BOUND) or (gradient > 0 and u == -_BOUND):
            return u, found
        low, high = (u, high) if gradient < 0 else (low, u)
        # d/du = b g and d2/du2 = b^2 h + b g; where that is not convex, b^2 h alone is.
        second = b * curvature + gradient
        bend = second if second > 0 else b * curvature
        step = -gradient / bend if bend > 0 else math.inf
        if abs(step) < _LAST_STEP:
            return u + step, found
        target = max(-_BOUND, min(_BOUND, u + max(-1.0, min(1.0, step))))
        u = target if low < target < high else (low + high) / 2
    return u, found
