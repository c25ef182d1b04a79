"""Plain cross-entropy: the control that every energy term is compared with."""

from __future__ import annotations

from typing import Any

from ebm_guard import energy as formulas
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import item


class CrossEntropy(Objective):
    """Minimise the class loss on the augmented images, -log p(y|x) by default, and nothing else.

    What a run gains with this objective is the gain of training on, not of the energy: compare
    the others with it. Rows labelled -1 (no label) do not count.

    Example:
        >>> CrossEntropy().settings()
        {'objective': 'cross_entropy'}
    """

    name = "cross_entropy"

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the mean over the labelled rows."""
        logits = context.logits(batch.augmented)
        total = context.class_loss(logits, batch.labels)
        energy = formulas.energy(logits.detach())
        return LossTerms(total, {"class": item(total)}, energy_data=energy)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"objective": self.name}
