"""Terms that any objective may carry besides its own, one file each.

A new regulariser is a file here, a class made from :class:`Regulariser`, and a row in the
registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.objectives.base import Objective
from ebm_guard.training.regularisers.base import Regulariser
from ebm_guard.training.regularisers.entropy import Entropy
from ebm_guard.training.regularisers.regularised import Regularised
from ebm_guard.training.regularisers.score_matching import DenoisingScoreMatching

Regularisers = str | Regulariser | Sequence[str | Regulariser]


def make_regulariser(regulariser: str | Regulariser, **settings: Any) -> Regulariser:
    """Make a regulariser by its registered name, or take a ready one.

    Raises:
        InvalidInputError: an unknown name or setting, settings for a ready one, or neither a name
            nor a Regulariser.

    Example:
        >>> make_regulariser("dsm", weight=0.02).weight
        0.02
    """
    if isinstance(regulariser, Regulariser):
        if settings:
            raise InvalidInputError(
                f"got {', '.join(settings)} beside a ready regulariser; give these to it"
            )
        return regulariser
    if not isinstance(regulariser, str):
        raise InvalidInputError(
            f"got a {type(regulariser).__name__} as regulariser; needed a registered name or an "
            "object made from Regulariser"
        )
    made: Regulariser = registry.make("regulariser", regulariser, **settings)
    return made


def regularised(objective: Objective, regularisers: Regularisers) -> Objective:
    """Add regularisers to an objective; without any, return it as it is.

    Raises:
        InvalidInputError: see :func:`make_regulariser`; or one of them twice.

    Example:
        >>> from ebm_guard.training.objectives import make_objective
        >>> regularised(make_objective("margin"), ["dsm"]).name
        'margin'
    """
    given = (regularisers,) if isinstance(regularisers, (str, Regulariser)) else regularisers
    if not isinstance(given, (list, tuple)):
        raise InvalidInputError(
            f"got regularisers={regularisers!r}; needed names or regularisers in a list"
        )
    made = [make_regulariser(each) for each in given]
    names = [each.name for each in made]
    if len(set(names)) < len(names):
        raise InvalidInputError(
            f"got the regularisers {', '.join(names)}; needed each at most once"
        )
    return Regularised(objective, made) if made else objective


__all__ = [
    "DenoisingScoreMatching",
    "Entropy",
    "Regularised",
    "Regulariser",
    "Regularisers",
    "make_regulariser",
    "regularised",
]
