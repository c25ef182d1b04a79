"""From stored predictions to the cells and the means of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebm_guard import energy as formulas
from ebm_guard.calibration import RowStatistics, row_statistics
from ebm_guard.calibration.metrics import ece, nll
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate.deciding import Parts, decide_stored
from ebm_guard.gate.decision import INVALID
from ebm_guard.intervals import LEVEL, Metric, mean, normal_quantile, proportion, wilson_share
from ebm_guard.ood.metrics import placements
from ebm_guard.predictions import Predictions
from ebm_guard.robustness.corruptions.alexnet import mean_corruption_error
from ebm_guard.robustness.corruptions.table import CorruptionCell, CorruptionSummary

CLEAN = "clean"
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DeployedRows:
    """What the deployed classifier says of some images, row by row.

    Args:
        valid: (N,) all that is used of the row is finite.
        correct: (N,) the deployed label is right; False where not valid.
        energy: (N,).
        score: (N,) of the gate, or None without one.
        accept: (N,) the gate accepts, or None without one.
        statistics: of the valid rows, by the deployed probabilities; None if there are none.
    """

    valid: Bools
    correct: Bools
    energy: Floats
    score: Floats | None
    accept: Bools | None
    statistics: RowStatistics | None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.valid)

    @property
    def nll(self) -> Floats:
        """(N,) negative log-likelihood, NaN where not valid."""
        found = np.full(len(self), np.nan)
        if self.statistics is not None:
            found[self.valid] = self.statistics.nll
        return found


def deployed_rows(predictions: Predictions, parts: Parts | None = None) -> DeployedRows:
    """Compute what the metrics need of each row.

    Args:
        predictions: logits and labels, and features where the gate's score needs them.
        parts: the gate; its calibrator, if any, gives label and probabilities.

    Raises:
        DataError: no labels, or no features where they are needed.
        InvalidInputError: stored probabilities, which have no energy.

    Example:
        >>> rows = deployed_rows(Predictions(np.array([[2.0, 0.0]]), labels=np.array([1])))
        >>> rows.correct.tolist(), rows.accept
        ([False], None)
    """
    if predictions.kind != "logits":
        raise InvalidInputError(f"{predictions.source} holds probabilities; needed logits")
    labels = predictions.require_labels("accuracy on corrupted images")
    logits = np.array(predictions.logits)
    valid, score, accept = ~predictions.invalid, None, None
    if parts is not None:
        decision = decide_stored(parts, predictions)
        status = decision.status.cpu().numpy()
        valid, accept = status != INVALID, decision.accept.cpu().numpy()
        score = decision.score.cpu().numpy()
    statistics, correct = None, np.zeros(len(labels), dtype=np.bool_)
    if valid.any():
        calibrator = None if parts is None else parts.calibrator
        settings: dict[str, Any] = {}
        if calibrator is not None:
            settings = {
                "transform": calibrator.transform,
                "keeps_prediction": calibrator.keeps_prediction,
            }
        statistics = row_statistics(logits[valid], labels[valid], **settings)
        correct[valid] = statistics.correct
    energy = formulas.energy(torch.from_numpy(logits)).double().numpy()
    return DeployedRows(valid, correct, energy, score, accept, statistics)


def corruption_cell(
    name: str, severity: int, rows: DeployedRows, clean: DeployedRows | None, seed: int = 0
) -> CorruptionCell:
    """Measure one cell.

    Args:
        name: of the corruption.
        severity: 0 for the clean images.
        rows: the corrupted images.
        clean: the same images before, in the same order; None for the clean images themselves.
        seed: of the intervals' own draws.

    Example:
        >>> rows = deployed_rows(Predictions(np.eye(2), labels=np.array([0, 1])))
        >>> corruption_cell("contrast", 1, rows, rows).energy_auroc.value
        0.5
    """
    accepted = 0 if rows.accept is None else int(rows.accept.sum())
    right = 0 if rows.accept is None else int((rows.correct & rows.accept).sum())
    both = None if clean is None else clean.valid & rows.valid

    def separation(what: str) -> Metric | None:
        before, after = getattr(clean, what, None), getattr(rows, what)
        if both is None or before is None or after is None or not both.any():
            return None
        return paired_auroc(before[both], after[both])

    return CorruptionCell(
        name=name,
        severity=severity,
        n=len(rows),
        invalid=int((~rows.valid).sum()),
        accuracy=proportion(int(rows.correct.sum()), len(rows)),
        ece=None if rows.statistics is None else ece(rows.statistics, seed=seed),
        nll=None if rows.statistics is None else nll(rows.statistics),
        energy_auroc=separation("energy"),
        score_auroc=separation("score"),
        coverage=None if rows.accept is None else proportion(accepted, len(rows)),
        accuracy_accepted=proportion(right, accepted) if accepted else None,
    )


def paired_auroc(before: Floats, after: Floats) -> Metric:
    """Compute P(after > before) + P(equal)/2 over all pairs of images; each image is in both sets.

    DeLong's interval takes the two sets as independent, which is too wide here. With V_i the share
    of ``after`` above before_i and W_i the share of ``before`` below after_i, the variance of the
    AUROC is var(V + W) / n.

    Args:
        before: (N,) scores of the clean images, finite, higher = more OOD.
        after: (N,) scores of the same images, corrupted.

    References:
        Obuchowski, Nonparametric Analysis of Clustered ROC Curve Data, Biometrics 1997, with one
        row of either kind in each cluster; logit scale: Pepe, 2003.

    Example:
        >>> paired_auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0])).value
        0.875
    """
    n = len(before)
    of_before, of_after = placements(before, after)
    value = float(of_after.mean())
    if n < 2:
        return Metric(value, None, None, n, "none: one image")
    method = "paired DeLong (Obuchowski), logit scale"
    if value in (0.0, 1.0):
        # The variance is 0 there; the rule of three is a plain bound.
        miss = min(1.0, 3 / n)
        low, high = (1 - miss, 1.0) if value == 1.0 else (0.0, miss)
        return Metric(value, low, high, n, method)
    deviation = math.sqrt(float(np.var(of_before + of_after, ddof=1)) / n)
    half = normal_quantile(0.5 + LEVEL / 2) * deviation / (value * (1 - value))
    centre = math.log(value / (1 - value))
    low, high = (1 / (1 + math.exp(-min(700.0, centre + side))) for side in (-half, half))
    return Metric(value, low, high, n, method)


def mean_share(hits: Bools) -> Metric:
    """Return a mean share over several cells of the same images, with Wilson's interval.

    Cells of one image go together: the effective n is p (1 - p) / var(mean over images), between
    the number of images and that of all rows.

    Args:
        hits: (K, N), cells by images.

    Example:
        >>> mean_share(np.array([[True, False], [True, False]])).method
        'Wilson, effective n 2'
    """
    cells, n = hits.shape
    by_image = hits.mean(axis=0)
    share, spread = float(by_image.mean()), float(np.var(by_image)) / n
    effective = min(float(n * cells), share * (1 - share) / spread) if spread else float(n)
    low, high = wilson_share(share, effective)
    return Metric(share, low, high, n, f"Wilson, effective n {effective:,.0f}")


def summarise(
    cells: Sequence[CorruptionCell], rows: Mapping[tuple[str, int], DeployedRows], mce_note: str
) -> CorruptionSummary:
    """Compute the means over all cells.

    Args:
        cells: the cells.
        rows: by name and severity, what they were measured on.
        mce_note: why AlexNet's errors do not apply, or '' where they do.
    """
    correct = {key: part.correct for key, part in rows.items()}
    accept = [part.accept for part in rows.values() if part.accept is not None]
    names = tuple(dict.fromkeys(name for name, _ in rows))
    severities = tuple(sorted({severity for _, severity in rows}))
    worst = min(cells, key=lambda cell: cell.accuracy.value)
    mce, note = None, mce_note
    if not mce_note:
        mce = mean_corruption_error({key: ~part for key, part in correct.items()})
        note = "relative to the errors of AlexNet as published with ImageNet-C"
    return CorruptionSummary(
        accuracy=mean_share(np.stack(list(correct.values()))),
        ece=_mean_of([cell.ece for cell in cells]),
        nll=_mean_nll([part.nll for part in rows.values()]),
        energy_auroc=_mean_of([cell.energy_auroc for cell in cells]),
        score_auroc=_mean_of([cell.score_auroc for cell in cells]),
        coverage=mean_share(np.stack(accept)) if accept else None,
        accuracy_by_severity={
            wanted: mean_share(
                np.stack([part for key, part in correct.items() if key[1] == wanted])
            )
            for wanted in severities
        },
        accuracy_by_name={
            wanted: mean_share(
                np.stack([part for key, part in correct.items() if key[0] == wanted])
            )
            for wanted in names
        },
        worst=(worst.name, worst.severity),
        mce=mce,
        mce_note=note,
    )


def check_same_images(clean: Predictions, corrupted: Predictions, what: str) -> None:
    """Refuse rows that are not the same images in the same order.

    Raises:
        DataError: another number of rows, other labels, or other ids where both have them.

    Example:
        >>> rows = Predictions(np.eye(2), labels=np.array([0, 1]))
        >>> check_same_images(rows, rows, "fog at severity 1")
    """
    if len(clean) != len(corrupted):
        raise DataError(
            f"{what}: got {len(corrupted)} rows, and {len(clean)} clean ones; needed the same "
            "images. Images that could not be read are left out: repair or remove them in all sets"
        )
    one, other = (
        part.require_labels("accuracy on corrupted images") for part in (clean, corrupted)
    )
    if not np.array_equal(one, other):
        raise DataError(
            f"{what}: {int((one != other).sum())} of {len(one)} labels differ from those of the "
            "clean rows; needed the same images in the same order, with classes numbered alike"
        )
    if clean.ids is not None and corrupted.ids is not None and clean.ids != corrupted.ids:
        raise DataError(f"{what}: the ids are not those of the clean rows; needed the same images")


def _mean_of(metrics: Sequence[Metric | None]) -> Metric | None:
    found = [metric for metric in metrics if metric is not None]
    if not found:
        return None
    value = float(np.mean([metric.value for metric in found]))
    return Metric(value, None, None, found[0].n, f"none: mean of {len(found)} cells")


def _mean_nll(values: Sequence[Floats]) -> Metric | None:
    stacked = np.stack(values)
    known = ~np.isnan(stacked).any(axis=0)
    return mean(stacked[:, known].mean(axis=0)) if known.any() else None
