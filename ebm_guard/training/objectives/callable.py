"""A user's own function as an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import item

LossFunction = Callable[[Context, TrainingBatch], LossTerms | Tensor]


class CallableObjective(Objective):
    """Minimise what a function ``(context, batch) -> LossTerms or scalar`` returns.

    The function keeps no state that a checkpoint would hold; an objective that remembers things
    between updates is a class of its own, made from :class:`Objective`.

    Args:
        function: gets :class:`~ebm_guard.training.context.Context` and
            :class:`~ebm_guard.training.context.TrainingBatch`.

    Raises:
        InvalidInputError: not callable.

    Example:
        >>> def brier(context, batch):
        ...     p = context.logits(batch.augmented).softmax(dim=1)
        ...     return (p.gather(1, batch.labels[:, None]) - 1).square().mean()
        >>> CallableObjective(brier).settings()
        {'objective': 'callable', 'function': 'brier'}
    """

    name = "callable"

    def __init__(self, function: LossFunction) -> None:
        if not callable(function):
            raise InvalidInputError(
                f"got a {type(function).__name__} as objective; needed a name, an Objective, or a "
                "function (context, batch) -> LossTerms or scalar tensor"
            )
        self.function = function

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Call the function.

        Raises:
            InvalidInputError: it returned neither LossTerms nor a scalar with a gradient.
        """
        found: object = self.function(context, batch)
        total = found.total if isinstance(found, LossTerms) else found
        if not isinstance(total, Tensor) or total.numel() != 1 or not total.requires_grad:
            shape = f" of shape {tuple(total.shape)}" if isinstance(total, Tensor) else ""
            raise InvalidInputError(
                f"the objective {self._label} returned a {type(found).__name__}{shape}; needed "
                "LossTerms or a scalar tensor that hangs on the logits of context.logits(pixels)"
            )
        if isinstance(found, LossTerms):
            return found
        return LossTerms(total.reshape(()), {"loss": item(total)})

    @property
    def _label(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def settings(self) -> dict[str, Any]:
        """Return the function's name."""
        return {"objective": self.name, "function": self._label}
