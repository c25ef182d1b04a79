"""Calibrators: fitted on held-out logits and labels, they turn logits into honest probabilities.

Energies and OOD scores are always read from the raw logits, never from calibrated ones.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.energy import log_probabilities
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, NotFittedError
from ebm_guard.intervals import Array
from ebm_guard.precision import KeepDouble

_CHUNK = 2_000_000
_BOUND = math.log(1e3)
_MAX_STEPS = 100


class Calibrator(KeepDouble, ABC):
    """Base of the calibrators: fit on logits and labels, then map logits to probabilities."""

    name = ""
    keeps_prediction = True

    @abstractmethod
    def fit(self, logits: Array, labels: NDArray[np.int64]) -> Calibrator:
        """Fit on held-out rows (N, C) and (N,), and return itself."""

    @abstractmethod
    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to calibrated log-probabilities (B, C)."""

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the calibrated probability (B,) of the predicted class."""
        return self.log_probabilities(logits).amax(dim=-1).exp()

    @torch.no_grad()
    def transform(self, logits: Array) -> Array:
        """Map a block of logits (B, C) to calibrated log-probabilities in float64."""
        values = torch.from_numpy(np.asarray(logits, dtype=np.float64))
        return np.asarray(self.log_probabilities(values).numpy())

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the tensors, rebuild the calibrator."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Calibrator:
        """Rebuild a fitted calibrator."""


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
        standard_error: of T, T / sqrt(n I(u)) with the observed information in u = log(1/T); None
            unless converged.
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
        self.status = "not fitted"
        self.standard_error: float | None = None
        self.n = 0

    def fit(self, logits: Array, labels: NDArray[np.int64], sample_weight: Any = None) -> TemperatureScaling:
        """Fit T on held-out logits.

        Args:
            logits: (N, C), finite.
            labels: (N,) in 0..C-1.

        Raises:
            InvalidInputError: fewer than 2 rows, non-finite logits, labels out of range.
        """
        _check_fit(logits, labels)
        u, curvature, status = _solve(logits, labels)
        self.n, self.status = len(labels), status
        if status == "converged":
            self.temperature.fill_(math.exp(-u))
            # d log T = -du, so se(T) = T se(u), and the information in u is n d2(NLL)/du2.
            flat = curvature <= 0
            self.standard_error = None if flat else math.exp(-u) / math.sqrt(self.n * curvature)
            return self
        self.temperature.fill_(1.0)
        self.standard_error = None
        warnings.warn(
            f"temperature scaling found no finite optimum on {self.n} rows ({status}): "
            f"{_EXPLANATIONS[status]}. T = 1 is kept",
            EbmGuardWarning,
            stacklevel=2,
        )
        return self

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to log softmax(f/T), (B, C).

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        if self.status == "not fitted":
            raise NotFittedError("the temperature is not fitted; call fit(logits, labels) first")
        return log_probabilities(logits, float(self.temperature))

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "temperature": float(self.temperature), "standard_error": self.standard_error, "status": self.status, "n": self.n}

    def settings(self) -> dict[str, Any]:
        """Return status, standard error and n."""
        return {"status": self.status, "standard_error": self.standard_error, "n": self.n}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> TemperatureScaling:
        """Rebuild from the buffer and the settings."""
        calibrator = cls()
        calibrator.temperature.copy_(tensors["temperature"])
        calibrator.status = str(settings["status"])
        error = settings["standard_error"]
        calibrator.standard_error = None if error is None else float(error)
        calibrator.n = int(settings["n"])
        return calibrator


_EXPLANATIONS = {
    "at_bound": "the best T lies outside [0.001, 1000]",
    "separable": "the label has the largest logit in every row, so sharper is always better",
    "worse_than_uniform": "the logits predict the labels no better than chance",
}


def _check_fit(logits: Array, labels: NDArray[np.int64]) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != (len(logits),):
        raise InvalidInputError(
            f"got logits of shape {logits.shape} and labels of shape {labels.shape}; needed (N, C) "
            "with C >= 2, and (N,)"
        )
    if len(logits) < 2:
        raise InvalidInputError(f"got {len(logits)} row; a temperature needs at least 2")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InvalidInputError(
            f"got labels in {labels.min()}..{labels.max()}; needed 0..{logits.shape[1] - 1}"
        )
    bad = sum(int((~np.isfinite(part).all(axis=1)).sum()) for part, _ in _parts(logits, labels))
    if bad:
        raise InvalidInputError(f"got {bad} rows with NaN or infinite logits; remove them first")


def _parts(logits: Array, labels: NDArray[np.int64]) -> Any:
    step = max(1, _CHUNK // logits.shape[1])
    for at in range(0, len(logits), step):
        yield logits[at : at + step], labels[at : at + step]


def _of_label(part: Array, of: NDArray[np.int64]) -> Array:
    return np.asarray(part[np.arange(len(of)), of])


def _derivatives(logits: Array, labels: NDArray[np.int64], b: float) -> tuple[float, float]:
    """Return the gradient and the curvature of the mean NLL with respect to b = 1/T."""
    gradient = curvature = 0.0
    for part, of in _parts(logits, labels):
        values = np.asarray(part, dtype=np.float64)
        values = values - values.max(axis=1, keepdims=True)
        weights = np.exp(b * values)
        weights /= weights.sum(axis=1, keepdims=True)
        expected = np.einsum("nc,nc->n", weights, values)
        centred = values - expected[:, None]
        gradient -= float(centred[np.arange(len(of)), of].sum())
        curvature += float(np.einsum("nc,nc,nc->", weights, centred, centred))
    return gradient / len(labels), curvature / len(labels)


def _solve(logits: Array, labels: NDArray[np.int64]) -> tuple[float, float, str]:
    """Find u = log(1/T) with zero gradient; return u, d2 NLL/du2 at it, and the status."""
    low, high = -_BOUND, _BOUND
    if _derivatives(logits, labels, 0.0)[0] >= 0:
        return 0.0, 0.0, "worse_than_uniform"
    # By the logits, and not by a gradient at a bound, which underflows to 0. Ties count: with the
    # label among the largest logits in every row the gradient is negative for every T.
    if all((_of_label(part, of) == part.max(axis=1)).all() for part, of in _parts(logits, labels)):
        return 0.0, 0.0, "separable"
    if _derivatives(logits, labels, math.exp(low))[0] >= 0:
        return 0.0, 0.0, "at_bound"
    if _derivatives(logits, labels, math.exp(high))[0] < 0:
        return 0.0, 0.0, "at_bound"
    u = 0.0
    for _ in range(_MAX_STEPS):
        b = math.exp(u)
        gradient, curvature = _derivatives(logits, labels, b)
        if gradient < 0:
            low = u
        else:
            high = u
        # d/du = b g and d2/du2 = b^2 h + b g; where that is not convex, b^2 h alone is.
        second = b * b * curvature + b * gradient
        bend = second if second > 0 else b * b * curvature
        step = -b * gradient / bend if bend > 0 else math.inf
        target = u + max(-1.0, min(1.0, step))
        if not low < target < high:
            target = (low + high) / 2
        if abs(target - u) < 1e-12 or gradient == 0:
            break
        u = target
    b = math.exp(u)
    gradient, curvature = _derivatives(logits, labels, b)
    return u, b * b * curvature + b * gradient, "converged"


def make_calibrator(name: str) -> Any:
    from ebm_guard import registry

    return registry.get("calibrator", name).load()()
