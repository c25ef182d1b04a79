"""What ``ebm-guard finetune`` writes: the net that was given against what training found."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ebm_guard.model.weights import weights_hash
from ebm_guard.report.finetune_density import DensitySection, density_section
from ebm_guard.report.finetune_robustness import RobustnessComparison, compare_robustness
from ebm_guard.report.finetune_training import TrainingSection, training_section
from ebm_guard.report.meta import (
    environment_facts,
    model_card,
    preprocessing_facts,
    run_facts,
)
from ebm_guard.report.paired import (
    Compared,
    ComparedSet,
    Pair,
    compare_ood,
    compare_rows,
    mean_auroc,
)
from ebm_guard.report.record import ATTENTION, GOOD, DataSet, Meta, NotRun, Record, Verdict, plain

if TYPE_CHECKING:
    from ebm_guard.model import EnergyClassifier
    from ebm_guard.predictions import Predictions
    from ebm_guard.robustness.records import Robustness
    from ebm_guard.training.result import FinetuneResult

SCHEMA = "ebm_guard.finetune/1"
ACCEPTED = "accepted"
NO_CANDIDATE = "training reached no state that could be a candidate"
NO_ATTACKS = "no attack was asked for; add --attacks quick"
# Headings of the means, and the roles that each is over.
NEVER_SEEN, TRAINED_ON = "never seen", "trained on"
MEANS = {
    NEVER_SEEN: ("unseen",),
    "kinds that chose the checkpoint": ("guard_kind",),
    "all that was not trained on": ("unseen", "validation", "guard_kind"),
    TRAINED_ON: ("trained_on",),
}


@dataclass(frozen=True)
class Sides:
    """What both nets said about all rows of the report.

    Args:
        evaluation: labelled rows.
        note: where these rows come from, in words.
        own: whether they were used for nothing else, and not for the acceptance test.
        ood: (role, rows) by name; see :class:`~ebm_guard.report.paired.ComparedSet` for the roles.
    """

    evaluation: Pair
    note: str
    own: bool
    ood: Mapping[str, tuple[str, Pair]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome(Record):
    """How fine-tuning ended.

    Args:
        status: ``accepted`` or ``start returned``.
        reason: one sentence.
        story: what happened, in order.
        interrupted: whether it was stopped by hand.
        seconds: of training.
        updates: made, those rolled back included.
        weights: hashes of the weights of the ``start`` and of the ``winner``; None for a callable.
    """

    status: str
    reason: str
    story: tuple[str, ...]
    interrupted: bool
    seconds: float
    updates: int
    weights: Mapping[str, str | None]


@dataclass(frozen=True)
class RowComparison(Record):
    """Accuracy and calibration of both nets.

    Args:
        note: where the rows come from.
        own: whether they were used for nothing else.
        n: rows compared.
        broken: rows left out, because one of the nets gave NaN or infinity.
        temperature: of the ``start`` and of the ``candidate``, fitted on selection rows, and a
            ``note`` where one could not be; None where there was no test.
        before: figures as the nets give their probabilities.
        after: the same after the temperatures; empty where there are none but 1.
    """

    note: str
    own: bool
    n: int
    broken: int
    temperature: Mapping[str, Any] | None
    before: Mapping[str, Compared]
    after: Mapping[str, Compared]


@dataclass(frozen=True)
class FinetuneReport(Record):
    """The whole before/after report."""

    meta: Meta
    data: Mapping[str, DataSet]
    verdict: Verdict
    outcome: Outcome
    acceptance: Any
    comparison: RowComparison | NotRun
    ood: Mapping[str, ComparedSet]
    ood_means: Mapping[str, Compared]
    robustness: RobustnessComparison | NotRun
    training: TrainingSection
    density: DensitySection | NotRun

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, schema number first."""
        return {"schema": SCHEMA} | super().to_dict()


def finetune_report(
    result: FinetuneResult,
    sides: Sides | None,
    classifier: EnergyClassifier,
    data: Mapping[str, DataSet],
    *,
    known: Predictions,
    robustness: tuple[Robustness, Robustness] | None = None,
    no_attacks: str = NO_ATTACKS,
    title: str = "Fine-tuning report",
    command: str | None = None,
    clock: float | None = None,
    seed: int = 0,
) -> FinetuneReport:
    """Put a fine-tuning run into a report: the start against the candidate, also a refused one.

    Args:
        result: of :func:`ebm_guard.finetune`.
        sides: predictions of both nets, or None where there is no candidate.
        classifier: the net that was given.
        data: the sets that were used, by name.
        known: what the given net said about any labelled rows; its classes and dtype are named.
        robustness: evaluations of the start and of the candidate, with the same images and seed.
        no_attacks: why there are none.
        title: heading.
        command: the command line that makes it, for the reader.
        clock: ``time.perf_counter()`` at the start of the work.
        seed: of the bootstraps.
    """
    comparison: RowComparison | NotRun = NotRun(NO_CANDIDATE)
    ood: dict[str, ComparedSet] = {}
    means: dict[str, Compared] = {}
    if sides is not None:
        comparison = _comparison(result, sides, seed)
        rows = sides.evaluation.finite()
        ood = compare_ood(rows, sides.ood, seed)
        means = _means(rows, sides, ood)
    attacks = (
        NotRun(NO_CANDIDATE if sides is None else no_attacks)
        if robustness is None
        else compare_robustness(*robustness)
    )
    training = training_section(result.history)
    outcome = Outcome(
        status=result.status,
        reason=result.reason,
        story=tuple(result.story),
        interrupted=result.interrupted,
        seconds=float(result.seconds),
        updates=training.made,
        weights={"start": classifier.weights_hash(), "winner": weights_hash(result.model)},
    )
    acceptance = result.acceptance
    return FinetuneReport(
        meta=_meta(result, known, classifier, title, command, clock, seed),
        data=data,
        verdict=_verdict(outcome, comparison, ood, means, attacks),
        outcome=outcome,
        acceptance=NotRun(NO_CANDIDATE) if acceptance is None else acceptance.to_dict(),
        comparison=comparison,
        ood=ood,
        ood_means=means,
        robustness=attacks,
        training=training,
        density=density_section(result, NO_CANDIDATE),
    )


def _comparison(result: FinetuneResult, sides: Sides, seed: int) -> RowComparison:
    pair = sides.evaluation.finite()
    acceptance = result.acceptance
    given = None if acceptance is None else acceptance.to_dict()["temperature"]
    temperatures = None if given is None else (given["start"], given["candidate"])
    # Where none could be fitted, the figures after temperature would be those before it once more.
    if temperatures == (1, 1):
        temperatures = None
    before, after = compare_rows(pair, temperatures, seed)
    return RowComparison(
        note=sides.note,
        own=sides.own,
        n=len(pair),
        broken=sides.evaluation.broken,
        temperature=given,
        before=before,
        after=after,
    )


def _means(rows: Pair, sides: Sides, compared: Mapping[str, ComparedSet]) -> dict[str, Compared]:
    """Compare means over groups of sets; a group of one set is that set, and a copy is left out."""
    means: dict[str, Compared] = {}
    seen: list[list[str]] = []
    for heading, roles in MEANS.items():
        names = [name for name, found in compared.items() if found.role in roles]
        if len(names) < 2 or names in seen:
            continue
        seen.append(names)
        means[heading] = mean_auroc(rows, [sides.ood[name][1] for name in names])
    return means


def _verdict(
    outcome: Outcome,
    comparison: RowComparison | NotRun,
    ood: Mapping[str, ComparedSet],
    means: Mapping[str, Compared],
    robustness: RobustnessComparison | NotRun,
) -> Verdict:
    worse = losses(comparison, ood, robustness)
    gains = losses(comparison, ood, robustness, better=True)
    if outcome.status != ACCEPTED:
        return Verdict(ATTENTION, "Start returned: your model stays as it was", outcome.reason)
    unseen = {name: found for name, found in ood.items() if found.role in MEANS[NEVER_SEEN]}
    headline = "Accepted: the fine-tuned net may replace yours"
    if not unseen:
        headline = "Accepted, on unknown images of known kinds alone"
    if worse:
        headline = f"Accepted, with {len(worse)} figure{'s' if len(worse) > 1 else ''} worse"
    said = [outcome.reason]
    if isinstance(comparison, RowComparison):
        accuracy = comparison.before["accuracy"]
        said.append(f"Accuracy {_arrow(accuracy, percent=True)} on {comparison.n:,} images.")
    said.append(_on_unseen(unseen, means))
    if gains:
        said.append(f"Better: {', '.join(gains)}.")
    said.append(f"Worse: {', '.join(worse)}." if worse else "No figure is clearly worse.")
    return Verdict(ATTENTION if worse or not unseen else GOOD, headline, " ".join(said))


def _on_unseen(unseen: Mapping[str, ComparedSet], means: Mapping[str, Compared]) -> str:
    """Say what the energy is worth on sets that nothing was chosen on."""
    if not unseen:
        return (
            "No unknown images were looked at that nothing was chosen on: add --ood NAME=SPEC to "
            "learn whether the gain carries over."
        )
    if len(unseen) == 1:
        ((name, found),) = unseen.items()
        return f"Energy AUROC on {name}, {NEVER_SEEN}: {_arrow(found.auroc)}."
    return f"Mean energy AUROC, {NEVER_SEEN}: {_arrow(means[NEVER_SEEN])}."


def losses(
    comparison: RowComparison | NotRun,
    ood: Mapping[str, ComparedSet],
    robustness: RobustnessComparison | NotRun,
    *,
    better: bool = False,
) -> list[str]:
    """List the figures whose interval says that the candidate is worse, or better."""
    found: list[tuple[str, Compared]] = []
    if isinstance(comparison, RowComparison):
        found += list(comparison.before.items())
        found += [(f"{name} after temperature", item) for name, item in comparison.after.items()]
    for name, part in ood.items():
        # What was trained on proves nothing, neither way.
        if part.role != "trained_on":
            found += [(f"AUROC on {name}", part.auroc), (f"FPR95 on {name}", part.fpr95)]
    if isinstance(robustness, RobustnessComparison):
        found += [
            (f"robust accuracy at {norm['norm']} {row['text']}", row["worst_case"])
            for norm in robustness.norms
            for row in norm["rows"]
            if row["worst_case"] is not None
        ]
        if robustness.corrupted is not None:
            found.append(("accuracy on corrupted images", robustness.corrupted["accuracy"]))
    return [name for name, item in found if item.better is better]


def _arrow(item: Compared, *, percent: bool = False) -> str:
    values = [item.start.value, item.candidate.value]
    if percent:
        return " -> ".join(f"{100 * value:.1f} %" for value in values)
    return " -> ".join(f"{value:.3f}" for value in values)


def _meta(
    result: FinetuneResult,
    evaluation: Predictions,
    classifier: EnergyClassifier,
    title: str,
    command: str | None,
    clock: float | None,
    seed: int,
) -> Meta:
    preprocessing = classifier.preprocessing
    return Meta(
        title=title,
        package={"name": "ebm_guard", "version": version("ebm-guard")},
        model=model_card(evaluation, classifier),
        preprocessing=None if preprocessing is None else preprocessing_facts(preprocessing),
        seed=seed,
        protocol=[],
        settings=plain(result.settings),
        command=command,
        environment=environment_facts(evaluation, classifier),
        run=run_facts(datetime.now(UTC), time.perf_counter() if clock is None else clock),
    )
