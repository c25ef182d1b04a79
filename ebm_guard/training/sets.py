"""The user's image sets: what they are, and that none of them holds images of another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.data.outliers import GUARD_KINDS, TRAINING_KINDS
from ebm_guard.data.splits import check_disjoint
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.images import TrainingImages
from ebm_guard.training.selection import at_most

# Of sets that are decoded when asked for, only so many are compared with the others.
COMPARED = 5000
# Two different images for each half of an OOD set: fewer give no interval.
LEAST_OOD = 4
# Images that stand for a decoded set in a checkpoint's settings.
_FEW = 64
_ROLES = (
    *("train", "validation", "outliers", "evaluation", "calibration", "fit"),
    *("selection", "acceptance", "refit"),
)


@dataclass(frozen=True)
class Sets:
    """The user's images.

    Args:
        train: labelled.
        validation: labelled.
        outliers: to train on, or None.
        ood: OOD sets by name, to choose and to accept on.
    """

    train: TrainingImages
    validation: TrainingImages
    outliers: TrainingImages | None = None
    ood: Mapping[str, TrainingImages] = field(default_factory=dict)

    def named(self) -> dict[str, TrainingImages]:
        """Return all sets by name."""
        given = {} if self.outliers is None else {"outliers": self.outliers}
        return {"train": self.train, "validation": self.validation, **given, **self.ood}

    def facts(self) -> dict[str, Any]:
        """Say what each set is, as JSON types."""
        return {name: _facts(part) for name, part in self.named().items()}


def check_names(ood: Mapping[str, Any]) -> None:
    """Refuse names of OOD sets that stand for something else.

    Raises:
        InvalidInputError: no text, or the name of another set or of a kind of synthetic outliers.

    Example:
        >>> check_names({"photos": ...})
    """
    for name in ood:
        if not isinstance(name, str) or not name.strip():
            raise InvalidInputError(f"got {name!r} as the name of an OOD set; needed a word")
        if name in (*GUARD_KINDS, *TRAINING_KINDS):
            raise InvalidInputError(
                f"got ood_validation[{name!r}]; {name} is a kind of synthetic outliers, take "
                "another name"
            )
        if name in _ROLES:
            raise InvalidInputError(
                f"got ood_validation[{name!r}]; {', '.join(_ROLES)} are names of other sets, take "
                "another"
            )


def checked_sets(sets: Sets, outlier_rows: int, seed: int) -> tuple[Sets, list[str]]:
    """See that the sets fit together, before any work is done on them.

    All images have one shape; every OOD set has enough different images for two halves; no two
    sets share images. Of a set that is decoded when asked for, at most 5,000 images are compared,
    drawn at random (validation rows: all), and an OOD set keeps no more than can be used.

    Args:
        sets: as the user gave them.
        outlier_rows: most rows of an OOD set in either half.
        seed: of the rows that are compared.

    Returns:
        The sets, and notes on the few duplicates that are let pass.

    Raises:
        InvalidInputError: images of different shapes, or too few of an OOD set.
        DataError: two sets share images.
    """
    check_shapes(sets.named())
    most = max(COMPARED, 2 * outlier_rows)
    sets = replace(sets, ood={name: _fewer(part, most, seed) for name, part in sets.ood.items()})
    for name, part in sets.ood.items():
        found = len(np.unique(part.hashes()))
        if found < LEAST_OOD:
            raise InvalidInputError(
                f"got OOD set {name} ({part.source}) with {len(part):,} images, of which {found} "
                f"are different; needed at least {LEAST_OOD}, two to choose on and two to accept "
                "on, and some hundreds for a useful comparison"
            )
    hashes = {
        name: (part if name == "validation" else _fewer(part, COMPARED, seed)).hashes()
        for name, part in sets.named().items()
    }
    found_notes = (
        check_disjoint(hashes[first], hashes[second], (first, second))
        for first, second in combinations(hashes, 2)
    )
    return sets, [note for note in found_notes if note is not None]


def check_shapes(sets: Mapping[str, TrainingImages]) -> None:
    """See that the images of all sets have one shape.

    Raises:
        InvalidInputError: they have not; with the shape of each set.
    """
    shapes = {name: part.shape for name, part in sets.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InvalidInputError(
            f"got images of different shapes (C, H, W): {found}. Data and outliers go through the "
            "net together; bring all of them to one size (image files: --img-size, image_size=)"
        )


def _fewer(images: TrainingImages, most: int, seed: int) -> TrainingImages:
    return images if images.in_memory else at_most(images, most, seed)


def _facts(images: TrainingImages) -> dict[str, Any]:
    """Say what a set is; of a decoded one by images spread over it."""
    rows = None
    if not images.in_memory:
        rows = np.unique(np.linspace(0, len(images) - 1, _FEW).astype(np.int64))
    labels = images.labels
    return {
        "source": images.source,
        "n": len(images),
        "fingerprint": _fingerprint(images.hashes(rows)),
        "labels": None if labels is None else _fingerprint(labels.numpy()),
    }


def _fingerprint(values: NDArray[Any]) -> str:
    data = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<")))
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]
