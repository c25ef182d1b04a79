"""What vector scaling and Dirichlet calibration share: the fit, its status and its state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.calibrators.base import (
    EXPLANATIONS,
    Calibrator,
    Rows,
    log_softmax,
    rows_of,
)
from ebm_guard.calibration.calibrators.crossval import FOLDS, CrossValidation, Searched
from ebm_guard.calibration.calibrators.linear import Penalty, Problem
from ebm_guard.calibration.calibrators.temperature import BestTemperature, best_temperature
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Array


class PenalisedCalibration(Calibrator):
    """A linear map of l = log softmax(f/T), drawn to temperature scaling by a penalty.

    Attributes:
        temperature: () float64 buffer, T.
        weight: float64 buffer, W: its diagonal (C,), or all of it (C, C).
        bias: (C,) float64 buffer, b.
        standard_error: of T alone.
        penalty: the chosen strengths, None where T had no optimum.
    """

    full: ClassVar[bool]
    grid: ClassVar[tuple[float, ...]]
    keeps_prediction = False
    temperature: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(0, dtype=torch.float64))
        self.standard_error: float | None = None
        self.penalty: Penalty | None = None

    @staticmethod
    @abstractmethod
    def require(rows: Rows) -> None:
        """Refuse rows that are too few for their classes.

        Raises:
            TooFewRowsError: with the number needed.
        """

    @staticmethod
    @abstractmethod
    def search(folds: CrossValidation) -> Searched:
        """Choose the penalty by held-out NLL."""

    def fit(
        self, logits: Array, labels: NDArray[np.int64], sample_weight: Array | None = None
    ) -> Self:
        """Fit T, then the penalty, then W and b.

        Args:
            logits: (N, C), finite, any floating dtype.
            labels: (N,) in 0..C-1; classes without a row are allowed.
            sample_weight: (N,) >= 0; only their ratios count.

        Raises:
            InvalidInputError: non-finite logits, labels out of range, or weights that are negative,
                not finite or all zero.
            TooFewRowsError: too few rows for the number of classes.
        """
        rows = rows_of(logits, labels, sample_weight)
        self.require(rows)
        found = best_temperature(rows)
        if found.status != "converged":
            return self.fit_rows(rows, found, None)
        return self.fit_rows(rows, found, self.search(CrossValidation(rows, found.temperature)))

    def fit_rows(self, rows: Rows, found: BestTemperature, searched: Searched | None) -> Self:
        """Fit W and b with a given temperature and penalty; without a penalty, leave W = I."""
        self.n, self.status, self.standard_error = len(rows), found.status, found.standard_error
        self.temperature.fill_(found.temperature)
        problem = Problem(rows, found.temperature, self.full)
        change, self.penalty = problem.start(), None
        if searched is not None:
            self.penalty = searched.penalty
            best = problem.fit(searched.penalty, torch.stack(searched.changes).mean(dim=0))
            self.status = "converged" if best.converged else "not_converged"
            change = best.change if best.converged else change
        classes = torch.ones(rows.num_classes, dtype=torch.float64)
        self.weight = torch.diag(classes) + change[:, :-1] if self.full else classes + change[:, 0]
        self.bias = change[:, -1].clone()
        if self.status != "converged":
            self._warn(_KEPT[self.status])
        return self

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to log softmax(W l + b), (B, C), float32 or float64.

        Raises:
            NotFittedError: :meth:`fit` has not run.
            InvalidInputError: another number of classes than at the fit.
        """
        self._require_fitted()
        log_p = log_softmax(logits, self.temperature)
        if log_p.shape[-1] != len(self.bias):
            raise InvalidInputError(
                f"got logits of {log_p.shape[-1]} classes; this {self.name} calibrator was fitted "
                f"on {len(self.bias)}"
            )
        weight, bias = self.weight.to(log_p.dtype), self.bias.to(log_p.dtype)
        # Autocast would take the product down to half precision.
        kind = log_p.device.type
        active = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if active else nullcontext():
            mapped = log_p @ weight.T + bias if self.full else log_p * weight + bias
            return torch.log_softmax(mapped, dim=-1)

    def facts(self) -> dict[str, Any]:
        """Return name, status, n, the temperature, the penalty and a sentence on it."""
        facts = super().facts() | {
            "temperature": float(self.temperature),
            "standard_error": self.standard_error,
        }
        if self.penalty is None:
            return facts | {"note": f"{EXPLANATIONS[self.status]}: plain softmax"}
        chosen = self.penalty.off_diagonal if self.full else self.penalty.diagonal
        facts |= {"penalty": chosen, "penalty_diagonal": self.penalty.diagonal}
        return facts | {"note": self._note(chosen)}

    def _note(self, chosen: float | None) -> str:
        if self.status != "converged":
            return f"{EXPLANATIONS[self.status]}: temperature scaling is kept"
        tried = ", ".join(f"{each:g}" for each in self.grid)
        note = f"penalty {chosen:g} chosen from {tried} by {FOLDS}-fold cross-validated NLL"
        if chosen == self.grid[0]:
            note += "; it is the strongest of them, so the rows ask for little more"
        return note

    def settings(self) -> dict[str, Any]:
        """Return status, n, the standard error of T and the penalty."""
        penalty = self.penalty
        return {
            "status": self.status,
            "n": self.n,
            "standard_error": self.standard_error,
            "penalty": None if penalty is None else [penalty.diagonal, penalty.off_diagonal],
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild from the buffers and the settings."""
        calibrator = cls()
        weight, bias = tensors["weight"], tensors["bias"]
        if weight.shape != bias.shape * (2 if cls.full else 1):
            raise ValueError(f"weight of shape {tuple(weight.shape)}, bias {tuple(bias.shape)}")
        calibrator.temperature.copy_(tensors["temperature"])
        calibrator.weight, calibrator.bias = weight.clone(), bias.clone()
        calibrator.status, calibrator.n = str(settings["status"]), int(settings["n"])
        error, penalty = settings["standard_error"], settings["penalty"]
        calibrator.standard_error = None if error is None else float(error)
        calibrator.penalty = None if penalty is None else Penalty(*penalty)
        return calibrator


_KEPT = {
    "not_converged": "Temperature scaling is kept",
    **dict.fromkeys(("at_bound", "separable", "worse_than_uniform"), "The plain softmax is kept"),
}
