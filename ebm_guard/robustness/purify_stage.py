"""The stage of an evaluation in which the classifier refines its input: clean, then attacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import EbmGuardError
from ebm_guard.intervals import proportion
from ebm_guard.robustness.label_flips import Chain, Context
from ebm_guard.robustness.purify import MODES, Purification, Purifier
from ebm_guard.robustness.purify_attack import PurifyBudget, attack_purified, majority_wrong
from ebm_guard.robustness.records import NormResult, PurificationResult, PurifiedMode
from ebm_guard.robustness.runner import BUDGET, Arrays, rows_key, tensor
from ebm_guard.robustness.threat import Threat

_PLACE = 21


def purified(
    context: Context, norm: NormResult, chain: Chain, settings: Purification | None
) -> PurificationResult | None:
    """Attack the purified classifier at the reference epsilon of the first norm.

    Each mode attacks all images that are right when purified, so that the modes can be compared.

    Args:
        context: of the evaluation.
        norm: what the attacks of the bare classifier found along the first norm.
        chain: the same, image by image.
        settings: of the purification, or None to leave it out.
    """
    if settings is None:
        return None
    threat = context.threats[0]
    budget = PurifyBudget.of(context.preset.name).needed(settings, context.eot_samples)
    n = min(len(context.examples), budget.images)
    title = f"{settings.num_steps} SGLD steps"
    try:
        wrong = _clean(context, settings, budget, n, f"purification without attack, {title}")
        if wrong is None:
            return None
        found = [_attacked(context, threat, settings, budget, wrong, mode) for mode in MODES]
    except EbmGuardError as error:
        # Such as a model that lets no gradient through; the attacks are worth keeping.
        context.runner.ledger.left_out.append({"name": "purification", "reason": str(error)})
        return None
    fooled = [rows for _, rows in found if rows is not None]
    complete = len(fooled) == len(MODES)
    lost = wrong | torch.stack(fooled).any(dim=0) if fooled else wrong
    index = threat.epsilons.index(threat.reference)
    bare = int((chain.fallen_at[:n] > index).sum())
    whole = norm.at(threat.reference.text).worst_case is not None
    chains = settings.chains
    return PurificationResult(
        settings=settings.to_dict(),
        norm=threat.norm,
        epsilon=threat.reference.value,
        text=threat.reference.text,
        n=n,
        clean=proportion(int((~wrong).sum()), n),
        bare_clean=proportion(int((~context.clean.wrong[:n]).sum()), n),
        bare=proportion(bare, n) if whole else None,
        modes=tuple(mode for mode, _ in found),
        worst_case=proportion(int((~lost).sum()), n) if complete else None,
        eot_samples=budget.eot_samples,
        success_draws=budget.success_draws,
        gradients_per_image=settings.num_steps * chains,
        forwards_per_image=chains,
    )


def _clean(
    context: Context, settings: Purification, budget: PurifyBudget, n: int, title: str
) -> Tensor | None:
    """Judge the images as they are; (n,) bool, or None where the time budget does not allow it."""
    examples, draws = context.examples.select(slice(0, n)), budget.success_draws

    def work() -> Mapping[str, Any]:
        purifier = _purifier(context, settings, 0)
        voted = majority_wrong(
            purifier,
            examples.pixels,
            examples.labels,
            draws,
            context.subject.batch_size,
            # A bare classifier that answers at random may draw once for a whole batch.
            together=budget.bare_samples == 1,
        )
        return {"wrong": voted}

    passes = n * draws * settings.chains
    kept = context.runner.run(
        f"purify/clean/{n}", title, work, forwards=passes, gradients=passes * settings.num_steps
    )
    return None if kept is None else tensor(kept["wrong"])


def _attacked(
    context: Context,
    threat: Threat,
    settings: Purification,
    budget: PurifyBudget,
    wrong: Tensor,
    mode: str,
) -> tuple[PurifiedMode, Tensor | None]:
    """Attack along one gradient; return its record, and which images it fooled."""
    n, epsilon = len(wrong), threat.reference
    rows = torch.nonzero(~wrong).squeeze(1)
    examples, number = context.examples.select(rows), MODES.index(mode)
    samples = budget.bare_samples if mode == "transfer" else budget.eot_samples
    label = f"PGD-{budget.num_steps}, {samples} gradient{'s' * (samples > 1)} a step"

    def work() -> Mapping[str, Any]:
        found = attack_purified(
            _purifier(context, settings, 1 + number),
            examples,
            epsilon.value,
            mode,
            budget,
            norm=threat.norm,
            batch_size=context.subject.batch_size,
            # The same starts for all modes: only the gradient differs.
            seed=(context.seed, _PLACE),
        )
        return {"fooled": found.fooled}

    kept: Arrays | None = {"fooled": torch.zeros(0).bool().numpy(), "cost": np.zeros(2, np.int64)}
    if len(rows):
        answers = len(rows) * (budget.num_steps + 1)
        cost = {name: answers * share for name, share in budget.cost(settings, mode).items()}
        kept = context.runner.run(
            f"purify/{mode}/{rows_key(rows)}",
            f"purification under attack ({mode}) at {threat.norm} {epsilon.text}, {len(rows)} "
            "images",
            work,
            **cost,
        )
    if kept is None:
        return PurifiedMode(mode, label, None, 0, 0, 0, BUDGET), None
    fooled = torch.zeros(n, dtype=torch.bool)
    fooled[rows] = tensor(kept["fooled"])
    left = proportion(int((~(wrong | fooled)).sum()), n)
    forwards, gradients = (int(number) for number in kept["cost"])
    return PurifiedMode(mode, label, left, int(fooled.sum()), gradients, forwards), fooled


def _purifier(context: Context, settings: Purification, number: int) -> Purifier:
    """Build the purifier of a stage: its random numbers hang on nothing that ran before."""
    subject = context.subject
    return Purifier(
        subject.forward,
        settings,
        seed=(context.seed, _PLACE, number),
        device=subject.classifier.device,
    )
