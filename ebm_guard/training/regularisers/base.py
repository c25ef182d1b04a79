"""What a regulariser is: a term that any objective's loss may carry besides its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ebm_guard.sampling.checks import check_number
from ebm_guard.training.context import Context, TrainingBatch


class Regulariser(ABC):
    """A penalty on the net, with its weight; it remembers nothing between updates.

    Args:
        weight: w >= 0.
        warm_up: share of the run over which the weight rises from 0.

    Attributes:
        name: the registered name.
        needs_unlabelled: whether it acts on images without label alone.

    Raises:
        InvalidInputError: settings out of range.
    """

    name: str = ""
    needs_unlabelled: ClassVar[bool] = False

    def __init__(self, weight: float, warm_up: float = 0.1) -> None:
        self.weight = check_number("weight", weight)
        self.warm_up = check_number("warm_up", warm_up, high=1.0)

    @abstractmethod
    def penalty(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Compute the penalty, a scalar with a gradient, without its weight."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"regulariser": self.name, "weight": self.weight, "warm_up": self.warm_up}
