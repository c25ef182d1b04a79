"""The density that a fine-tuning run offers, or the reason why it offers none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebm_guard.report.record import NotRun, Record

if TYPE_CHECKING:
    from ebm_guard.training.result import FinetuneResult

NO_DENSITY = "this objective learns no density; nce and fce do"


@dataclass(frozen=True)
class DensitySection(Record):
    """What was measured of a learned density.

    Args:
        status: ``offered`` or ``not offered``.
        reason: why, in words.
        space: ``features`` or ``pixels``.
        dim: values of one point.
        base: name of the known density that the energy tilts.
        constant: log Z, in nats: in closed form where there is one, else as it was learned.
        checks: see :class:`ebm_guard.training.density.checks.DensityChecks`.
    """

    status: str
    reason: str
    space: str
    dim: int
    base: str
    constant: float
    checks: Mapping[str, Any]


def density_section(result: FinetuneResult, no_candidate: str) -> DensitySection | NotRun:
    """Put a run's density into the report.

    Args:
        result: of :func:`ebm_guard.finetune`.
        no_candidate: what to say where training found none.
    """
    if result.candidate is None:
        return NotRun(no_candidate)
    if result.density is None:
        return NotRun(getattr(result, "no_density", "") or NO_DENSITY)
    return DensitySection(**result.density.to_dict())
