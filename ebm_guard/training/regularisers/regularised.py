"""An objective with regularisers added to its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import item, warmed_up
from ebm_guard.training.regularisers.base import Regulariser


class Regularised(Objective):
    """Add r_j w_j R_j to an objective's loss, r_j rising from 0 to 1.

    Args:
        objective: whose loss it is.
        regularisers: the terms R_j; each is a part of the loss under its name.

    Example:
        >>> from ebm_guard.training.objectives import make_objective
        >>> from ebm_guard.training.regularisers import DenoisingScoreMatching
        >>> both = Regularised(make_objective("margin"), [DenoisingScoreMatching()])
        >>> both.settings()["regularisers"][0]["regulariser"]
        'dsm'
    """

    def __init__(self, objective: Objective, regularisers: Sequence[Regulariser]) -> None:
        self.objective = objective
        self.regularisers = tuple(regularisers)
        self.name = objective.name
        # An instance's own, as the classes' are: what the user does not say is the objective's.
        self.default_learning_rate = objective.default_learning_rate  # type: ignore[misc]
        self.default_scope = objective.default_scope  # type: ignore[misc]

    @property
    def negative_kinds(self) -> tuple[str, ...]:
        """Names of the synthetic kinds that the objective trains on."""
        return self.objective.negative_kinds

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Let the objective begin."""
        self.objective.begin(context, batch)

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the objective's loss and add the regularisers."""
        terms = self.objective(context, batch)
        total, parts = terms.total, dict(terms.parts)
        for each in self.regularisers:
            ramp = warmed_up(context, each.warm_up)
            term = ramp * each.weight * each.penalty(context, batch)
            total = total + term.to(total)
            parts[each.name] = item(term)
        return replace(terms, total=total, parts=parts)

    def rolled_back(self, context: Context) -> None:
        """Let the objective start afresh."""
        self.objective.rolled_back(context)

    def settings(self) -> dict[str, Any]:
        """Return the objective's settings, and the regularisers."""
        return {**self.objective.settings(), "regularisers": self._described()}

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        return {**self.objective.identity(), "regularisers": self._described()}

    def _described(self) -> list[dict[str, Any]]:
        return [each.settings() for each in self.regularisers]

    def state_dict(self) -> dict[str, Any]:
        """Return what the objective remembers; regularisers remember nothing."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what the objective remembered."""
        self.objective.load_state_dict(state)
