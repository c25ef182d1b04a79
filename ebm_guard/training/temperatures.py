"""The temperatures at which two nets are compared: each side's own, or one for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ebm_guard.calibration.calibrators.temperature import BestTemperature

CONVERGED = "converged"
# Status of a fit, in the order of its number where processes exchange numbers.
STATUSES = (CONVERGED, "at_bound", "separable", "worse_than_uniform")
_WHY = {
    "at_bound": "the best one lies outside [0.001, 1000]",
    "separable": "every row is right, and a lower one is always better",
    "worse_than_uniform": "the logits say less than nothing, and a higher one is always better",
}


@dataclass(frozen=True)
class Temperatures:
    """The temperatures of start and candidate, made so that equal logits give equal NLLs.

    A fit that finds no temperature says T = 1, which stands for none. Beside a fitted T of the
    other side it would decide the comparison: the very same logits at T = 1 and at T = 3 differ in
    NLL by more than any limit. So each side has its own T only where both were fitted; else both
    have the one that was, or 1.

    Args:
        start: T of the start.
        candidate: T of the candidate.
        note: where the two share one: why, in words; else ''.
    """

    start: float
    candidate: float
    note: str = ""

    @classmethod
    def of(cls, start: BestTemperature, candidate: BestTemperature) -> Temperatures:
        """Pair two fits.

        Example:
            >>> fitted, none = BestTemperature(1.5, "converged"), BestTemperature(1.0, "separable")
            >>> pair = Temperatures.of(none, fitted)
            >>> pair.start, pair.candidate
            (1.5, 1.5)
        """
        fits = {"start": start, "candidate": candidate}
        failed = {name: fit for name, fit in fits.items() if fit.status != CONVERGED}
        if not failed:
            return cls(start.temperature, candidate.temperature)
        found = [fit.temperature for name, fit in fits.items() if name not in failed]
        common = found[0] if found else 1.0
        causes = {f"for the {name}, ": _WHY[fit.status] for name, fit in failed.items()}
        if len(failed) == len(fits) and len(set(causes.values())) == 1:
            causes = {"for both, ": causes.popitem()[1]}
        why = "; ".join(name + cause for name, cause in causes.items())
        how = f"the other's, T = {common:.3g}" if found else "T = 1"
        return cls(
            common,
            common,
            f"No temperature could be fitted on the selection rows ({why}), so both nets are "
            f"compared at {how}.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {"start": self.start, "candidate": self.candidate, "note": self.note}
