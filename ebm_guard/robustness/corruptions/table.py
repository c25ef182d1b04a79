"""The records of an evaluation on corrupted images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ebm_guard.intervals import Metric


@dataclass(frozen=True)
class CorruptionCell:
    """What one corruption of one severity does to the classifier and its gate.

    Args:
        name: of the corruption; ``clean`` for the images before it.
        severity: 1..5; 0 for the clean images.
        n: images.
        invalid: images with non-finite logits, features or score: wrong, refused, and left out of
            the metrics that need numbers.
        accuracy: share of all images that are named rightly by the deployed prediction.
        ece: of the top label, by the deployed probabilities; None without valid rows.
        nll: in nats, by the same.
        energy_auroc: how well the energy tells corrupted images from the same images clean,
            corrupted positive; None for the clean images.
        score_auroc: the same for the gate's score; None without a gate.
        coverage: share of all images that the gate accepts; None without a gate.
        accuracy_accepted: accuracy among the accepted; None without a gate, or if none is.
    """

    name: str
    severity: int
    n: int
    invalid: int
    accuracy: Metric
    ece: Metric | None = None
    nll: Metric | None = None
    energy_auroc: Metric | None = None
    score_auroc: Metric | None = None
    coverage: Metric | None = None
    accuracy_accepted: Metric | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            name: value.to_dict() if isinstance(value, Metric) else value
            for name, value in ((key, getattr(self, key)) for key in self.__dataclass_fields__)
        }


@dataclass(frozen=True)
class CorruptionSummary:
    """Means over all corruptions and severities of a table; every cell weighs the same.

    Args:
        accuracy: mean over the cells; 1 minus it is the mean error, not normalised by AlexNet's.
        ece: mean over the cells.
        nll: mean over the cells.
        energy_auroc: mean over the cells.
        score_auroc: mean over the cells; None without a gate.
        coverage: mean over the cells; None without a gate.
        accuracy_by_severity: mean over the corruptions, for each severity.
        accuracy_by_name: mean over the severities, for each corruption.
        worst: name and severity of the cell with the lowest accuracy.
        mce: mean corruption error relative to AlexNet's (1 = as bad), on ImageNet-C alone.
        mce_note: why there is no ``mce``, or what it was computed from.
    """

    accuracy: Metric
    ece: Metric | None
    nll: Metric | None
    energy_auroc: Metric | None
    score_auroc: Metric | None
    coverage: Metric | None
    accuracy_by_severity: Mapping[int, Metric]
    accuracy_by_name: Mapping[str, Metric]
    worst: tuple[str, int]
    mce: Metric | None
    mce_note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        metrics = ("accuracy", "ece", "nll", "energy_auroc", "score_auroc", "coverage", "mce")
        found = {name: getattr(self, name) for name in metrics}
        return {
            **{name: None if part is None else part.to_dict() for name, part in found.items()},
            "accuracy_by_severity": {
                str(severity): metric.to_dict()
                for severity, metric in self.accuracy_by_severity.items()
            },
            "accuracy_by_name": {
                name: metric.to_dict() for name, metric in self.accuracy_by_name.items()
            },
            "worst": {"name": self.worst[0], "severity": self.worst[1]},
            "mce_note": self.mce_note,
        }


@dataclass(frozen=True)
class CorruptionTable:
    """Corruptions by severity, on the same images throughout.

    Args:
        source: which set of corruptions, in words: never ``ImageNet-C`` unless its files were read.
        names: of the corruptions, in order.
        severities: in order.
        n: images in each cell.
        probabilities: where ECE and NLL are from: the name of the gate's calibrator, or
            ``softmax``.
        score: the gate's score, or None.
        clean: the same images before corruption.
        cells: one for each name and severity, in order.
        summary: means over the cells.
        facts: versions, constants and settings, as JSON types.
    """

    source: str
    names: tuple[str, ...]
    severities: tuple[int, ...]
    n: int
    probabilities: str
    score: str | None
    clean: CorruptionCell
    cells: tuple[CorruptionCell, ...]
    summary: CorruptionSummary
    facts: Mapping[str, Any] = field(default_factory=dict)

    def cell(self, name: str, severity: int) -> CorruptionCell:
        """Return one cell.

        Raises:
            KeyError: it was not measured.
        """
        for found in self.cells:
            if (found.name, found.severity) == (name, severity):
                return found
        raise KeyError(f"{name} at severity {severity}")

    @property
    def forwards(self) -> int:
        """Images that went through the model, the clean ones among them."""
        return self.n * (len(self.cells) + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "source": self.source,
            "names": list(self.names),
            "severities": list(self.severities),
            "n": self.n,
            "forwards": self.forwards,
            "probabilities": self.probabilities,
            "score": self.score,
            "clean": self.clean.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
            "summary": self.summary.to_dict(),
            "facts": dict(self.facts),
        }
