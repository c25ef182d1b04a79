"""ImageNet's class names: WordNet ids and words, in timm's order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.model.loading import import_timm

_WORDNET_ID = re.compile(r"n[0-9]{8}")
_NUM_CLASSES = 1000
# Models spell a few of the thousand names in their own way.
_AGREE = 0.9


def class_key(name: str) -> str:
    """Return a class name for comparison: case, underscores and outer blanks do not count.

    Example:
        >>> class_key("Red_Fox ")
        'red fox'
    """
    return name.strip().lower().replace("_", " ")


def match_imagenet(
    data: Sequence[str], model: Sequence[str] | None, num_classes: int
) -> tuple[NDArray[np.int64], str] | None:
    """Match the data's names to an ImageNet model's classes through timm's ``ImageNetInfo``.

    The data's names are WordNet ids (``n01440764``), timm's descriptions (``tench, Tinca tinca``)
    or one of their words where only one class has it.

    Args:
        data: class names of the data in label order.
        model: class names of the model, or None: then ImageNet's order is assumed.
        num_classes: number of logits.

    Returns:
        The class of each label and a sentence, or None where these are not ImageNet's names, or the
        model's names are others.

    Raises:
        InvalidInputError: some WordNet ids are to be matched, and timm cannot be imported.
    """
    by_id = all(_WORDNET_ID.fullmatch(class_key(name)) for name in data)
    if num_classes != _NUM_CLASSES and not by_id:
        return None
    try:
        import_timm()
    except InvalidInputError:
        # All ids, sorted, are in the model's order anyway.
        if by_id and len(data) < num_classes:
            raise
        return None
    subset, table = _imagenet(num_classes)
    places = [table.get(class_key(name)) for name in data]
    found = [place for place in places if place is not None]
    if len(set(found)) < len(data):
        return None
    what = "WordNet ids" if by_id else "names"
    sentence = f"{len(data)} {what} of the data are {subset} classes, by timm's ImageNetInfo"
    if model is None:
        sentence += "; the model names no classes and is taken to have their order"
        return np.array(found, dtype=np.int64), sentence
    order = _order(model, table)
    if order is None or any(place not in order for place in found):
        return None
    mapping = np.array([order[place] for place in found], dtype=np.int64)
    return mapping, f"{sentence}, and so are the model's names"


def _imagenet(num_classes: int) -> tuple[str, dict[str, int]]:
    """Return the name of the ImageNet of this size and its names, or nothing."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return "", {}
    info: Any = ImageNetInfo(subset)
    return str(subset), _table(info.label_names(), info.label_descriptions())


def _table(ids: Sequence[str], descriptions: Sequence[str]) -> dict[str, int]:
    """Map ids, descriptions and their words to class numbers; what two classes share is left out.

    "crane" is a bird and a machine.
    """
    owners: dict[str, set[int]] = {}
    for number, words in enumerate(descriptions):
        for word in {class_key(part) for part in (words, *words.split(","))}:
            owners.setdefault(word, set()).add(number)
    table = {word: next(iter(numbers)) for word, numbers in owners.items() if len(numbers) == 1}
    return table | {name: number for number, name in enumerate(ids)}


def _order(model: Sequence[str], table: dict[str, int]) -> dict[int, int] | None:
    """Map ImageNet's class numbers to the model's, or None where its names are others."""
    places = [table.get(class_key(name)) for name in model]
    known = [(place, number) for number, place in enumerate(places) if place is not None]
    if len(known) < _AGREE * len(model):
        return None
    if all(place == number for place, number in known):
        return {number: number for number in range(len(model))}
    return dict(known) if len({place for place, _ in known}) == len(known) else None
