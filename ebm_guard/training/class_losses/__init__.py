"""What fine-tuning minimises on labels: LeCun's table of losses over joint energies E(x, y).

:func:`make_class_loss` makes one by its registered name. A new class loss is a class made from
:class:`ClassLoss` or :class:`PairLoss`, and a row in the registry.
"""

from __future__ import annotations

from typing import Any

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.class_losses.base import MARGINS, UNLABELLED, ClassLoss, PairLoss


def make_class_loss(class_loss: str | ClassLoss = "nll", **settings: Any) -> ClassLoss:
    """Make a class loss by its registered name, or take a ready one.

    Args:
        class_loss: a name of the family ``class_loss``, or a :class:`ClassLoss`.
        settings: of the class loss, such as ``m``.

    Raises:
        InvalidInputError: an unknown name or setting, or settings for a ready class loss.

    Example:
        >>> make_class_loss("hinge", m=2).settings()
        {'class_loss': 'hinge', 'm': 2.0}
    """
    if isinstance(class_loss, ClassLoss):
        if settings:
            raise InvalidInputError(
                f"got {', '.join(settings)} beside a ready class loss; give these to the class "
                "loss itself, or give its name"
            )
        return class_loss
    if not isinstance(class_loss, str):
        raise InvalidInputError(
            f"got a {type(class_loss).__name__} as class loss; needed a registered name, or an "
            "object made from ClassLoss"
        )
    made: ClassLoss = registry.make("class_loss", class_loss, **settings)
    return made


__all__ = ["MARGINS", "UNLABELLED", "ClassLoss", "PairLoss", "make_class_loss"]
