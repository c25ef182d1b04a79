"""What fine-tuning minimises, one file for each family.

:func:`make_objective` makes one by its registered name. A new objective is a file here, a class
made from :class:`Objective`, and a row in the registry.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.negatives import given_negatives
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.callable import CallableObjective, LossFunction


def make_objective(
    objective: str | Objective | LossFunction = "margin",
    *,
    outliers: Tensor | Any | None = None,
    **settings: Any,
) -> Objective:
    """Make an objective by its registered name, or take a ready one.

    Args:
        objective: a name of the family ``objective``, an :class:`Objective`, or any function
            ``(context, batch) -> LossTerms or scalar``.
        outliers: images that the user has, pixels (N, C, H, W) in [0, 1] or an object with ``len``
            and ``pixels(rows)``; half of the negatives are then drawn from them.
        settings: of the objective, such as ``weight``.

    Raises:
        InvalidInputError: an unknown name or setting; outliers for an objective without
            negatives; settings or outliers for a ready objective.

    Example:
        >>> make_objective("margin", weight=0.25).settings()["weight"]
        0.25
    """
    if not isinstance(objective, str):
        if settings or outliers is not None:
            given = ", ".join([*settings, *(["outliers"] if outliers is not None else [])])
            raise InvalidInputError(
                f"got {given} beside a ready objective; give these to the objective itself"
            )
        return objective if isinstance(objective, Objective) else CallableObjective(objective)
    if outliers is not None:
        kind = registry.get("objective", objective).load()
        if "negatives" not in inspect.signature(kind).parameters:
            raise InvalidInputError(
                f"got outliers for the objective {objective!r}, which trains on none; use margin "
                "or dat"
            )
        settings["negatives"] = given_negatives(outliers, settings.get("negatives"))
    made: Objective = registry.make("objective", objective, **settings)
    return made


__all__ = ["CallableObjective", "LossFunction", "LossTerms", "Objective", "make_objective"]
