"""The gate's conditions as numbers that an attacker climbs.

Each is >= 0 where its condition is met::

    wrong       max_{j != y} l_j - l_y, l the logits, or calibrated log p where that names the label
    score       (cut - s(x)) / IQR, IQR of the calibration scores: a unit for any score
    confidence  logit(confidence) - logit(its cut), where a certified rule has one
    class       the best logit of a class that has a cut - the best of those that have none
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.attacks.engine import Goal
from ebm_guard.attacks.rows import Examples
from ebm_guard.calibration.calibrators import AutoCalibrator, IsotonicCalibration
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.gate.deciding import NO_DOUBLE, Parts, decide
from ebm_guard.gate.decision import Decision
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.model.isolation import Forward

# What stands for "as unmet as can be" where a number is not finite.
_FAR = 1e6


class GateGoal(Goal):
    """Base of the goals with a gate in the loop.

    Args:
        parts: what decides.
        surrogate: climb by the gradient of the energy where that of the score is needed, for
            scores without one; values and success stay those of the true score.

    Attributes:
        unit: interquartile range of the calibration scores.
    """

    def __init__(self, parts: Parts, *, surrogate: bool = False) -> None:
        self.parts, self.surrogate = parts, surrogate
        spread = torch.quantile(_few(parts.threshold.scores), torch.tensor([0.25, 0.75]).double())
        self.unit = float(spread[1] - spread[0]) or 1.0
        low, high = (-math.inf, math.inf) if parts.rule is None else parts.rule.cuts.tolist()
        self._lowest_confidence, self._highest_score = low, high

    @abstractmethod
    def success(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Tell by the deployed decision whether the attacker has what they want, (B,) bool."""

    def decision(self, output: ClassifierOutput) -> Decision:
        """Decide as the deployed gate does."""
        return decide(self.parts, output.logits, self._features(output))

    def margin(self, output: ClassifierOutput, labels: Tensor) -> Tensor:
        """Compute how far the deployed label is wrong, (B,) float64, > 0 where it is.

        Classes whose inputs are always refused do not help an attacker who wants to be accepted:
        they count like the true class.
        """
        values, useless = self._wrong_classes(output, labels)
        return _best(values, ~useless) - _best(values, useless)

    def conditions(
        self, output: ClassifierOutput, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute how far each condition of acceptance is met, (B,) float64 each, >= 0 if met.

        Args:
            output: of the model.
            labels: (B,) true classes: then the conditions are those of the best *wrong* class,
                also before it is the predicted one. Otherwise climbing towards another class would
                seem to lower the confidence.
        """
        logits = wide(output.logits)
        predicted = logits.argmax(dim=1)
        named = _label(self._label_values(logits))
        if labels is not None:
            values, useless = self._wrong_classes(output, labels)
            named = _label(values.masked_fill(useless, -math.inf))
            ahead = _best(values, ~useless) > _best(values, useless)
            predicted = torch.where(ahead, predicted, named)
        found = {"score": self._score_slack(output, logits, predicted)}
        if self._lowest_confidence > 0:
            found["confidence"] = self._confidence_slack(logits, named)
        closed = self._closed(logits)
        if closed is not None:
            found["class"] = _best(logits, ~closed) - _best(logits, closed)
        return found

    def raw_score(self, output: ClassifierOutput) -> Tensor:
        """Compute the gate's score (B,) float64, with the gradient that is climbed."""
        logits, features = _on_cpu(output.logits), self._features(output)
        features = None if features is None else features.to(logits.device)
        if not self.surrogate:
            score: Tensor = self.parts.score(logits, features)
            return score.double()
        with torch.no_grad():
            value = self.parts.score(logits, features).double()
        return _through(value, formulas.energy(logits).double() * self.unit)

    def _score_slack(self, output: ClassifierOutput, logits: Tensor, classes: Tensor) -> Tensor:
        score = self.raw_score(output)
        cut = self.parts.threshold.cuts(classes).clamp(max=self._highest_score)
        # A class that is always refused has no cut; its own condition leads out of it.
        cut = torch.where(cut > -math.inf, cut, self._loosest(logits))
        return bounded((cut - score) / self.unit)

    def _confidence_slack(self, logits: Tensor, label: Tensor) -> Tensor:
        calibrator, low = self.parts.calibrator, min(self._lowest_confidence, 1 - 1e-12)
        log_p = logits if calibrator is None else calibrator.log_probabilities(logits)
        found = _odds(log_p, label)
        chosen = calibrator.chosen if isinstance(calibrator, AutoCalibrator) else calibrator
        if isinstance(chosen, IsotonicCalibration):
            # Steps have no gradient; they rise with the odds of the plain softmax.
            found = _through(found.detach(), _odds(logits, label))
        return bounded(found - (math.log(low) - math.log1p(-low)))

    def _wrong_classes(self, output: ClassifierOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what names the label (B, C), and the classes that do not help (B, C)."""
        values = self._label_values(wide(output.logits))
        own = torch.zeros_like(values, dtype=torch.bool)
        own.scatter_(1, labels.to(values.device)[:, None], value=True)
        closed = self._closed(values)
        return values, own if closed is None else own | closed

    def _label_values(self, logits: Tensor) -> Tensor:
        calibrator = self.parts.calibrator
        if calibrator is None or calibrator.keeps_prediction:
            return logits
        return calibrator.log_probabilities(logits)

    def _closed(self, values: Tensor) -> Tensor | None:
        """Mark the classes that are always refused, (B, C), or None where there are none."""
        classes = torch.arange(values.shape[1], device=values.device)
        closed = self.parts.threshold.cuts(classes) == -math.inf
        return closed.expand_as(values) if bool(closed.any()) else None

    def _loosest(self, logits: Tensor) -> Tensor:
        classes = torch.arange(logits.shape[1], device=logits.device)
        return self.parts.threshold.cuts(classes).amax().clamp(max=self._highest_score)

    def _features(self, output: ClassifierOutput) -> Tensor | None:
        return output.features if self.parts.score.needs_features else None


def condition_names(parts: Parts) -> tuple[str, ...]:
    """Name the conditions that this gate sets, besides finite numbers."""
    names = ["score"]
    if parts.rule is not None and float(parts.rule.cuts[0]) > 0:
        names.append("confidence")
    if getattr(parts.threshold, "unseen", []):
        names.append("class")
    return tuple(names)


@torch.no_grad()
def standing(
    parts: Parts, forward: Forward, examples: Examples, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Tell which images the deployed label has right, and which the gate accepts, (N,) bool each.

    Images that are both are the denominator of success rates of aims B and C.
    """
    right, accepted = [], []
    for start in range(0, len(examples), batch_size):
        part = examples.select(slice(start, start + batch_size))
        output = forward(part.pixels)
        features = output.features if parts.score.needs_features else None
        decision = decide(parts, output.logits, features)
        right.append((decision.label == part.labels.to(decision.label.device)).cpu())
        accepted.append(decision.accept.cpu())
    return torch.cat(right), torch.cat(accepted)


def hinged(conditions: Tensor) -> Tensor:
    """Sum what is unmet (K, B) -> (B,); where all are met, the smallest."""
    unmet = conditions.clamp(max=0).sum(dim=0)
    return torch.where((conditions >= 0).all(dim=0), conditions.amin(dim=0), unmet)


def _best(values: Tensor, among: Tensor) -> Tensor:
    # A row without such a class: everything is worse than any logit.
    return bounded(values.masked_fill(~among, -math.inf).amax(dim=1))


def _label(values: Tensor) -> Tensor:
    return values.detach().argmax(dim=1)


def _odds(log_p: Tensor, label: Tensor) -> Tensor:
    own = log_p.gather(1, label[:, None])[:, 0]
    rest = torch.logsumexp(log_p.scatter(1, label[:, None], -math.inf), dim=1)
    return own - rest


def _through(value: Tensor, path: Tensor) -> Tensor:
    """Return a tensor with this value and the gradient of ``path``."""
    path = path.to(value.device)
    return value.detach() + (path - path.detach())


def bounded(values: Tensor) -> Tensor:
    """Replace what is not finite, which the gate refuses, by the farthest value."""
    return values.nan_to_num(nan=-_FAR, posinf=-_FAR, neginf=-_FAR)


def wide(logits: Tensor) -> Tensor:
    """Return logits in float64, on the CPU where their device has none."""
    return _on_cpu(logits).double()


def _on_cpu(logits: Tensor) -> Tensor:
    return logits.cpu() if logits.device.type in NO_DOUBLE else logits


def answer_like(objective: Tensor, output: ClassifierOutput) -> Tensor:
    """Return to the device and the dtype that all goals answer in."""
    return objective.float().to(output.logits.device)


def _few(scores: Tensor) -> Tensor:
    # torch.quantile takes at most 2^24 values; every k-th of sorted scores tells as much.
    return scores[:: 1 + len(scores) // 1_000_000].double().cpu()


def check_known(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse an unknown word.

    Raises:
        InvalidInputError: with those that are known.
    """
    if value not in known:
        raise InvalidInputError(
            f"got {what} {value!r}; known are {', '.join(known)}{suggest(value, known)}"
        )
