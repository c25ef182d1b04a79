"""The gate in the loop: what an attacker gets wrong *and accepted*, refused, or accepted unknown.

An attack on a classifier with a reject option has succeeded only where the answer is wrong and the
gate accepts it. Stopping at the first flip makes any gate look strong: the image then lies on the
border between two classes, where its energy is high. The attacker here goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.attacks import PGD, Examples, Outcome, Square, StepRule, climb
from ebm_guard.intervals import proportion
from ebm_guard.ood.metrics import auroc, fpr95
from ebm_guard.robustness.gate_attacks import ScoreDescent, try_all
from ebm_guard.robustness.label_flips import Chain, Context
from ebm_guard.robustness.records import GatedResult, OodEpsilon, OodResult
from ebm_guard.robustness.runner import BUDGET, Arrays, rows_key, tensor
from ebm_guard.robustness.subject import inside
from ebm_guard.robustness.threat import Epsilon, Threat

QUERIES = 500


@dataclass
class GateChain:
    """Where the attacker who knows the gate stands, image by image.

    Args:
        pixels: (N, C, H, W) the best image so far, for aim B.
        plain: (N,) bool, wrong and accepted without knowing the gate.
        taken: (N,) bool, wrong and accepted.
        pixels_refused: (N, C, H, W) the best image so far, for aim C.
        refused: (N,) bool, right and accepted at first, and refused now.
    """

    pixels: Tensor
    plain: Tensor
    taken: Tensor
    pixels_refused: Tensor
    refused: Tensor

    @classmethod
    def begin(cls, context: Context) -> GateChain:
        """Start at the clean images."""
        pixels, taken = context.examples.pixels, context.clean.taken
        none = torch.zeros_like(taken)
        return cls(pixels.clone(), taken.clone(), taken.clone(), pixels.clone(), none)


def attack_gate(
    context: Context,
    threat: Threat,
    index: int,
    chain: Chain,
    gate: GateChain,
    *,
    complete: bool,
) -> GatedResult:
    """Run aims B and C at one epsilon.

    Args:
        context: of the evaluation.
        threat: the norm.
        index: of the epsilon.
        chain: aim A at this epsilon, done.
        gate: updated in place.
        complete: whether all attacks of aim A ran.
    """
    epsilon, n = threat.epsilons[index], len(context.examples)
    gate.plain |= chain.taken
    gate.taken |= chain.taken
    trusted = context.clean.accepted & ~context.clean.taken
    # What is wrong and accepted is a part of what is wrong: without all of aim A it is too little.
    aware = _aim_b(context, threat, epsilon, index, chain, gate) and complete
    forced = None
    if context.preset.forced_rejection and bool(trusted.any()):
        done = _aim_c(context, threat, epsilon, index, gate, trusted)
        forced = proportion(int(gate.refused.sum()), int(trusted.sum())) if done else None
    wrong = chain.fooled
    fooled_since = wrong & ~context.clean.wrong
    refused = fooled_since & ~chain.taken
    taken_since = gate.taken & trusted
    share = None
    if aware and bool(trusted.any()):
        share = proportion(int(taken_since.sum()), int(trusted.sum()))
    return GatedResult(
        plain=proportion(n - int(gate.plain.sum()), n) if complete else None,
        aware=proportion(n - int(gate.taken.sum()), n) if aware else None,
        success_rate=share,
        rejected=proportion(int(refused.sum()), int(fooled_since.sum()))
        if complete and bool(fooled_since.any())
        else None,
        forced_rejection=forced,
        labels=tuple(_labels(context, "accepted_flip")),
        reason="" if aware else BUDGET,
    )


def attack_ood(
    context: Context,
    threat: Threat,
    name: str,
    pixels: Tensor,
    id_scores: NDArray[np.float64],
) -> OodResult | None:
    """Run aim D on an OOD set: lower the score as far as each epsilon allows.

    The AUROC of attacked OOD images is against ID images as they are: the attacker holds the
    unknown image, not the user's.

    Args:
        context: of the evaluation.
        threat: the norm.
        name: of the OOD set.
        pixels: (M, C, H, W) in [0, 1].
        id_scores: (K,) the gate's score of clean ID images.

    Returns:
        The result with as many epsilons as the budget allowed, or None without any.
    """
    subject = context.subject
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    examples = Examples.of(pixels, labels)
    clean = subject.judge(examples.pixels, labels)
    best, accepted = examples.pixels, clean.accepted.clone()
    scores = clean.score.clone()
    rows = [_ood_row(Epsilon(0.0, "0"), scores, accepted, id_scores)]
    for index, epsilon in enumerate(threat.epsilons):
        found = _descent(context, threat.norm, epsilon, (index, name), examples, best)
        if found is None:
            break
        lower = tensor(found["score"]) < scores
        shape = (-1, *[1] * (pixels.ndim - 1))
        best = torch.where(lower.reshape(shape), tensor(found["pixels"]), best)
        scores = torch.where(lower, tensor(found["score"]), scores)
        accepted = accepted | tensor(found["accepted"])
        rows.append(_ood_row(epsilon, scores, accepted, id_scores))
    return (
        OodResult(len(pixels), tuple(rows), _labels(context, "ood_acceptance")[0])
        if len(rows) > 1
        else None
    )


def _descent(
    context: Context,
    norm: str,
    epsilon: Epsilon,
    place: tuple[int, str],
    examples: Examples,
    best: Tensor,
) -> Arrays | None:
    """Lower the score of all images as far as one epsilon allows."""
    index, name = place
    by_gradient = context.gate_source != "none"
    surrogate = context.gate_source == "surrogate"
    steps = context.preset.gate_steps if by_gradient else QUERIES
    rule: StepRule[Any] = PGD(steps, norm=norm) if by_gradient else Square(steps, norm=norm)

    def work() -> Mapping[str, Any]:
        outcome = climb(
            rule,
            context.query(ScoreDescent(context.parts, surrogate=surrogate)),
            examples,
            epsilon.value,
            start=best if index else None,
            until="best",
            seed=(context.seed, 4, index),
        )
        found = _judged(context, outcome, examples, norm, epsilon.value)
        rows = torch.nonzero(~found["accepted"]).squeeze(1)
        if len(rows):
            # The lowest score is not always the way in: cuts may differ by class.
            few = examples.select(rows)
            more = _tried(
                context, "ood_acceptance", norm, few, epsilon, outcome.pixels[rows], (11, index)
            )
            found["accepted"][rows] = _judged(context, more, few, norm, epsilon.value)["accepted"]
            found["gradients"][rows] += more.gradients
            found["forwards"][rows] += (more.forwards - more.gradients).clamp(min=0)
        return found

    return context.runner.run(
        f"ood/{name}/{norm}/{epsilon.text}",
        f"make {name} accepted at {norm} {epsilon.text}, {len(examples)} images",
        work,
        **_sum(
            context.cost(len(examples), steps, gradient=by_gradient),
            _cost(context, "ood_acceptance", len(examples)),
        ),
    )


def _labels(context: Context, aim: str) -> list[str]:
    """Name the ways to an aim with their budgets."""
    if aim == "ood_acceptance" and context.gate_source != "none":
        return [f"PGD-{context.preset.gate_steps} down the score"]
    return [
        f"{attempt.name} PGD-{context.preset.gate_steps}"
        if attempt.uses_gradient
        else f"{attempt.name} Square {QUERIES}"
        for attempt in context.gate_plan(aim)
    ]


def _aim_b(
    context: Context, threat: Threat, epsilon: Epsilon, index: int, chain: Chain, gate: GateChain
) -> bool:
    rows = torch.nonzero(_reachable(context, chain) & ~gate.taken).squeeze(1)
    if not len(rows):
        return True
    examples = context.examples.select(rows)
    shape = (-1, *[1] * (examples.pixels.ndim - 1))
    start = torch.where(chain.fooled[rows].reshape(shape), chain.pixels[rows], gate.pixels[rows])

    def work() -> Mapping[str, Any]:
        outcome = _tried(
            context, "accepted_flip", threat.norm, examples, epsilon, start, (2, index)
        )
        return _judged(context, outcome, examples, threat.norm, epsilon.value)

    found = context.runner.run(
        f"gate/{threat.norm}/{epsilon.text}/{rows_key(rows)}",
        f"flip and accepted at {threat.norm} {epsilon.text}, {len(rows)} images",
        work,
        **_cost(context, "accepted_flip", len(rows)),
    )
    if found is None:
        return False
    gate.pixels[rows] = tensor(found["pixels"])
    gate.taken[rows] = tensor(found["taken"])
    return True


def _reachable(context: Context, chain: Chain) -> Tensor:
    """Mark the images that can be wrong and accepted: those that some attack made wrong.

    A calibrator that changes labels has its own wrong images, so there all of them are tried.
    """
    calibrator = context.parts.calibrator
    if calibrator is None or calibrator.keeps_prediction:
        return chain.fooled
    return torch.ones_like(chain.fooled)


def _aim_c(
    context: Context,
    threat: Threat,
    epsilon: Epsilon,
    index: int,
    gate: GateChain,
    trusted: Tensor,
) -> bool:
    rows = torch.nonzero(trusted & ~gate.refused).squeeze(1)
    if not len(rows):
        return True
    examples = context.examples.select(rows)
    start = gate.pixels_refused[rows] if index else None

    def work() -> Mapping[str, Any]:
        outcome = _tried(
            context, "forced_rejection", threat.norm, examples, epsilon, start, (3, index)
        )
        return _judged(context, outcome, examples, threat.norm, epsilon.value)

    found = context.runner.run(
        f"refuse/{threat.norm}/{epsilon.text}/{rows_key(rows)}",
        f"force a rejection at {threat.norm} {epsilon.text}, {len(rows)} images",
        work,
        **_cost(context, "forced_rejection", len(rows)),
    )
    if found is None:
        return False
    gate.pixels_refused[rows] = tensor(found["pixels"])
    gate.refused[rows] = ~tensor(found["accepted"])
    return True


def _tried(
    context: Context,
    aim: str,
    norm: str,
    examples: Examples,
    epsilon: Epsilon,
    start: Tensor | None,
    place: tuple[int, int],
) -> Outcome:
    """Try all ways to an aim, each on what the ways before left."""
    subject = context.subject
    return try_all(
        context.gate_plan(aim),
        PGD(context.preset.gate_steps, norm=norm),
        subject.forward,
        examples,
        epsilon.value,
        without_gradient=Square(QUERIES, norm=norm),
        start=start,
        batch_size=subject.batch_size,
        eot_samples=context.eot_samples,
        success_draws=subject.draws,
        seed=(context.seed, *place),
    )


def _cost(context: Context, aim: str, images: int) -> dict[str, float]:
    """Return the most that all ways to an aim can take."""
    costs = []
    for attempt in context.gate_plan(aim):
        steps = context.preset.gate_steps if attempt.uses_gradient else QUERIES
        costs.append(context.cost(images, steps, gradient=attempt.uses_gradient))
    return _sum(*costs)


def _sum(*costs: dict[str, float]) -> dict[str, float]:
    return {name: sum(cost[name] for cost in costs) for name in ("forwards", "gradients")}


def _judged(
    context: Context, outcome: Outcome, examples: Examples, norm: str, epsilon: float
) -> dict[str, Any]:
    valid = inside(outcome.pixels, examples, norm, epsilon)
    shape = (-1, *[1] * (examples.pixels.ndim - 1))
    kept = torch.where(valid.reshape(shape), outcome.pixels, examples.pixels)
    judged = context.subject.judge(kept, examples.labels)
    return {
        "pixels": kept,
        "taken": judged.taken,
        "accepted": judged.accepted,
        "score": judged.score,
        "gradients": outcome.gradients,
        "forwards": (outcome.forwards - outcome.gradients).clamp(min=0),
    }


def _ood_row(
    epsilon: Epsilon, scores: Tensor, accepted: Tensor, id_scores: NDArray[np.float64]
) -> OodEpsilon:
    values = scores.numpy()
    return OodEpsilon(
        epsilon.value,
        epsilon.text,
        proportion(int(accepted.sum()), len(accepted)),
        auroc(id_scores, values),
        fpr95(id_scores, values),
    )
