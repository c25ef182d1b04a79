"""Two reports side by side: differences with paired intervals, on the rows that both saw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import RowStatistics
from ebm_guard.calibration.metrics import bin_index
from ebm_guard.calibration.metrics.proper import weighted_mean
from ebm_guard.errors import DataError
from ebm_guard.intervals import LEVEL, Array, Metric, resample_counts
from ebm_guard.ood.metrics import auroc, auroc_difference
from ebm_guard.report.record import (
    ATTENTION,
    BAD,
    GOOD,
    SCHEMA,
    NotRun,
    Record,
    Verdict,
)
from ebm_guard.report.rows import FILE_NAME, ReportRows, SetRows

_DRAWS = 1000
_BINS = 15
# +1: larger is better, -1: smaller is better.
DIRECTION = {"accuracy": 1, "nll": -1, "brier": -1, "ece": -1, "auroc": 1, "fpr95": -1}


@dataclass(frozen=True)
class Baseline:
    """An older report, read from its folder.

    Args:
        report: its ``report.json``.
        rows: its rows, or None where the folder holds none.
        name: what to call it.
    """

    report: Mapping[str, Any]
    rows: ReportRows | None
    name: str

    @classmethod
    def read(cls, path: str | Path) -> Baseline:
        """Read ``report.json`` (or its folder), and the rows beside it.

        Raises:
            DataError: missing, damaged, or of another schema.
        """
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            schema = report["schema"]
            title = str(report["meta"]["title"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(f"cannot read the baseline report {file}: {error}") from None
        if schema != SCHEMA:
            raise DataError(f"{file} has schema {schema!r}; this version compares {SCHEMA!r}")
        rows = file.parent / FILE_NAME
        return cls(report, ReportRows.read(rows) if rows.exists() else None, title)


@dataclass(frozen=True)
class Change(Record):
    """One metric in both reports.

    Args:
        name: metric path without its set.
        baseline: the value in the older report, on the rows compared.
        value: the value now, on the same rows.
        difference: now minus baseline, with its interval.
        better: True, False, or None where the interval holds 0.
    """

    name: str
    baseline: float
    value: float
    difference: Metric
    better: bool | None


@dataclass(frozen=True)
class ComparisonSection(Record):
    """What changed against a baseline report."""

    verdict: Verdict
    baseline: str
    paired: bool
    note: str
    n: int
    before: Mapping[str, Change]
    after: Mapping[str, Change]
    ood: Mapping[str, Mapping[str, Change]]


def comparison_section(
    rows: ReportRows, baseline: Baseline | None, score: str, seed: int
) -> ComparisonSection | NotRun:
    """Compare the rows of this report with those of a baseline.

    Only rows that both reports saw are compared, matched by their content. Reports from stored
    logits hash the logits, which differ between models: they are matched by position, if number
    and labels agree.

    Returns:
        The section, or why there is none.
    """
    if baseline is None:
        return NotRun("no --baseline was given")
    if baseline.rows is None:
        return NotRun(
            f"the baseline {baseline.name!r} has no {FILE_NAME} beside its report.json, so nothing "
            "can be compared row by row"
        )
    old = baseline.rows
    pairs, by_position, note = _pairs(rows, old)
    if pairs is None:
        return NotRun(f"the baseline {baseline.name!r} saw other rows: {note}")
    here, there = pairs
    sides = {
        side: _row_changes(getattr(rows, side), getattr(old, side), here, there, seed)
        for side in ("before", "after")
    }
    old_score = baseline.report["gate"].get("score", score)
    ood = {
        name: changes
        for name in rows.sets
        if name != "evaluation" and name in old.sets
        for changes in [_ood_changes(rows, old, name, pairs, seed, by_position=by_position)]
        if changes
    }
    if rows.before is not None and rows.before.weight is not None:
        note += "; weighted by the sample weights of this report, not by the baseline's"
    if old_score != score and ood:
        note += f"; the baseline's gate used {old_score}, this one {score}"
    if _same_predictions(rows) and _same_predictions(old):
        # A temperature changes no prediction: accuracy is said once.
        sides["after"] = [item for item in sides["after"] if item.name != "accuracy"]
    everything = [
        *sides["before"],
        *sides["after"],
        *(item for part in ood.values() for item in part),
    ]
    return ComparisonSection(
        verdict=_verdict(everything, baseline.name, ood),
        baseline=baseline.name,
        paired=True,
        note=note,
        n=len(here),
        before=_named(sides["before"]),
        after=_named(sides["after"]),
        ood={name: _named(part) for name, part in ood.items()},
    )


def _same_predictions(rows: ReportRows) -> bool:
    before, after = rows.before, rows.after
    if before is None or after is None:
        return True
    return np.array_equal(before.predicted, after.predicted)


def _named(changes: list[Change]) -> dict[str, Change]:
    return {item.name: item for item in changes}


Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def _pairs(rows: ReportRows, old: ReportRows) -> tuple[Pairs | None, bool, str]:
    """Return the pairs, whether only their position matched them, and a sentence."""
    found = match(rows.sets["evaluation"].hashes, old.sets["evaluation"].hashes)
    n, m = len(rows.sets["evaluation"].hashes), len(old.sets["evaluation"].hashes)
    if len(found[0]) >= 2:
        share = "" if len(found[0]) == n == m else f" of {n:,} here and {m:,} there"
        return found, False, f"{len(found[0]):,} rows matched by content{share}"
    same = rows.labels is not None and old.labels is not None
    if n == m and same and np.array_equal(rows.labels, old.labels):  # type: ignore[arg-type]
        every = np.arange(n, dtype=np.int64)
        return (every, every), True, f"{n:,} rows matched by position; their labels agree"
    return None, False, "no content in common, and number or labels differ"


def match(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> Pairs:
    """Find the rows of two sets with equal content, each used once.

    Example:
        >>> one, two = np.array([5, 7, 7], np.uint64), np.array([7, 9, 7], np.uint64)
        >>> [part.tolist() for part in match(one, two)]
        [[1, 2], [0, 2]]
    """
    places: dict[int, list[int]] = {}
    for row, key in enumerate(second.tolist()):
        places.setdefault(key, []).append(row)
    here, there = [], []
    for row, key in enumerate(first.tolist()):
        rest = places.get(key)
        if rest:
            here.append(row)
            there.append(rest.pop(0))
    return np.array(here, dtype=np.int64), np.array(there, dtype=np.int64)


def _row_changes(
    now: RowStatistics | None, old: RowStatistics | None, here: Array, there: Array, seed: int
) -> list[Change]:
    if now is None or old is None:
        return []
    weight = None if now.weight is None else now.weight[here]
    changes = []
    for name in ("accuracy", "nll", "brier"):
        field = "correct" if name == "accuracy" else name
        new, before = _as_stored(getattr(now, field)[here]), _as_stored(getattr(old, field)[there])
        baseline, value = (float(np.average(part, weights=weight)) for part in (before, new))
        changes.append(_change(name, baseline, value, weighted_mean(new - before, weight)))
    changes.append(_ece_change(now, old, here, there, seed))
    return changes


def _ece_change(
    now: RowStatistics, old: RowStatistics, here: Array, there: Array, seed: int
) -> Change:
    """Compare the ECE of two sides by a bootstrap over their common rows."""
    n = len(here)
    weight = np.ones(n) if now.weight is None else now.weight[here]
    gaps = [weight[:, None] * _gaps(part, rows) for part, rows in ((now, here), (old, there))]

    def eces(counts: Array) -> list[Array]:
        return [np.abs(counts @ part).sum(axis=1) / (counts @ weight) for part in gaps]

    def difference(counts: Array) -> Array:
        new, before = eces(counts)
        return np.asarray(new - before)

    draws = max(100, min(_DRAWS, 20_000_000 // n))
    resampled = resample_counts(n, draws, np.random.default_rng(seed), difference)
    value, baseline = (float(part[0]) for part in eces(np.ones((1, n))))
    return _change("ece", baseline, value, _bootstrapped(value - baseline, resampled, n))


def _as_stored(values: Array) -> NDArray[np.float64]:
    """Round to the digits that rows.npz keeps, so that an unchanged model shows a change of 0."""
    return values.astype(np.float32).astype(np.float64)


def _gaps(rows: RowStatistics, keep: Array) -> Array:
    by_bin = np.zeros((len(keep), _BINS))
    confidence = _as_stored(rows.confidence[keep])
    by_bin[np.arange(len(keep)), bin_index(confidence, _BINS)] = confidence - rows.correct[keep]
    return by_bin


def _ood_changes(
    rows: ReportRows, old: ReportRows, name: str, pairs: Pairs, seed: int, *, by_position: bool
) -> list[Change]:
    found = match(rows.sets[name].hashes, old.sets[name].hashes)
    n = len(rows.sets[name].hashes)
    # Only where the contents can never agree: other images of the same number are no pairs.
    if by_position and not len(found[0]) and n == len(old.sets[name].hashes):
        every = np.arange(n, dtype=np.int64)
        found = (every, every)
    scores = [
        _picked(part, keep)
        for part, keep in (
            (rows.sets["evaluation"], pairs[0]),
            (old.sets["evaluation"], pairs[1]),
            (rows.sets[name], found[0]),
            (old.sets[name], found[1]),
        )
    ]
    id_now, id_old, ood_now, ood_old = scores
    if id_now is None or id_old is None or ood_now is None or ood_old is None:
        return []
    if min(len(id_now), len(ood_now)) < 2:
        return []
    area = auroc_difference(id_now, id_old, [ood_now], [ood_old])
    changes = [_change("auroc", auroc(id_old, ood_old).value, auroc(id_now, ood_now).value, area)]
    generator = np.random.default_rng(seed)
    n, m = len(id_now), len(ood_now)
    draws = []
    for _ in range(max(100, min(500, 50_000_000 // (n + m)))):
        ids, oods = generator.integers(0, n, n), generator.integers(0, m, m)
        draws.append(_fpr95(id_now[ids], ood_now[oods]) - _fpr95(id_old[ids], ood_old[oods]))
    old_value, value = _fpr95(id_old, ood_old), _fpr95(id_now, ood_now)
    metric = _bootstrapped(value - old_value, np.array(draws), n + m)
    changes.append(_change("fpr95", old_value, value, metric))
    return changes


def _picked(part: SetRows, keep: Array) -> NDArray[np.float64] | None:
    return None if part.scores is None else part.scores[keep]


def _fpr95(id_scores: Array, ood_scores: Array) -> float:
    """Share of OOD at or below the smallest cut that accepts 95 % of ID."""
    rank = math.ceil(0.95 * len(id_scores) - 1e-9)
    cut = np.partition(id_scores, rank - 1)[rank - 1]
    return float((ood_scores <= cut).mean())


def _bootstrapped(value: float, draws: Array, n: int) -> Metric:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    method = f"paired bootstrap, {len(draws)} draws"
    return Metric(value, min(float(low), value), max(float(high), value), n, method)


def _change(name: str, baseline: float, value: float, difference: Metric) -> Change:
    better: bool | None = None
    if difference.low is not None and difference.high is not None:
        if difference.low > 0:
            better = DIRECTION[name] > 0
        elif difference.high < 0:
            better = DIRECTION[name] < 0
    return Change(name, baseline, value, difference, better)


def _verdict(changes: list[Change], baseline: str, ood: Mapping[str, list[Change]]) -> Verdict:
    worse = sum(item.better is False for item in changes)
    better = sum(item.better is True for item in changes)
    status = GOOD if not worse else ATTENTION if better else BAD
    headline = {
        GOOD: "Nothing got worse" if not better else "Better, and nothing got worse",
        ATTENTION: "Some figures got better and some worse",
        BAD: "Figures got worse",
    }[status]
    areas = ", ".join(
        f"{name} {part[0].baseline:.3f} -> {part[0].value:.3f}" for name, part in ood.items()
    )
    sentence = (
        f"Against {baseline!r}: {better} figures better, {worse} worse, "
        f"{len(changes) - better - worse} that these rows cannot tell apart"
    )
    return Verdict(status, headline, sentence + (f". AUROC: {areas}." if areas else "."))
