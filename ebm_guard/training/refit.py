"""A new guard around the winner, by the settings of the old one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_guard.errors import EbmGuardError, InvalidInputError, first_line
from ebm_guard.gate import Guard
from ebm_guard.gate.class_conditional import ClassConditionalThreshold
from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import Combined, Score
from ebm_guard.training.images import TrainingImages

# Images of the detector's statistics; more change them little and cost a pass each.
MOST_FIT_ROWS = 10_000
_CHUNK = 128
Batches = Iterator[tuple[Tensor, Tensor]]


def fit_like(
    old: Guard | None,
    classifier: EnergyClassifier,
    rows: TrainingImages,
    train: TrainingImages,
    seed: int,
) -> tuple[Guard, str]:
    """Fit a guard by the settings of another, on rows of its own.

    A detector is fitted on training images anew: the features have moved.

    Args:
        old: its settings are taken; None, or one that is not fitted, means the defaults.
        classifier: around the winner.
        rows: labelled, used by nothing else.
        train: training images, for a score on features; those without label are left out.
        seed: of the splits.

    Returns:
        The guard, and a sentence where its certified rule could not be made again, else ''.

    Raises:
        InvalidInputError: too few rows for the promise, or a score of a foreign object.
    """
    settings: dict[str, Any] = {"seed": seed}
    if old is not None and old.threshold is not None:
        settings |= _settings(old)
    score = settings.get("score")
    if isinstance(score, Score) and score.needs_fit:
        few = train.labelled
        if len(few) > MOST_FIT_ROWS:
            order = np.random.default_rng([seed, 47]).permutation(len(few))[:MOST_FIT_ROWS]
            few = few[np.sort(order)]
        settings["fit_data"] = _Loader(train.select(few), classifier)
    try:
        return Guard(classifier).fit(_Loader(rows, classifier), **settings), ""
    except EbmGuardError as error:
        if "risk" not in settings:
            raise
        reason = first_line(error)
    del settings["risk"], settings["risk_assurance"]
    if isinstance(score, Score):
        settings["score"] = fresh_score(score)
    guard = Guard(classifier).fit(_Loader(rows, classifier), **settings)
    return guard, f"The new guard has no certified rule: {reason}."


def fresh_score(score: Score) -> Score:
    """Return a score of the same kind and settings; a detector has to be fitted again.

    Raises:
        InvalidInputError: the score is a foreign object, which we cannot make a second time.

    Example:
        >>> from ebm_guard.ood import make_score
        >>> fresh_score(make_score("knn")).options() == make_score("knn").options()
        True
    """
    if isinstance(score, Combined):
        return Combined([fresh_score(part) for part in score.scores], score.knots)
    if not score.storable:
        raise InvalidInputError(
            f"the guard's score {score.name} is a foreign detector, which cannot be made again for "
            "the new weights. Give the classifier instead of the guard, and fit a guard afterwards"
        )
    if not score.needs_fit:
        made: Score = type(score).from_state(dict(score.state_dict()), score.settings())
        return made.cpu()
    return type(score)(**score.options())


def _settings(old: Guard) -> dict[str, Any]:
    threshold, rule = old.threshold, old.rule
    if threshold is None:
        return {}
    settings: dict[str, Any] = {
        "score": fresh_score(old.score),
        "calibrator": "temperature" if old.calibrator is None else old.calibrator.name,
        "threshold": threshold.method,
        "false_reject_rate": threshold.false_reject_rate,
        "per_class": isinstance(threshold, ClassConditionalThreshold),
        "simultaneous": getattr(threshold, "simultaneous", False),
    }
    if threshold.assurance is not None:
        settings["assurance"] = threshold.assurance
    if rule is not None:
        settings |= {"risk": rule.risk, "risk_assurance": rule.assurance}
    return settings


def _dtype(model: Any) -> torch.dtype:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((part.dtype for part in parameters if part.is_floating_point()), torch.float32)


class _Loader:
    """Batches of the model's own input, in the dtype of its weights; can be read again."""

    def __init__(self, images: TrainingImages, classifier: EnergyClassifier) -> None:
        self._images, self._classifier = images, classifier
        self._dtype = _dtype(classifier.model)

    def __iter__(self) -> Batches:
        labels = self._images.labels
        for at in range(0, len(self._images), _CHUNK):
            rows = np.arange(at, min(at + _CHUNK, len(self._images)), dtype=np.int64)
            inputs = self._classifier.pixels(self._images.pixels(rows)).to(self._dtype)
            if labels is not None:
                yield inputs, labels[torch.from_numpy(rows)]
