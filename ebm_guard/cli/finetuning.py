"""Run a fine-tuning of the command line: open the data, train, and look at both nets."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from ebm_guard.cli.finetune_options import PASSED, TrainingChoices
from ebm_guard.cli.finetune_sides import (
    OOD_VALIDATION,
    OUTLIERS,
    TRAIN,
    UNLABELLED,
    VALIDATION,
    attacked,
    both_sides,
)
from ebm_guard.cli.options import ModelOptions
from ebm_guard.cli.session import Session, model_errors, named_specs
from ebm_guard.data import ImageSource, match_classes, parse_spec
from ebm_guard.data.splits import check_disjoint
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.loading import import_callable
from ebm_guard.predictions import Predictions
from ebm_guard.report.finetune_report import FinetuneReport, finetune_report
from ebm_guard.report.record import DataSet
from ebm_guard.robustness.threat import Threat
from ebm_guard.training import FinetuneResult, TrainingImages, finetune
from ebm_guard.training.class_losses import make_class_loss
from ebm_guard.training.objectives import Objective
from ebm_guard.training.regularisers import make_regulariser
from ebm_guard.training.working_copy import around

# Folder in the output that keeps an interrupted run.
STATE = "finetune-state"
_NAMES = (TRAIN, VALIDATION, UNLABELLED, OUTLIERS, OOD_VALIDATION)
# Values of images that are kept in memory, decoded.
_IN_MEMORY = 200_000_000
# Of larger sets only so many are compared with --data.
_COMPARED = 5000


@dataclass(frozen=True)
class Inputs:
    """What the command line says about data and attacks."""

    train_data: str
    val_data: str
    data: str | None
    unlabelled: str | None
    outliers: str | None
    ood_validation: str | None
    ood: tuple[str, ...]
    guard_path: str | None
    attacks: str
    epsilon: tuple[str, ...]
    attack_images: int | None

    def threats(self) -> tuple[Threat, ...] | None:
        """Return the budgets, or None for those of the literature."""
        return (Threat.of("linf", self.epsilon),) if self.epsilon else None


def check_inputs(given: Inputs, training: TrainingChoices, output: Path) -> None:
    """Refuse what contradicts itself or would be ignored, before the work.

    Raises:
        InvalidInputError: with the way out.
    """
    if training.updates is not None and training.epochs is not None:
        raise InvalidInputError("got --updates and --epochs; give one of them")
    attack_options = {"--epsilon": given.epsilon, "--attack-images": given.attack_images}
    ignored = [name for name, value in attack_options.items() if value]
    if given.attacks == "none" and ignored:
        raise InvalidInputError(f"got {ignored[0]} without --attacks; add --attacks quick")
    given.threats()
    for name in named_specs(given.ood):
        if name in _NAMES or name.startswith("synthetic_"):
            raise InvalidInputError(f"got --ood {name!r}, a name of another set; take another")
    parse_settings(training.objective_setting)
    class_terms(training)
    if training.resume and not (output / STATE).is_dir():
        raise InvalidInputError(
            f"got --resume, and {output} holds no interrupted run; start without --resume"
        )


def class_terms(training: TrainingChoices) -> dict[str, Any]:
    """Make what ``--class-loss`` and ``--regulariser`` name.

    Raises:
        InvalidInputError: an unknown name or setting.
    """
    name, settings = parse_method("--class-loss", training.class_loss)
    named = [parse_method("--regulariser", each) for each in training.regulariser]
    return {
        "class_loss": make_class_loss(name, **settings),
        "regularisers": [make_regulariser(each, **own) for each, own in named],
    }


def parse_method(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``NAME,SETTING=VALUE,...``.

    Raises:
        InvalidInputError: a setting without ``=``, or twice.

    Example:
        >>> parse_method("--class-loss", "hinge,m=2")
        ('hinge', {'m': 2})
    """
    name, *pairs = (part.strip() for part in text.split(","))
    return name, parse_settings(tuple(pairs), option)


def parse_settings(pairs: tuple[str, ...], option: str = "--objective-setting") -> dict[str, Any]:
    """Parse NAME=VALUE settings of an option: numbers, true, false, lists, or text.

    Raises:
        InvalidInputError: no ``=``, or a name twice.

    Example:
        >>> parse_settings(("weight=0.5", "form=raw"))
        {'weight': 0.5, 'form': 'raw'}
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in settings:
            raise InvalidInputError(f"got {option} {pair!r}; needed NAME=VALUE, each name once")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    return settings


def finetuned(
    options: ModelOptions,
    given: Inputs,
    training: TrainingChoices,
    output: Path,
    *,
    title: str,
    command: str,
    clock: float,
) -> tuple[FinetuneResult, FinetuneReport | None]:
    """Fine-tune as the command line says, and compare both nets.

    Returns:
        The result, and its report; None in a process that does not write it.
    """
    ood = named_specs(given.ood)
    roles = {
        TRAIN: given.train_data,
        VALIDATION: given.val_data,
        "evaluation": given.data,
        UNLABELLED: given.unlabelled,
        OUTLIERS: given.outliers,
        OOD_VALIDATION: given.ood_validation,
    }
    specs = {name: spec for name, spec in roles.items() if spec is not None} | ood
    session = Session(options, list(specs.values()), given.guard_path)
    session.require_classifier()
    known = session.predictions(given.val_data, VALIDATION, VALIDATION)
    images = {name: _images(session, spec, name, known) for name, spec in specs.items()}
    _check_own_rows(images)
    result = _run(session, images, training, output)
    if os.environ.get("RANK", "0") != "0":
        return result, None
    data = {name: _data_set(images[name], name) for name in specs if name not in ood}
    data |= {name: _data_set(images[name], "ood") for name in ood}
    sides, robustness = None, None
    if result.candidate is not None:
        twin = copy.copy(session)
        twin.classifier = around(session.require_classifier(), result.candidate)
        sides = both_sides(session, twin, specs, images, known, result)
        if given.attacks != "none":
            robustness = attacked(
                session,
                twin,
                sides.evaluation.start,
                given.attacks,
                threats=given.threats(),
                most=given.attack_images,
            )
    elif given.data is not None:
        known = session.predictions(given.data, "evaluation", "evaluation")
    report = finetune_report(
        result,
        sides,
        session.require_classifier(),
        data,
        known=known,
        robustness=robustness,
        title=title,
        command=command,
        clock=clock,
        seed=options.seed,
    )
    return result, report


def forget_state(output: Path) -> None:
    """Remove the checkpoint once the results are written."""
    import shutil

    shutil.rmtree(output / STATE, ignore_errors=True)


def _run(
    session: Session,
    images: Mapping[str, TrainingImages],
    training: TrainingChoices,
    output: Path,
) -> FinetuneResult:
    quiet = session.options.quiet
    objective, settings = _objective(training)
    augment = training.augment
    with model_errors("fine-tuning"):
        return finetune(
            session.guard or session.require_classifier(),
            images[TRAIN],
            images[VALIDATION],
            objective=objective,
            objective_settings=settings,
            unlabelled=images.get(UNLABELLED),
            **class_terms(training),
            updates=training.updates or 200,
            batch_size=training.train_batch_size,
            augment=None
            if augment == "none"
            else import_callable(augment, "augmentation")
            if ":" in augment
            else augment,
            outliers=images.get(OUTLIERS),
            ood_validation=images.get(OOD_VALIDATION),
            seed=session.options.seed,
            checkpoint=output / STATE,
            progress=not quiet,
            on_event=None if quiet else say,
            **{name: getattr(training, name) for name in PASSED},
        )


def say(line: Mapping[str, Any]) -> None:
    """Print evaluations and events, on stderr."""
    if line["kind"] == "event":
        click.echo(f"  update {line['update']}: {line['text']}", err=True)
    elif line["kind"] == "evaluation":
        mark = ", the best so far" if line["best"] else "" if line["eligible"] else ", not eligible"
        if not line["update"]:
            mark = ", the start"
        click.echo(
            f"  update {line['update']}: accuracy {100 * line['accuracy']:.1f} %, mean AUROC "
            f"{line['mean_auroc']:.4f}{mark}",
            err=True,
        )


def _objective(training: TrainingChoices) -> tuple[Any, dict[str, Any] | None]:
    """Return a registered name with its settings, or the user's own objective."""
    settings = parse_settings(training.objective_setting)
    if ":" not in training.objective:
        return training.objective, settings
    found = import_callable(training.objective, "objective")
    if isinstance(found, type) and issubclass(found, Objective):
        return found(**settings), None
    if settings:
        raise InvalidInputError(
            "got --objective-setting for a function of your own; give it as a class made from "
            "Objective, or put the settings into the function"
        )
    return found, None


def _images(session: Session, spec: str, name: str, known: Predictions) -> TrainingImages:
    """Open a set as pixels in [0, 1], small ones in memory, labels numbered as the model's."""
    classifier = session.require_classifier()
    preprocessing = classifier.preprocessing
    role = name if name in (TRAIN, VALIDATION, "evaluation") else "ood"
    role = TRAIN if name == UNLABELLED else role
    source = session.sources.get(name) or session.open(parse_spec(spec), role, name)
    if preprocessing is None:
        raise InvalidInputError(
            "this model has no pretrained_cfg, so its preprocessing is not known: give --mean and "
            "--std"
        )
    if name == VALIDATION and known.skipped:
        raise DataError(
            f"{len(known.skipped)} images of --val-data cannot be read, such as "
            f"{known.skipped[0][0]}; fine-tuning needs rows that are all readable. Remove them"
        )
    images = TrainingImages.of_source(source, preprocessing)
    if name in (TRAIN, VALIDATION, "evaluation"):
        labels = known.labels if name == VALIDATION else _labels(source, classifier, known)
        images.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    if len(images) * int(np.prod(images.shape)) > _IN_MEMORY:
        return images
    return TrainingImages(images.all_pixels(), images.labels, source=images.source)


def _check_own_rows(images: Mapping[str, TrainingImages]) -> None:
    """Refuse report rows that training or choosing has seen.

    Raises:
        DataError: more than a few are shared.
    """
    own = images.get("evaluation")
    if own is None:
        return
    hashes = own.hashes()
    seen = {TRAIN: "--train-data", VALIDATION: "--val-data", UNLABELLED: "--unlabelled"}
    for name, option in seen.items():
        other = images.get(name)
        if other is None:
            continue
        few = None if other.in_memory else np.arange(min(len(other), _COMPARED), dtype=np.int64)
        warning = check_disjoint(hashes, other.hashes(few), ("--data", option))
        if warning is not None:
            click.echo(f"warning: {warning}", err=True)


def _labels(
    source: ImageSource, classifier: EnergyClassifier, known: Predictions
) -> NDArray[np.int64] | None:
    if source.labels is None or source.class_map:
        return source.labels
    mapping, _ = match_classes(
        source.classes, classifier.classes, known.num_classes, sorted_names=source.sorted_classes
    )
    if mapping is None or source.classes is None:
        return source.labels
    labels: NDArray[np.int64] = source.labels
    named = (labels >= 0) & (labels < len(mapping))
    return np.where(named, mapping[np.where(named, labels, 0)], labels)


def _data_set(images: TrainingImages, role: str) -> DataSet:
    """Describe images that were not run through the model as a whole."""
    fingerprint = "not computed: decoded as needed"
    if images.in_memory:
        digest = hashlib.sha256(images.hashes().tobytes())
        if images.labels is not None:
            digest.update(images.labels.numpy().tobytes())
        fingerprint = f"sha256:{digest.hexdigest()[:32]}"
    return DataSet(
        spec=images.source,
        role=role,
        n=len(images),
        labelled=images.labels is not None,
        skipped=0,
        skipped_examples=[],
        num_classes=None,
        classes=None,
        class_match="" if images.labels is None else "labels are numbered as the model's classes",
        fingerprint=fingerprint,
        limit=None,
    )
