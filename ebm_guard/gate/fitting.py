"""What ``Guard.fit`` does: which rows serve which part, and the parts in their order.

Each part is fitted on rows that the parts before it have not seen where its promise needs that:
the detector, then the choice of the score, then the threshold (with the calibrator, which does not
touch the score), then the certificate.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.calibrators import Calibrator, make_calibrator
from ebm_guard.data.splits import check_disjoint
from ebm_guard.errors import (
    DataError,
    EbmGuardWarning,
    InvalidInputError,
    NotFittedError,
    TooFewRowsError,
)
from ebm_guard.gate.choice import MOST_IMAGES, Choice, choose_score, synthetic_outliers
from ebm_guard.gate.class_conditional import AnyThreshold, ClassConditionalThreshold
from ebm_guard.gate.deciding import Parts, decide_stored
from ebm_guard.gate.gathering import Gathered, Rows, deal
from ebm_guard.gate.risk_rule import RiskRule
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import Score, make_score
from ebm_guard.predictions import Predictions

AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """What a guard is to be made of; see :meth:`ebm_guard.gate.Guard.fit` for each.

    Args:
        score: name, score, choice, or ``auto``.
        calibrator: name or calibrator.
        threshold: ``pac`` or ``marginal``.
        false_reject_rate: target for the share of ID refused.
        assurance: probability that it is met.
        per_class: one cut for each predicted class.
        simultaneous: for all of them at once.
        risk: share of wrong predictions among the accepted to certify, or None.
        risk_assurance: probability that it is met.
        seed: of the split of the rows.
    """

    score: str | Score | Choice = "energy"
    calibrator: str | Calibrator = "temperature"
    threshold: str = "pac"
    false_reject_rate: float = 0.05
    assurance: float = 0.95
    per_class: bool = False
    simultaneous: bool = False
    risk: float | None = None
    risk_assurance: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if self.simultaneous and not self.per_class:
            raise InvalidInputError(
                "got simultaneous=True without per_class=True; one cut has one promise. Leave it "
                "out, or ask for per_class=True"
            )
        if self.per_class and self.threshold != "pac":
            raise InvalidInputError(
                f"got per_class=True with threshold={self.threshold!r}; cuts by predicted class "
                "are PAC cuts, because a shared group of small classes has no exact marginal "
                "promise. Use threshold='pac'"
            )

    @property
    def is_auto(self) -> bool:
        """Whether the score is still to be chosen."""
        return isinstance(self.score, str) and self.score == AUTO

    def made(self) -> Score:
        """Return the score; a name gives a new one."""
        if isinstance(self.score, Choice):
            return self.score.score
        return make_score(self.score) if isinstance(self.score, str) else self.score

    @property
    def needs_features(self) -> bool:
        """Whether the pass over the data must keep features."""
        return self.is_auto or self.made().needs_features


@dataclass(frozen=True)
class Fitted:
    """What was made.

    Args:
        parts: what decides.
        facts: what it was fitted on, as JSON types.
    """

    parts: Parts
    facts: dict[str, Any]


def fit_guard(
    rows: Gathered,
    fit_rows: Predictions | None,
    outliers: Mapping[str, Predictions] | None,
    recipe: Recipe,
    classifier: EnergyClassifier | None,
) -> Fitted:
    """Fit all parts of a guard.

    Raises:
        InvalidInputError: too few rows, or settings that do not fit the data.
        DataError: the score cannot be fitted on these rows, or rows are shared.
    """
    data = rows.predictions
    if fit_rows is not None:
        shared = check_disjoint(hashes(data), hashes(fit_rows), ("data", "fit_data"))
        if shared is not None:
            warnings.warn(shared, EbmGuardWarning, stacklevel=4)
    if outliers is not None and not recipe.is_auto:
        raise InvalidInputError("got outliers= with a score that is not 'auto'; leave one out")
    if isinstance(recipe.score, Choice) and recipe.score.fingerprint == data.fingerprint:
        raise DataError(
            f"{data.source} holds the rows on which the score was chosen; its threshold needs "
            "others. Give rows of their own to each"
        )
    score = None if recipe.is_auto else recipe.made()
    ready = None if score is None or fit_rows is not None else _ready(score, data)
    fresh = ready is None
    wants_fit = fresh and fit_rows is None and (not recipe.is_auto or data.features is not None)
    if not recipe.is_auto and fit_rows is not None and not (score and score.needs_fit):
        raise InvalidInputError(
            f"got fit_data with the score {score.name if score else ''}, which has nothing to fit; "
            "leave fit_data out"
        )
    split = _split(rows, recipe, wants_fit=wants_fit, with_images=outliers is None)
    detector = fit_rows
    if "fit" in split.rows:
        detector = _selected(data, split.rows["fit"])
    choice = recipe.score if isinstance(recipe.score, Choice) else None
    try:
        if score is None:
            choice = _choose(rows, split, outliers, detector, classifier, recipe)
            score = choice.score
        elif ready is not None:
            score = ready
        elif detector is not None:
            _fit_score(score, detector)
        parts = fit_parts(data, split.rows, score, recipe)
    except TooFewRowsError as error:
        raise _explained(error, data, split) from None
    return Fitted(parts, _facts(data, detector if score.needs_fit else None, parts, split, choice))


def fit_parts(data: Predictions, rows: Mapping[str, Rows], score: Score, recipe: Recipe) -> Parts:
    """Fit threshold and calibrator, and where asked for the certified rule, for a fitted score."""
    score.check_kind(data)
    reason = score.why_not(data)
    if reason is not None:
        raise DataError(f"a gate on {score.name} is not available on {data.source}: {reason}")
    part = _selected(data, rows["calibration"])
    threshold = fit_threshold(part, score, recipe)
    parts = Parts(score, threshold, _fit_calibrator(part, recipe.calibrator))
    if recipe.risk is None:
        return parts
    held_out = _selected(data, rows["certificate"])
    return replace(parts, rule=fit_rule(parts, held_out, recipe.risk, recipe.risk_assurance))


def fit_threshold(part: Predictions, score: Score, recipe: Recipe) -> AnyThreshold:
    """Choose the cut or cuts on calibration rows."""
    scores = score.of(part)
    if not recipe.per_class:
        return Threshold.fit(scores, recipe.threshold, recipe.false_reject_rate, recipe.assurance)
    return ClassConditionalThreshold.fit(
        scores,
        np.asarray(part.logits).argmax(axis=1),
        part.num_classes,
        recipe.false_reject_rate,
        recipe.assurance,
        recipe.simultaneous,
    )


def fit_rule(parts: Parts, held_out: Predictions, risk: float, assurance: float) -> RiskRule:
    """Certify a rule on rows that no other part has seen.

    Raises:
        DataError: the rows have no labels.
        InvalidInputError: nothing can be certified.
    """
    labels = held_out.require_labels("a certificate of the risk")
    decision = decide_stored(replace(parts, rule=None), held_out)
    return RiskRule.fit(
        decision.confidence.cpu().numpy(),
        decision.score.cpu().numpy(),
        decision.label.cpu().numpy() != labels,
        decision.accept.cpu().numpy(),
        risk=risk,
        assurance=assurance,
        score_name=parts.score.name,
    )


def lineage_entry(data: Predictions, changed: list[str]) -> dict[str, Any]:
    """Return one entry of a guard's history, as JSON types."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "changed": changed,
        "n": len(data),
        "source": data.source,
        "fingerprint": data.fingerprint,
    }


def parts_by_name(parts: Parts) -> list[str]:
    """Name the parts that a guard has besides its score."""
    named = {"calibrator": parts.calibrator, "threshold": parts.threshold, "rule": parts.rule}
    return [name for name, part in named.items() if part is not None]


def hashes(predictions: Predictions) -> NDArray[np.uint64]:
    """Return the hashes of the rows' content."""
    return predictions.hashes if predictions.hashes is not None else np.empty(0, dtype=np.uint64)


@dataclass(frozen=True)
class _Split:
    """Rows by part, and the inputs of the rows that the score is chosen on."""

    rows: dict[str, Rows]
    images: Any = None


def _split(rows: Gathered, recipe: Recipe, *, wants_fit: bool, with_images: bool) -> _Split:
    data = rows.predictions
    names = ["calibration"]
    names += ["certificate"] if recipe.risk is not None else []
    names += ["fit"] if wants_fit else []
    if not recipe.is_auto:
        return _Split(deal(data, names, recipe.seed))
    most = max(1, len(data) // (len(names) + 1))
    if not with_images:
        order = np.random.default_rng(recipe.seed).permutation(len(data))
        taken, images = np.sort(order[: min(most, MOST_IMAGES)]).astype(np.int64), None
    elif rows.sample is None:
        raise InvalidInputError(
            "got score='auto' on stored predictions, which hold no images to make outliers from; "
            "give outliers= (Predictions on outliers made from other images than these rows), or "
            "a loader of images"
        )
    else:
        taken, images = rows.sample.take(most)
    return _Split(deal(data, names, recipe.seed, taken) | {"choice": taken}, images)


def _choose(
    rows: Gathered,
    split: _Split,
    outliers: Mapping[str, Predictions] | None,
    detector: Predictions | None,
    classifier: EnergyClassifier | None,
    recipe: Recipe,
) -> Choice:
    inside = rows.predictions.select(split.rows["choice"])
    if outliers is None and classifier is not None:
        features = rows.predictions.features is not None
        outliers = synthetic_outliers(
            classifier, split.images, inside.labels, features=features, seed=recipe.seed
        )
    return choose_score(inside, outliers or {}, detector)


def _ready(score: Score, data: Predictions) -> Score | None:
    """Return a score to be used as it is (nothing to fit, or fitted by the caller), or None."""
    if not score.needs_fit:
        return score
    if score.why_not(data) is not None:
        return None
    twin = _twin(score)
    try:
        twin.of(data.select(slice(0, 1)))
    except NotFittedError:
        return None
    return twin


def _fit_score(score: Score, detector: Predictions) -> None:
    reason = score.why_not_fit(detector)
    if reason is not None:
        raise DataError(
            f"{score.name} cannot be fitted on {len(detector):,} rows of {detector.source}: "
            f"{reason}. Give fit_data= (usually training images), or use a score of the logits "
            "(energy, msp, maxlogit, gen)"
        )
    score.fit(detector)


def _fit_calibrator(part: Predictions, chosen: str | Calibrator) -> Calibrator | None:
    calibrator = make_calibrator(chosen) if isinstance(chosen, str) else chosen
    if part.labels is None:
        warnings.warn(
            "no labels were given, so no temperature or other calibrator is fitted: confidence is "
            "the plain softmax probability. The gate itself needs no labels",
            EbmGuardWarning,
            stacklevel=5,
        )
        return None
    return calibrator.fit(part.logits, part.labels, part.sample_weight)


def _selected(data: Predictions, rows: Rows) -> Predictions:
    # All rows, which may be memory-mapped, are not copied.
    return data if len(rows) == len(data) else data.select(rows)


def _explained(error: TooFewRowsError, data: Predictions, split: _Split) -> TooFewRowsError:
    if len(split.rows) < 2:
        return error
    counts = ", ".join(f"{len(rows):,} for {name}" for name, rows in split.rows.items())
    rest = "; fit_data= spares the rows of `fit`" if "fit" in split.rows else ""
    return TooFewRowsError(f"{error}. The {len(data):,} rows were split: {counts}{rest}")


def _facts(
    data: Predictions,
    detector: Predictions | None,
    parts: Parts,
    split: _Split,
    choice: Choice | None,
) -> dict[str, Any]:
    width = data.features.shape[1] if data.features is not None else None
    return {
        "n": len(data),
        "num_classes": data.num_classes,
        "classes": None if data.classes is None else list(data.classes),
        "dtype": data.dtype,
        "source": data.source,
        "fingerprint": data.fingerprint,
        "labelled": data.labels is not None,
        "features": width if parts.score.needs_features else None,
        "rows": {name: len(rows) for name, rows in split.rows.items()},
        "fit": None
        if detector is None
        else {
            "n": len(detector),
            "source": detector.source,
            "fingerprint": detector.fingerprint,
        },
        "auto": None if choice is None else choice.to_dict(),
        "lineage": [lineage_entry(data, ["score", *parts_by_name(parts)])],
    }


def refit(
    old: Parts, data: Predictions, calibrator: str | Calibrator | None, seed: int
) -> tuple[Parts, dict[str, Rows]]:
    """Fit all but the score anew, by the settings of the old parts; the old ones stay as they are.

    Returns:
        The new parts, and which rows served which.
    """
    threshold, rule = old.threshold, old.rule
    kept = "temperature" if old.calibrator is None else old.calibrator.name
    assurance = {} if threshold.assurance is None else {"assurance": threshold.assurance}
    certified = {} if rule is None else {"risk": rule.risk, "risk_assurance": rule.assurance}
    recipe = Recipe(
        score=old.score,
        calibrator=calibrator or kept,
        threshold=threshold.method,
        false_reject_rate=threshold.false_reject_rate,
        per_class=isinstance(threshold, ClassConditionalThreshold),
        simultaneous=getattr(threshold, "simultaneous", False),
        seed=seed,
        **assurance,
        **certified,
    )
    names = ["calibration"] if rule is None else ["calibration", "certificate"]
    rows = deal(data, names, seed)
    return fit_parts(data, rows, _twin(old.score), recipe), rows


def _twin(score: Score) -> Score:
    """Return a second module on the CPU, so that moving one guard leaves the other."""
    if not score.storable:
        return score
    twin: Score = type(score).from_state(dict(score.state_dict()), score.settings())
    return twin.cpu()
