"""Make a source of negatives by its name, or around the outliers that a user has."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.sampling.checks import check_number
from ebm_guard.training.negatives.base import Negatives
from ebm_guard.training.negatives.mixed import Mixed
from ebm_guard.training.negatives.outliers import Outliers, PixelRows


def make_negatives(negatives: str | Negatives, **settings: Any) -> Negatives:
    """Make a source of negatives by its registered name, or take a ready one.

    Raises:
        InvalidInputError: an unknown name or setting, a name that needs more than itself, or
            neither a name nor Negatives.

    Example:
        >>> make_negatives("synthetic", kinds=["blend"]).kinds
        ('blend',)
    """
    if isinstance(negatives, Negatives):
        return negatives
    if not isinstance(negatives, str):
        raise InvalidInputError(
            f"got a {type(negatives).__name__} as negatives; needed a registered name, or an "
            "object made from Negatives"
        )
    made: type[Negatives] = registry.get("negatives", negatives).load()
    parameters = inspect.signature(made).parameters
    for name in settings:
        if name not in parameters:
            raise InvalidInputError(
                f"got {name} for the negatives {negatives!r}; they take {', '.join(parameters)}"
                f"{suggest(name, parameters)}"
            )
    missing = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.name not in settings
    ]
    if missing:
        raise InvalidInputError(
            f"got negatives={negatives!r} without {', '.join(missing)}; a name alone says too "
            f"little: give {made.__name__}({', '.join(missing)}=...) itself"
            + (", or the images as outliers" if made is Outliers else "")
        )
    return made(**settings)


def given_negatives(
    outliers: Tensor | PixelRows, others: str | Negatives | None = None, share: float = 0.5
) -> Negatives:
    """Mix the user's outliers with other negatives, so that a few of them do not stand alone.

    Args:
        outliers: pixels (N, C, H, W) in [0, 1], or an object with ``len`` and ``pixels(rows)``.
        others: the other negatives; default: synthetic.
        share: of the user's outliers, in (0, 1].

    Example:
        >>> import torch
        >>> given_negatives(torch.rand(8, 1, 4, 4)).shares
        (0.5, 0.5)
    """
    check_number("share", share, high=1.0, open_low=True)
    if share == 1:
        return Outliers(outliers)
    rest = make_negatives("synthetic" if others is None else others)
    return Mixed([(Outliers(outliers), share), (rest, 1 - share)])
