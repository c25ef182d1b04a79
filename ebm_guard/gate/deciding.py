"""From logits and features to decisions: one function, used live, on stored rows and in fitting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.calibration.calibrators import Calibrator
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate.class_conditional import AnyThreshold
from ebm_guard.gate.decision import ACCEPT, INVALID, REJECT, Decision
from ebm_guard.gate.risk_rule import RiskRule
from ebm_guard.ood import Score
from ebm_guard.predictions import Predictions

# Apple's GPUs have no float64; decisions are made on the CPU there.
NO_DOUBLE = ("mps",)
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Parts:
    """What decides.

    Args:
        score: the OOD score, fitted.
        threshold: the cut or cuts on it.
        calibrator: of the confidence, or None for the plain softmax.
        rule: on confidence and score, with a certified risk, or None.
    """

    score: Score
    threshold: AnyThreshold
    calibrator: Calibrator | None = None
    rule: RiskRule | None = None


@torch.no_grad()
def decide(parts: Parts, logits: Tensor, features: Tensor | None = None) -> Decision:
    """Decide on rows; see :meth:`ebm_guard.gate.Guard.decide`.

    Raises:
        InvalidInputError: not (B, C), or features that are missing or not (B, D).
    """
    formulas.check_logits(logits)
    _check_features(parts.score, logits, features)
    if logits.device.type in NO_DOUBLE:
        logits = logits.cpu()
    if features is not None:
        features = features.to(logits.device)
    used = features if parts.score.needs_features else None
    score = parts.score(logits, used).double()
    valid = torch.isfinite(logits).all(dim=1) & torch.isfinite(score)
    if features is not None:
        valid &= torch.isfinite(features).all(dim=1)
    classes = logits.argmax(dim=1)
    label, confidence = _predicted(parts.calibrator, logits)
    confidence = torch.where(valid, confidence, 0.0)
    certified = torch.ones_like(valid)
    if parts.rule is not None:
        certified = parts.rule.accept(confidence, score)
    accept = valid & parts.threshold.accept(score, classes) & certified
    status = torch.where(accept, ACCEPT, torch.where(valid, REJECT, INVALID)).to(torch.int8)
    return Decision(
        status=status,
        label=torch.where(valid, label, -1),
        confidence=confidence,
        energy=formulas.energy(logits),
        score=score,
        p_value=torch.where(valid, parts.threshold.p_value(score, classes), 0.0),
        logits=logits,
        cut=parts.threshold.cuts(classes),
        certified=certified,
        score_name=parts.score.name,
        rule="" if parts.rule is None else parts.rule.words,
    )


def decide_stored(parts: Parts, predictions: Predictions) -> Decision:
    """Decide on stored rows, in chunks, on the CPU or where the parts are.

    Raises:
        DataError: the score needs logits or features that are not stored.
    """
    reason = parts.score.why_not(predictions)
    if reason is not None:
        raise DataError(f"{parts.score.name} is not available on {predictions.source}: {reason}")
    features = predictions.features if parts.score.needs_features else None
    width = max(predictions.num_classes, 0 if features is None else features.shape[1])
    step = max(1, _CHUNK // width)
    device = parts.threshold.scores.device
    found = []
    for start in range(0, len(predictions), step):
        rows = slice(start, start + step)
        logits = torch.from_numpy(np.array(predictions.logits[rows])).to(device)
        part = None if features is None else torch.from_numpy(np.array(features[rows])).to(device)
        found.append(decide(parts, logits, part))
    return Decision.concatenate(found)


def _predicted(calibrator: Calibrator | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    if calibrator is not None:
        return calibrator.predict(logits)
    log_p, label = formulas.log_probabilities(logits).max(dim=-1)
    return label, log_p.exp()


def _check_features(score: Score, logits: Tensor, features: Tensor | None) -> None:
    if features is None:
        if score.needs_features:
            raise InvalidInputError(
                f"the score {score.name} needs features (B, D), and got none; call guard(x) with "
                "the model, or guard.decide(logits, features) with the input of its last layer"
            )
        return
    if (
        not isinstance(features, Tensor)
        or features.ndim != 2
        or len(features) != len(logits)
        or not features.is_floating_point()
    ):
        shape = getattr(features, "shape", None)
        found = type(features).__name__ if shape is None else f"features of shape {tuple(shape)}"
        dtype = getattr(features, "dtype", "")
        raise InvalidInputError(
            f"got {found} {dtype} for {len(logits)} rows of logits; needed a floating tensor "
            "(B, D) with one row for each"
        )
