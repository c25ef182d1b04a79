"""What ``ebm-guard sample`` writes: images that the net finds familiar, and how they came to be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm_guard.intervals import Metric, proportion
from ebm_guard.report.editing_report import EditedSection, MorphSection
from ebm_guard.report.meta import (
    environment_facts,
    model_card,
    preprocessing_facts,
    run_facts,
)
from ebm_guard.report.record import DataSet, Meta, Record, plain

if TYPE_CHECKING:
    import torch

    from ebm_guard.model import EnergyClassifier
    from ebm_guard.predictions import Predictions
    from ebm_guard.sampling import SampleSheet
    from ebm_guard.sampling.sampler import Trace

SCHEMA = "ebm_guard.sample/1"
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
EDITS = ("inpainting", "denoising", "morphing")


@dataclass(frozen=True)
class ClassSamples(Record):
    """The samples of one class.

    Args:
        label: the class.
        name: its name, or its number.
        energies: of each sample.
        joint_energies: E(x, y) of each sample with this class.
        predicted: the class that the net names for each.
        agrees: whether that is the class asked for.
    """

    label: int
    name: str
    energies: list[float]
    joint_energies: list[float]
    predicted: list[int]
    agrees: list[bool]


@dataclass(frozen=True)
class SampleReport(Record):
    """Samples by class with their energies, and the traces of their chains.

    Args:
        meta: how it was made.
        data: the images that chains start at, or are compared with; by name.
        sentence: what came of it, in words.
        samples: how many.
        agreement: share of the samples that the net names as the class asked for.
        classes: the samples class by class.
        reference: ``n`` and ``quantiles`` (.05, .25, .5, .75, .95) of the energy of real images, or
            None without any.
        below: share of the samples with a lower energy than 95 % of the real images, or None.
        trace: energy and length of the gradient as ``low``, ``median``, ``high`` (5, 50, 95 % of
            the chains) by step; saturation and acceptance as ``mean``; None where not measured.
        inpainting: what chains made of holes in real images; not written where nobody asked.
        denoising: what they made of noise; the same.
        morphing: how they went from one class to another; the same.
    """

    meta: Meta
    data: Mapping[str, DataSet]
    sentence: str
    samples: int
    agreement: Metric
    classes: list[ClassSamples]
    reference: Mapping[str, Any] | None
    below: Metric | None
    trace: Mapping[str, Any]
    inpainting: EditedSection | None = None
    denoising: EditedSection | None = None
    morphing: MorphSection | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, schema number first."""
        found = {"schema": SCHEMA} | super().to_dict()
        return {key: value for key, value in found.items() if key not in EDITS or value is not None}


def sample_report(
    sheet: SampleSheet,
    classifier: EnergyClassifier,
    *,
    said: Predictions,
    known: Predictions | None = None,
    data: Mapping[str, DataSet] | None = None,
    edits: Mapping[str, Any] | None = None,
    title: str = "Samples",
    command: str | None = None,
    clock: float | None = None,
) -> SampleReport:
    """Put samples into a report.

    Args:
        sheet: what :func:`ebm_guard.sampling.sample` returned.
        classifier: the wrapped model.
        said: what the net said about the samples; its classes and dtype are named.
        known: what the net said about real images, to compare energies with.
        data: sets that were used, by name.
        edits: the sections ``inpainting``, ``denoising`` and ``morphing``, those that were made.
        title: heading.
        command: the command line that makes it, for the reader.
        clock: ``time.perf_counter()`` at the start of the work.
    """
    labels, predicted = sheet.labels.tolist(), sheet.predicted.tolist()
    energies = [float(value) for value in sheet.energy]
    reference, below = _reference(known, energies)
    agreement = proportion(sum(map(int.__eq__, labels, predicted)), len(labels))
    return SampleReport(
        meta=_meta(sheet, classifier, said, title, command, clock),
        data=data or {},
        sentence=_sentence(agreement, reference, below),
        samples=len(labels),
        agreement=agreement,
        classes=_classes(sheet),
        reference=reference,
        below=below,
        trace=_trace(sheet.trace),
        **(edits or {}),
    )


def _classes(sheet: SampleSheet) -> list[ClassSamples]:
    found = []
    for label, name in zip(sheet.classes, sheet.names, strict=True):
        rows = (sheet.labels == label).nonzero().flatten()
        predicted = sheet.predicted[rows].tolist()
        found.append(
            ClassSamples(
                label=label,
                name=name,
                energies=[float(value) for value in sheet.energy[rows]],
                joint_energies=[float(value) for value in sheet.joint_energy[rows]],
                predicted=predicted,
                agrees=[item == label for item in predicted],
            )
        )
    return found


def _reference(
    known: Predictions | None, energies: list[float]
) -> tuple[dict[str, Any] | None, Metric | None]:
    from ebm_guard.ood import Energy

    if known is None:
        return None, None
    values = np.asarray(Energy().of(known), dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    quantiles = [float(value) for value in np.quantile(values, LEVELS)]
    low = sum(value < quantiles[0] for value in energies)
    return {"n": len(values), "quantiles": quantiles}, proportion(low, len(energies))


def _trace(trace: Trace) -> dict[str, Any]:
    def spread(values: torch.Tensor) -> dict[str, list[float]]:
        rows = np.quantile(values.double().numpy(), (0.05, 0.5, 0.95), axis=1)
        return dict(zip(("low", "median", "high"), rows.tolist(), strict=True))

    def means(values: torch.Tensor | None) -> dict[str, list[float]] | None:
        return None if values is None else {"mean": [float(value) for value in values]}

    return {
        "energy": spread(trace.energy),
        # A run of no steps has no gradient.
        "gradient_norm": spread(trace.gradient_norm) if len(trace.gradient_norm) else None,
        "saturation": means(trace.saturation),
        "acceptance": means(trace.acceptance),
    }


def _sentence(agreement: Metric, reference: Mapping[str, Any] | None, below: Metric | None) -> str:
    said = (
        f"{100 * agreement.value:.0f} % of the {agreement.n} samples are named as the class that "
        "was asked for."
    )
    if reference is None or below is None:
        return f"{said} No real images were given to compare their energies with."
    if below.value >= 0.5:
        return (
            f"{said} {100 * below.value:.0f} % have a lower energy than 95 % of your "
            f"{reference['n']:,} images: the net finds them more familiar than the real ones. "
            "Where they do not look like images, its energy is a score and no density."
        )
    return (
        f"{said} {100 * below.value:.0f} % have a lower energy than 95 % of your "
        f"{reference['n']:,} images."
    )


def _meta(
    sheet: SampleSheet,
    classifier: EnergyClassifier,
    said: Predictions,
    title: str,
    command: str | None,
    clock: float | None,
) -> Meta:
    preprocessing = classifier.preprocessing
    settings = plain(sheet.settings)
    return Meta(
        title=title,
        package={"name": "ebm_guard", "version": version("ebm-guard")},
        model=model_card(said, classifier),
        preprocessing=None if preprocessing is None else preprocessing_facts(preprocessing),
        seed=int(settings.get("seed", 0)),
        protocol=[],
        settings=settings,
        command=command,
        environment=environment_facts(said, classifier),
        run=run_facts(datetime.now(UTC), time.perf_counter() if clock is None else clock),
    )
