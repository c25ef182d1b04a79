"""The table of methods: what exists, from which paper, and where its code lives.

It imports no torch, so that ``ebm-guard list`` and every ``--help`` stay instant. Command-line
choices, report columns and documentation tables render from it. Adding a method means its code
and one row here.
"""

from __future__ import annotations

import inspect
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.registry import (
    attacks,
    calibration,
    class_losses,
    corruptions,
    defences,
    gate,
    ood,
    sampling,
    scores,
    training,
)
from ebm_guard.registry.method import Method

FAMILIES = (
    "score",
    "feature_score",
    "input_score",
    "calibrator",
    "conformal",
    "selective",
    "threshold",
    "calibration_metric",
    "ood_metric",
    "gate",
    "drift",
    "outlier",
    "attack",
    "gate_attack",
    "corruption",
    "defence",
    "sampler",
    "density",
    "objective",
    "negatives",
    "class_loss",
    "regulariser",
)

_METHODS = tuple(
    sorted(
        (
            *scores.METHODS,
            *calibration.METHODS,
            *gate.METHODS,
            *ood.METHODS,
            *attacks.METHODS,
            *corruptions.METHODS,
            *defences.METHODS,
            *sampling.METHODS,
            *training.METHODS,
            *class_losses.METHODS,
        ),
        key=lambda method: FAMILIES.index(method.family),
    )
)


def methods(family: str | None = None) -> tuple[Method, ...]:
    """Return the registered methods, all or of one family, in their documented order.

    Raises:
        InvalidInputError: the family is not one of ``FAMILIES``.

    Example:
        >>> [method.name for method in methods("score")]
        ['energy', 'msp', 'maxlogit', 'gen']
    """
    if family is None:
        return _METHODS
    if family not in FAMILIES:
        raise InvalidInputError(
            f"got family {family!r}; known families are {', '.join(FAMILIES)}"
            f"{suggest(family, FAMILIES)}"
        )
    return tuple(method for method in _METHODS if method.family == family)


def get(family: str, name: str) -> Method:
    """Return one method.

    Raises:
        InvalidInputError: no such family or name; near names are suggested.

    Example:
        >>> get("score", "energy").needs
        ('logits',)
    """
    rows = {method.name: method for method in methods(family)}
    if name not in rows:
        raise InvalidInputError(
            f"got {family} {name!r}; known are {', '.join(rows)}{suggest(name, rows)}; "
            "`ebm-guard list` shows them all"
        )
    return rows[name]


def make(family: str, name: str, **settings: Any) -> Any:
    """Load the class of a method and make one with these settings.

    Raises:
        InvalidInputError: no such family, name or setting; near names are suggested.

    Example:
        >>> make("class_loss", "hinge", m=2).settings()
        {'class_loss': 'hinge', 'm': 2.0}
    """
    made = get(family, name).load()
    known = list(inspect.signature(made).parameters)
    for setting, value in settings.items():
        if setting not in known:
            raise InvalidInputError(
                f"got {setting}={value!r} for the {family.replace('_', ' ')} {name!r}; it takes "
                f"{', '.join(known) or 'no settings'}{suggest(setting, known)}"
            )
    return made(**settings)


__all__ = ["FAMILIES", "Method", "get", "make", "methods"]
