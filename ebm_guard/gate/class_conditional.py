"""One cut for each predicted class, so that no class pays for the others.

One cut for all classes keeps its promise on average over them: a class whose images look less
sure may be refused far more often. Groups are by the class of the largest *logit*, which is a
function of the input alone; true labels are not known at run time, and a calibrator may depend on
the labels of the calibration rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.errors import InvalidInputError, NotFittedError, TooFewRowsError
from ebm_guard.gate.thresholds import (
    Threshold,
    check_rates,
    check_sorted,
    finite_scores,
    minimum_rows,
    pac_rank,
)
from ebm_guard.intervals import Array
from ebm_guard.precision import KeepDouble

KIND = "class_conditional"
_NAMED = 10


class ClassConditionalThreshold(KeepDouble):
    """Accept iff the score is at most the cut of its predicted class: one PAC cut a class.

    A class with fewer calibration rows than the promise needs has no cut of its own: all such
    classes share one group, which is calibrated on itself (and is given the next smallest classes
    until it is large enough). Which classes those are depends on the predicted classes of the
    calibration rows and never on their scores.

    What is promised, given the predicted classes of the calibration rows: with probability
    ``assurance``, at least 1 - ``false_reject_rate`` of ID inputs predicted as that class are
    accepted; for the shared group, of inputs whose classes mix as in its calibration rows (small
    classes are in it *because* they are rare there, so live traffic may mix them otherwise). By
    itself for each group, or with ``simultaneous`` for all groups at once, each at delta / groups.

    Attributes:
        scores: (n,) float64, calibration scores, ascending within each group.
        starts: (G + 1,) int64, where each group begins; the shared group, if any, is the last.
        group_cuts: (G,) float64.
        group_of: (C,) int64, the group of each class; -1 for a class without calibration rows
            where there is no shared group: such a row is refused.

    References:
        Vovk, Conditional Validity of Inductive Conformal Predictors, ACML 2012: Mondrian
        (category-wise) validity and the PAC rank. The shared group: Hoeffding, On the Distribution
        of the Number of Successes in Independent Trials, 1956: a sum of unequal trials exceeds a
        count of at least its mean + 1 no more often than a binomial of the same mean.

    Example:
        >>> classes = np.repeat([0, 1, 2, 3], [100, 100, 40, 30])
        >>> threshold = ClassConditionalThreshold.fit(np.arange(270.0), classes, num_classes=5)
        >>> threshold.own, threshold.shared, threshold.group_cuts.tolist()
        ([0, 1], [2, 3, 4], [98.0, 198.0, 269.0])
    """

    scores: Tensor
    starts: Tensor
    group_cuts: Tensor
    group_of: Tensor
    method = "pac"

    def __init__(
        self,
        scores: Tensor,
        starts: Tensor,
        group_of: Tensor,
        ranks: list[int],
        false_reject_rate: float,
        assurance: float,
        simultaneous: bool,
        has_shared: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("scores", scores.double())
        self.register_buffer("starts", starts.long())
        self.register_buffer("group_of", group_of.long())
        places = self.starts[:-1] + torch.tensor(ranks, dtype=torch.long) - 1
        self.register_buffer("group_cuts", self.scores[places])
        self.ranks = ranks
        self.false_reject_rate, self.assurance = false_reject_rate, assurance
        self.simultaneous, self._has_shared = simultaneous, has_shared

    @classmethod
    def fit(
        cls,
        scores: Array,
        classes: NDArray[np.int64],
        num_classes: int,
        false_reject_rate: float = 0.05,
        assurance: float = 0.95,
        simultaneous: bool = False,
    ) -> ClassConditionalThreshold:
        """Choose the cuts from the scores of held-out ID rows.

        Args:
            scores: (n,), finite.
            classes: (n,) in 0..C-1, the class of each row's largest logit.
            num_classes: C.
            false_reject_rate: target for the share of ID refused, in each group.
            assurance: probability that the target is met.
            simultaneous: the assurance is for all groups at once.

        Raises:
            TooFewRowsError: too few rows for even one group; the error names the number needed.
            InvalidInputError: non-finite scores, or rates out of range.
        """
        check_rates(false_reject_rate, assurance)
        values = finite_scores(scores)
        predicted = np.asarray(classes, dtype=np.int64)
        if values.ndim != 1 or predicted.shape != values.shape:
            raise InvalidInputError(
                f"got scores {values.shape} and classes {predicted.shape}; needed (n,) for both"
            )
        counts = np.bincount(predicted, minlength=num_classes)
        groups, level = _groups(counts, false_reject_rate, assurance, simultaneous)
        group_of = np.full(num_classes, -1, dtype=np.int64)
        for number, members in enumerate(groups):
            group_of[members] = number
        # One class too small for itself is never left alone.
        has_shared = len(groups[-1]) > 1
        if has_shared:
            group_of[counts == 0] = len(groups) - 1
        of_row = group_of[predicted]
        order = np.lexsort((values, of_row))
        sizes = np.bincount(of_row, minlength=len(groups))
        ranks = [
            _rank(
                int(size), false_reject_rate, level, shared=has_shared and number + 1 == len(sizes)
            )
            for number, size in enumerate(sizes)
        ]
        return cls(
            torch.from_numpy(values[order]),
            torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])),
            torch.from_numpy(group_of),
            ranks,
            false_reject_rate,
            assurance,
            simultaneous,
            has_shared,
        )

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return len(self.scores)

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return len(self.ranks)

    @property
    def sizes(self) -> list[int]:
        """Calibration rows of each group."""
        return [int(size) for size in self.starts.diff()]

    @property
    def own(self) -> list[int]:
        """Classes with a cut of their own."""
        last = self.groups - 1 if self._has_shared else self.groups
        return torch.nonzero((self.group_of >= 0) & (self.group_of < last))[:, 0].tolist()

    @property
    def shared(self) -> list[int]:
        """Classes of the shared group, those without calibration rows included."""
        if not self._has_shared:
            return []
        return torch.nonzero(self.group_of == self.groups - 1)[:, 0].tolist()

    @property
    def unseen(self) -> list[int]:
        """Classes without calibration rows and without a shared group: always refused."""
        return torch.nonzero(self.group_of < 0)[:, 0].tolist()

    @property
    def guarantee(self) -> str:
        """The promise, in words."""
        share = f"{1 - self.false_reject_rate:.4g}"
        scope = (
            f"for all {self.groups} groups at once"
            if self.simultaneous
            else "for each group by itself"
        )
        text = (
            f"With probability {self.assurance:g} over the draw of the {self.n:,} calibration "
            f"rows, {scope}, at least {share} of exchangeable in-distribution inputs predicted as "
            f"a class of that group are accepted. {len(self.own)} classes have a cut of their own"
        )
        if self.shared:
            text += (
                f"; {len(self.shared)} classes with few rows share one ({self.sizes[-1]:,} rows): "
                f"{_listed(self.shared)}, and for them the promise supposes that they mix as in "
                "those rows"
            )
        text += "."
        if self.unseen:
            text += (
                f" No calibration row was predicted as {_listed(self.unseen)}: such inputs are "
                "refused."
            )
        return f"{text} Nothing is promised about how many OOD inputs are refused."

    def cuts(self, classes: Tensor) -> Tensor:
        """Return the cut of each row, (B,) float64; -inf where its class is always refused.

        Args:
            classes: (B,) int64, the class of the largest logit.
        """
        group = self.group_of.to(classes.device)[classes]
        cuts = self.group_cuts.to(classes.device)[group.clamp_min(0)]
        return torch.where(group >= 0, cuts, -math.inf)

    def accept(self, score: Tensor, classes: Tensor | None = None) -> Tensor:
        """Compare scores (B,) with the cuts of their classes; NaN is never accepted.

        Args:
            score: (B,).
            classes: (B,) int64, the class of the largest logit.

        Raises:
            InvalidInputError: no classes.
        """
        classes = _required(classes)
        return (score.double() <= self.cuts(classes)) & (self.cuts(classes) > -math.inf)

    def p_value(self, score: Tensor, classes: Tensor | None = None) -> Tensor:
        """Compute (1 + #{s_i >= s(x)}) / (n_g + 1) among the n_g rows of the same group.

        Args:
            score: (B,), finite.
            classes: (B,) int64, the class of the largest logit.

        Returns:
            (B,) float64; 1 for a class without calibration rows, of which nothing is known.

        Raises:
            InvalidInputError: no classes.
        """
        classes = _required(classes)
        group = self.group_of.to(classes.device)[classes]
        found = torch.ones(len(score), dtype=torch.float64, device=score.device)
        starts = self.starts.tolist()
        for number in sorted(set(group.tolist())):
            if number < 0:
                continue
            rows = group == number
            scores = self.scores[starts[number] : starts[number + 1]].to(score.device)
            below = torch.searchsorted(scores, score[rows].double(), right=False)
            found[rows] = (1 + len(scores) - below).double() / (len(scores) + 1)
        return found

    def settings(self) -> dict[str, Any]:
        """Return what, with the tensors, rebuilds the threshold."""
        return {
            "kind": KIND,
            "method": self.method,
            "false_reject_rate": self.false_reject_rate,
            "assurance": self.assurance,
            "simultaneous": self.simultaneous,
            "ranks": self.ranks,
            "sizes": self.sizes,
            "cuts": self.group_cuts.tolist(),
            "own": self.own,
            "shared": self.shared,
            "unseen": self.unseen,
        }

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> ClassConditionalThreshold:
        """Rebuild a fitted threshold.

        Raises:
            ValueError: tensors and settings do not belong together.
        """
        scores, starts, group_of = (tensors[name] for name in ("scores", "starts", "group_of"))
        ranks = [int(rank) for rank in settings["ranks"]]
        sizes = starts.diff().tolist()
        if (
            scores.ndim != 1
            or group_of.ndim != 1
            or int(starts[0]) != 0
            or int(starts[-1]) != len(scores)
            or not all(1 <= rank <= size for rank, size in zip(ranks, sizes, strict=True))
            or int(group_of.max()) >= len(ranks)
            or int(group_of.min()) < -1
        ):
            raise ValueError(f"groups of {sizes} rows with ranks {ranks} in {len(scores)} scores")
        threshold = cls(
            scores,
            starts,
            group_of,
            ranks,
            float(settings["false_reject_rate"]),
            float(settings["assurance"]),
            bool(settings["simultaneous"]),
            bool(settings["shared"]),
        )
        check_rates(threshold.false_reject_rate, threshold.assurance)
        for start, size in zip(starts.tolist(), sizes, strict=False):
            check_sorted(threshold.scores[start : start + size])
        if not torch.equal(threshold.group_cuts, tensors["group_cuts"].double()):
            raise ValueError("cuts that are not those of the scores")
        return threshold


AnyThreshold = Threshold | ClassConditionalThreshold


def require_threshold(threshold: AnyThreshold | None) -> AnyThreshold:
    """Return the threshold.

    Raises:
        NotFittedError: there is none yet.
    """
    if threshold is None:
        raise NotFittedError(
            "the guard is not fitted, so it has no threshold; call guard.fit(validation_loader)"
        )
    return threshold


def _groups(
    counts: NDArray[np.int64], false_reject_rate: float, assurance: float, simultaneous: bool
) -> tuple[list[list[int]], float]:
    """Return the classes of each group, the shared one last, and the assurance of one group."""
    limit = max(1, int((counts > 0).sum())) if simultaneous else 1
    for number in range(1, limit + 1):
        level = 1 - (1 - assurance) / number
        needed = minimum_rows("pac", false_reject_rate, level)
        found = _group_by_count(counts, needed, max(needed, math.ceil(1 / false_reject_rate)))
        # More groups ask for more rows in each: the smallest level that serves its own groups.
        if found and (not simultaneous or len(found) <= number):
            return found, level
    raise TooFewRowsError(
        f"got {int(counts.sum())} calibration rows; thresholds by predicted class for a false "
        f"reject rate of {false_reject_rate:g} with assurance {assurance:g} need at least "
        f"{minimum_rows('pac', false_reject_rate, assurance)} in a group. Give more ID rows, or "
        "allow a higher false_reject_rate"
    )


def _group_by_count(counts: NDArray[np.int64], needed: int, needed_shared: int) -> list[list[int]]:
    """Give each class with enough rows a group; join the others, and as many more as it takes."""
    order = np.argsort(counts, kind="stable")
    seen = order[counts[order] > 0]
    small = int(np.searchsorted(counts[seen], needed, side="left"))
    if small:
        enough = np.flatnonzero(np.cumsum(counts[seen]) >= needed_shared)
        if not len(enough):
            return []
        small = max(small, int(enough[0]) + 1)
    own = [[int(label)] for label in sorted(seen[small:].tolist())]
    shared = sorted(seen[:small].tolist())
    return [*own, shared] if shared else own


def _rank(n: int, false_reject_rate: float, assurance: float, *, shared: bool) -> int:
    rank = pac_rank(n, false_reject_rate, assurance)
    if not shared:
        return rank
    # Hoeffding's inequality for a mix of classes holds from the mean count + 1 on.
    return max(rank, math.ceil(n * (1 - false_reject_rate) + 1 - 1e-9))


def _required(classes: Tensor | None) -> Tensor:
    if classes is None:
        raise InvalidInputError(
            "got scores without classes; a class-conditional threshold needs the class of each "
            "row's largest logit"
        )
    return classes


def _listed(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:_NAMED]))
    rest = len(classes) - _NAMED
    return f"class{'es' if len(classes) > 1 else ''} {shown}" + (
        f" and {rest} more" if rest > 0 else ""
    )
