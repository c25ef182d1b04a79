"""From what the stages found to the numbers of the record."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ebm_guard.intervals import Metric, proportion
from ebm_guard.robustness.label_flips import Chain, Context
from ebm_guard.robustness.plan import Plan
from ebm_guard.robustness.records import AttackResult, EpsilonResult, GatedResult
from ebm_guard.robustness.threat import Epsilon


def share(rows: Tensor) -> Metric:
    """Return the share of True with its Wilson interval."""
    return proportion(int(rows.sum()), len(rows))


def epsilon_result(
    context: Context,
    epsilon: Epsilon,
    results: Sequence[AttackResult],
    chain: Chain,
    gated: GatedResult | None,
    *,
    complete: bool,
    as_files: bool,
) -> EpsilonResult:
    """Sum up one epsilon; without all attacks there is no worst case."""
    right = ~context.clean.wrong
    lost = chain.fooled & right
    rate = proportion(int(lost.sum()), int(right.sum())) if bool(right.any()) else None
    return EpsilonResult(
        epsilon=epsilon.value,
        text=epsilon.text,
        attacks=tuple(results),
        worst_case=share(~chain.fooled) if complete else None,
        success_rate=rate if complete else None,
        fooled=int(chain.fooled.sum()),
        rounded=share(~(chain.wrong_rounded & chain.fooled)) if complete and as_files else None,
        outside=chain.outside,
        gated=gated,
        standing=tuple((~chain.fooled).tolist()) if complete else (),
    )


def gate_facts(context: Context, no_gate: str) -> dict[str, Any]:
    """Say which gate is in the loop, or why there is none."""
    parts = context.subject.parts
    if parts is None:
        return {"not_run": no_gate or "no fitted guard was given"}
    words = {
        "score": "the score's own gradient",
        "surrogate": "the energy's gradient, since the score has none, and Square without gradient",
        "none": "none: Square asks for the decision only",
    }
    trusted = context.clean.accepted & ~context.clean.taken
    return {
        "score": parts.score.name,
        "guarantee": parts.threshold.guarantee,
        "rule": "" if parts.rule is None else parts.rule.words,
        "gradient": words[context.gate_source],
        "clean_coverage": share(context.clean.accepted),
        "right_and_accepted": int(trusted.sum()),
    }


def cost(context: Context) -> dict[str, Any]:
    """Say what the evaluation took."""
    ledger, n = context.runner.ledger, len(context.examples)
    return {
        "gradients": ledger.gradients,
        "forwards": ledger.forwards,
        "gradients_per_image": round(ledger.gradients / n, 2),
        "forwards_per_image": round(ledger.forwards / n, 2),
    }


def settings(
    context: Context, plan: Plan, time_budget: float | None, *, noisy: bool
) -> dict[str, Any]:
    """Record what was asked for, so that it can be repeated."""
    return {
        "seed": context.seed,
        "batch_size": context.subject.batch_size,
        "attacks": {
            threat.norm: {
                attacker.label: attacker.settings(threat.norm)
                for attacker in context.preset.attackers
            }
            for threat in context.threats
        },
        "time_budget": time_budget,
        "images_cut": plan.cut,
        "random_inference": noisy,
        "eot_samples": context.eot_samples,
        "success_draws": context.subject.draws,
        "versions": {"ebm_guard": package_version(), "torch": torch.__version__},
    }


def package_version(name: str = "ebm-guard") -> str:
    """Return the version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
