"""Split-conformal prediction sets: the classes that cannot be ruled out.

With n labelled rows that are exchangeable with the inputs to come, and that neither the model nor
the calibrator was fitted on, the set C(x) = {c: s(x, c) <= q} with q the k-th smallest of the
rows' scores s(x_i, y_i), k = ceil((n + 1)(1 - miscoverage)), holds the true class with probability
at least 1 - miscoverage. The promise is *marginal*: over the rows and the input together; not for
each class, not for the rows that a gate answers, and not for foreign inputs.

Scores are log-odds, so that float32 probabilities of exactly 1 do not tie. They are deterministic:
a row's set depends on that row alone, never on its batch, on a random number or on the order of
the classes. The temperature is a separate setting for sets: one that is fitted for calibration can
make APS sets larger (Dabah and Tirer, arXiv 2402.05806).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.errors import InvalidInputError, NotFittedError, TooFewRowsError
from ebm_guard.intervals import Array, Metric, mean, proportion
from ebm_guard.precision import KeepDouble

_CHUNK = 500_000
_SUM = 1e-3


def conformal_rank(n: int, miscoverage: float) -> int:
    """Compute k = ceil((n + 1)(1 - miscoverage)); n + 1 means that n is too small.

    Example:
        >>> [conformal_rank(n, 0.1) for n in (8, 9, 99, 1000)]
        [9, 9, 90, 901]
    """
    # The tolerance keeps 10 * 0.9 from rounding up to 9.000000000000002.
    return min(n + 1, math.ceil((n + 1) * (1 - miscoverage) - 1e-9))


class ConformalSets(KeepDouble, ABC):
    """Base of the prediction sets: fit on log-probabilities and labels, then give sets.

    Attributes:
        scores: (n,) float64, sorted scores of the calibration rows.
        cut: () float64, the k-th smallest of them: the set is {c: score <= cut}.
        miscoverage: share of true classes that may be left out.
    """

    name = ""
    scores: Tensor
    cut: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.empty(0, dtype=torch.float64))
        self.register_buffer("cut", torch.full((), math.nan, dtype=torch.float64))
        self.miscoverage = math.nan

    @abstractmethod
    def _class_scores(self, values: Tensor) -> Tensor:
        """Map float64 log-probabilities (B, C) to scores (B, C); higher = less likely."""

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return len(self.scores)

    @property
    def guarantee(self) -> str:
        """The promise, in words."""
        return (
            f"On average over sets of {self.n:,} calibration rows, at least "
            f"{1 - self.miscoverage:.4g} of the prediction sets hold the true class, for inputs "
            "exchangeable with those rows. It is not promised for each class, for the sets of one "
            "size, for accepted rows alone, or for foreign inputs."
        )

    def fit(
        self, log_probabilities: Array, labels: NDArray[np.int64], miscoverage: float = 0.1
    ) -> ConformalSets:
        """Choose the cut from held-out rows, in chunks.

        Args:
            log_probabilities: (N, C), log p(y|x); -inf is allowed.
            labels: (N,) in 0..C-1.
            miscoverage: share of true classes that may be left out, in (0, 1).

        Raises:
            TooFewRowsError: too few rows; the error names the number needed.
            InvalidInputError: not log-probabilities, or labels out of range.
        """
        return self.fit_scores(self.label_scores(log_probabilities, labels), miscoverage)

    def label_scores(self, log_probabilities: Array, labels: NDArray[np.int64]) -> Array:
        """Compute the scores (N,) of the labels, to gather them from blocks of rows.

        Args:
            log_probabilities: (N, C).
            labels: (N,) in 0..C-1.
        """
        values, of = np.asarray(log_probabilities), np.asarray(labels)
        if values.ndim != 2 or values.shape[1] < 2 or of.shape != (len(values),):
            raise InvalidInputError(
                f"got log-probabilities of shape {values.shape} and labels of shape {of.shape}; "
                "needed (N, C) with C >= 2, and (N,)"
            )
        if len(of) and not 0 <= of.min() <= of.max() < values.shape[1]:
            raise InvalidInputError(
                f"got labels in {of.min()}..{of.max()}; needed 0..{values.shape[1] - 1}"
            )
        step, parts = max(1, _CHUNK // values.shape[1]), [np.empty(0)]
        for at in range(0, len(of), step):
            block = torch.from_numpy(np.array(values[at : at + step], dtype=np.float64))
            where = torch.from_numpy(np.array(of[at : at + step], dtype=np.int64))
            scores = self._class_scores(_checked(block))
            parts.append(scores.gather(1, where[:, None])[:, 0].numpy())
        return np.concatenate(parts)

    def fit_scores(self, scores: Array, miscoverage: float = 0.1) -> ConformalSets:
        """Choose the cut from the scores (n,) that :meth:`label_scores` gives.

        Raises:
            TooFewRowsError: too few rows; the error names the number needed.
        """
        if not 0 < miscoverage < 1:
            raise InvalidInputError(f"got miscoverage {miscoverage!r}; needed a number in (0, 1)")
        n, rank = len(scores), conformal_rank(len(scores), miscoverage)
        if rank > n:
            needed = max(1, math.ceil(1 / miscoverage - 1e-9) - 1)
            raise TooFewRowsError(
                f"got {n} calibration rows; prediction sets with miscoverage {miscoverage:g} need "
                f"at least {needed}. Give more labelled rows, or allow a higher miscoverage"
            )
        ranked = torch.from_numpy(np.sort(np.asarray(scores, dtype=np.float64)))
        self.scores, self.cut = ranked, ranked[rank - 1].clone()
        self.miscoverage = miscoverage
        return self

    def class_scores(self, log_probabilities: Tensor) -> Tensor:
        """Compute the score of every class, (B, C) float64; -inf and inf can occur.

        Raises:
            InvalidInputError: rows that are not log-probabilities.
        """
        if log_probabilities.ndim != 2 or log_probabilities.shape[1] < 2:
            raise InvalidInputError(
                f"got a tensor of shape {tuple(log_probabilities.shape)}; needed log-probabilities "
                "(B, C) with C >= 2"
            )
        return self._class_scores(_checked(log_probabilities.double()))

    def sets(self, log_probabilities: Tensor) -> Tensor:
        """Compute the prediction sets: a mask (B, C) of the classes that cannot be ruled out.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        self._require_fit()
        cut = self.cut.to(log_probabilities.device)
        step = max(1, _CHUNK // max(1, log_probabilities.shape[-1]))
        parts = [self.class_scores(part) <= cut for part in torch.split(log_probabilities, step)]
        return torch.cat(parts)

    def size(self, log_probabilities: Tensor) -> Tensor:
        """Count the classes in each set, (B,) int64."""
        return self.sets(log_probabilities).sum(dim=1)

    def p_values(self, log_probabilities: Tensor) -> Tensor:
        """Compute each class's conformal p-value (1 + #{s_i >= s(x, c)}) / (n + 1).

        The set at any miscoverage is {c: p_value > miscoverage}, so the p-values hold the sets of
        all levels at once.

        Args:
            log_probabilities: (B, C).

        Returns:
            (B, C) float64 in [1/(n+1), 1].

        References:
            Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005, section 2.
        """
        self._require_fit()
        scores = self.scores.to(log_probabilities.device)
        found = self.class_scores(log_probabilities)
        below = torch.searchsorted(scores, found, right=False)
        return (1 + self.n - below).double() / (self.n + 1)

    def ambiguity(self, log_probabilities: Tensor) -> Tensor:
        """Compute the p-value (B,) of the second most likely class; higher = less trusted.

        It is the set size made fine enough to rank by: the row's set holds two classes or more
        exactly where the miscoverage is below it, whatever the miscoverage is. It is the order to
        give to a gate or to ``certify`` for "one class only".
        """
        return self.p_values(log_probabilities).topk(2, dim=1).values[:, 1]

    def settings(self) -> dict[str, Any]:
        """Return what, with the sorted scores, rebuilds the sets."""
        return {"miscoverage": self.miscoverage}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> ConformalSets:
        """Rebuild fitted sets."""
        scores, cut = tensors["scores"], tensors["cut"]
        sets = cls().fit_scores(scores.double().cpu().numpy(), float(settings["miscoverage"]))
        if not torch.equal(sets.cut, cut.double().cpu()):
            raise ValueError(f"a cut of {float(cut)} where the scores give {float(sets.cut)}")
        return sets

    def _require_fit(self) -> None:
        if not self.n:
            raise NotFittedError("the prediction sets are not fitted; call fit(...) first")


class LAC(ConformalSets):
    """Give the smallest sets on average: every class that is likely enough.

    s(x, c) = log((1 - p_c) / p_c), which orders as 1 - p_c does; C(x) = {c: p_c >= 1 - q'}. A set
    can be empty: then no class is likely enough.

    References:
        Sadinle, Lei and Wasserman, Least Ambiguous Set-Valued Classifiers, JASA 2019.
        Differs: log-odds instead of 1 - p, which ties where p rounds to 1.

    Example:
        >>> p = np.array([[0.8, 0.15, 0.05]] * 10)
        >>> sets = LAC().fit(np.log(p), np.array([0] * 8 + [1] * 2), miscoverage=0.2)
        >>> sets.sets(torch.from_numpy(np.log(p[:1])))
        tensor([[ True,  True, False]])
    """

    name = "lac"

    def _class_scores(self, values: Tensor) -> Tensor:
        top, where = values.max(dim=1, keepdim=True)
        others = values.scatter(1, where, -math.inf).logsumexp(dim=1, keepdim=True)
        # Only the top class can have p near 1, where log(1 - p) must come from the others.
        rest = torch.log1p(-values.clamp(max=math.log(0.5)).exp())
        return torch.where(values == top, others, rest) - values


class APS(ConformalSets):
    """Give sets that adapt to how hard the input is: classes from the likeliest on.

    s(x, c) = log(a / (1 - a)) with a = sum of p_k over all k with p_k > p_c, the mass ahead of c.
    It is the smallest tau with c in S(x, tau) of the paper's eq. 3, the shortest list of likeliest
    classes with mass of at least tau. The likeliest class has a = 0 and is in every set.

    References:
        Romano, Sesia and Candès, Classification with Valid and Adaptive Coverage, NeurIPS 2020.
        Differs: no randomisation. Where the model is right more often than 1 - miscoverage, the
        sets hold the top class alone and cover more than was asked; the paper's random number
        would empty some of them. Classes of equal probability are in or out together.

    Example:
        >>> p = np.array([[0.8, 0.15, 0.05]] * 10)
        >>> sets = APS().fit(np.log(p), np.array([0] * 8 + [1] * 2), miscoverage=0.2)
        >>> sets.sets(torch.from_numpy(np.log(p[:1])))
        tensor([[ True,  True, False]])
    """

    name = "aps"

    def _class_scores(self, values: Tensor) -> Tensor:
        ranked, order = values.sort(dim=1, descending=True)
        falls = ranked[:, 1:] < ranked[:, :-1]
        rows, classes = ranked.shape
        place = torch.arange(classes, device=values.device).expand(rows, classes)
        # Where each group of equal probabilities starts: its classes share what is ahead of it.
        first = torch.where(falls, place[:, 1:], torch.zeros_like(place[:, 1:]))
        start = torch.cat([place[:, :1], first.cummax(dim=1).values], dim=1)
        # Sums of positive terms keep their relative precision; the mass behind starts at the end.
        mass = ranked.exp()
        ahead = torch.nn.functional.pad(mass.cumsum(dim=1)[:, :-1], (1, 0)).gather(1, start)
        behind = mass.flip(1).cumsum(dim=1).flip(1).gather(1, start)
        odds = ahead.log() - behind.log()
        return torch.empty_like(values).scatter(1, order, odds)


@dataclass(frozen=True)
class ConformalReport:
    """What prediction sets did on rows that they were not fitted on.

    Args:
        method: ``lac`` or ``aps``.
        miscoverage: share of true classes that may be left out.
        n_calibration: rows behind each cut.
        coverage: share of sets that hold the true class.
        mean_size: classes in a set.
        empty: share of empty sets.
        single: share of sets with one class.
        several: share of sets with two classes or more.
        right_when_single: share of right ones among the sets with one class; not promised.
        sizes: number of rows by set size, from 0 on.
        guarantee: the promise, in words.
    """

    method: str
    miscoverage: float
    n_calibration: int
    coverage: Metric
    mean_size: Metric
    empty: Metric
    single: Metric
    several: Metric
    right_when_single: Metric | None
    sizes: NDArray[np.int64]
    guarantee: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        metrics = ("coverage", "mean_size", "empty", "single", "several")
        single = self.right_when_single
        return {
            "method": self.method,
            "miscoverage": self.miscoverage,
            "n_calibration": self.n_calibration,
            **{name: getattr(self, name).to_dict() for name in metrics},
            "right_when_single": None if single is None else single.to_dict(),
            "sizes": self.sizes.tolist(),
            "guarantee": self.guarantee,
        }


def conformal_report(sets: ConformalSets, covered: Array, sizes: Array) -> ConformalReport:
    """Measure prediction sets on fresh rows.

    The intervals are Wilson's, for these sets. Over the draw of the calibration rows the coverage
    itself varies as Beta(k, n + 1 - k) (continuous scores), and the promise is about its mean.

    Args:
        sets: the fitted sets (of one fold, where several folds are joined).
        covered: (N,) bool, whether the set holds the true class.
        sizes: (N,) int, classes in the set.

    Raises:
        InvalidInputError: no rows, or shapes that differ.

    Example:
        >>> sets = LAC().fit(np.log(np.full((20, 2), 0.5)), np.zeros(20, dtype=int))
        >>> report = conformal_report(sets, np.array([True, True]), np.array([2, 2]))
        >>> report.coverage.value, report.mean_size.value, report.several.value
        (1.0, 2.0, 1.0)
    """
    inside, size = np.asarray(covered, dtype=bool), np.asarray(sizes, dtype=np.int64)
    if inside.ndim != 1 or inside.shape != size.shape or not len(inside):
        raise InvalidInputError(
            f"got shapes {inside.shape} and {size.shape}; needed (N,) for both, with N >= 1"
        )
    n, one = len(size), size == 1
    return ConformalReport(
        method=sets.name,
        miscoverage=sets.miscoverage,
        n_calibration=sets.n,
        coverage=proportion(int(inside.sum()), n),
        mean_size=mean(size),
        empty=proportion(int((size == 0).sum()), n),
        single=proportion(int(one.sum()), n),
        several=proportion(int((size > 1).sum()), n),
        right_when_single=proportion(int(inside[one].sum()), int(one.sum())) if one.any() else None,
        sizes=np.bincount(size),
        guarantee=sets.guarantee,
    )


def _checked(values: Tensor) -> Tensor:
    """Refuse rows that are not log-probabilities."""
    bad = ~((values.logsumexp(dim=1).abs() < _SUM) & ~values.isnan().any(dim=1))
    if bad.any():
        raise InvalidInputError(
            f"got {int(bad.sum())} rows that are not log-probabilities (their probabilities do not "
            "sum to 1); give log softmax of the logits, or what a calibrator's transform returns"
        )
    return values
