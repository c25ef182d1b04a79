"""The acceptance test: may the candidate take the start's place?

On rows used for nothing else. Both nets see the same rows, so every difference is paired; the two
bounds are one-sided at 95 %, so a net that is worse than the limits passes at most one time in
twenty, whatever the run did to get there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, Metric, normal_quantile
from ebm_guard.ood.metrics import auroc_difference
from ebm_guard.training.selection import Look

_BISECTIONS = 60


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
        temperature: of both sides, fitted on the selection rows.
    """

    passed: bool
    n: int
    tests: tuple[Check, ...]
    auroc: Mapping[str, Mapping[str, Any]]
    temperature: Mapping[str, float]

    @property
    def story(self) -> list[str]:
        """Say in plain words what each test found."""
        return [_sentence(test) for test in self.tests]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "passed": self.passed,
            "n": self.n,
            "tests": [test.to_dict() for test in self.tests],
            "auroc": {name: dict(row) for name, row in self.auroc.items()},
            "temperature": dict(self.temperature),
        }


def accept(
    start: Look,
    candidate: Look,
    *,
    temperatures: tuple[float, float],
    max_acc_drop: float,
    max_nll_rise: float,
    roles: Mapping[str, str],
) -> Acceptance:
    """Test a candidate against the start on the same rows.

    Three tests, and all must pass: the upper bound of the loss of accuracy is at most
    ``max_acc_drop``; the upper bound of the rise of the NLL, each side after its own temperature,
    is at most ``max_nll_rise``; the mean AUROC of the energy over the OOD sets is not lower. The
    last is of the estimate: it asks for a gain, and its bound is printed beside it.

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
        return Acceptance(False, len(start.labels), tests, {}, _named(temperatures))
    tests = (
        accuracy_test(start.correct, candidate.correct, max_acc_drop),
        nll_test(start.nll(temperatures[0]), candidate.nll(temperatures[1]), max_nll_rise),
        auroc_test(start, candidate),
    )
    return Acceptance(
        passed=all(test.passed for test in tests),
        n=len(start.labels),
        tests=tests,
        auroc=_by_set(start, candidate, roles),
        temperature=_named(temperatures),
    )


def accuracy_test(start: NDArray[np.bool_], candidate: NDArray[np.bool_], limit: float) -> Check:
    """Test that the accuracy falls by at most ``limit``, by Tango's bound.

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
    bound = tango_upper(lost, gained, n)
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
        method=f"one-sided {LEVEL:.0%} score bound of paired proportions (Tango)",
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


def tango_upper(lost: int, gained: int, n: int, level: float = LEVEL) -> float:
    """Compute the upper score bound of the loss (lost - gained) / n of paired proportions.

    The bound is the largest d with (b - c - n d) / sqrt(n (2 q + d (1 - d))) >= -z, where b rows
    were right and became wrong, c the other way round, and q is the maximum-likelihood estimate of
    the chance of c under a loss of d:
    q = (sqrt(B^2 - 4 A C) - B) / (2 A), A = 2 n, B = (2 n - b + c) d - b - c, C = -c d (1 - d).

    Args:
        lost: b.
        gained: c.
        n: rows, b + c <= n.
        level: of the one-sided bound.

    Raises:
        InvalidInputError: counts out of range.

    References:
        Tango, Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design, Statistics in Medicine 1998, eq. 9 and section 3.

    Example:
        >>> round(tango_upper(0, 0, 268), 5)
        0.00999
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise InvalidInputError(f"got {lost} lost and {gained} gained of {n} rows")
    z = normal_quantile(level)
    low, high = (lost - gained) / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = _tango_statistic(lost, gained, n, middle) >= -z
        low, high = (middle, high) if inside else (low, middle)
    return high


def rows_needed(max_acc_drop: float, level: float = LEVEL) -> int:
    """Return the fewest acceptance rows with which a net that loses nothing can pass.

    With no row changed the bound is z^2 / (n + z^2).

    Example:
        >>> rows_needed(0.01), rows_needed(0.02)
        (268, 133)
    """
    z2 = normal_quantile(level) ** 2
    return math.ceil(z2 * (1 - max_acc_drop) / max_acc_drop)


def points(share: float) -> str:
    """Say a share in points.

    Example:
        >>> points(0.01), points(0.025)
        ('1 point', '2.5 points')
    """
    return f"{100 * share:g} point" + ("" if share == 0.01 else "s")


def _tango_statistic(lost: int, gained: int, n: int, loss: float) -> float:
    a = 2 * n
    b = (2 * n - lost + gained) * loss - lost - gained
    c = -gained * loss * (1 - loss)
    # The same root in the form that does not cancel.
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    q = (root - b) / (2 * a) if b <= 0 else -2 * c / (root + b)
    variance = n * (2 * q + loss * (1 - loss))
    above = lost - gained - n * loss
    if variance <= 0:
        return 0.0 if above == 0 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


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


def _named(temperatures: tuple[float, float]) -> dict[str, float]:
    return {"start": temperatures[0], "candidate": temperatures[1]}


def _sentence(test: Check) -> str:
    verdict = "met" if test.passed else "not met"
    figures = f"{test.start:.4f} -> {test.candidate:.4f} on {test.n:,} rows"
    if test.name == "auroc":
        return f"Wanted: {test.what}: {verdict} ({figures}, difference {test.difference:+.4f})."
    return (
        f"Wanted: {test.what}: {verdict} ({figures}; the change is {test.difference:+.4f}, and "
        f"with 95 % confidence no worse than {test.bound:+.4f}; limit {test.limit:+g})."
    )
