"""Everything that can be wrong is looked at before the work: data, model, guard, objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.splits import check_disjoint
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate import Guard
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.training.acceptance import points, rows_needed
from ebm_guard.training.distributed import World
from ebm_guard.training.images import Rows, TrainingImages
from ebm_guard.training.negatives import given_negatives
from ebm_guard.training.objectives import Objective, make_objective
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.refit import fit_like
from ebm_guard.training.selection import (
    Look,
    Panel,
    ValidationParts,
    at_most,
    half,
    make_panel,
    split_validation,
)
from ebm_guard.training.working_copy import working_copy

_PROBE = 8
# Of sets that are decoded when asked for, only so many are compared with the validation rows.
_COMPARED = 5000
_HALF = 0.5


@dataclass(frozen=True)
class Sets:
    """The user's images.

    Args:
        train: labelled.
        validation: labelled.
        outliers: to train on, or None.
        ood: OOD sets by name, to choose and to accept on.
    """

    train: TrainingImages
    validation: TrainingImages
    outliers: TrainingImages | None = None
    ood: Mapping[str, TrainingImages] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Say what each set is, as JSON types."""
        sets = {"train": self.train, "validation": self.validation, **self.ood}
        if self.outliers is not None:
            sets["outliers"] = self.outliers
        return {name: _facts(part) for name, part in sets.items()}


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
        DataError: training and validation share images, or lack labels.
        UnsupportedModelError: the model cannot be copied.
    """
    world.share(options.batch_size)
    train, seed = sets.train, options.seed
    parts = _split(sets, options)
    probe = train.pixels(np.arange(min(_PROBE, len(train)), dtype=np.int64))
    # One image alone proves nothing about a layer.
    probe = probe if len(probe) > 1 else torch.cat([probe, 1 - probe])
    copied = working_copy(classifier, probe)
    forward = pixel_forward(copied)
    with torch.no_grad():
        num_classes = int(forward(probe).logits.shape[1])
    train.require_labels(num_classes, "train")
    sets.validation.require_labels(num_classes, "validation")
    # Before the training: too few rows, or a score that cannot be made again, show here.
    start_guard, _ = fit_like(guard, classifier, parts.refit, train, seed)

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
        on_selection=selection.look(forward),
        on_acceptance=acceptance.look(forward),
    )


def make_training_objective(
    objective: str | Objective | Callable[..., Any],
    outliers: TrainingImages | None,
    options: FineTuneOptions,
) -> Objective:
    """Make the objective, with the user's outliers among its negatives where there are any.

    Raises:
        InvalidInputError: see :func:`ebm_guard.training.objectives.make_objective`.
    """
    settings = dict(options.objective_settings)
    if outliers is None:
        return make_objective(objective, **settings)
    if options.outlier_share == _HALF or not isinstance(objective, str):
        return make_objective(objective, outliers=outliers, **settings)
    settings["negatives"] = given_negatives(
        outliers, settings.get("negatives"), options.outlier_share
    )
    return make_objective(objective, **settings)


def _split(sets: Sets, options: FineTuneOptions) -> ValidationParts:
    train, validation = sets.train, sets.validation
    known = validation.hashes()
    check_disjoint(train.hashes(_compared(train, options.seed)), known, ("train", "validation"))
    if sets.outliers is not None:
        for name, part in sets.ood.items():
            rows = _compared(part, options.seed)
            check_disjoint(sets.outliers.hashes(), part.hashes(rows), ("outliers", name))
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


def _compared(images: TrainingImages, seed: int) -> Rows | None:
    if images.in_memory or len(images) <= _COMPARED:
        return None
    order = np.random.default_rng([seed, 59]).permutation(len(images))
    return order[:_COMPARED].astype(np.int64)


def _facts(images: TrainingImages) -> dict[str, Any]:
    """Say what a set is; of a decoded one by its first images."""
    few = None if images.in_memory else np.arange(min(64, len(images)), dtype=np.int64)
    return {
        "source": images.source,
        "n": len(images),
        "fingerprint": _fingerprint(images.hashes(few)),
        "label_sum": None if images.labels is None else int(images.labels.sum()),
    }


def _fingerprint(hashes: NDArray[np.uint64]) -> str:
    # Odd factors by place, so that the order counts.
    with np.errstate(over="ignore"):
        mixed = hashes * (2 * np.arange(len(hashes), dtype=np.uint64) + np.uint64(1))
    return f"{int(np.bitwise_xor.reduce(mixed)):016x}"
