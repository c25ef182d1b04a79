"""Certificates: the largest coverage at which the risk among the answered rows is promised.

A rule answers a row where every order is strictly below its cut; which cuts may be chosen, and
why their risk is certified, is in :mod:`ebm_guard.calibration.certified_cuts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.certified_cuts import (
    bonferroni,
    checked_grid,
    fixed_sequence,
    least_rows,
    rank_grid,
    sgr,
)
from ebm_guard.calibration.selective import check_rows
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.intervals import Array, Metric, proportion

METHODS = ("sgr", "bonferroni", "fixed_sequence")


@dataclass(frozen=True)
class Order:
    """One number a row that says how far the row is to be trusted.

    Args:
        name: what it is, for the words of the certificate.
        values: (N,), finite.
        trusted: ``low`` (an energy or another score) or ``high`` (a confidence).
    """

    name: str
    values: Array
    trusted: str = "low"

    def ascending(self) -> NDArray[np.float64]:
        """Return the values so that higher = less trusted."""
        values = np.asarray(self.values, dtype=np.float64)
        return -values if self.trusted == "high" else values


@dataclass(frozen=True)
class Cut:
    """One side of a rule; the comparison is strict.

    Args:
        name: of the order.
        trusted: ``low``: answered below the cut; ``high``: answered above it.
        cut: in the order's own units, None where every value is answered.
    """

    name: str
    trusted: str
    cut: float | None

    @property
    def words(self) -> str:
        """The cut in words."""
        if self.cut is None:
            return f"any {self.name}"
        return f"{self.name} {'>' if self.trusted == 'high' else '<'} {self.cut:.6g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "name": self.name,
            "trusted": self.trusted,
            "cut": self.cut,
            "words": self.words,
        }


@dataclass(frozen=True)
class Certificate:
    """What is promised, or why nothing is.

    Args:
        certified: whether there is a promise.
        rule: the cuts, one for each order; empty where nothing is certified.
        coverage: share of the rows that the rule answers, an estimate with its Wilson interval.
        accepted: rows that the rule answers.
        errors: wrong rows among them.
        risk: P(wrong | answered) that is not exceeded.
        assurance: probability of that, over the draw of the rows.
        n: rows.
        method: ``sgr``, ``bonferroni`` or ``fixed_sequence``.
        tests: tests that share the 1 - assurance.
        needed: fewest rows with which the method can certify anything, all of them right.
        why: what stood in the way, '' where certified.
    """

    certified: bool
    rule: tuple[Cut, ...]
    coverage: Metric | None
    accepted: int
    errors: int
    risk: float
    assurance: float
    n: int
    method: str
    tests: int
    needed: int
    why: str

    @property
    def sentence(self) -> str:
        """The promise in plain words."""
        if not self.certified or self.coverage is None:
            return f"Nothing is certified at a risk of {100 * self.risk:g}%: {self.why}."
        cuts = " and ".join(cut.words for cut in self.rule if cut.cut is not None)
        where = f"Answer only where {cuts}, about {self.coverage.value:.1%} of the inputs"
        text = (
            f"{where if cuts else 'Answer everything'}: with probability {self.assurance:g} over "
            f"the draw of these {self.n:,} rows, at most {100 * self.risk:g}% of the answers are "
            "wrong on inputs drawn like them."
        )
        if self.method == "sgr":
            worse = "lower" if self.rule[0].trusted == "high" else "higher"
            text += f" This supposes that a {worse} {self.rule[0].name} never means fewer errors."
        return text

    def accept(self, *values: Array) -> NDArray[np.bool_]:
        """Apply the rule to new rows.

        Args:
            values: one (B,) array for each order, in the units and the order they were given.

        Returns:
            (B,) bool; NaN, and every row where nothing is certified, is refused.

        Raises:
            InvalidInputError: another number of arrays than the rule has cuts.
        """
        if not self.certified:
            return np.zeros(len(values[0]) if values else 0, dtype=bool)
        if len(values) != len(self.rule):
            raise InvalidInputError(
                f"got {len(values)} arrays; the rule needs {len(self.rule)}: "
                f"{', '.join(cut.name for cut in self.rule)}"
            )
        sides = []
        for cut, given in zip(self.rule, values, strict=True):
            column = np.asarray(given, dtype=np.float64)
            if cut.cut is None:
                sides.append(~np.isnan(column))
            else:
                sides.append(column > cut.cut if cut.trusted == "high" else column < cut.cut)
        return np.asarray(np.logical_and.reduce(sides))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types, with its sentence."""
        return {
            "certified": self.certified,
            "rule": [cut.to_dict() for cut in self.rule],
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "accepted": self.accepted,
            "errors": self.errors,
            "risk": self.risk,
            "assurance": self.assurance,
            "n": self.n,
            "method": self.method,
            "tests": self.tests,
            "needed": self.needed,
            "why": self.why,
            "sentence": self.sentence,
        }


def certify(
    orders: Order | Sequence[Order],
    errors: Array,
    *,
    risk: float = 0.01,
    assurance: float = 0.95,
    method: str | None = None,
    declared: NDArray[np.float64] | None = None,
    sample_weight: Array | None = None,
) -> Certificate:
    """Find the largest coverage at which P(wrong | answered) <= risk is certified.

    - ``sgr`` (default for one order): binary search over how many rows are answered, each of its
      at most k = ceil(log2(n + 1)) tests at delta / k; a group of ties is answered as a whole.
      Proved where the chance of an error does not fall as trust falls: then the unsafe ranks that
      the search can visit before its first mistake depend only on how many rows lie below the
      last safe cut, and not on the labels. (The paper's union bound treats the visited thresholds
      as fixed, which they are not.)
    - ``bonferroni`` (default for two): Learn-then-Test over the declared ranks, each of the G
      rules at delta / G. Supposes nothing but independent rows.
    - ``fixed_sequence``: Learn-then-Test from the strictest cut to the loosest, until one is not
      certified; the chains (one for each cut of the second order and each of three starts) share
      delta. Supposes nothing, but the cuts must come from other rows: give ``declared``.

    Args:
        orders: one order, or two that must both be below their cuts.
        errors: (N,) whether each row is wrong.
        risk: largest share of wrong answers among the answered, in (0, 1).
        assurance: probability 1 - delta over the draw of the rows, in (0, 1).
        method: see above.
        declared: cuts from :func:`declare` on *other* rows (or fixed by hand); by default they are
            ranks of these rows.
        sample_weight: must be None; the promise is for rows drawn like new inputs.

    Returns:
        The certificate: also where nothing can be certified, with the reason and the rows needed.

    Raises:
        InvalidInputError: shapes, rates or methods that do not fit.

    References:
        Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017,
        Algorithm 1 (differs: strict cuts, the answer is the last *certified* step and not the last
        step, the exact condition is named). Angelopoulos et al., Learn then Test, 2021, section 2.

    Example:
        The classic: a check reader that answers 50 % rightly and 1 % wrongly and refuses 49 %.

        >>> order = np.repeat([0.0, 1.0], [5100, 4900])
        >>> errors = np.repeat([0, 1, 1], [5000, 100, 4900])
        >>> found = certify(Order("distance", order), errors, risk=0.03)
        >>> found.coverage.value, found.errors, found.rule[0].words
        (0.51, 100, 'distance < 1')
        >>> certify(Order("distance", order), errors, risk=0.01).certified
        False
    """
    orders = [orders] if isinstance(orders, Order) else list(orders)
    method = method or ("sgr" if len(orders) == 1 else "bonferroni")
    _check(orders, risk, assurance, method, declared, sample_weight)
    checked = [check_rows(order.ascending(), errors) for order in orders]
    values, wrong = np.stack([column for column, _ in checked], axis=1), checked[0][1]
    if method == "sgr":
        cuts, tests = sgr(values[:, 0], wrong, risk, 1 - assurance)
    else:
        grid = rank_grid(values) if declared is None else checked_grid(declared, len(orders))
        search = bonferroni if method == "bonferroni" else fixed_sequence
        cuts, tests = search(grid, values, wrong, risk, 1 - assurance)
    return _certificate(orders, values, wrong, cuts, tests, risk, assurance, method)


def declare(orders: Order | Sequence[Order]) -> NDArray[np.float64]:
    """Declare cuts on rows whose labels will not be used.

    Args:
        orders: one order or two, of other rows than those that :func:`certify` will test.

    Returns:
        (J, G, K) cuts, higher = less trusted, inf = no cut: J chains of G cuts from the strictest
        to the loosest, for K orders.

    Example:
        >>> declare(Order("energy", np.arange(200.0))).shape
        (1, 100, 1)
    """
    orders = [orders] if isinstance(orders, Order) else list(orders)
    columns = [order.ascending() for order in orders]
    for column in columns:
        check_rows(column, np.zeros(len(column), dtype=bool))
    return rank_grid(np.stack(columns, axis=1))


def _certificate(
    orders: list[Order],
    values: NDArray[np.float64],
    wrong: NDArray[np.bool_],
    cuts: NDArray[np.float64] | None,
    tests: int,
    risk: float,
    assurance: float,
    method: str,
) -> Certificate:
    n, needed = len(values), least_rows(risk, 1 - assurance, tests, method)
    rule: tuple[Cut, ...] = ()
    coverage, accepted, errors, why = None, 0, 0, ""
    if cuts is None:
        why = (
            f"{n:,} rows are too few, at least {needed:,} are needed even without a single error"
            if n < needed
            else "no group of trusted rows is large enough and has few enough errors for it "
            f"({int(wrong.sum()):,} of {n:,} rows are wrong)"
        )
    else:
        below = (values < cuts).all(axis=1)
        accepted, errors = int(below.sum()), int((below & wrong).sum())
        coverage = proportion(accepted, n)
        rule = tuple(_cut(order, float(cut)) for order, cut in zip(orders, cuts, strict=True))
    return Certificate(
        cuts is not None,
        rule,
        coverage,
        accepted,
        errors,
        risk,
        assurance,
        n,
        method,
        tests,
        needed,
        why,
    )


def _cut(order: Order, cut: float) -> Cut:
    if not math.isfinite(cut):
        return Cut(order.name, order.trusted, None)
    # 0 - x and not -x: a cut of -0.0 would be printed with its sign.
    return Cut(order.name, order.trusted, 0 - cut if order.trusted == "high" else cut)


def _check(
    orders: list[Order],
    risk: float,
    assurance: float,
    method: str,
    declared: NDArray[np.float64] | None,
    sample_weight: Array | None,
) -> None:
    for name, value in (("risk", risk), ("assurance", assurance)):
        if not 0 < value < 1:
            raise InvalidInputError(f"got {name} {value!r}; needed a number in (0, 1)")
    if method not in METHODS:
        raise InvalidInputError(
            f"got method {method!r}; known are {', '.join(METHODS)}{suggest(method, METHODS)}"
        )
    if not 1 <= len(orders) <= 2 or (method == "sgr" and len(orders) != 1):
        raise InvalidInputError(
            f"got {len(orders)} orders for {method}; sgr takes one, the others one or two"
        )
    for order in orders:
        if order.trusted not in ("low", "high"):
            raise InvalidInputError(f"got trusted={order.trusted!r}; needed 'low' or 'high'")
    if sample_weight is not None:
        raise InvalidInputError(
            "got sample weights; a certificate counts errors among rows that are drawn like the "
            "inputs to come, and weighted counts are not binomial. Leave the weights out and give "
            "rows drawn from the inputs that you want the promise for"
        )
    if method == "fixed_sequence" and declared is None:
        raise InvalidInputError(
            "got method 'fixed_sequence' without declared cuts; its proof needs cuts that do not "
            "depend on these rows. Give declared=declare(orders of other rows), or use 'bonferroni'"
        )
    if method == "sgr" and declared is not None:
        raise InvalidInputError(
            "got declared cuts for sgr, which searches all ranks; leave them out"
        )
