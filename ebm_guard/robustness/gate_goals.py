"""Goals of an attacker of a classifier *with its gate*: flip and accepted, refused, OOD accepted.

Success is :func:`ebm_guard.gate.deciding.decide` itself: invalid rows are refused, cuts are those
of the predicted class, the certified rule has its say, and the label is the calibrator's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_guard.attacks.engine import differentiate
from ebm_guard.attacks.goals import cross_entropy
from ebm_guard.attacks.rows import Examples
from ebm_guard.gate.deciding import Parts
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.robustness.gate_conditions import (
    GateGoal,
    answer_like,
    bounded,
    check_known,
    condition_names,
    hinged,
    wide,
)

STRATEGIES = ("selective", "orthogonal", "joint", "run_on")


class AcceptedFlip(GateGoal):
    """Aim B: another label, and accepted.

    The objective is the sum of min(c, 0) over the conditions c, or the smallest c where all are
    met (``run_on``: the cross-entropy of the true class).

    Args:
        parts: what decides.
        strategy: what is followed. ``selective``: per image the gradient of one unmet condition,
            ``wrong`` first, then the one that is most unmet. ``orthogonal``: the same, with its
            component along the other's gradient taken out, g - (g·h / h·h) h, so that what is held
            is lost more slowly; two backward passes. ``joint``: the gradient of the objective.
            ``run_on``: the cross-entropy, past the first flip: on ordinary nets it lowers the
            energy by itself.
        surrogate: see :class:`GateGoal`.

    Raises:
        InvalidInputError: unknown strategy.

    References:
        Bryniarski et al., Evading Adversarial Example Detection Defenses with Orthogonal Projected
        Gradient Descent, 2021 (arXiv 2106.15023), sections 4.1 and 4.2. Differs: any number of
        conditions; where two gradients are parallel nothing is taken out; success is the deployed
        decision; ``joint`` and ``run_on`` are there because no strategy is the strongest on all
        nets (see :func:`gate_plan`).
    """

    name = "accepted_flip"

    def __init__(
        self, parts: Parts, strategy: str = "selective", *, surrogate: bool = False
    ) -> None:
        super().__init__(parts, surrogate=surrogate)
        check_known("strategy", strategy, STRATEGIES)
        self.strategy = strategy

    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute what is climbed, (B,)."""
        if self.strategy == "run_on":
            values = self._label_values(wide(output.logits))
            return answer_like(cross_entropy(values, examples.labels.to(values.device)), output)
        return answer_like(hinged(self._all(output, examples)), output)

    def success(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Tell whether the deployed label is wrong and accepted, (B,) bool."""
        decision = self.decision(output)
        found = decision.accept & (decision.label != examples.labels.to(decision.label.device))
        return found.to(output.logits.device)

    def gradient(
        self, output: ClassifierOutput, pixels: Tensor, examples: Examples
    ) -> tuple[Tensor, Tensor]:
        """Return the objective (B,) and the direction of the strategy (B, C, H, W)."""
        if self.strategy not in ("selective", "orthogonal"):
            return super().gradient(output, pixels, examples)
        conditions = self._all(output, examples)
        values = conditions.detach()
        followed = torch.where(values[0] <= 0, 0, values.argmin(dim=0))
        objective = answer_like(hinged(values), output)
        if self.strategy == "selective":
            return objective, differentiate(_chosen(conditions, followed), pixels)
        held = torch.where(followed == 0, 1 + values[1:].argmin(dim=0), 0)
        along = differentiate(_chosen(conditions, followed), pixels, retain=True)
        return objective, orthogonal(along, differentiate(_chosen(conditions, held), pixels))

    def _all(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        labels = examples.labels
        return torch.stack([self.margin(output, labels), *self.conditions(output, labels).values()])


class ForcedRejection(GateGoal):
    """Aim C, denial of service: what was accepted becomes refused.

    Climbs -c of a condition c of acceptance; a NaN that the attack provokes is a refusal too. Give
    it images that are right and accepted (see :func:`standing`): a refused one is a success at
    once.

    Args:
        parts: what decides.
        by: the condition to break: ``score``, ``confidence`` or ``class`` where the gate has them;
            ``nearest`` breaks the one that is nearest to it.
        surrogate: see :class:`GateGoal`.
    """

    name = "forced_rejection"

    def __init__(self, parts: Parts, by: str = "nearest", *, surrogate: bool = False) -> None:
        super().__init__(parts, surrogate=surrogate)
        check_known("condition", by, ("nearest", *condition_names(parts)))
        self.by = by

    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute how far the condition is broken, (B,), > 0 where it is."""
        found = self.conditions(output)
        kept = found.values() if self.by == "nearest" else (found[self.by],)
        return answer_like(-torch.stack(list(kept)).amin(dim=0), output)

    def success(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Tell whether the gate refuses, (B,) bool."""
        return ~self.decision(output).accept.to(output.logits.device)


class OodAcceptance(GateGoal):
    """Aim D: an input that the gate should refuse is accepted; labels are not used.

    Climbs the sum of min(c, 0) over the conditions of acceptance; with cuts by class the cut is
    that of the class predicted now.
    """

    name = "ood_acceptance"

    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute how near acceptance is, (B,), >= 0 where all conditions are met."""
        return answer_like(hinged(torch.stack(list(self.conditions(output).values()))), output)

    def success(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Tell whether the gate accepts, (B,) bool."""
        return self.decision(output).accept.to(output.logits.device)


class ScoreDescent(OodAcceptance):
    """The lowest score within the budget, for AUROC and FPR95 under attack.

    Run it with ``climb(..., until="best")``: every image goes on to the end, and the one with the
    lowest score counts. Success is acceptance of that image.
    """

    name = "score_descent"

    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute -s(x), (B,), in units of the calibration scores' interquartile range."""
        return answer_like(bounded(-self.raw_score(output) / self.unit), output)


def orthogonal(along: Tensor, held: Tensor) -> Tensor:
    """Take out of g its component along h: g - (g·h / h·h) h, image by image.

    Where nothing is left (the two are parallel), or h is zero, g stays as it is.

    Example:
        >>> orthogonal(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 3.0]]))
        tensor([[1., 0.]])
    """
    g, h = along.flatten(1).double(), held.flatten(1).double()
    # By the largest entry first: squares of small gradients underflow.
    h = h / h.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    share = (g * h).sum(dim=1) / h.square().sum(dim=1).clamp_min(1e-300)
    left = g - share[:, None] * h
    length = torch.linalg.vector_norm
    parallel = length(left, dim=1) <= 1e-6 * length(g, dim=1)
    return torch.where(parallel[:, None], g, left).to(along.dtype).reshape(along.shape)


def _chosen(conditions: Tensor, numbers: Tensor) -> Tensor:
    return conditions.gather(0, numbers[None])[0]
