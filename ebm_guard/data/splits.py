"""Roles of data sets, folds for cross-fitting, disjointness, and matching of class names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ebm_guard.data.imagenet import class_key, match_imagenet
from ebm_guard.errors import DataError, EbmGuardWarning, InvalidInputError

ROLES = ("fit", "calibration", "evaluation", "train", "validation", "ood", "outliers")
# Public test sets hold a few exact duplicates; more than that is the same data twice.
_DUPLICATES_ALLOWED = 0.01


def two_folds(
    n: int, labels: NDArray[np.int64] | None = None, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows in two halves, stratified by label where labels are given.

    Args:
        n: rows, >= 2.
        labels: (n,), or None.
        seed: of the split's own generator.

    Returns:
        Two sorted, disjoint index arrays that cover all rows; sizes differ by at most 1 overall.

    Example:
        >>> first, second = two_folds(5)
        >>> len(first), len(second)
        (3, 2)
    """
    if n < 2:
        raise InvalidInputError(f"got {n} rows; two folds need at least 2")
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None:
        # A stable sort of a random order, dealt out in turn, balances every class to within 1.
        order = order[np.argsort(labels[order], kind="stable")]
    return np.sort(order[0::2]), np.sort(order[1::2])


def check_disjoint(
    first: NDArray[np.uint64], second: NDArray[np.uint64], what: tuple[str, str]
) -> str | None:
    """Compare row hashes of two sets that must not share rows.

    Args:
        first: (N,) row hashes.
        second: (M,) row hashes.
        what: names of the two sets, for the message.

    Returns:
        None, or a warning when a few exact duplicates (at most 1 % of either set) are shared.

    Raises:
        DataError: more than that is shared.

    Example:
        >>> one = np.array([1, 2], dtype=np.uint64)
        >>> check_disjoint(one, one + np.uint64(5), ("a", "b")) is None
        True
    """
    # Rows, and not distinct contents: a set may hold the same row many times.
    inside = [np.isin(one, other) for one, other in ((first, second), (second, first))]
    shared = min(int(part.sum()) for part in inside)
    if shared == 0:
        return None
    if max(float(part.mean()) for part in inside) > _DUPLICATES_ALLOWED:
        raise DataError(
            f"{what[0]} and {what[1]} share {shared} rows; a figure measured on rows that "
            "something was fitted on is too good. Give disjoint data, for example slices of one "
            "file: npz:FILE[:5000] and npz:FILE[5000:]"
        )
    return f"{what[0]} and {what[1]} share {shared} identical rows"


def match_classes(
    data: Sequence[str] | None,
    model: Sequence[str] | None,
    num_classes: int,
    *,
    sorted_names: bool = False,
) -> tuple[NDArray[np.int64] | None, str]:
    """Find how the data's labels map to the model's classes.

    Names are compared first; where none fit, as ImageNet's (WordNet ids and words). With nothing to
    compare the labels are taken as class numbers, with a warning where folders were numbered by
    their sorted names and timm's folder reader would have numbered them otherwise.

    Args:
        data: class names of the data in label order, or None.
        model: class names of the model in logit order, or None.
        num_classes: number of logits.
        sorted_names: the data's classes are folders, numbered by their names sorted as text.

    Returns:
        Mapping from data label to class (None where they are the same), and a sentence that says
        what was compared.

    Raises:
        DataError: more classes in the data than logits, or names that fit only in part.

    Example:
        >>> match_classes(["dog", "cat"], ["cat", "dog"], 2)[0]
        array([1, 0])
    """
    if data is not None and len(data) > num_classes:
        raise DataError(
            f"got data with {len(data)} classes and a model with {num_classes}; needed the same "
            "classes. Select some with npz:FILE?classes=..., or take the right model"
        )
    if data is None:
        return None, "the data has no class names, labels are taken as class numbers"
    if model is None:
        reason = (
            "the model has no class names, labels are taken as class numbers; the count was "
            f"compared: {len(data)} of {num_classes}"
        )
        return _unnamed(data, model, num_classes, reason, sorted_names)
    if [class_key(name) for name in data] == [class_key(name) for name in model]:
        return None, f"{len(data)} class names of data and model agree, in order"
    if len({class_key(name) for name in data}) < len(data):
        return None, "class names of the data occur twice, labels are taken by their order"
    return _by_name(data, model, num_classes, sorted_names)


def _by_name(
    data: Sequence[str], model: Sequence[str], num_classes: int, sorted_names: bool
) -> tuple[NDArray[np.int64] | None, str]:
    place = {class_key(name): number for number, name in enumerate(model)}
    found = [place.get(class_key(name)) for name in data]
    known = [number for number in found if number is not None]
    if not known:
        reason = "the names of data and model share nothing, labels are taken by their order"
        return _unnamed(data, model, num_classes, reason, sorted_names)
    if len(known) < len(found):
        missing = [name for name, number in zip(data, found, strict=True) if number is None]
        raise DataError(
            f"got classes {', '.join(map(repr, missing[:5]))} in the data, which the model does "
            f"not name; it names {', '.join(map(repr, list(model)[:5]))}, ..."
        )
    mapping = np.array(known, dtype=np.int64)
    if np.array_equal(mapping, np.arange(len(mapping))):
        return None, f"{len(mapping)} class names of data and model agree, in order"
    return mapping, f"{len(mapping)} class names agree; labels were re-ordered by name"


def _unnamed(
    data: Sequence[str],
    model: Sequence[str] | None,
    num_classes: int,
    reason: str,
    sorted_names: bool,
) -> tuple[NDArray[np.int64] | None, str]:
    """Match ImageNet's names, or take the labels as they are, for a reason."""
    found = match_imagenet(data, model, num_classes)
    return found or (None, reason + _order_warning(data, sorted_names))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return timm's sorting key: numbers by their value, case ignored.

    Example:
        >>> sorted(["class10", "Class2"], key=natural_key)
        ['Class2', 'class10']
    """
    parts = re.split(r"([0-9]+)", name.lower())
    # Text first, as in timm, whose lists begin with a text and alternate.
    return [(1, int(part), "") if place % 2 else (0, 0, part) for place, part in enumerate(parts)]


def _order_warning(data: Sequence[str], sorted_names: bool) -> str:
    natural = sorted(data, key=natural_key)
    if not sorted_names or natural == list(data):
        return ""
    place = next(row for row, name in enumerate(data) if natural[row] != name)
    text = (
        f"folders are numbered by their names sorted as text (torchvision: class {place} is "
        f"{data[place]!r}), in natural order (timm: class {place} is {natural[place]!r}) the "
        "numbers are others; give --class-map FILE where the model was trained with timm's"
    )
    warnings.warn(text, EbmGuardWarning, stacklevel=4)
    return f"; {text}"
