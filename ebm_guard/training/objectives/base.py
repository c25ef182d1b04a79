"""What an objective is: one loss on one batch, with its parts to show and to guard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ebm_guard.training.context import Context, TrainingBatch


@dataclass(frozen=True)
class LossTerms:
    """The loss of one update, and what the safeguard watches.

    Args:
        total: scalar, with gradients.
        parts: the weighted terms that ``total`` is the sum of, detached.
        energy_data: (B,) energies of the data, detached, or None.
        energy_negatives: (M,) energies of the negatives, detached, or None.
        saturation: share of the negatives' values that a sampler or a walk left on the edge of
            [0, 1]; None for negatives that nothing has moved.
    """

    total: Tensor
    parts: Mapping[str, float] = field(default_factory=dict)
    energy_data: Tensor | None = None
    energy_negatives: Tensor | None = None
    saturation: float | None = None

    @property
    def gap(self) -> float | None:
        """Mean energy of the negatives minus that of the data; None without either."""
        if self.energy_data is None or self.energy_negatives is None:
            return None
        return float(self.energy_negatives.mean() - self.energy_data.mean())


class Objective(ABC):
    """What fine-tuning minimises.

    An objective may remember things between updates (a queue, chains, a curriculum): all of it is
    in :meth:`state_dict`, as tensors and JSON types, and nothing else is.

    Attributes:
        name: the registered name.
        negative_kinds: names of the synthetic outlier kinds that it trains on, so that they are
            neither used to choose a checkpoint nor reported as unseen.
        default_learning_rate: of AdamW, where the user gives none.
        default_scope: which weights move, where the user does not say.
    """

    name: str = ""
    default_learning_rate: ClassVar[float] = 3e-4
    default_scope: ClassVar[str] = "all"

    @property
    def negative_kinds(self) -> tuple[str, ...]:
        """Names of the synthetic kinds that are trained on."""
        return ()

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Measure the given net on a first, larger batch: margins, buffers, starts.

        Called once before the first update, never on a resumed run.
        """
        del context, batch

    @abstractmethod
    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the loss of one update; the net is asked once (:meth:`Context.together`)."""

    def rolled_back(self, context: Context) -> None:
        """Start afresh what may have led into a dead end, such as chains; weights are old again."""
        del context

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings, measured margins included, as JSON types."""

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given, as JSON types.

        A checkpoint belongs to one identity: an interrupted run may go on with it. So nothing that
        is measured or made in :meth:`begin` is in it; an objective whose :meth:`settings` hold
        such figures leaves them out here.
        """
        return self.settings()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered: tensors, numbers, text, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        del state

    def __call__(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the loss: any callable of this form may stand in for an objective."""
        return self.loss(context, batch)
