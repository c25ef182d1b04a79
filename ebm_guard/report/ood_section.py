"""The OOD sections: energies on one axis, all scores on all sets, and their ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.intervals import Metric
from ebm_guard.ood import Energy, ood_metrics, roc_curve
from ebm_guard.ood.contrasts import auroc_contrasts
from ebm_guard.ood.metrics import auroc
from ebm_guard.predictions import Predictions
from ebm_guard.report.record import (
    ATTENTION,
    BAD,
    GOOD,
    NOT_RUN,
    EnergySection,
    NotRun,
    OODSet,
    Ranking,
    Verdict,
)
from ebm_guard.report.score_table import ScoreTable

SYNTHETIC, SHIFTED = "synthetic", "shifted"
_BINS = 60
# Customs: below 0.8 the two sets mix, above 0.95 few inputs are confused.
_WEAK, _STRONG = 0.80, 0.95
# A lead below one point of AUROC changes no decision.
_MATTERS = 0.01
Values = dict[str, NDArray[np.float64]]


def ood_role(name: str) -> str:
    """Return the role that the name of an OOD set tells.

    ``synthetic`` sets are made from the user's own images; ``shifted`` ones are familiar images
    under other conditions, which a gate should still accept: they are not ranked.

    Example:
        >>> ood_role("near_cifar100"), ood_role("svhn"), ood_role("shifted_blur")
        ('near_ood', 'ood', 'shifted')
    """
    for prefix in ("near", "far"):
        if name.startswith(prefix):
            return f"{prefix}_ood"
    return next((role for role in (SYNTHETIC, SHIFTED) if name.startswith(role)), "ood")


def ood_section(ood: Mapping[str, Predictions], table: ScoreTable, seed: int) -> dict[str, OODSet]:
    """Measure every score on every OOD set, against all evaluation rows."""
    sections = {}
    for name, part in ood.items():
        measured: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        for method, column in table.columns.items():
            if not column.values:
                measured[method] = NotRun(column.reason)
                continue
            id_scores, ood_scores = column.values["evaluation"], column.values[name]
            measured[method] = ood_metrics(id_scores, ood_scores, seed=seed)
            curves[method] = roc_curve(id_scores, ood_scores).to_dict()
        sections[name] = OODSet(ood_role(name), len(part), measured, curves)
    return sections


def energy_section(
    evaluation: Predictions,
    ood: Mapping[str, Predictions],
    table: ScoreTable,
    threshold: float | None,
    seed: int,
) -> EnergySection | NotRun:
    """Describe the energies of all sets, and rank energy among the scores."""
    if evaluation.kind == "probs":
        return NotRun("energy is not available: needs logits, got probabilities")
    energy = Energy()
    parts = {"evaluation": evaluation, **ood}
    values = {name: energy.of(part) for name, part in parts.items()}
    ranked = [name for name in ood if ood_role(name) != SHIFTED]
    ranking = _ranking(ranked, table, seed) if ranked else None
    sets = {
        name: {"role": "evaluation" if name == "evaluation" else ood_role(name)} | _summary(row)
        for name, row in values.items()
    }
    return EnergySection(
        verdict=_verdict(values, ranking),
        temperature=energy.energy_temperature,
        sets=sets,
        histogram=_histogram(values, threshold),
        threshold=threshold,
        ranking=ranking,
    )


def _summary(values: NDArray[np.float64]) -> dict[str, Any]:
    q05, median, q95 = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "min": float(values.min()),
        "q05": float(q05),
        "median": float(median),
        "q95": float(q95),
        "max": float(values.max()),
    }


def _histogram(values: Values, threshold: float | None) -> dict[str, Any]:
    """Count on shared edges; the outermost 0.1 % of each set go to the end bins."""
    ends = np.array([np.quantile(row, [0.001, 0.999]) for row in values.values()])
    low, high = float(ends.min()), float(ends.max())
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    counts = {
        name: np.histogram(np.clip(row, low, high), edges)[0].tolist()
        for name, row in values.items()
    }
    return {"edges": edges.tolist(), "counts": counts}


def _ranking(sets: list[str], table: ScoreTable, seed: int) -> Ranking:
    columns = table.ran()
    scores = list(columns)
    id_scores = {name: column.values["evaluation"] for name, column in columns.items()}
    ood_scores = {name: [column.values[part] for part in sets] for name, column in columns.items()}
    means: dict[str, float] = {}
    worst: dict[str, float] = {}
    for name in scores:
        values = [auroc(id_scores[name], part).value for part in ood_scores[name]]
        means[name], worst[name] = float(np.mean(values)), min(values)
    order = sorted(scores, key=lambda name: -means[name])
    ranks = {name: 1 + sum(other > means[name] for other in means.values()) for name in order}
    ranked = [
        {
            "name": name,
            "mean_auroc": means[name],
            "worst_auroc": worst[name],
            "rank": ranks[name],
        }
        for name in order
    ]
    best, rank = order[0], ranks["energy"]
    # With energy in front, it is compared with the runner-up; every rival was looked at.
    rival = best if rank > 1 else next(name for name in order if name != "energy")
    # Intervals of all leads at once: the best score was chosen by looking at all of them.
    against = auroc_contrasts(id_scores, ood_scores, "energy", seed)[rival]
    difference = against if rank > 1 else _negated(against)
    sentence = _ranking_sentence(rank, len(ranked), rival, difference)
    if rank == 1:
        best = "energy"
        difference = Metric(0.0, None, None, difference.n, "energy is the best")
    return Ranking(ranked, rank, len(ranked), best, difference, sentence)


def _negated(metric: Metric) -> Metric:
    low, high = metric.low, metric.high
    return replace(
        metric,
        value=-metric.value,
        low=None if high is None else -high,
        high=None if low is None else -low,
    )


def _ranking_sentence(rank: int, of: int, rival: str, difference: Metric) -> str:
    low, high = difference.low or 0.0, difference.high or 0.0
    size = f"{difference.value:+.4f} mean AUROC [{low:+.4f}, {high:+.4f}]"
    if rank == 1:
        certain = "" if low > 0 else ", which these rows cannot tell from 0"
        return f"Energy is 1st of {of} scores on this data; it leads {rival} by {size}{certain}."
    place = {2: "2nd", 3: "3rd"}.get(rank, f"{rank}th")
    if low > 0:
        advice = f"consider a gate on {rival}" if low > _MATTERS else "a real but small lead"
        return (
            f"Energy is {place} of {of} scores on this data: {rival} is better by {size}; {advice}."
        )
    return (
        f"Energy is {place} of {of} scores on this data; the best, {rival}, leads by {size}, which "
        "these rows cannot tell from 0."
    )


def _verdict(values: Values, ranking: Ranking | None) -> Verdict:
    if ranking is None:
        return Verdict(
            NOT_RUN,
            "No OOD data was given",
            "Energies of the evaluation rows are described below; how well they tell foreign "
            "inputs apart is unknown. Give OOD sets with --ood NAME=SPEC.",
        )
    found = {
        name: ood_metrics(values["evaluation"], row, draws=100)
        for name, row in values.items()
        if name != "evaluation" and ood_role(name) != SHIFTED
    }
    worst = min(found, key=lambda name: found[name].auroc.value)
    value = found[worst].auroc.value
    status = GOOD if value >= _STRONG else ATTENTION if value >= _WEAK else BAD
    headline = {
        GOOD: "Foreign inputs stand out by their energy",
        ATTENTION: "Foreign inputs are partly told apart",
        BAD: "Foreign inputs look like familiar ones",
    }[status]
    sentence = (
        f"On the hardest set, {worst}, energy reaches AUROC {value:.3f}; a cut that accepts 95 % "
        f"of familiar inputs lets {found[worst].fpr95.value:.1%} of {worst} pass. "
        f"Energy ranks {ranking.energy_rank} of {ranking.of} scores here"
    )
    sentence += "." if ranking.energy_rank == 1 else f"; the best is {ranking.best}."
    if all(ood_role(name) == SYNTHETIC for name in found):
        sentence += (
            " These sets are synthetic, made from your own images: real foreign images may be "
            "harder. Give some with `--ood NAME=SPEC`."
        )
    return Verdict(status, headline, sentence)
