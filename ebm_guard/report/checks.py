"""What is checked before anything is measured: sets that fit each other, rows that are enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ebm_guard.calibration.metrics import ece
from ebm_guard.data.splits import check_disjoint
from ebm_guard.errors import DataError, InvalidInputError, ModelOutputError
from ebm_guard.gate import Guard
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted
from ebm_guard.report.record import Warned

RESERVED = ("evaluation", "calibration", "fit")
_SMALL = 2000
_PER_CLASS = 5


def check_sets(
    evaluation: Predictions,
    ood: Mapping[str, Predictions],
    calibration: Predictions | None,
    fit: Predictions | None,
    guard: Guard | None,
) -> list[Warned]:
    """Refuse sets that do not fit each other, and warn of what a reader must know.

    Raises:
        ModelOutputError: NaN or infinite logits.
        DataError: other numbers of classes, or rows of the evaluation in another role.
        InvalidInputError: a bad name of an OOD set.
    """
    warned = []
    roles = {"calibration": calibration, "fit": fit}
    others = {**ood, **{name: part for name, part in roles.items() if part is not None}}
    for name, part in {"evaluation": evaluation, **others}.items():
        _refuse_invalid(name, part)
        if part.num_classes != evaluation.num_classes or part.kind != evaluation.kind:
            raise DataError(
                f"{name} has {part.num_classes} classes ({part.kind}), evaluation has "
                f"{evaluation.num_classes} ({evaluation.kind}); needed outputs of one model"
            )
        if part.skipped:
            message = f"{len(part.skipped)} unreadable images of {name} were skipped"
            warned.append(Warned("skipped_images", message))
        if part.notes.get("limit"):
            message = f"{name} was limited to {len(part)} rows: these are not the full figures"
            warned.append(Warned("limited", message))
    for name in ood:
        if name in RESERVED or not name.replace("_", "").replace("-", "").isalnum():
            raise InvalidInputError(
                f"got OOD set name {name!r}; needed letters, digits, _ and -, and none of "
                f"{', '.join(RESERVED)}"
            )
    for name, part in others.items():
        warned += _overlap(evaluation, part, ("evaluation", name))
    if calibration is not None and fit is not None:
        warned += _overlap(calibration, fit, ("calibration", "fit"))
    fitted = evaluation.num_classes if guard is None else guard.facts.get("num_classes")
    if fitted != evaluation.num_classes:
        raise DataError(
            f"evaluation has {evaluation.num_classes} classes; the guard was fitted on {fitted}"
        )
    if guard is not None and guard.facts.get("fingerprint") == evaluation.fingerprint:
        raise DataError(
            "the guard was fitted on the very rows it is now evaluated on; give evaluation data "
            "that it has not seen"
        )
    return warned


def _overlap(first: Predictions, second: Predictions, names: tuple[str, str]) -> list[Warned]:
    if first.hashes is None or second.hashes is None:
        return []
    message = check_disjoint(first.hashes, second.hashes, names)
    return [] if message is None else [Warned("shared_rows", message)]


def _refuse_invalid(name: str, part: Predictions) -> None:
    bad = part.invalid
    if part.kind == "logits" and bad.any():
        first = part.names([int(bad.argmax())])[0]
        raise ModelOutputError(
            f"{int(bad.sum())} of {len(part)} rows of {name} have NaN or infinite logits (first: "
            f"{first}); no metric is honest on the rest. Look for overflow in half precision or "
            "broken inputs"
        )


def size_warnings(evaluation: Predictions, protocol: Fitted) -> list[Warned]:
    """Say where the rows are too few for a figure."""
    if len(evaluation) >= _SMALL or protocol.after is None:
        return []
    null95 = ece(protocol.after).null95
    return [
        *_few_per_class(evaluation),
        Warned(
            "small_n",
            f"{len(evaluation):,} evaluation rows are few for ECE and the reliability diagram. A "
            f"perfectly calibrated model with these confidences would show an ECE of up to "
            f"{null95:.1%} (95 % of cases): a lower ECE says nothing. Most bins hold few rows, so "
            "their bars are wide, and below about 2,000 rows the intervals of calibration errors "
            "may cover the truth in less than 95 % of cases",
        ),
    ]


def _few_per_class(evaluation: Predictions) -> list[Warned]:
    if evaluation.labels is None:
        return []
    fewest = int(np.unique(evaluation.labels, return_counts=True)[1].min())
    if fewest >= _PER_CLASS:
        return []
    return [
        Warned(
            "few_per_class",
            f"a class of the evaluation rows has {fewest} image{'' if fewest == 1 else 's'}: "
            "figures per class say nothing, and detectors cannot be fitted on these rows",
        )
    ]
