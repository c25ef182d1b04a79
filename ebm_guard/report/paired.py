"""Two nets on the same rows: every figure of both, and the difference with a paired interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import RowStatistics, row_statistics
from ebm_guard.calibration.metrics import accuracy, brier, ece, nll
from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, Metric, proportion
from ebm_guard.ood import Energy
from ebm_guard.ood.metrics import auroc_difference, ood_metrics
from ebm_guard.predictions import Predictions
from ebm_guard.report.comparison import (
    Baseline,
    Change,
    ComparisonSection,
    comparison_section,
)
from ebm_guard.report.record import NotRun, Record
from ebm_guard.report.rows import ReportRows, SetRows
from ebm_guard.training.bounds import tango_upper

_METRICS: Mapping[str, Callable[[RowStatistics], Metric]] = {
    "accuracy": accuracy,
    "nll": nll,
    "ece": ece,
    "brier": brier,
}
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """What two nets said about the same rows, in the same order.

    Args:
        start: predictions of the net that was given.
        candidate: predictions of the net that training found.

    Raises:
        InvalidInputError: another number of rows, or other labels.
    """

    start: Predictions
    candidate: Predictions

    def __post_init__(self) -> None:
        """Refuse rows that are no pairs."""
        one, two = self.start, self.candidate
        if one.labels is None or two.labels is None:
            same = one.labels is two.labels
        else:
            same = np.array_equal(one.labels, two.labels)
        if len(one) != len(two) or not same:
            raise InvalidInputError(
                f"got {len(one)} rows of the start and {len(two)} of the candidate"
                f"{'' if same else ' with other labels'}; needed the same rows in the same order"
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.start)

    @property
    def broken(self) -> int:
        """Rows in which one of the nets gave NaN or infinity."""
        return int((self.start.invalid | self.candidate.invalid).sum())

    def finite(self) -> Pair:
        """Keep the rows in which both nets gave finite logits."""
        keep = np.flatnonzero(~(self.start.invalid | self.candidate.invalid))
        if len(keep) == len(self):
            return self
        return Pair(self.start.select(keep), self.candidate.select(keep))

    def energies(self) -> tuple[Scores, Scores]:
        """Return the energies (N,) of both nets, higher = more OOD."""
        score = Energy()
        one, two = (score.of(part) for part in (self.start, self.candidate))
        return np.asarray(one, np.float64), np.asarray(two, np.float64)


@dataclass(frozen=True)
class Compared(Record):
    """One figure of both nets.

    Args:
        start: of the net that was given.
        candidate: of the net that training found.
        difference: candidate minus start, with its paired interval where there is one.
        better: whether the candidate is better; None where the interval holds 0.
    """

    start: Metric
    candidate: Metric
    difference: Metric
    better: bool | None


@dataclass(frozen=True)
class ComparedSet(Record):
    """One OOD set seen by both nets.

    Args:
        role: ``unseen`` (nothing was chosen on it), ``validation`` (a part of the acceptance test),
            ``guard_kind`` (of a kind that the checkpoint was chosen on) or ``trained_on``.
        n: its rows.
        broken: rows left out, because one of the nets gave NaN or infinity.
        auroc: of the energy, OOD positive.
        fpr95: share accepted where 95 % of ID is accepted.
    """

    role: str
    n: int
    broken: int
    auroc: Compared
    fpr95: Compared


def compare_rows(
    pair: Pair, temperatures: tuple[float, float] | None, seed: int
) -> tuple[dict[str, Compared], dict[str, Compared]]:
    """Compare accuracy, NLL, ECE and Brier score, before and after temperature.

    Args:
        pair: labelled rows with finite logits.
        temperatures: of the start and of the candidate, each fitted on other rows; None leaves the
            second table empty.
        seed: of the bootstrap of the ECE.
    """
    before = _statistics(pair, (1.0, 1.0))
    after = None if temperatures is None else _statistics(pair, temperatures)
    found = _changes(pair, before, after, {}, seed)
    # A temperature changes no prediction, so accuracy is compared once.
    tables = [
        {
            name: _joined(of(rows[0]), of(rows[1]), changes[name])
            for name, of in _METRICS.items()
            if rows is not None and name in changes
        }
        for changes, rows in ((found.before, before), (found.after, after))
    ]
    return tables[0], tables[1]


def compare_ood(
    evaluation: Pair, sets: Mapping[str, tuple[str, Pair]], seed: int
) -> dict[str, ComparedSet]:
    """Compare AUROC and FPR95 of the energy on each OOD set.

    Args:
        evaluation: ID rows with finite logits.
        sets: (role, rows) by name.
        seed: of the bootstraps.
    """
    clean = {name: (role, part.finite(), part.broken) for name, (role, part) in sets.items()}
    usable = {name: item for name, item in clean.items() if len(item[1]) > 1}
    energies = {name: part.energies() for name, (_, part, _) in usable.items()}
    own = evaluation.energies()
    changes = _changes(evaluation, None, None, energies, seed).ood
    compared = {}
    for name, (role, part, broken) in usable.items():
        sides = [ood_metrics(own[side], energies[name][side], seed=seed) for side in (0, 1)]
        figures = {
            metric: _joined(getattr(sides[0], metric), getattr(sides[1], metric), change)
            for metric, change in changes[name].items()
        }
        compared[name] = ComparedSet(role, len(part), broken, **figures)
    return compared


def mean_auroc(evaluation: Pair, sets: list[Pair]) -> Compared:
    """Compare the mean AUROC of the energy over several OOD sets.

    Both nets see the same ID rows for every set, which the interval takes into account.

    Example:
        >>> import numpy as np
        >>> rows = lambda *f: Predictions(np.array([[v, 0.0] for v in f]))
        >>> known = Pair(rows(3.0, 4.0), rows(3.0, 4.0))
        >>> other = Pair(rows(5.0, 0.0), rows(0.0, 0.0))
        >>> mean_auroc(known, [other]).difference.value
        0.5
    """
    start, candidate = evaluation.energies()
    pairs = [part.finite().energies() for part in sets]
    difference = auroc_difference(
        candidate, start, [two for _, two in pairs], [one for one, _ in pairs]
    )
    sides = [
        [ood_metrics(own, pair[side], draws=100).auroc for pair in pairs]
        for side, own in ((0, start), (1, candidate))
    ]
    means = [
        Metric(float(np.mean([item.value for item in side])), None, None, difference.n, "mean")
        for side in sides
    ]
    return Compared(means[0], means[1], difference, _sign(difference, larger=True))


def unpaired(start: Metric, candidate: Metric, *, larger: bool = True) -> Compared:
    """Compare two figures of which only the intervals are known, by the square-and-add rule.

    With l, u the ends of either interval: d - sqrt((c - l_c)^2 + (u_s - s)^2) to
    d + sqrt((u_c - c)^2 + (s - l_s)^2), d = c - s. For two shares with Wilson's intervals this is
    Newcombe's method 10. On the same images it is too wide, never too narrow, where the two nets
    tend to be right on the same images.

    References:
        Newcombe, Interval Estimation for the Difference Between Independent Proportions,
        Statistics in Medicine 1998, method 10; Zou and Donner, Statistics in Medicine 2008.

    Example:
        >>> from ebm_guard.intervals import proportion
        >>> found = unpaired(proportion(48, 80), proportion(56, 70)).difference
        >>> round(found.low, 4), round(found.high, 4)  # Newcombe's example (a), Table II, turned
        (0.0524, 0.3339)
    """
    value = candidate.value - start.value
    low = high = None
    if None not in (start.low, start.high, candidate.low, candidate.high):
        low = value - math.hypot(candidate.value - candidate.low, start.high - start.value)  # type: ignore[operator]
        high = value + math.hypot(candidate.high - candidate.value, start.value - start.low)  # type: ignore[operator]
    method = "none: a figure without an interval" if low is None else "Newcombe, unpaired"
    n = min(start.n, candidate.n)
    difference = Metric(value, low, high, n, method)
    return Compared(start, candidate, difference, _sign(difference, larger=larger))


def paired_shares(start: Sequence[bool], candidate: Sequence[bool]) -> Compared:
    """Compare two shares on the same images by Tango's score interval.

    Args:
        start: for each image whether it counts, with the start.
        candidate: the same with the candidate, in the same order.

    References:
        Tango, Statistics in Medicine 1998; see :func:`ebm_guard.training.bounds.tango_upper`.

    Example:
        >>> found = paired_shares([True] * 90 + [False] * 10, [True] * 95 + [False] * 5).difference
        >>> round(found.value, 4), found.low > 0
        (0.05, True)
    """
    one, two = (np.asarray(side, dtype=bool) for side in (start, candidate))
    n = len(one)
    if n != len(two) or not n:
        raise InvalidInputError(f"got {n} and {len(two)} images; needed the same, at least one")
    lost, gained = int((one & ~two).sum()), int((~one & two).sum())
    tail = (1 + LEVEL) / 2
    low = -tango_upper(lost, gained, n, tail)
    high = tango_upper(gained, lost, n, tail)
    difference = Metric((gained - lost) / n, low, high, n, "Tango, paired")
    before, after = (proportion(int(side.sum()), n) for side in (one, two))
    return Compared(before, after, difference, _sign(difference, larger=True))


def _statistics(
    pair: Pair, temperatures: tuple[float, float]
) -> tuple[RowStatistics, RowStatistics]:
    labels = pair.start.require_labels("comparing accuracy")
    one, two = (
        row_statistics(part.logits, labels, temperature, sample_weight=pair.start.sample_weight)
        for part, temperature in zip((pair.start, pair.candidate), temperatures, strict=True)
    )
    return one, two


def _changes(
    pair: Pair,
    before: tuple[RowStatistics, RowStatistics] | None,
    after: tuple[RowStatistics, RowStatistics] | None,
    ood: Mapping[str, tuple[Scores, Scores]],
    seed: int,
) -> ComparisonSection:
    """Compare the rows of both nets as a report compares itself with its baseline."""
    energies = {"evaluation": pair.energies(), **ood}

    def rows(side: int) -> ReportRows:
        # Row numbers stand for the contents: these are pairs by construction.
        sets = {
            name: SetRows(np.arange(len(part[side]), dtype=np.uint64), part[side])
            for name, part in energies.items()
        }
        return ReportRows(
            sets,
            pair.start.labels,
            None if before is None else before[side],
            None if after is None else after[side],
        )

    baseline = Baseline({"gate": {"score": "energy"}}, rows(0), "the start")
    found = comparison_section(rows(1), baseline, "energy", seed)
    if isinstance(found, NotRun):  # fewer than two rows
        raise InvalidInputError(f"got {len(pair)} rows to compare; needed at least two")
    return found


def _joined(start: Metric, candidate: Metric, change: Change) -> Compared:
    # The comparison works on the digits that a report keeps; the sides must add up for a reader.
    value = candidate.value - start.value
    difference = change.difference
    low, high = difference.low, difference.high
    difference = replace(
        difference,
        value=value,
        low=None if low is None else min(low, value),
        high=None if high is None else max(high, value),
    )
    return Compared(start, candidate, difference, change.better)


def _sign(difference: Metric, *, larger: bool) -> bool | None:
    if difference.low is None or difference.high is None:
        return None
    if difference.low > 0:
        return larger
    return not larger if difference.high < 0 else None
