"""The density of a finished run: points of its rows, the checks, and what is offered."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ebm_guard.model.isolation import untouched
from ebm_guard.model.weights import weights_hash
from ebm_guard.training.density.checks import check_density
from ebm_guard.training.density.heads import found_head, head_weights
from ebm_guard.training.density.record import NOT_OFFERED, OFFERED, EnergyDensity
from ebm_guard.training.images import TrainingImages
from ebm_guard.training.objectives.base import Objective
from ebm_guard.training.objectives.nce import Nce
from ebm_guard.training.preparing import Prepared
from ebm_guard.training.working_copy import around

# Training rows that c is refitted on, and held-out rows that it is checked on, at most.
_MOST = 4000


def contrastive_objective(objective: Objective) -> Nce | None:
    """Return the objective that learns a density, also from within its regularisers, or None."""
    inner = getattr(objective, "objective", objective)
    return inner if isinstance(inner, Nce) else None


def measure_density(of: Prepared, candidate: nn.Module) -> EnergyDensity | None:
    """Refit c for the candidate's weights, check it, and offer its density where that holds.

    c is refitted on training rows; the checks take the acceptance rows, which nothing was
    trained or chosen on.

    Args:
        of: what the run started from, its objective with what it learned.
        candidate: the net, which takes the start's place; the start has no density.

    Returns:
        The density, offered or not; None for an objective that learns none.
    """
    objective = contrastive_objective(of.objective)
    if objective is None:
        return None
    classifier = around(of.classifier, candidate)
    device = classifier.device or torch.device("cpu")
    space, on_features = objective.space, objective.space.name == "features"
    generator = torch.Generator(device=device).manual_seed(of.options.seed + 59)
    with untouched(candidate):
        if on_features:
            found_head(classifier, of.probe.to(device))
        train, held_out = (
            space.points(classifier, _pixels(part, of.options.seed).to(device), generator)
            for part in (of.sets.train, of.parts.acceptance)
        )
        head = head_weights(classifier) if on_features else None
        checks = check_density(
            space,
            space.energy(classifier),
            train,
            held_out,
            generator,
            noise=objective.final_noise(),
            head=head,
        )
    problems = checks.problems()
    agree = ["the held-out accuracy and the sampled log Z agree with it", *checks.notes()]
    return EnergyDensity(
        status=NOT_OFFERED if problems else OFFERED,
        reason="; ".join(problems or agree),
        space=space.name,
        base=space.base,
        constant=checks.constant,
        checks=checks.to_dict(),
        weights=weights_hash(candidate),
        head=None if head is None else (head[0].cpu(), head[1].cpu()),
        classifier=classifier,
    )


def told(density: EnergyDensity) -> str:
    """Say in one sentence what became of the density."""
    if not density.offered:
        return f"No density is offered: {density.reason}."
    bits, notes = density.checks["bits"]["value"], density.checks["notes"]
    return (
        f"A density of {density.space} is offered: log Z = {density.constant:.3f} nats, "
        f"{bits:.3f} bits per dimension on held-out rows" + "".join(f"; {note}" for note in notes)
    ) + "."


def _pixels(images: TrainingImages, seed: int) -> torch.Tensor:
    rows = np.arange(len(images), dtype=np.int64)
    if len(rows) > _MOST:
        rows = np.sort(np.random.default_rng([seed, 61]).permutation(rows)[:_MOST])
    return images.pixels(rows)
