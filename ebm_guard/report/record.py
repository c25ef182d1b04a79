"""The report as frozen records; ``to_dict`` gives exactly what ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ebm_guard.report.rows import ReportRows

SCHEMA = "ebm_guard.report/2"
GOOD, ATTENTION, BAD, UNCLEAR, NOT_RUN = "good", "attention", "bad", "unclear", "not_run"


class Record:
    """Base of the report's records: fields become keys, in order."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        # Only dataclasses derive from this base.
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """Turn records, arrays and mappings into JSON types.

    Example:
        >>> plain({"a": (1, np.float64(2.0))})
        {'a': [1, 2.0]}
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


@dataclass(frozen=True)
class NotRun(Record):
    """A section that has no numbers, and why."""

    not_run: str


@dataclass(frozen=True)
class Verdict(Record):
    """One pillar in plain words.

    Args:
        status: ``good``, ``attention``, ``bad``, ``unclear`` or ``not_run``.
        headline: a few words.
        sentence: one or two sentences with the figures.
    """

    status: str
    headline: str
    sentence: str


@dataclass(frozen=True)
class DataSet(Record):
    """Where a set of rows came from."""

    spec: str
    role: str
    n: int
    labelled: bool
    skipped: int
    skipped_examples: list[dict[str, str]]
    num_classes: int | None
    classes: list[str] | None
    class_match: str
    fingerprint: str
    limit: int | None


@dataclass(frozen=True)
class DataSection(Record):
    """All sets that the report used."""

    evaluation: DataSet
    calibration: DataSet | None
    fit: DataSet | None
    ood: Mapping[str, DataSet]


@dataclass(frozen=True)
class ModelCard(Record):
    """What is known of the model."""

    name: str
    source: str
    num_classes: int
    num_parameters: int | None = None
    weights_sha256: str | None = None
    head: dict[str, Any] | None = None
    loss_note: str | None = None


@dataclass(frozen=True)
class Requirement(Record):
    """A bound on a metric, and whether it is met."""

    text: str
    path: str
    operator: str
    bound: float
    value: float | None
    low: float | None
    high: float | None
    status: str
    message: str


@dataclass(frozen=True)
class CalibrationSide(Record):
    """Calibration metrics, before or after a calibrator."""

    metrics: Any
    on_request: Mapping[str, Any] = field(default_factory=dict)
    calibrator: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics and, after calibration, what calibrated them."""
        extra = {} if self.calibrator is None else {"calibrator": plain(self.calibrator)}
        return {**plain(self.metrics), **plain(self.on_request), **extra}


@dataclass(frozen=True)
class CalibrationSection(Record):
    """Does 90 % confidence mean 90 % right."""

    verdict: Verdict
    before: CalibrationSide
    after: CalibrationSide | NotRun
    calibrators: Any
    classes: Any
    accepted: Any
    rejected: Any
    ood_confidence: Mapping[str, Any]
    protocol: str


@dataclass(frozen=True)
class Ranking(Record):
    """All scores on the user's OOD sets, best first."""

    scores: list[dict[str, Any]]
    energy_rank: int
    of: int
    best: str
    difference: Any
    sentence: str


@dataclass(frozen=True)
class EnergySection(Record):
    """Energies of all sets on one axis, and how energy ranks among the scores."""

    verdict: Verdict
    temperature: float
    sets: Mapping[str, Mapping[str, Any]]
    histogram: Mapping[str, Any]
    threshold: float | None
    ranking: Ranking | None


@dataclass(frozen=True)
class OODSet(Record):
    """All scores on one OOD set."""

    role: str
    n: int
    scores: Mapping[str, Any]
    roc: Mapping[str, Any]


@dataclass(frozen=True)
class GateSection(Record):
    """What the gate promises, and what it did."""

    verdict: Verdict
    score: str
    method: str
    threshold: float | None
    false_reject_rate: float
    assurance: float | None
    n: int
    guarantee: str
    rule: str
    protocol: str
    coverage: Any
    accuracy_accepted: Any
    accuracy_rejected: Any
    accepted_ood: Mapping[str, Any]
    invalid: int


@dataclass(frozen=True)
class Warned(Record):
    """Something that a reader must know before using the numbers."""

    code: str
    message: str


@dataclass(frozen=True)
class Meta(Record):
    """How the report was made."""

    title: str
    package: Mapping[str, str]
    model: ModelCard
    preprocessing: Mapping[str, Any] | None
    seed: int
    protocol: list[str]
    settings: Mapping[str, Any]
    command: str | None
    environment: Mapping[str, Any]
    run: Mapping[str, Any]


@dataclass(frozen=True)
class Report(Record):
    """The whole report; everything that people see is rendered from :meth:`to_dict`."""

    meta: Meta
    data: DataSection
    requirements: list[Requirement]
    calibration: CalibrationSection | NotRun
    energy: EnergySection | NotRun
    ood: Mapping[str, OODSet]
    gate: GateSection | NotRun
    selective: Any
    groups: Any
    robustness: Any
    finetune: Any
    comparison: Any
    gallery: Any
    warnings: list[Warned] = field(default_factory=list)
    # Not part of the JSON: what a later report needs to compare row by row.
    rows: ReportRows | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, schema number first, without the rows."""
        own = {item.name: plain(getattr(self, item.name)) for item in fields(self)}
        del own["rows"]
        return {"schema": SCHEMA} | own

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.html, report.md, rows.npz and the figures, all or nothing.

        Raises:
            DataError: the folder cannot be written; an older report there is unchanged.
        """
        from ebm_guard.report.render import write_outputs

        return write_outputs(self.to_dict(), Path(folder), self.rows)

    def _repr_html_(self) -> str:
        """Show the verdicts in a notebook; :meth:`save` writes the whole page."""
        from ebm_guard.report.render import render_summary

        return render_summary(self.to_dict())
