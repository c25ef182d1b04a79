"""What every calibrator is, and the rows that it is fitted on."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.energy import check_logits, log_probabilities
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, NotFittedError, TooFewRowsError
from ebm_guard.intervals import Array
from ebm_guard.precision import KeepDouble

# Elements per chunk: small enough for the cache, large enough for the vector units.
CHUNK = 200_000
_NOT_FITTED = "not fitted"
EXPLANATIONS = {
    "at_bound": "the best T lies outside [0.001, 1000]",
    "separable": "the label has the largest logit in every row, so sharper is always better",
    "worse_than_uniform": "the logits predict the labels no better than chance",
    "not_converged": "the optimiser stopped before the gradient was zero",
}


class Calibrator(KeepDouble, ABC):
    """Base of the calibrators: fit on logits and labels, then map logits to probabilities.

    Attributes:
        name: the registered name.
        keeps_prediction: whether the predicted class stays argmax f. Otherwise it is the argmax
            of the calibrated probabilities.
        status: ``converged``; ``at_bound``, ``separable``, ``worse_than_uniform``,
            ``not_converged`` (with a warning, see each calibrator for what it then does); ``not
            fitted`` before.
        n: rows of positive weight that it was fitted on.
    """

    name = ""
    keeps_prediction: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.status = _NOT_FITTED
        self.n = 0

    @abstractmethod
    def fit(
        self, logits: Array, labels: NDArray[np.int64], sample_weight: Array | None = None
    ) -> Self:
        """Fit on held-out rows and return itself.

        Args:
            logits: (N, C), finite, any floating dtype.
            labels: (N,) in 0..C-1.
            sample_weight: (N,) >= 0, such as the ratio of the class priors in use to those of the
                rows. Only their ratios count; a row of weight 0 is left out.

        Raises:
            InvalidInputError: fewer than 2 rows, non-finite logits, labels out of range, or
                weights that are negative, not finite or all zero.
            TooFewRowsError: this calibrator needs more rows.
        """

    @abstractmethod
    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to calibrated log-probabilities (B, C), float32 or float64.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the tensors, rebuild the calibrator, as JSON types."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild a fitted calibrator."""

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted class (B,) int64 and its calibrated probability (B,)."""
        log_p = self.log_probabilities(logits)
        label = (logits if self.keeps_prediction else log_p).argmax(dim=-1)
        return label, log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1).exp()

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the calibrated probability (B,) of the predicted class."""
        return self.predict(logits)[1]

    @torch.no_grad()
    def transform(self, logits: Array) -> Array:
        """Map a block of logits (B, C) to calibrated log-probabilities in float64."""
        # A copy: a block of a read-only memory map must not reach torch.
        values = torch.from_numpy(np.array(logits, dtype=np.float64))
        return np.asarray(self.log_probabilities(values).numpy())

    def facts(self) -> dict[str, Any]:
        """Return what a report says about the fit, as JSON types."""
        return {"name": self.name, "status": self.status, "n": self.n}

    def _require_fitted(self) -> None:
        if self.status == _NOT_FITTED:
            raise NotFittedError(
                f"the {self.name} calibrator is not fitted; call fit(logits, labels) first"
            )

    def _warn(self, kept: str) -> None:
        warnings.warn(
            f"{self.name} calibration found no finite optimum on {self.n} rows ({self.status}): "
            f"{EXPLANATIONS[self.status]}. {kept}",
            EbmGuardWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class Rows:
    """Rows to fit on, read chunk by chunk so that a memory map stays on disk.

    Args:
        logits: (N, C).
        labels: (N,).
        weights: (n,) of the rows in use, mean 1, or None for equal weights.
        index: (n,) numbers of the rows in use, or None for all.
    """

    logits: Array
    labels: NDArray[np.int64]
    weights: Array | None = None
    index: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the number of rows in use."""
        return len(self.labels) if self.index is None else len(self.index)

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.logits.shape[1])

    def take(self, positions: NDArray[np.int64]) -> Rows:
        """Return some of these rows; their weights get mean 1 again."""
        weights = None if self.weights is None else _mean_one(self.weights[positions])
        index = positions if self.index is None else self.index[positions]
        return Rows(self.logits, self.labels, weights, index)

    def of_use(self, values: Array) -> Array:
        """Return the entries (n,) of an array (N,) that belong to the rows in use."""
        return values if self.index is None else np.asarray(values[self.index])

    def parts(self) -> Iterator[tuple[Array, NDArray[np.int64], Array | None, slice]]:
        """Yield logits in float64 (own memory), labels, weights and place of each chunk."""
        step = max(1, CHUNK // self.num_classes)
        for at in range(0, len(self), step):
            place = slice(at, at + step)
            rows = place if self.index is None else self.index[place]
            weights = None if self.weights is None else self.weights[place]
            yield np.array(self.logits[rows], np.float64), self.labels[rows], weights, place


def rows_of(logits: Array, labels: NDArray[np.int64], sample_weight: Array | None = None) -> Rows:
    """Check what a calibrator is fitted on; rows of weight 0 are left out.

    Raises:
        InvalidInputError: see :meth:`Calibrator.fit`.
    """
    _check_shapes(logits, labels)
    _check_finite(logits)
    if sample_weight is None:
        return Rows(logits, labels)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != labels.shape:
        raise InvalidInputError(
            f"got sample_weight of shape {weights.shape} for {len(labels)} rows; needed one weight "
            "per row, (N,)"
        )
    bad = int((~np.isfinite(weights) | (weights < 0)).sum())
    if bad or not weights.any():
        what = f"{bad} weights that are negative or not finite" if bad else "only zero weights"
        raise InvalidInputError(f"got {what}; needed finite weights >= 0, some of them positive")
    kept = np.flatnonzero(weights)
    if len(kept) < 2:
        raise InvalidInputError("got 1 row of positive weight; a calibrator needs at least 2")
    index = None if len(kept) == len(weights) else kept
    return Rows(logits, labels, _mean_one(weights[kept]), index)


def require_rows(rows: Rows, needed: int, name: str, why: str) -> None:
    """Refuse too few rows.

    Raises:
        TooFewRowsError: with the number needed.
    """
    if len(rows) < needed:
        raise TooFewRowsError(
            f"got {len(rows):,} rows of {rows.num_classes} classes; {name} calibration needs at "
            f"least {needed:,} ({why}). Use temperature, or give more rows"
        )


def describe_facts(facts: Mapping[str, Any]) -> str:
    """Say in one line what a calibrator's facts are.

    Example:
        >>> facts = {"name": "temperature", "status": "converged", "n": 5000, "temperature": 2.067}
        >>> describe_facts(facts)
        'temperature, T = 2.067, on 5,000 rows: converged'
    """
    words = [facts["name"] if "chosen" not in facts else f"{facts['name']} -> {facts['chosen']}"]
    if "temperature" in facts:
        error = facts.get("standard_error")
        spread = "" if error is None else f" ± {error:.2g}"
        words.append(f"T = {facts['temperature']:.4g}{spread}")
    if "penalty" in facts:
        words.append(f"penalty {facts['penalty']:g}")
    return f"{', '.join(words)}, on {facts['n']:,} rows: {facts['status']}"


def log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """Compute log softmax(f/T) with T as a tensor, so that an exported graph holds no constant.

    Args:
        logits: (B, C).
        temperature: () float64.

    Returns:
        (B, C), float32, or float64 for float64 logits.
    """
    check_logits(logits)
    return log_probabilities(
        (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    )


def _mean_one(weights: Array) -> Array:
    # By the largest first: a sum of huge weights may overflow.
    scaled = weights / weights.max()
    return np.asarray(scaled / scaled.mean())


def _check_shapes(logits: Array, labels: NDArray[np.int64]) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != (len(logits),):
        raise InvalidInputError(
            f"got logits of shape {logits.shape} and labels of shape {labels.shape}; needed (N, C) "
            "with C >= 2, and (N,)"
        )
    if len(logits) < 2:
        raise InvalidInputError(f"got {len(logits)} row; a calibrator needs at least 2")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InvalidInputError(
            f"got labels in {labels.min()}..{labels.max()}; needed 0..{logits.shape[1] - 1}"
        )


def _check_finite(logits: Array) -> None:
    step = max(1, CHUNK // logits.shape[1])
    bad = 0
    for at in range(0, len(logits), step):
        part = logits[at : at + step]
        # The largest and the smallest entry are NaN where any entry is.
        if not (np.isfinite(part.max()) and np.isfinite(part.min())):
            bad += int((~np.isfinite(part).all(axis=1)).sum())
    if bad:
        raise InvalidInputError(f"got {bad} rows with NaN or infinite logits; remove them first")
