"""Cross-validation inside the fit rows: penalties and calibrators by the NLL of held-out folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.calibrators.base import Rows
from ebm_guard.calibration.calibrators.linear import ROUGH, Penalty, Problem
from ebm_guard.calibration.calibrators.temperature import best_temperature
from ebm_guard.errors import TooFewRowsError
from ebm_guard.intervals import Array

FOLDS = 5
# From strong to weak, each fit starting from the one before. Of the second, a search stops at the
# first that is not better.
VECTOR_GRID = (1.0, 0.1, 0.01, 0.001)
OFF_DIAGONAL_GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_DIGITS = 7


@dataclass(frozen=True)
class Searched:
    """The best penalty of a grid, its held-out NLL (n,) per row, and each fold's solution."""

    penalty: Penalty
    row_nll: Array
    changes: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Fold:
    temperature: float
    train: Rows
    test: Rows
    where: NDArray[np.int64]


class CrossValidation:
    """Held-out NLL of every row under each calibrator, all on the same folds.

    A row's fold is a hash of its label's, largest and mean log-probability. So it depends on
    nothing but the row: not on the order of the rows or of the classes, a constant added to the
    logits, or a seed; and equal rows are never on both sides. The folds are not stratified: folds
    with the same share of each class hide the error that a bias per class makes, and flattered
    vector scaling by half of its gain on 5,000 rows of 100 classes.

    Args:
        rows: to fit on.
        temperature: T of all rows, for the hash only.

    Raises:
        TooFewRowsError: fewer than 10 different rows.
    """

    def __init__(self, rows: Rows, temperature: float) -> None:
        self.rows = rows
        hashes = row_hashes(rows, temperature)
        different = len(np.unique(hashes))
        numbers = hashes % np.uint64(FOLDS)
        if different < 2 * FOLDS or (numbers == numbers[0]).all():
            raise TooFewRowsError(
                f"got {different} different rows; cross-validation of a penalty needs at least "
                f"{2 * FOLDS}. Use temperature, or give more rows"
            )
        self._folds = []
        for number in np.unique(numbers):
            where, rest = np.flatnonzero(numbers == number), np.flatnonzero(numbers != number)
            train = rows.take(rest)
            found = best_temperature(train).temperature
            self._folds.append(_Fold(found, train, rows.take(where), where))

    def mean(self, row_values: Array) -> float:
        """Return the weighted mean of one value per row."""
        return float(np.average(row_values, weights=self.rows.weights))

    @cached_property
    def temperature_nll(self) -> Array:
        """(n,) held-out NLL of temperature scaling."""
        found = np.empty(len(self.rows))
        for fold in self._folds:
            problem = Problem(fold.test, fold.temperature, full=False)
            found[fold.where] = problem.row_nll(problem.start())
        return found

    @cached_property
    def vector(self) -> Searched:
        """The best penalty of vector scaling."""
        starts = [torch.zeros(self.rows.num_classes, 2, dtype=torch.float64)] * len(self._folds)
        return self._search([Penalty(strength) for strength in VECTOR_GRID], starts)

    @cached_property
    def dirichlet(self) -> Searched:
        """The best off-diagonal penalty, with the diagonal's taken over from vector scaling."""
        starts = [
            torch.cat([torch.diag(change[:, 0]), change[:, 1:]], dim=1)
            for change in self.vector.changes
        ]
        diagonal = self.vector.penalty.diagonal
        return self._search([Penalty(diagonal, each) for each in OFF_DIAGONAL_GRID], starts)

    def _search(self, penalties: Sequence[Penalty], starts: Sequence[Tensor]) -> Searched:
        full = starts[0].shape[1] > 2
        problems = [
            (
                Problem(fold.train, fold.temperature, full),
                Problem(fold.test, fold.temperature, full),
            )
            for fold in self._folds
        ]
        best = last = self._held_out(problems, penalties[0], starts)
        for penalty in penalties[1:]:
            last = self._held_out(problems, penalty, last.changes)
            if self.mean(last.row_nll) < self.mean(best.row_nll):
                best = last
            elif full:
                # Weak penalties on C^2 entries take ever more passes, and overfit ever more.
                break
        return best

    def _held_out(
        self,
        problems: Sequence[tuple[Problem, Problem]],
        penalty: Penalty,
        starts: Sequence[Tensor],
    ) -> Searched:
        changes, row_nll = [], np.empty(len(self.rows))
        for fold, (train, test), start in zip(self._folds, problems, starts, strict=True):
            changes.append(train.fit(penalty, start, ROUGH).change)
            row_nll[fold.where] = test.row_nll(changes[-1])
        return Searched(penalty, row_nll, tuple(changes))


def row_hashes(rows: Rows, temperature: float) -> NDArray[np.uint64]:
    """Return a hash (n,) of what each row says, the same for rows that say the same."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for values, labels, _, place in Problem(rows, temperature, full=False).parts():
        of_label = values.gather(1, labels[:, None]).squeeze(1)
        for key in (of_label, values.amax(dim=1), values.mean(dim=1)):
            # Rounded: a constant added to a row of logits moves its last digits.
            digits = np.round(key.numpy() * 10**_DIGITS).astype(np.int64).view(np.uint64)
            hashes[place] = _mixed(hashes[place] ^ digits)
    return hashes


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter the bits (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
