"""The choice among calibrators by cross-validated NLL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.calibrators.base import EXPLANATIONS, Calibrator, Rows, rows_of
from ebm_guard.calibration.calibrators.crossval import CrossValidation, Searched
from ebm_guard.calibration.calibrators.dirichlet import DirichletCalibration
from ebm_guard.calibration.calibrators.penalised import PenalisedCalibration
from ebm_guard.calibration.calibrators.temperature import (
    BestTemperature,
    TemperatureScaling,
    best_temperature,
)
from ebm_guard.calibration.calibrators.vector import VectorScaling
from ebm_guard.errors import TooFewRowsError
from ebm_guard.intervals import Array

_RICHER: tuple[type[PenalisedCalibration], ...] = (VectorScaling, DirichletCalibration)
_ALL: dict[str, type[Calibrator]] = {
    kind.name: kind for kind in (TemperatureScaling, VectorScaling, DirichletCalibration)
}


@dataclass(frozen=True)
class Candidate:
    """One row of the table behind the choice.

    Args:
        name: of the calibrator.
        nll: weighted mean NLL of held-out folds, None where it was not measured.
        difference: of ``nll`` to temperature's; negative = better.
        standard_error: of that difference, from the differences row by row.
        refused: why it was not measured, or None.
    """

    name: str
    nll: float | None = None
    difference: float | None = None
    standard_error: float | None = None
    refused: str | None = None

    @property
    def wins(self) -> bool:
        """Whether it beats temperature by more than one standard error."""
        return (
            self.difference is not None
            and self.standard_error is not None
            and -self.difference > self.standard_error
        )


class AutoCalibrator(Calibrator):
    """Choose temperature, vector or dirichlet by 5-fold cross-validated NLL.

    All are measured on the same folds of the fit rows, and compared row by row. It is temperature
    unless another is better by more than one standard error of the difference; of several such, the
    one with the lowest NLL. The standard error is ::

        sqrt(sum_i w_i^2 (d_i - mean d)^2) / sum_i w_i,   d_i = NLL_i - NLL_i(temperature)

    The NLL of a penalised calibrator is that of its best penalty, which flatters it a little; the
    one standard error is also a margin for that.

    Attributes:
        chosen: the fitted calibrator.
        candidates: the table behind the choice.
        keeps_prediction: that of the chosen one.

    References:
        The one-standard-error rule: Breiman et al., Classification and Regression Trees, 1984,
        section 3.4.3.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> logits, labels = rng.normal(size=(400, 3)), rng.integers(0, 3, 400)
        >>> logits[np.arange(400), labels] += 1.0
        >>> AutoCalibrator().fit(logits, labels).chosen.name
        'temperature'
    """

    name = "auto"
    chosen: Calibrator

    def __init__(self) -> None:
        super().__init__()
        self.chosen = TemperatureScaling()
        self.candidates: tuple[Candidate, ...] = ()

    def fit(
        self, logits: Array, labels: NDArray[np.int64], sample_weight: Array | None = None
    ) -> Self:
        """Measure the candidates, choose, and fit the chosen one on all rows.

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
        self.candidates, searched = _measured(rows, found)
        winners = [each for each in self.candidates if each.wins]
        name = min(winners, key=lambda each: each.nll or 0.0).name if winners else "temperature"
        if name in searched:
            kind = next(kind for kind in _RICHER if kind.name == name)
            self._take(kind().fit_rows(rows, found, searched[name]))
        else:
            self._take(TemperatureScaling().fit(logits, labels, sample_weight))
        return self

    def _take(self, chosen: Calibrator) -> None:
        self.chosen, self.keeps_prediction = chosen, chosen.keeps_prediction
        self.status, self.n = chosen.status, chosen.n

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) by the chosen calibrator.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        self._require_fitted()
        return self.chosen.log_probabilities(logits)

    def facts(self) -> dict[str, Any]:
        """Return the chosen one's facts, the table of candidates, and a sentence on the choice."""
        facts = self.chosen.facts()
        detail = facts.get("note")
        return facts | {
            "name": self.name,
            "chosen": self.chosen.name,
            "candidates": [asdict(each) for each in self.candidates],
            "note": self._note() + (f" {detail[0].upper()}{detail[1:]}." if detail else ""),
        }

    def _note(self) -> str:
        measured = [each for each in self.candidates[1:] if each.nll is not None]
        if not measured:
            return "Temperature, since nothing else could be fitted on these rows."
        if self.chosen.name == "temperature":
            names = " nor ".join(each.name for each in measured)
            some = "neither " if len(measured) > 1 else "not "
            return (
                f"Temperature: {some}{names} lowers the cross-validated NLL by more than one "
                "standard error."
            )
        best = next(each for each in measured if each.name == self.chosen.name)
        return (
            f"{best.name.capitalize()}: its cross-validated NLL of {best.nll:.4f} is "
            f"{-(best.difference or 0.0):.4f} ± {best.standard_error:.4f} below temperature's."
        )

    def settings(self) -> dict[str, Any]:
        """Return status, n, the name and the settings of the chosen one, and the table."""
        return {
            "status": self.status,
            "n": self.n,
            "chosen": self.chosen.name,
            "settings": self.chosen.settings(),
            "candidates": [asdict(each) for each in self.candidates],
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild the chosen one from its buffers and settings."""
        calibrator = cls()
        prefix = "chosen."
        own = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        calibrator._take(_ALL[settings["chosen"]].from_state(own, settings["settings"]))
        calibrator.candidates = tuple(Candidate(**each) for each in settings["candidates"])
        return calibrator


def _measured(
    rows: Rows, found: BestTemperature
) -> tuple[tuple[Candidate, ...], dict[str, Searched]]:
    """Return the table, temperature first, and what the search for each penalty found."""
    refused: dict[str, str] = {}
    for kind in _RICHER:
        try:
            kind.require(rows)
        except TooFewRowsError as error:
            refused[kind.name] = str(error)
        if found.status != "converged":
            refused[kind.name] = f"temperature is {found.status}: {EXPLANATIONS[found.status]}"
    folds = None
    if len(refused) < len(_RICHER):
        try:
            folds = CrossValidation(rows, found.temperature)
        except TooFewRowsError as error:
            refused = {kind.name: str(error) for kind in _RICHER}
    if folds is None:
        none = [Candidate(kind.name, refused=refused[kind.name]) for kind in _RICHER]
        return (Candidate("temperature"), *none), {}
    base = folds.temperature_nll
    searched = {kind.name: kind.search(folds) for kind in _RICHER if kind.name not in refused}
    table = [Candidate("temperature", folds.mean(base), 0.0, 0.0)]
    for kind in _RICHER:
        if kind.name in refused:
            table.append(Candidate(kind.name, refused=refused[kind.name]))
        else:
            table.append(_compared(kind.name, searched[kind.name].row_nll, base, rows.weights))
    return tuple(table), searched


def _compared(name: str, row_nll: Array, base: Array, weights: Array | None) -> Candidate:
    difference = row_nll - base
    mean = float(np.average(difference, weights=weights))
    spread = (difference - mean) * (1.0 if weights is None else weights)
    error = float(np.sqrt(np.square(spread).sum())) / len(base)
    return Candidate(name, float(np.average(row_nll, weights=weights)), mean, error)
