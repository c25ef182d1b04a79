"""Both nets of a fine-tuning over everything that the report compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

from ebm_guard.cli.session import Session, model_errors
from ebm_guard.data import ImageSource
from ebm_guard.data.outliers import GUARD_KINDS, TRAINING_KINDS, OutlierSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.predictions import Predictions
from ebm_guard.report.finetune_report import Sides
from ebm_guard.report.paired import Pair
from ebm_guard.robustness.evaluate import evaluate_robustness
from ebm_guard.robustness.options import AttackOptions, Images
from ebm_guard.robustness.presets import preset_of
from ebm_guard.robustness.records import Robustness
from ebm_guard.training import FinetuneResult, TrainingImages

if TYPE_CHECKING:
    from ebm_guard.robustness.threat import Threat

# Names of the sets of a run.
TRAIN, VALIDATION, OUTLIERS, OOD_VALIDATION = "train", "validation", "outliers", "ood_validation"
UNLABELLED = "unlabelled"
_SYNTHETIC_ROWS = 500
_NO_GATE = "both nets are compared without a gate"


def both_sides(
    session: Session,
    twin: Session,
    specs: Mapping[str, str],
    images: Mapping[str, TrainingImages],
    known: Predictions,
    result: FinetuneResult,
) -> Sides:
    """Run both nets over everything that the report compares.

    Args:
        session: with the start.
        twin: the same with the candidate.
        specs: data specs by name.
        images: the same sets as pixels.
        known: what the start said about the validation rows.
        result: of the run.
    """
    spec = specs.get("evaluation")
    if spec is not None:
        evaluation = Pair(
            *(each.predictions(spec, "evaluation", "evaluation") for each in (session, twin))
        )
        base = session.sources["evaluation"]
        note = f"{len(evaluation):,} images of --data, used for nothing else."
    else:
        rows = result.parts.rows["acceptance"]
        after = twin.predictions(specs[VALIDATION], VALIDATION, VALIDATION)
        evaluation = Pair(known.select(rows), after.select(rows))
        base = session.sources[VALIDATION].subset(rows)
        session.sources["evaluation"] = base
        note = (
            f"The {len(evaluation):,} acceptance rows of --val-data: the very rows that the "
            "candidate was accepted or refused on, as no --data was given."
        )
    ood: dict[str, tuple[str, Pair]] = {}
    for name, text in specs.items():
        if name in (TRAIN, VALIDATION, "evaluation"):
            continue
        pair = Pair(*(each.predictions(text, "ood", name) for each in (session, twin)))
        ood[name] = _role(name, images), pair
    ood |= _synthetic(session, twin, base, result)
    return Sides(evaluation, note, spec is not None, ood)


def _role(name: str, images: Mapping[str, TrainingImages]) -> str:
    """Say what training knew of an OOD set, by the images themselves."""
    if name == OUTLIERS:
        return "trained_on"
    if name == OOD_VALIDATION:
        return "validation"
    own = images[name].hashes()
    for other, role in ((OUTLIERS, "trained_on"), (OOD_VALIDATION, "validation")):
        shared = int(np.isin(own, images[other].hashes()).sum()) if other in images else 0
        if shared:
            option = f"--{other.replace('_', '-')}"
            click.echo(
                f"warning: {shared:,} of the {len(own):,} images of {name} are in {option} too: it "
                "is not reported as unseen",
                err=True,
            )
            return role
    return "unseen"


def _synthetic(
    session: Session, twin: Session, base: ImageSource, result: FinetuneResult
) -> dict[str, tuple[str, Pair]]:
    """Make outliers of every kind from the evaluation images, with what training knew of it."""
    if base.total is not None and base.total > _SYNTHETIC_ROWS:
        base = base.subset(session.chosen(base.total, _SYNTHETIC_ROWS))
    trained = trained_kinds(result)
    found: dict[str, tuple[str, Pair]] = {}
    for kind in (*GUARD_KINDS, *TRAINING_KINDS):
        source = OutlierSource(base, kind, session.options.seed)
        try:
            sides = [each.run(source, source.spec, features=False) for each in (session, twin)]
        except (DataError, InvalidInputError) as error:
            click.echo(f"warning: no outliers of kind {kind}: {error}", err=True)
            continue
        pair = Pair(*(replace(part, labels=None) for part in sides))
        role = "guard_kind" if kind in GUARD_KINDS else "unseen"
        found[f"synthetic_{kind}"] = ("trained_on" if kind in trained else role), pair
    return found


def trained_kinds(result: FinetuneResult) -> tuple[str, ...]:
    """Return the synthetic kinds that were trained on."""
    return tuple(result.settings["negative_kinds"])


def attacked(
    session: Session,
    twin: Session,
    evaluation: Predictions,
    preset: str,
    *,
    threats: tuple[Threat, ...] | None,
    most: int | None,
) -> tuple[Robustness, Robustness]:
    """Attack both nets on the same images with the same random numbers.

    Args:
        session: with the start, and the evaluation source open.
        twin: with the candidate.
        evaluation: labelled rows, of which some are drawn.
        preset: of the attacks.
        threats: budgets, or None for those of the literature.
        most: images to attack, at most; None for the preset's.
    """
    seed = session.options.seed
    sizes = preset_of(preset, evaluation.num_classes)
    wanted = max(most or sizes.images, sizes.corruption_images)
    order = np.random.default_rng([seed, 16]).permutation(len(evaluation))[:wanted]
    if evaluation.labels is None:
        raise InvalidInputError("attacks compare accuracies; the evaluation rows have no labels")
    images = Images(
        session.pixels("evaluation", evaluation.names(list(order))),
        torch.from_numpy(evaluation.labels[order].astype(np.int64)),
        torch.from_numpy(order),
        of=len(evaluation),
    )
    options = AttackOptions(
        preset=preset,
        threats=threats,
        norm="linf",
        images=most,
        seed=seed,
    )
    with model_errors("an attack"):
        start, candidate = (
            evaluate_robustness(
                each.require_classifier(),
                images,
                no_gate=_NO_GATE,
                options=options,
                say=None if session.options.quiet else _stage(name),
            )
            for name, each in (("start", session), ("candidate", twin))
        )
    return start, candidate


def _stage(name: str) -> Any:
    return lambda line: click.echo(f"  {name}: {line}", err=True)
