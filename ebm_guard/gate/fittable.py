"""The half of the guard that makes it: fit, certify, recalibrate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ebm_guard.calibration.calibrators import Calibrator
from ebm_guard.errors import DataError, InvalidInputError, NotFittedError
from ebm_guard.gate.artifact import CANARY_ROWS, Canary
from ebm_guard.gate.choice import Choice
from ebm_guard.gate.class_conditional import AnyThreshold, require_threshold
from ebm_guard.gate.deciding import NO_DOUBLE, Parts
from ebm_guard.gate.fitting import (
    Recipe,
    fit_guard,
    fit_rule,
    lineage_entry,
    parts_by_name,
    refit,
)
from ebm_guard.gate.gathering import Gathered, Sample, gather
from ebm_guard.gate.risk_rule import RiskRule
from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import Energy, Score
from ebm_guard.precision import KeepDouble
from ebm_guard.predictions import Predictions

Data = Predictions | Tensor | Iterable[Any]


class Fittable(KeepDouble):
    """Hold the parts of a guard, and fit them; see :class:`ebm_guard.gate.Guard`.

    Args:
        classifier: the wrapped model, or None for a guard on stored logits alone.
    """

    def __init__(self, classifier: EnergyClassifier | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        self.score: Score = Energy()
        self.calibrator: Calibrator | None = None
        self.threshold: AnyThreshold | None = None
        self.rule: RiskRule | None = None
        self.canary: Canary | None = None
        self.facts: dict[str, Any] = {}

    def fit(
        self,
        data: Data,
        *,
        fit_data: Data | None = None,
        score: str | Score | Choice = "energy",
        outliers: Mapping[str, Predictions] | None = None,
        calibrator: str | Calibrator = "temperature",
        false_reject_rate: float = 0.05,
        assurance: float = 0.95,
        threshold: str = "pac",
        per_class: bool = False,
        simultaneous: bool = False,
        risk: float | None = None,
        risk_assurance: float = 0.95,
        canary: bool | Tensor = True,
        seed: int = 0,
        progress: bool = False,
    ) -> Self:
        """Fit the score where it needs it, the calibrator, the threshold and the certified rule.

        A score of the logits has nothing to fit, so calibrator and threshold both use all rows.
        Otherwise each part has rows of its own: without ``fit_data`` one half of ``data`` is for
        the detector; a choice and a certificate take parts of their own too. Rows without labels
        give a gate but no calibrator, with a warning. Scores are those of the raw logits, whatever
        the calibrator.

        Args:
            data: a loader of (inputs, labels) or of inputs, one tensor of inputs, or
                :class:`~ebm_guard.predictions.Predictions`. ID rows that the model was not trained
                on, drawn like the traffic to come.
            fit_data: ID rows for a detector (``vim``, ``knn``, ...), usually training images; none
                of them in ``data``.
            score: a registered score, a :class:`~ebm_guard.ood.Score` (taken as it is if it was
                fitted, and no ``fit_data`` is given), a :class:`~ebm_guard.gate.Choice`, or
                ``auto``: the best on synthetic outliers, see :mod:`ebm_guard.gate.choice`.
            outliers: for ``auto``, predictions by name to choose on; default: made from up to 500
                images of ``data``.
            calibrator: a registered calibrator, or a
                :class:`~ebm_guard.calibration.calibrators.Calibrator`, which is fitted here.
            false_reject_rate: target for the share of ID refused.
            assurance: probability that the target is met (PAC).
            threshold: ``pac`` or ``marginal``.
            per_class: one cut for each predicted class; small classes share one. See
                :class:`~ebm_guard.gate.ClassConditionalThreshold`.
            simultaneous: with ``per_class``, the assurance is for all groups at once.
            risk: certify that at most this share of the accepted predictions is wrong, by refusing
                more; see :meth:`certify`. Takes a part of the rows, which need labels.
            risk_assurance: probability that ``risk`` is met.
            canary: keep 8 inputs with their logits in the artefact, to catch a changed model; a
                tensor gives these inputs (for ``Predictions``, which hold none), False keeps none.
            seed: of the split of the rows.
            progress: show a progress bar.

        Returns:
            Itself.

        Raises:
            InvalidInputError: too few rows for a promise or for the calibrator (the error names
                the number needed), or settings that do not go together.
            DataError: the score cannot be fitted on these rows, with the reason; or shared rows.
            ModelOutputError: the model gives NaN or infinite logits for some rows.
            UnsupportedModelError: the model does not give logits.
        """
        recipe = Recipe(
            score=score,
            calibrator=calibrator,
            threshold=threshold,
            false_reject_rate=false_reject_rate,
            assurance=assurance,
            per_class=per_class,
            simultaneous=simultaneous,
            risk=risk,
            risk_assurance=risk_assurance,
            seed=seed,
        )
        stored = isinstance(data, Predictions)
        wanted = recipe.is_auto and outliers is None and not stored
        sample = Sample(np.random.default_rng(seed)) if wanted else None
        rows = self._gather(data, recipe.needs_features, sample, progress)
        detector = None
        if fit_data is not None:
            detector = self._gather(fit_data, True, None, progress).predictions
        fitted = fit_guard(rows, detector, outliers, recipe, self.classifier)
        self._set(fitted.parts, fitted.facts)
        inputs = canary if isinstance(canary, Tensor) else rows.first
        self.canary = None if canary is False or inputs is None else self._make_canary(inputs)
        return self._beside_model()

    def certify(
        self, data: Data, *, risk: float, assurance: float = 0.95, progress: bool = False
    ) -> Self:
        """Add a rule that certifies the share of wrong predictions among the accepted.

        Accept then needs score <= threshold, and confidence and score beyond certified cuts. The
        two promises stay apart: the threshold's is about how many ID inputs it accepts by itself,
        the rule's about how many of the accepted are wrong. The rule lowers the coverage.

        Args:
            data: labelled ID rows that no part of the guard has seen.
            risk: largest share of wrong predictions among the accepted, in (0, 1).
            assurance: probability of that, over the draw of the rows.
            progress: show a progress bar.

        Returns:
            A new guard; this one is not changed.

        Raises:
            InvalidInputError: nothing can be certified, with the reason and the rows needed.
            DataError: rows without labels, or those that the guard was fitted on.
        """
        parts = self._parts()
        new = self._gather(data, self.score.needs_features, None, progress).predictions
        self._check_classes(new.num_classes)
        self._refuse_seen(new, "a certificate")
        rule = fit_rule(parts, new, risk, assurance)
        return self._derived(replace(parts, rule=rule), {}, lineage_entry(new, ["rule"]))

    def recalibrate(
        self,
        data: Data,
        *,
        calibrator: str | Calibrator | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Self:
        """Fit calibrator and threshold anew on new ID rows; score, detector and model stay.

        For traffic that has moved while the model has not. The new rows must again be drawn like
        the traffic to come: a random sample of *all* of it that people found familiar, and not what
        the old gate accepted, which would make each new cut stricter than the last.

        Args:
            data: as in :meth:`fit`, in the settings of this guard; one with a certified rule needs
                labels, and gives half of the rows to a new certificate.
            calibrator: default: the kind that the guard has.
            seed: of that split.
            progress: show a progress bar.

        Returns:
            A new guard; this one is not changed. ``facts["lineage"]`` tells the history.

        Raises:
            InvalidInputError: too few rows for the promise.
            DataError: these are the rows that the detector was fitted on, or its score chosen on.
        """
        old = self._parts()
        new = self._gather(data, self.score.needs_features, None, progress).predictions
        self._check_classes(new.num_classes)
        self._refuse_detector_rows(new)
        parts, rows = refit(old, new, calibrator, seed)
        facts = {
            "n": len(new),
            "dtype": new.dtype,
            "source": new.source,
            "fingerprint": new.fingerprint,
            "labelled": new.labels is not None,
            "rows": {name: len(part) for name, part in rows.items()},
        }
        return self._derived(parts, facts, lineage_entry(new, parts_by_name(parts)))

    def _parts(self) -> Parts:
        threshold = require_threshold(self.threshold)
        return Parts(self.score, threshold, self.calibrator, self.rule)

    def _set(self, parts: Parts, facts: Mapping[str, Any]) -> None:
        self.score, self.threshold = parts.score, parts.threshold
        self.calibrator, self.rule = parts.calibrator, parts.rule
        self.facts = dict(facts)

    def _derived(self, parts: Parts, facts: Mapping[str, Any], entry: dict[str, Any]) -> Self:
        """Make a new guard around the same model, with one more entry in its history."""
        guard = type(self)(self.classifier)
        lineage = [*self.facts.get("lineage", []), entry]
        guard._set(parts, {**self.facts, **facts, "lineage": lineage})
        guard.canary = self.canary
        return guard._beside_model()

    def _gather(
        self, data: Data, features: bool, sample: Sample | None, progress: bool
    ) -> Gathered:
        classifier = None if isinstance(data, Predictions) else self._require_classifier()
        return gather(data, classifier, features=features, sample=sample, progress=progress)

    def _refuse_seen(self, new: Predictions, what: str) -> None:
        self._refuse_detector_rows(new)
        seen = {entry["fingerprint"] for entry in self.facts.get("lineage", [])}
        if new.fingerprint in seen | {self.facts.get("fingerprint")}:
            raise DataError(
                f"{new.source} holds the rows that this guard was fitted on; {what} needs others. "
                "Split the data, or use guard.fit(data, risk=...)"
            )

    def _refuse_detector_rows(self, new: Predictions) -> None:
        for part in ("fit", "auto"):
            known = self.facts.get(part)
            if known is not None and known["fingerprint"] == new.fingerprint:
                raise DataError(
                    f"{new.source} holds the rows that the score was fitted or chosen on; a "
                    "threshold or a certificate needs others"
                )

    def _check_classes(self, found: int) -> None:
        expected = self.facts.get("num_classes", found)
        if found != expected:
            raise InvalidInputError(
                f"got logits of {found} classes; this guard was fitted on {expected}"
            )

    def _make_canary(self, inputs: Tensor) -> Canary:
        classifier = self._require_classifier()
        inputs = inputs[:CANARY_ROWS].detach().cpu().clone()
        with torch.no_grad():
            logits = classifier(inputs)
        return Canary(inputs, logits.cpu(), logits.device.type)

    def _beside_model(self) -> Self:
        """Keep the fitted tensors where the model is, so that a call copies nothing."""
        device = None if self.classifier is None else self.classifier.device
        return self if device is None or device.type in NO_DOUBLE else self.to(device)

    def _require_classifier(self) -> EnergyClassifier:
        if self.classifier is None:
            raise NotFittedError(
                "this guard holds no model; load it with Guard.load(path, model), or give logits "
                "to guard.decide(logits)"
            )
        return self.classifier
