"""Stages beside the curve: minimal distances, energies on the way, corruptions, a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ebm_guard.attacks import Examples, Misclassify, minimal_distance
from ebm_guard.attacks.foreign import autoattack
from ebm_guard.attacks.geometry import ball_of
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import proportion
from ebm_guard.robustness.corruptions import evaluate_corruptions, plan_corruptions
from ebm_guard.robustness.energy_path import energy_path
from ebm_guard.robustness.label_flips import Chain, Context, judged_outcome
from ebm_guard.robustness.records import MinimalResult, NormResult
from ebm_guard.robustness.runner import rows_key
from ebm_guard.robustness.threat import Threat

_MINIMAL_STEPS = 100
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def minimal_curve(context: Context, threat: Threat, chain: Chain) -> MinimalResult | None:
    """Search the smallest change that fools each of some images (FMN).

    Where an attack with a budget came nearer, its image counts: FMN is weak on nets whose gradients
    are small, and every distance is an upper bound.
    """
    n = min(len(context.examples), context.preset.minimal_images)
    if not n:
        return None
    examples = context.examples.select(slice(0, n))

    def work() -> Mapping[str, Any]:
        found = minimal_distance(
            context.query(Misclassify("margin")),
            examples,
            norm=threat.norm,
            num_steps=_MINIMAL_STEPS,
            seed=(context.seed, 12),
        )
        return {"distance": found.distance}

    found = context.runner.run(
        f"minimal/{threat.norm}",
        f"FMN-{_MINIMAL_STEPS} in {threat.norm}, {n} images",
        work,
        **context.cost(n, _MINIMAL_STEPS, gradient=True),
    )
    if found is None:
        return None
    reached = ball_of(threat.norm).distance(chain.pixels[:n], examples.pixels).double()
    nearer = torch.where(chain.fooled[:n], reached, math.inf).numpy()
    distance = np.minimum(found["distance"].astype(np.float64), nearer)
    distance[context.clean.wrong[:n].numpy()] = 0
    # Of the sorted distances, not between them: some may be infinite.
    quantiles = [float(np.quantile(distance, share, method="lower")) for share in _QUANTILES]
    finite = tuple(value if math.isfinite(value) else None for value in quantiles)
    return MinimalResult(
        label=f"FMN-{_MINIMAL_STEPS}, and the attacks above where they came nearer",
        n=n,
        found=int(np.isfinite(distance).sum()),
        median=finite[2],
        quantiles=finite,
        curve={
            epsilon.text: proportion(int((distance > epsilon.value).sum()), n)
            for epsilon in threat.epsilons
        },
    )


def followed_energy(context: Context) -> dict[str, Any] | None:
    """Follow the energy of some images along plain PGD, at the reference epsilon of linf."""
    threat = next((threat for threat in context.threats if threat.norm == "linf"), None)
    n, subject = min(len(context.examples), context.preset.path_images), context.subject
    if threat is None or not n:
        return None
    examples = context.examples.select(slice(0, n))

    def work() -> Mapping[str, Any]:
        path = energy_path(
            subject.forward,
            examples,
            threat.reference.value,
            subject.parts,
            num_steps=context.preset.gate_steps,
            gradient=context.gate_source,
            batch_size=subject.batch_size,
            seed=(context.seed, 10),
        )
        return {"json": json.dumps({**path.to_dict(), "text": threat.reference.text})}

    steps = context.preset.gate_steps
    try:
        found = context.runner.run(
            "energy_path",
            f"energy along PGD-{steps} at linf {threat.reference.text}, {n} images",
            work,
            **context.cost(n, 6 * steps, gradient=True),
        )
    except InvalidInputError as error:
        context.runner.ledger.left_out.append(
            {"name": "energy along the attack", "reason": str(error)}
        )
        return None
    return None if found is None else json.loads(str(found["json"]))


def corruption_table(context: Context, pool: Examples) -> dict[str, Any] | None:
    """Measure the chosen corruptions, as JSON types."""
    preset, subject = context.preset, context.subject
    if not preset.corruptions:
        return None
    plan = plan_corruptions(
        len(pool), preset.corruptions, preset.severities, preset.corruption_images
    )

    def work() -> Mapping[str, Any]:
        table = evaluate_corruptions(
            subject.forward,
            pool,
            plan.names,
            plan.severities,
            parts=subject.parts,
            limit=plan.n,
            seed=context.seed,
            batch_size=subject.batch_size,
        )
        return {"json": json.dumps(table.to_dict()), "forwards": table.forwards}

    title = f"{len(plan.cells)} corruptions, {plan.n} images"
    try:
        found = context.runner.run("corruptions", title, work, forwards=plan.forwards)
    except InvalidInputError as error:
        # Such as images that are too small for the package; the attacks are worth keeping.
        context.runner.ledger.left_out.append({"name": title, "reason": str(error)})
        return None
    return None if found is None else json.loads(str(found["json"]))


def reference_on_survivors(
    context: Context, norm: NormResult, chain: Chain
) -> dict[str, Any] | None:
    """Run pyautoattack on what every attack of ours left, at the reference epsilon."""
    threat, n = context.threats[0], len(context.examples)
    epsilon = threat.reference
    if not context.preset.autoattack or norm.at(epsilon.text).worst_case is None:
        return None
    rows = torch.nonzero(chain.fallen_at > threat.epsilons.index(epsilon)).squeeze(1)
    said = {"label": "pyautoattack standard", "epsilon": epsilon.text, "attacked": len(rows)}
    if not len(rows):
        nothing = proportion(0, n).to_dict()
        return said | {"fooled": 0, "robust_accuracy": nothing, "version": "", "messages": []}
    examples = context.examples.select(rows)

    def work() -> Mapping[str, Any]:
        outcome = autoattack(
            context.query(Misclassify("margin")),
            examples,
            epsilon.value,
            norm=threat.norm,
            seed=(context.seed, 8),
        )
        found = judged_outcome(context, outcome, examples, threat.norm, epsilon.value)
        messages = json.dumps(outcome.messages)
        return {"fooled": found["fooled"], "version": outcome.source, "messages": messages}

    try:
        found = context.runner.run(
            f"reference/{threat.norm}/{rows_key(rows)}",
            f"pyautoattack at {threat.norm} {epsilon.text}, {len(rows)} images",
            work,
            forwards=len(rows) * 5000,
            # APGD-CE, and nine targets each for APGD-T and FAB-T, of 100 steps.
            gradients=len(rows) * 1900 * context.eot_samples,
        )
    except InvalidInputError as error:
        context.runner.ledger.left_out.append({"name": "pyautoattack", "reason": str(error)})
        return None
    if found is None:
        return None
    fooled = int(found["fooled"].sum())
    return said | {
        "fooled": fooled,
        "robust_accuracy": proportion(len(rows) - fooled, n).to_dict(),
        "version": str(found["version"]),
        "messages": json.loads(str(found["messages"])),
    }
