"""What ``ebm-guard attack`` writes: the robustness section with the facts of its making."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from ebm_guard.model import EnergyClassifier
from ebm_guard.predictions import Predictions
from ebm_guard.report.meta import (
    data_set,
    environment_facts,
    model_card,
    preprocessing_facts,
    run_facts,
)
from ebm_guard.report.record import DataSet, Meta, Record
from ebm_guard.report.robustness_section import RobustnessSection, robustness_section
from ebm_guard.robustness.records import Robustness

SCHEMA = "ebm_guard.attack/1"


@dataclass(frozen=True)
class AttackReport(Record):
    """A report of robustness alone.

    Args:
        meta: how it was made.
        data: the set that the attacked images are of.
        robustness: what was found.
    """

    meta: Meta
    data: DataSet
    robustness: RobustnessSection

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, schema number first."""
        return {"schema": SCHEMA} | super().to_dict()


def attack_report(
    found: Robustness,
    evaluation: Predictions,
    classifier: EnergyClassifier,
    *,
    title: str,
    command: str | None = None,
    clock: float | None = None,
) -> AttackReport:
    """Put an evaluation of robustness into a report.

    Args:
        found: the evaluation.
        evaluation: predictions on the set that the attacked images are of.
        classifier: the wrapped model.
        title: heading.
        command: the command line that makes it, for the reader.
        clock: ``time.perf_counter()`` at the start of the work.
    """
    section = robustness_section(found)
    if not isinstance(section, RobustnessSection):  # found is not None
        raise TypeError(f"got {type(section).__name__}; needed a section with numbers")
    preprocessing = classifier.preprocessing
    meta = Meta(
        title=title,
        package={"name": "ebm_guard", "version": version("ebm-guard")},
        model=model_card(evaluation, classifier),
        preprocessing=None if preprocessing is None else preprocessing_facts(preprocessing),
        seed=int(found.settings["seed"]),
        protocol=[],
        settings=found.settings,
        command=command,
        environment=environment_facts(evaluation, classifier),
        run=run_facts(datetime.now(UTC), time.perf_counter() if clock is None else clock),
    )
    return AttackReport(meta, data_set(evaluation, "evaluation"), section)
