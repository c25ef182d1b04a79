"""Gather the evidence for the flags of masked gradients, mostly from what ran already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.attacks import FGSM, Misclassify, Square, StepRule, climb
from ebm_guard.robustness.label_flips import Chain, Context, judged_outcome
from ebm_guard.robustness.masking import (
    LARGE_EPSILONS,
    Count,
    CurvePoint,
    MaskingEvidence,
    StepsGain,
    large_epsilon_accuracy,
    masking_flags,
    more_steps_gain,
    probe_model,
)
from ebm_guard.robustness.records import NormResult
from ebm_guard.robustness.runner import rows_key

_ENOUGH = 16
# A few thousand queries in all: it is a sign here and no attack.
_SHOWN_TO_SQUARE = 24


def flags_of(
    context: Context, norm: NormResult, chain: Chain, *, noisy: bool
) -> tuple[dict[str, Any], ...]:
    """Judge by the signs of masked gradients whether the robust accuracy can be trusted."""
    evidence = MaskingEvidence(
        square_only=_square_only(context, norm, chain),
        fgsm_only=_fgsm_only(context, norm, chain),
        curve=_curve(context, norm),
        **_swept(context, norm, chain),
        **_probed(context),
    )
    if noisy:
        evidence = replace(evidence, random_forward=True)
    return tuple(flag.to_dict() for flag in masking_flags(evidence))


def _standing(norm: NormResult, chain: Chain) -> tuple[int, Tensor] | None:
    """Choose the largest epsilon at which enough images stand, and return these images.

    Where nowhere enough stand, the epsilon with the most of them; None without any.
    """
    found = [
        (index, torch.nonzero(chain.fallen_at > index).squeeze(1))
        for index, row in enumerate(norm.epsilons)
        # Where an attack was left out, an image stands because nobody tried.
        if row.worst_case is not None
    ]
    if not found:
        return None
    enough = [item for item in found if len(item[1]) >= _ENOUGH]
    chosen = enough[-1] if enough else found[0]
    return chosen if len(chosen[1]) else None


def _square_only(context: Context, norm: NormResult, chain: Chain) -> Count | None:
    """Count the images that Square fooled and the gradient attacks left."""
    names = [attacker.name for attacker in context.preset.attackers]
    if "square" in names:
        place, n = names.index("square"), len(context.examples)
        if not place:  # nothing ran before it that it could beat
            return None
        counts = []
        for row in norm.epsilons:
            left = row.attacks[place - 1].robust_accuracy
            if row.worst_case is not None and left is not None:
                counts.append(Count(row.attacks[place].fooled, round(left.value * n)))
        # The epsilon at which its share is the largest; of these, the one with most images.
        counts = [item for item in counts if item.n]
        return max(counts, key=lambda item: (item.count / item.n, item.n), default=None)
    found = _standing(norm, chain)
    if found is None or not context.preset.square_queries:
        return None
    found = (found[0], found[1][:_SHOWN_TO_SQUARE])
    fooled = _plainly(
        context,
        Square(context.preset.square_queries, norm=norm.norm),
        f"Square {context.preset.square_queries}",
        found,
    )
    return None if fooled is None else Count(fooled, len(found[1]))


def _fgsm_only(context: Context, norm: NormResult, chain: Chain) -> Count | None:
    """Count the images that FGSM fooled and PGD left."""
    found = _standing(norm, chain)
    if found is None or not any(item.needs_gradient for item in context.preset.attackers):
        return None
    fooled = _plainly(context, FGSM(context.threats[0].norm), "FGSM", found)
    return None if fooled is None else Count(fooled, len(found[1]))


def _plainly(
    context: Context, rule: StepRule[Any], label: str, found: tuple[int, Tensor]
) -> int | None:
    """Run one more attack, as a flag, on images that stand; return how many it fools."""
    (index, rows), threat = found, context.threats[0]
    epsilon, examples = threat.epsilons[index], context.examples.select(rows)

    def work() -> Mapping[str, Any]:
        query = context.query(Misclassify("margin"))
        outcome = climb(rule, query, examples, epsilon.value, seed=(context.seed, 6))
        found = judged_outcome(context, outcome, examples, threat.norm, epsilon.value)
        return {"fooled": found["fooled"]}

    kept = context.runner.run(
        f"flag/{label}/{index}/{rows_key(rows)}",
        f"{label} as a flag at {threat.norm} {epsilon.text}, {len(rows)} images",
        work,
        **context.cost(len(rows), rule.num_steps, gradient=rule.needs_gradient),
    )
    return None if kept is None else int(kept["fooled"].sum())


def _curve(context: Context, norm: NormResult) -> list[CurvePoint]:
    right = int((~context.clean.wrong).sum())
    n = len(context.examples)
    return [
        CurvePoint(row.epsilon, n - row.fooled, right)
        for row in norm.epsilons
        if row.worst_case is not None
    ]


def _swept(context: Context, norm: NormResult, chain: Chain) -> dict[str, Any]:
    """Attack at large budgets, and with twice the steps."""
    found = _standing(norm, chain)
    subject, threat = context.subject, context.threats[0]
    if not context.preset.sweep or threat.norm != "linf":
        return {}
    budgets = LARGE_EPSILONS + ((0.5,) if context.examples.pixels.shape[1] == 1 else ())
    seed = (context.seed, 7)

    def work() -> Mapping[str, Any]:
        points = large_epsilon_accuracy(
            subject.forward, context.examples, budgets, batch_size=subject.batch_size, seed=seed
        )
        result: dict[str, Any] = {
            "points": np.array([[p.epsilon, p.standing, p.n] for p in points])
        }
        if found is not None:
            gain = more_steps_gain(
                subject.forward,
                context.examples,
                threat.epsilons[found[0]].value,
                batch_size=subject.batch_size,
                seed=seed,
            )
            result["gain"] = np.array([gain.num_steps, gain.gained, gain.n])
        return result

    n = len(context.examples)
    kept = context.runner.run(
        "sweep",
        f"large budgets and doubled steps, {n} images",
        work,
        gradients=n * (20 * len(budgets) + 60) * context.eot_samples,
    )
    if kept is None:
        return {}
    points = [CurvePoint(float(e), int(left), int(of)) for e, left, of in kept["points"]]
    gain = kept.get("gain")
    steps = None if gain is None else StepsGain(*map(int, gain))
    return {"large_epsilon": points, "more_steps": steps}


def _probed(context: Context) -> dict[str, Any]:
    """Measure what needs no attack on up to 64 images."""
    few = context.examples.select(slice(0, 64))
    found = probe_model(context.subject.forward, few, context.subject.batch_size)
    names = ("zero_gradients", "random_forward", "output_problem", "forward_problem")
    return {name: getattr(found, name) for name in names}
