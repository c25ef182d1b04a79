"""What an attacker of a classifier *with its gate* wants: three aims, judged by the deployed gate.

=====  ===================  =====================================================
aim    name                 success
=====  ===================  =====================================================
B      ``accepted_flip``    the deployed label is wrong **and** the gate accepts
C      ``forced_rejection`` a correct, accepted input is refused
D      ``ood_acceptance``   an OOD input is accepted
=====  ===================  =====================================================

(Aim A, another class whatever the gate says, is :class:`ebm_guard.attacks.Misclassify`.)

Each aim is tried in several ways (:func:`gate_plan`), and an image counts as lost where any of
them succeeds (:func:`try_all`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ebm_guard.attacks.engine import Goal, Query, StepRule, climb, differentiate
from ebm_guard.attacks.rows import Examples, Outcome
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.deciding import Parts
from ebm_guard.model.isolation import Forward
from ebm_guard.robustness.gate_conditions import check_known, condition_names, standing
from ebm_guard.robustness.gate_goals import (
    STRATEGIES,
    AcceptedFlip,
    ForcedRejection,
    OodAcceptance,
    ScoreDescent,
)

__all__ = [
    "AIMS",
    "SOURCES",
    "STRATEGIES",
    "AcceptedFlip",
    "Attempt",
    "ForcedRejection",
    "OodAcceptance",
    "ScoreDescent",
    "condition_names",
    "gate_plan",
    "score_has_gradient",
    "standing",
    "try_all",
]

AIMS = ("accepted_flip", "forced_rejection", "ood_acceptance")
Source = Literal["score", "surrogate", "none"]
SOURCES = ("score", "surrogate", "none")
_PROBE = 16


@dataclass(frozen=True)
class Attempt:
    """One way to reach an aim.

    Args:
        name: of the way, for the report.
        goal: what is climbed.
        uses_gradient: whether a rule with gradients can run it; otherwise only one without.
    """

    name: str
    goal: Goal
    uses_gradient: bool = True


def gate_plan(aim: str, parts: Parts, gradient: Source = "score") -> list[Attempt]:
    """Return all ways to reach an aim; an image counts as lost where any of them succeeds.

    Args:
        aim: ``accepted_flip`` (B), ``forced_rejection`` (C) or ``ood_acceptance`` (D).
        parts: what decides.
        gradient: ``score`` where the score passes gradients (:func:`score_has_gradient`);
            ``surrogate`` climbs by the energy's instead, and adds an attempt on the true decision
            without any; ``none`` is that attempt alone.

    Raises:
        InvalidInputError: unknown aim or source of gradients.

    Example:
        >>> from ebm_guard.gate.thresholds import Threshold
        >>> from ebm_guard.ood import make_score
        >>> parts = Parts(make_score("energy"), Threshold.fit(torch.arange(100.0).numpy()))
        >>> [attempt.name for attempt in gate_plan("accepted_flip", parts)]
        ['selective', 'orthogonal', 'joint', 'run_on']
    """
    check_known("aim", aim, AIMS)
    check_known("gradient", gradient, SOURCES)
    surrogate = gradient == "surrogate"
    found = [] if gradient == "none" else list(_ways(aim, parts, surrogate=surrogate))
    if gradient == "score":
        return found
    true: dict[str, Goal] = {
        "accepted_flip": AcceptedFlip(parts, "joint"),
        "forced_rejection": ForcedRejection(parts),
        "ood_acceptance": OodAcceptance(parts),
    }
    return [*found, Attempt("true_decision", true[aim], uses_gradient=False)]


def _ways(aim: str, parts: Parts, *, surrogate: bool) -> Iterable[Attempt]:
    if aim == "accepted_flip":
        for strategy in STRATEGIES:
            yield Attempt(strategy, AcceptedFlip(parts, strategy, surrogate=surrogate))
        return
    if aim == "forced_rejection":
        names = condition_names(parts)
        for by in ("nearest", *names) if len(names) > 1 else names:
            yield Attempt(by, ForcedRejection(parts, by, surrogate=surrogate))
    else:
        yield Attempt("conditions", OodAcceptance(parts, surrogate=surrogate))
    if parts.score.name != "energy" and not surrogate:
        # Scores with kinks, such as the largest logit, hold a climber up; the energy is smooth.
        kind = ForcedRejection if aim == "forced_rejection" else OodAcceptance
        yield Attempt("by_energy", kind(parts, surrogate=True))


def try_all(
    plan: Sequence[Attempt],
    rule: StepRule[Any],
    forward: Forward,
    examples: Examples,
    epsilon: float,
    *,
    without_gradient: StepRule[Any] | None = None,
    start: Tensor | None = None,
    batch_size: int = 64,
    eot_samples: int = 1,
    success_draws: int = 1,
    seed: Sequence[int] = (0,),
) -> Outcome:
    """Run all attempts, each on the images that the ones before left standing.

    Args:
        plan: of :func:`gate_plan`.
        rule: for attempts with gradients.
        forward: from pixels to the output.
        examples: the images.
        epsilon: radius in pixel units.
        without_gradient: a rule for attempts without gradients, such as the square attack.
        start: (N, C, H, W) images to start from.
        batch_size: see :class:`~ebm_guard.attacks.Query`, as the next two.
        eot_samples: forward and backward passes a gradient.
        success_draws: fresh forward passes a verdict.
        seed: each attempt adds its number to it.

    Returns:
        One outcome for each image: that of the first attempt that succeeded, or of the last;
        costs are of all attempts. A gradient of ``orthogonal`` is two backward passes.

    Raises:
        InvalidInputError: the plan holds attempts without gradients, and there is no rule for
            them; or an empty plan.
    """
    if not plan:
        raise InvalidInputError("got an empty plan; needed at least one attempt")
    total: Outcome | None = None
    for number, attempt in enumerate(plan):
        used = rule if attempt.uses_gradient else without_gradient
        if used is None or (used.needs_gradient and not attempt.uses_gradient):
            raise InvalidInputError(
                f"the attempt {attempt.name} needs a rule without gradients, such as the square "
                "attack; give it as without_gradient="
            )
        query = Query(
            forward,
            attempt.goal,
            batch_size=batch_size,
            eot_samples=eot_samples,
            success_draws=success_draws,
        )
        rows = torch.arange(len(examples)) if total is None else torch.nonzero(~total.success)[:, 0]
        if not len(rows):
            break
        begin = None if start is None else start[rows.to(start.device)]
        part = climb(
            used,
            query,
            examples.select(rows.to(examples.labels.device)),
            epsilon,
            start=begin,
            seed=(*seed, number),
        )
        total = part if total is None else total.with_rows(rows, part)
    if total is None:  # the plan is not empty
        raise InvalidInputError("got no images; needed at least one")
    return total


def score_has_gradient(parts: Parts, forward: Forward, examples: Examples) -> tuple[bool, str]:
    """Tell by a probe whether gradients of the gate's score reach the pixels, and say so.

    Up to 16 images; more than half of them must have a finite gradient that is not zero.

    Args:
        parts: what decides.
        forward: with features where the score needs them.
        examples: real images.

    Returns:
        Whether they do, and a sentence with the way out.
    """
    probe = examples.select(slice(0, _PROBE))
    name, n = parts.score.name, len(probe)
    good = _with_gradient(OodAcceptance(parts), forward, probe)
    if 2 * good > n:
        return True, f"the gradient of {name} reaches the pixels on {good} of {n} images"
    energy = _with_gradient(OodAcceptance(parts, surrogate=True), forward, probe)
    if 2 * energy <= n:
        return False, (
            f"neither {name} nor the energy passes a gradient to the pixels ({energy} of {n} "
            "images): the model hides it, so only attacks without gradients can judge this gate"
        )
    return False, (
        f"{name} passes a gradient to the pixels on {good} of {n} images: gradient attacks climb "
        "by the energy instead, and the square attack judges the true decision"
    )


def _with_gradient(goal: OodAcceptance, forward: Forward, probe: Examples) -> int:
    """Count the images whose gradient is finite and not zero."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = probe.pixels.detach().clone().requires_grad_()
        score = goal.raw_score(forward(leaf))
        if not score.requires_grad:
            return 0
        found = differentiate(score, leaf).flatten(1)
    good = torch.isfinite(found).all(dim=1) & (found != 0).any(dim=1)
    return int(good.sum())
