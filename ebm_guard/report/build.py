"""Predictions in, report out: the protocol of the reliability report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from ebm_guard.calibration import row_statistics
from ebm_guard.gate import Guard
from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import Energy, make_score
from ebm_guard.predictions import Predictions
from ebm_guard.report.calibration_section import calibration_section
from ebm_guard.report.checks import check_sets, size_warnings
from ebm_guard.report.comparison import Baseline, comparison_section
from ebm_guard.report.crossfit import Fitted, fit_protocol
from ebm_guard.report.finetune_section import Finetuned, finetune_section
from ebm_guard.report.gallery import gallery_section
from ebm_guard.report.gate_section import gate_section
from ebm_guard.report.groups_section import groups_section
from ebm_guard.report.meta import (
    data_set,
    environment_facts,
    model_card,
    preprocessing_facts,
    run_facts,
)
from ebm_guard.report.ood_section import energy_section, ood_role, ood_section
from ebm_guard.report.record import (
    DataSection,
    Meta,
    Report,
)
from ebm_guard.report.requirements import judge, parse_requirement
from ebm_guard.report.robustness_section import robustness_section
from ebm_guard.report.rows import ReportRows, SetRows
from ebm_guard.report.score_table import ScoreColumn, detector_rows, score_table
from ebm_guard.report.selective_section import selective_section
from ebm_guard.robustness.records import Robustness


@dataclass(frozen=True)
class Settings:
    """Choices of a report.

    Args:
        score: the gate's score.
        calibrator: the calibrator that ``after`` is measured with.
        metrics: ``default``, or ``all`` for the metrics and the table of classes on request.
        threshold: ``pac`` or ``marginal``.
        false_reject_rate: target for the share of ID refused.
        assurance: probability that it is met (PAC).
        seed: of the folds and the bootstraps.
        title: heading of the report.
        command: the command line that makes it, for the reader.
        images: whether thumbnails may be shown.
        clock: ``time.perf_counter()`` at the start of the work, for the wall time; default: now.
        extra: further settings to record.
    """

    score: str = "energy"
    calibrator: str = "temperature"
    threshold: str = "pac"
    false_reject_rate: float = 0.05
    assurance: float = 0.95
    seed: int = 0
    title: str = "Reliability report"
    command: str | None = None
    images: bool = True
    metrics: str = "default"
    clock: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def build_report(
    evaluation: Predictions,
    *,
    ood: Mapping[str, Predictions] | None = None,
    calibration: Predictions | None = None,
    fit: Predictions | None = None,
    guard: Guard | None = None,
    classifier: EnergyClassifier | None = None,
    baseline: Baseline | None = None,
    robustness: Robustness | None = None,
    finetuned: Finetuned | None = None,
    requirements: Sequence[str] = (),
    settings: Settings | None = None,
    picture: Callable[[str, int], Image.Image | None] | None = None,
) -> Report:
    """Build the reliability report of a classifier.

    Protocol: ``before`` uses all evaluation rows. ``after``, and the gate's coverage, come from the
    calibration rows if given, else from two-fold cross-fitting on the evaluation rows, so nothing
    is measured on rows it was fitted on. A fitted ``guard`` is evaluated as it is.

    Args:
        evaluation: ID rows; labels allow calibration and accuracy.
        ood: OOD sets by name; a name that begins with ``near`` or ``far`` tells the role.
        calibration: ID rows for temperature and threshold, disjoint from ``evaluation``.
        fit: ID rows for the statistics of feature scores, usually training images; disjoint from
            both.
        guard: a fitted guard to evaluate without refitting.
        classifier: the wrapped model, for the model card.
        baseline: an older report to compare with, row by row.
        robustness: what :func:`ebm_guard.evaluate_robustness` found.
        finetuned: the run of ``ebm-guard finetune`` that returned this model; its weights are
            compared with the model's.
        requirements: bounds such as ``ece<=0.05``.
        settings: see :class:`Settings`.
        picture: returns the image of (set name, row) for the gallery, or None.

    Returns:
        The report.

    Raises:
        ModelOutputError: NaN or infinite logits.
        DataError: sets that share rows, or do not fit each other; a fine-tuning run of another
            model.
        InvalidInputError: a bad name or requirement; a fine-tuning run without a model.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> logits = generator.normal(size=(400, 3)).astype(np.float32)
        >>> report = build_report(Predictions(logits, labels=logits.argmax(axis=1)))
        >>> report.calibration.before.metrics.accuracy.value
        1.0
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    settings = settings or Settings()
    ood = dict(ood or {})
    bounds = [parse_requirement(text) for text in requirements]
    classifier = classifier or (guard.classifier if guard is not None else None)
    tuned = finetune_section(finetuned, classifier)
    warned = check_sets(evaluation, ood, calibration, fit, guard)
    score = guard.score if guard is not None else make_score(settings.score)
    detector, held = detector_rows(score, calibration, fit, settings.seed)
    role = "fit" if fit is not None else "calibration"
    table = score_table(evaluation, ood, detector, score, settings.seed, role)
    protocol = fit_protocol(evaluation, held, guard, table.columns[score.name], settings)
    rows = _rows(evaluation, ood, table.columns[score.name], protocol)
    energy = Energy().of(evaluation) if evaluation.kind == "logits" else None
    warned += protocol.warnings + size_warnings(evaluation, protocol)
    report = Report(
        meta=_meta(evaluation, guard, classifier, settings, protocol, table.sentences),
        data=DataSection(
            evaluation=data_set(evaluation, "evaluation"),
            calibration=None if calibration is None else data_set(calibration, "calibration"),
            fit=None if fit is None else data_set(fit, "fit"),
            ood={name: data_set(part, ood_role(name)) for name, part in ood.items()},
        ),
        requirements=[],
        calibration=calibration_section(evaluation, ood, protocol, settings.seed, settings.metrics),
        energy=energy_section(evaluation, ood, table, protocol.cut_on_energy, settings.seed),
        ood=ood_section(ood, table, settings.seed),
        gate=gate_section(evaluation, ood, protocol),
        selective=selective_section(
            protocol.after, evaluation.labels, energy, protocol.parts, seed=settings.seed
        ),
        groups=groups_section(evaluation, protocol, settings.seed),
        robustness=robustness_section(robustness),
        finetune=tuned,
        comparison=comparison_section(rows, baseline, score.name, settings.seed),
        gallery=gallery_section(evaluation, ood, protocol, picture if settings.images else None),
        warnings=warned,
    )
    report = replace(report, requirements=judge(bounds, report.to_dict()) if bounds else [])
    run = run_facts(started, settings.clock or clock)
    return replace(report, meta=replace(report.meta, run=run), rows=rows)


def _rows(
    evaluation: Predictions, ood: Mapping[str, Predictions], gate: ScoreColumn, fitted: Fitted
) -> ReportRows:
    labels = evaluation.labels
    sets = {
        name: SetRows(np.asarray(part.hashes), gate.values.get(name))
        for name, part in {"evaluation": evaluation, **ood}.items()
    }
    before = (
        None
        if labels is None
        else row_statistics(evaluation.logits, labels, sample_weight=evaluation.sample_weight)
    )
    return ReportRows(sets, labels, before, fitted.after)


def _meta(
    evaluation: Predictions,
    guard: Guard | None,
    classifier: EnergyClassifier | None,
    settings: Settings,
    protocol: Fitted,
    of_scores: list[str],
) -> Meta:
    preprocessing = None if classifier is None else classifier.preprocessing
    chosen = {
        "score": protocol.score.name,
        "calibrator": settings.calibrator
        if protocol.calibrator is None
        else protocol.calibrator.name,
        "metrics": settings.metrics,
        "threshold": settings.threshold,
        "false_reject_rate": settings.false_reject_rate,
        "assurance": settings.assurance,
        "n_bins": 15,
        **settings.extra,
    }
    if guard is not None and protocol.threshold is not None:
        chosen |= {
            "threshold": protocol.threshold.method,
            "false_reject_rate": protocol.threshold.false_reject_rate,
            "assurance": protocol.threshold.assurance,
        }
    return Meta(
        title=settings.title,
        package={"name": "ebm_guard", "version": version("ebm-guard")},
        model=model_card(evaluation, classifier),
        preprocessing=None if preprocessing is None else preprocessing_facts(preprocessing),
        seed=settings.seed,
        protocol=[*protocol.sentences, *of_scores],
        settings=chosen,
        command=settings.command,
        environment=environment_facts(evaluation, classifier),
        run={},
    )
