"""The acceptance test: may the candidate take the start's place?

On rows used for nothing else. Both nets see the same rows, so every difference is paired; the two
bounds are one-sided at 95 %: a net that is worse than a limit passes its test about one time in
twenty, whatever the run did to get there. That rate is exact (never more than one in twenty) for
the accuracy of a net that gained no row. Where rows were gained it is that of Tango's score bound:
5.2 % at the worst of a wide grid (limits of 1, 2 and 5 points; up to 2,000 rows, 3 % gained).
Student's t is as good as the mean of the NLL's differences is normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.intervals import LEVEL, Metric, normal_quantile
from ebm_guard.ood.metrics import auroc_difference
from ebm_guard.training.bounds import loss_upper
from ebm_guard.training.selection import Look
from ebm_guard.training.temperatures import Temperatures


@dataclass(frozen=True)
class Check:
    """One of the three tests.

    Args:
        name: ``accuracy``, ``nll`` or ``auroc``.
        what: what is asked, in words.
        start: the start's figure.
        candidate: the candidate's.
        difference: candidate minus start.
        bound: the one-sided 95 % bound of the difference on its bad side.
        limit: what the bound (for ``auroc``: the difference) must not cross.
        passed: whether it does not.
        n: rows.
        method: how the bound was made.
    """

    name: str
    what: str
    start: float
    candidate: float
    difference: float
    bound: float
    limit: float
    passed: bool
    n: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "name": self.name,
            "what": self.what,
            "start": self.start,
            "candidate": self.candidate,
            "difference": self.difference,
            "bound": self.bound,
            "limit": self.limit,
            "passed": self.passed,
            "n": self.n,
            "method": self.method,
        }


@dataclass(frozen=True)
class Acceptance:
    """The outcome.

    Args:
        passed: whether all three tests passed.
        n: ID rows.
        tests: the three.
        auroc: ``start``, ``candidate``, paired ``difference`` and ``role`` of each OOD set.
        temperature: of both sides, fitted on the selection rows; one for both where one of them
            could not be fitted, with a note.
    """

    passed: bool
    n: int
    tests: tuple[Check, ...]
    auroc: Mapping[str, Mapping[str, Any]]
    temperature: Temperatures

    @property
    def story(self) -> list[str]:
        """Say in plain words what each test found."""
        note = self.temperature.note
        return [*([note] if note else []), *map(_sentence, self.tests)]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "passed": self.passed,
            "n": self.n,
            "tests": [test.to_dict() for test in self.tests],
            "auroc": {name: dict(row) for name, row in self.auroc.items()},
            "temperature": self.temperature.to_dict(),
        }


def accept(
    start: Look,
    candidate: Look,
    *,
    temperatures: Temperatures,
    max_acc_drop: float,
    max_nll_rise: float,
    roles: Mapping[str, str],
) -> Acceptance:
    """Test a candidate against the start on the same rows.

    Three tests, and all must pass: the upper bound of the loss of accuracy is at most
    ``max_acc_drop``; the upper bound of the rise of the NLL, both sides after temperature, is at
    most ``max_nll_rise``; the mean AUROC of the energy over the OOD sets is not lower. The last is
    of the estimate: it asks for a gain, and its bound is printed beside it.

    Args:
        start: on the acceptance rows.
        candidate: on the same rows.
        temperatures: of start and candidate, fitted on other rows.
        max_acc_drop: in (0, 1].
        max_nll_rise: in nats, > 0.
        roles: of the OOD sets.
    """
    tests: tuple[Check, ...]
    if not candidate.finite:
        tests = (_not_finite(start, max_acc_drop),)
        return Acceptance(False, len(start.labels), tests, {}, temperatures)
    tests = (
        accuracy_test(start.correct, candidate.correct, max_acc_drop),
        nll_test(
            start.nll(temperatures.start), candidate.nll(temperatures.candidate), max_nll_rise
        ),
        auroc_test(start, candidate),
    )
    return Acceptance(
        passed=all(test.passed for test in tests),
        n=len(start.labels),
        tests=tests,
        auroc=_by_set(start, candidate, roles),
        temperature=temperatures,
    )


def accuracy_test(start: NDArray[np.bool_], candidate: NDArray[np.bool_], limit: float) -> Check:
    """Test that the accuracy falls by at most ``limit``; see :func:`loss_upper`.

    Args:
        start: (N,) whether the start is right.
        candidate: (N,) whether the candidate is, on the same rows.
        limit: largest loss.

    Example:
        >>> right = np.ones(1000, dtype=bool)
        >>> accuracy_test(right, right, 0.01).passed
        True
    """
    lost = int((start & ~candidate).sum())
    gained = int((~start & candidate).sum())
    n = len(start)
    bound = loss_upper(lost, gained, n)
    return Check(
        name="accuracy",
        what=f"accuracy falls by at most {points(limit)}",
        start=float(start.mean()),
        candidate=float(candidate.mean()),
        difference=(gained - lost) / n,
        bound=-bound,
        limit=-limit,
        passed=bound <= limit,
        n=n,
        method=f"one-sided {LEVEL:.0%} score bound of paired proportions (Tango), and the exact "
        "binomial bound (Clopper-Pearson) where no row was gained",
    )


def nll_test(start: NDArray[np.float64], candidate: NDArray[np.float64], limit: float) -> Check:
    """Test that the NLL rises by at most ``limit``, by Student's paired t.

    Args:
        start: (N,) -log p(y|x) of the start.
        candidate: (N,) of the candidate, on the same rows.
        limit: largest rise, in nats.

    Example:
        >>> values = np.linspace(0, 1, 100)
        >>> nll_test(values, values, 0.01).passed
        True
    """
    from scipy import stats

    rise = candidate - start
    n = len(rise)
    value = float(rise.mean())
    error = float(rise.std(ddof=1)) / math.sqrt(n)
    bound = value + float(stats.t.ppf(LEVEL, n - 1)) * error
    return Check(
        name="nll",
        what=f"the NLL after temperature rises by at most {limit:g} nats",
        start=float(start.mean()),
        candidate=float(candidate.mean()),
        difference=value,
        bound=bound,
        limit=limit,
        passed=bound <= limit,
        n=n,
        method=f"one-sided {LEVEL:.0%} bound of the mean paired difference (Student t)",
    )


def auroc_test(start: Look, candidate: Look) -> Check:
    """Test that the mean AUROC of the energy over the OOD sets is not lower.

    Args:
        start: on the acceptance rows.
        candidate: on the same rows.
    """
    names = list(start.outside)
    before, after = (
        float(np.mean([metric.value for metric in look.aurocs().values()]))
        for look in (start, candidate)
    )
    found = auroc_difference(
        candidate.energies,
        start.energies,
        [candidate.outside[name] for name in names],
        [start.outside[name] for name in names],
    )
    half = (found.high or found.value) - found.value
    low = found.value - half * normal_quantile(LEVEL) / normal_quantile(0.5 + LEVEL / 2)
    return Check(
        name="auroc",
        what=f"the mean AUROC of the energy over {', '.join(names)} is not lower",
        start=before,
        candidate=after,
        difference=found.value,
        bound=low,
        limit=0.0,
        passed=found.value >= 0,
        n=found.n,
        method="the paired difference itself; its bound is DeLong's, one-sided",
    )


def points(share: float) -> str:
    """Say a share in points.

    Example:
        >>> points(0.01), points(0.025)
        ('1 point', '2.5 points')
    """
    return f"{100 * share:g} point" + ("" if share == 0.01 else "s")


def _by_set(start: Look, candidate: Look, roles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    before, after = start.aurocs(), candidate.aurocs()
    table = {}
    for name in start.outside:
        difference: Metric = auroc_difference(
            candidate.energies, start.energies, [candidate.outside[name]], [start.outside[name]]
        )
        table[name] = {
            "start": before[name].value,
            "candidate": after[name].value,
            "difference": difference.to_dict(),
            "role": roles.get(name, "given"),
        }
    return table


def _not_finite(start: Look, limit: float) -> Check:
    return Check(
        name="finite",
        what="the candidate's logits are finite",
        start=float(start.correct.mean()),
        candidate=0.0,
        difference=-float(start.correct.mean()),
        bound=-1.0,
        limit=-limit,
        passed=False,
        n=len(start.labels),
        method="every logit is looked at",
    )


def _sentence(test: Check) -> str:
    verdict = "met" if test.passed else "not met"
    figures = f"{test.start:.4f} -> {test.candidate:.4f} on {test.n:,} rows"
    if test.name == "auroc":
        return f"Wanted: {test.what}: {verdict} ({figures}, difference {test.difference:+.4f})."
    return (
        f"Wanted: {test.what}: {verdict} ({figures}; the change is {test.difference:+.4f}, and "
        f"with 95 % confidence no worse than {test.bound:+.4f}; limit {test.limit:+g})."
    )
