"""Screen a batch: flag outliers so that the share of false flags is bounded.

The gate decides each input by itself: of m in-distribution inputs it refuses about
``false_reject_rate`` times m, however clean the batch. Screening asks another question, "which of
these m are outliers", and bounds the false share among those it names. It never changes a
``Decision``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.metrics.classwise import benjamini_hochberg
from ebm_guard.errors import EbmGuardWarning, InvalidInputError
from ebm_guard.intervals import Array

FDR = 0.05


@dataclass(frozen=True)
class Screening:
    """Which rows of a batch are flagged as outliers.

    Args:
        mask: (B,) bool, True = flagged, invalid rows included.
        fdr: bound on the expected false share among the flagged valid rows.
        tested: m, the rows that have a p-value.
        flagged: of them, flagged.
        invalid: rows without one, flagged by themselves.
        n: calibration scores behind the p-values, or None where not told.
    """

    mask: NDArray[np.bool_]
    fdr: float
    tested: int
    flagged: int
    invalid: int
    n: int | None

    @property
    def can_flag_one(self) -> bool | None:
        """Whether a lone outlier can be flagged at all: n + 1 >= m / fdr; None where n is not."""
        return None if self.n is None else self.n >= needed_calibration_rows(self.tested, self.fdr)

    @property
    def sentence(self) -> str:
        """What was found, and what it means, in plain words."""
        text = (
            f"{self.flagged:,} of {self.tested:,} inputs are flagged as outliers; on average at "
            f"most {self.fdr:g} of such flags are false."
        )
        if self.invalid:
            text += f" {self.invalid:,} more had no finite score and are flagged as invalid."
        return text if self.can_flag_one is not False else f"{text} {self._too_few()}"

    def _too_few(self) -> str:
        needed = needed_calibration_rows(self.tested, self.fdr)
        return (
            f"A lone outlier in a batch of {self.tested:,} cannot be flagged: with {self.n:,} "
            f"calibration scores the smallest p-value is 1/{(self.n or 0) + 1:,}, and n + 1 >= m / "
            f"fdr needs {needed:,}. Give smaller batches or more calibration rows."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "mask": self.mask.tolist(),
            "fdr": self.fdr,
            "tested": self.tested,
            "flagged": self.flagged,
            "invalid": self.invalid,
            "n": self.n,
            "can_flag_one": self.can_flag_one,
            "sentence": self.sentence,
        }


def needed_calibration_rows(m: int, fdr: float = FDR) -> int:
    """Compute the fewest calibration scores n with which a lone outlier among m can be flagged.

    Its p-value is at least 1 / (n + 1), and the strictest comparison is with fdr / m.

    Example:
        >>> needed_calibration_rows(100, 0.05)
        1999
    """
    return max(1, math.ceil(m / fdr - 1e-9) - 1)


def screen_batch(p_values: Array | Tensor, fdr: float = FDR, *, n: int | None = None) -> Screening:
    """Flag the outliers of a batch by Benjamini and Hochberg's rule on conformal p-values.

    With the m valid p-values sorted, all up to the last with p_(i) <= fdr i / m are flagged. The
    p-values share their calibration scores and so depend on each other, in a way (positive
    regression dependence) under which the rule still holds: E[false flags / flags] <= fdr times
    the share of inliers in the batch, on average over calibration sets and batches.

    Args:
        p_values: (B,) marginal conformal p-values, such as ``Decision.p_value``, of inputs that
            were not used in calibration. 0 is the p-value of an INVALID row, and no conformal
            p-value: such a row is flagged and takes no part in the rule.
        fdr: in (0, 1).
        n: calibration scores behind the p-values, for the warning that there are too few.

    Returns:
        The mask with its statement.

    Raises:
        InvalidInputError: p-values outside [0, 1] or NaN, another shape, or a wrong ``fdr``.

    Warns:
        EbmGuardWarning: ``n`` is too small for a lone outlier in a batch of this size.

    References:
        Benjamini and Hochberg, JRSS B 1995; Bates, Candès, Lei, Romano and Sesia, Testing for
        Outliers with Conformal P-values, Annals of Statistics 2023 (theorem 2.4: PRDS).

    Example:
        >>> screen_batch(np.array([0.001, 0.2, 0.7, 0.5])).mask.tolist()
        [True, False, False, False]
    """
    if not 0 < fdr < 1:
        raise InvalidInputError(f"got fdr {fdr!r}; needed a number in (0, 1)")
    values = _checked(p_values)
    valid = values > 0
    mask = ~valid
    # p-values are multiples of 1 / (n + 1): an equality must not be lost in the last bit.
    mask[valid] = benjamini_hochberg(values[valid].tolist(), fdr * (1 + 1e-12))
    tested = int(valid.sum())
    invalid = len(values) - tested
    screening = Screening(mask, fdr, tested, int(mask.sum()) - invalid, invalid, n)
    if screening.can_flag_one is False:
        warnings.warn(screening._too_few(), EbmGuardWarning, stacklevel=2)
    return screening


def _checked(p_values: Array | Tensor) -> NDArray[np.float64]:
    if isinstance(p_values, Tensor):
        p_values = p_values.detach().double().cpu().numpy()
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1:
        raise InvalidInputError(f"got p-values of shape {values.shape}; needed (B,)")
    bad = int((~((values >= 0) & (values <= 1))).sum())
    if bad:
        raise InvalidInputError(
            f"got {bad} of {len(values)} p-values outside [0, 1] or NaN; needed the marginal "
            "p-values of a guard (Decision.p_value)"
        )
    return values
