"""Everything that can be wrong is looked at before the work: data, model, guard, objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.distributed import World
from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.gate import Guard
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.training.acceptance import points
from ebm_guard.training.bounds import rows_needed
from ebm_guard.training.images import TrainingImages
from ebm_guard.training.negatives import given_negatives
from ebm_guard.training.objectives import Objective, make_objective
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.order import shares
from ebm_guard.training.refit import fit_like
from ebm_guard.training.regularisers import Regularised, Regularisers, regularised
from ebm_guard.training.selection import (
    Look,
    Panel,
    ValidationParts,
    at_most,
    half,
    make_panel,
    split_validation,
)
from ebm_guard.training.sets import Sets, checked_sets
from ebm_guard.training.working_copy import working_copy

_PROBE = 8
_HALF = 0.5


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Args:
        classifier: around the user's model.
        guard: as given, or None.
        copied: around the copy that is trained.
        sets: the images.
        parts: the validation rows by use.
        objective: not begun.
        options: of the run.
        world: the processes.
        probe: (B, C, H, W) a few training images.
        num_classes: C.
        start_guard: fitted around the user's model on the refit rows.
        selection: rows that checkpoints are chosen on, with their outliers.
        acceptance: rows of the acceptance test, with theirs.
        on_selection: what the start says on the first.
        on_acceptance: what it says on the second.
        notes: what the user should know of the images, in words.
    """

    classifier: EnergyClassifier
    guard: Guard | None
    copied: EnergyClassifier
    sets: Sets
    parts: ValidationParts
    objective: Objective
    options: FineTuneOptions
    world: World
    probe: Tensor
    num_classes: int
    start_guard: Guard
    selection: Panel
    acceptance: Panel
    on_selection: Look
    on_acceptance: Look
    notes: tuple[str, ...]


def prepare(
    classifier: EnergyClassifier,
    guard: Guard | None,
    sets: Sets,
    objective: Objective,
    options: FineTuneOptions,
    world: World,
) -> Prepared:
    """Check, copy, split, and look at the start.

    Raises:
        InvalidInputError: settings or images that cannot be used; too few validation rows.
        DataError: two sets share images, or labels are missing.
        UnsupportedModelError: the model cannot be copied, or its logits depend on the batch.
        ModelOutputError: logits that are not finite.
    """
    world.share(options.batch_size)
    sets, notes = checked_sets(sets, options.outlier_rows, options.seed)
    train, seed = sets.train, options.seed
    parts = _split(sets.validation, options)
    probe = train.pixels(np.arange(min(_PROBE, len(train)), dtype=np.int64))
    # One image alone proves nothing about a layer.
    probe = probe if len(probe) > 1 else torch.cat([probe, 1 - probe])
    copied = working_copy(classifier, probe)
    forward = pixel_forward(copied)
    with torch.no_grad():
        num_classes = int(forward(probe).logits.shape[1])
    train.require_labels(num_classes, "train", some=True)
    sets.validation.require_labels(num_classes, "validation")

    def panel(images: TrainingImages, side: int) -> Panel:
        given = {name: half(part, seed, side) for name, part in sets.ood.items()}
        return make_panel(
            images,
            given,
            objective.negative_kinds,
            outlier_rows=options.outlier_rows,
            seed=seed + side,
        )

    selection = panel(at_most(parts.selection, options.selection_rows, seed), 0)
    acceptance = panel(parts.acceptance, 1)
    looks = {"selection": selection.look(forward), "acceptance": acceptance.look(forward)}
    _check_start(looks, classifier.name)
    # Before the training: too few rows, or a score that cannot be made again, show here.
    start_guard, _ = fit_like(guard, classifier, parts.refit, train, seed)
    return Prepared(
        classifier=classifier,
        guard=guard,
        copied=copied,
        sets=sets,
        parts=parts,
        objective=objective,
        options=options,
        world=world,
        probe=probe,
        num_classes=num_classes,
        start_guard=start_guard,
        selection=selection,
        acceptance=acceptance,
        on_selection=looks["selection"],
        on_acceptance=looks["acceptance"],
        notes=(*notes, *_unlabelled(train, objective, options, world)),
    )


def make_training_objective(
    objective: str | Objective | Callable[..., Any],
    outliers: TrainingImages | None,
    options: FineTuneOptions,
    regularisers: Regularisers = (),
) -> Objective:
    """Make the objective, with the user's outliers among its negatives where there are any.

    Args:
        objective: as :func:`ebm_guard.finetune` takes it.
        outliers: the user's, or None.
        options: of the run.
        regularisers: names or regularisers, added to the loss.

    Raises:
        InvalidInputError: see :func:`ebm_guard.training.objectives.make_objective`.
    """
    return regularised(_objective(objective, outliers, options), regularisers)


def _objective(
    objective: str | Objective | Callable[..., Any],
    outliers: TrainingImages | None,
    options: FineTuneOptions,
) -> Objective:
    settings = dict(options.objective_settings)
    if outliers is None:
        return make_objective(objective, **settings)
    if options.outlier_share == _HALF or not isinstance(objective, str):
        return make_objective(objective, outliers=outliers, **settings)
    settings["negatives"] = given_negatives(
        outliers, settings.get("negatives"), options.outlier_share
    )
    return make_objective(objective, **settings)


def _unlabelled(
    train: TrainingImages, objective: Objective, options: FineTuneOptions, world: World
) -> list[str]:
    """Say how many images have no label, what becomes of them, and what waits for some in vain."""
    labelled = train.labelled
    if len(labelled) == len(train):
        added = objective.regularisers if isinstance(objective, Regularised) else ()
        idle = [each.name for each in added if each.needs_unlabelled]
        return [
            f"the regulariser {name} acts on images without label, and there are none"
            for name in idle
        ]
    own, others = shares(options.batch_size, options.labelled_share, world.size)
    note = (
        f"{len(train) - len(labelled):,} of {len(train):,} training images have no label: every "
        f"batch takes {own} with a label and {others} without, which the class loss leaves out"
    )
    notes = [note]
    if train.in_memory:
        hashes = train.hashes()
        rest = np.setdiff1d(np.arange(len(train)), labelled)
        twice = int(np.isin(hashes[rest], hashes[labelled]).sum())
        if twice:
            notes.append(f"{twice:,} of the images without label are among those with one")
    return notes


def _split(validation: TrainingImages, options: FineTuneOptions) -> ValidationParts:
    parts = split_validation(validation, options.seed)
    needed = rows_needed(options.max_acc_drop)
    if len(parts.acceptance) < needed:
        raise InvalidInputError(
            f"got {len(validation):,} validation rows, of which {len(parts.acceptance):,} are for "
            "the acceptance test; to show that the accuracy falls by at most "
            f"{points(options.max_acc_drop)} it needs {needed:,}, even where nothing "
            f"changes. Give {2 * needed:,} validation rows or more, or a larger max_acc_drop"
        )
    return parts


def _check_start(looks: Mapping[str, Look], name: str) -> None:
    for rows, look in looks.items():
        if not look.finite:
            raise ModelOutputError(
                f"the logits of this {name} are not finite on the {rows} rows or their outliers, "
                "before any training: there is nothing to compare a fine-tuned model with. Look "
                "at its weights and at its normalisation (mean, std)"
            )
