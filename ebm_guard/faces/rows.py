"""Rows of one set as they come during a training: a few numbers each, and the metrics of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.calibration import RowStatistics, row_statistics
from ebm_guard.calibration.metrics import ece, ece_l2_debiased
from ebm_guard.errors import DataError
from ebm_guard.model.classifier import check_kind
from ebm_guard.ood.metrics import auroc

PREFIX = "ebm_guard"
COLUMNS = ("energy", "valid", "confidence", "predicted", "correct", "nll", "brier")
UNLABELLED = 2
Table = NDArray[np.float64]


class Rows:
    """What is kept of the rows of one set: 7 numbers each, 2 of unlabelled ones.

    Args:
        source: what the rows are called in messages.
        labelled: whether the set has labels.

    Example:
        >>> rows = Rows("validation", labelled=True)
        >>> rows.add(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> rows.table().shape
        (2, 7)
    """

    def __init__(self, source: str, *, labelled: bool) -> None:
        self.source = source
        self.labelled = labelled
        self._parts: list[Table] = []

    def add(self, logits: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (B, C); a row with a NaN or infinite logit is counted and left out.
            labels: (B,) integers, needed where the set is labelled.

        Raises:
            UnsupportedModelError: the first batch holds probabilities, not logits.
            DataError: labels are missing, or there are more or fewer than rows.
        """
        logits = logits.detach()
        formulas.check_logits(logits)
        if not self._parts:
            check_kind(logits)
        energies = formulas.energy(logits).double().cpu().numpy()
        valid = torch.isfinite(logits).all(dim=1).cpu().numpy() & np.isfinite(energies)
        part = np.zeros((len(energies), len(COLUMNS) if self.labelled else UNLABELLED))
        part[:, 0], part[:, 1] = np.where(valid, energies, 0.0), valid
        if self.labelled:
            classes = self._classes(labels, len(energies))[valid]
            if len(classes):
                # Half precision has no numpy dtype of its own in every case.
                values = logits if logits.dtype == torch.float64 else logits.float()
                part[valid, UNLABELLED:] = _columns(values.cpu().numpy()[valid], classes)
        self._parts.append(part)

    def table(self, most: int | None = None) -> Table:
        """Return the rows so far, (N, 7) or (N, 2).

        Args:
            most: keep this many from the beginning; None keeps all.
        """
        width = len(COLUMNS) if self.labelled else UNLABELLED
        return np.concatenate([np.zeros((0, width)), *self._parts])[:most]

    def _classes(self, labels: Tensor | None, n: int) -> NDArray[np.int64]:
        if labels is None:
            raise DataError(
                f"the batches of {self.source} have no labels; ECE and accuracy need them. Give "
                "read=, which takes a batch and returns (inputs, labels)"
            )
        found = torch.as_tensor(labels)
        if found.shape != (n,) or found.is_floating_point():
            raise DataError(
                f"got labels of shape {tuple(found.shape)} and dtype {found.dtype} for {n} rows of "
                f"{self.source}; needed one integer class per row. Give read=, which takes a batch "
                "and returns (inputs, labels)"
            )
        return found.detach().cpu().numpy().astype(np.int64)


def metrics_of(table: Table, ood: Mapping[str, Table]) -> dict[str, float]:
    """Compute what a monitor logs, under stable names.

    ``ebm_guard/accuracy``, ``ece`` (15 equal-width bins), ``ece_null95`` (what a perfectly
    calibrated model with these confidences stays below in 95 % of cases), ``ece_l2_debiased``,
    ``nll``, ``brier``, ``invalid`` (rows with a NaN or infinite logit, left out of all the others);
    with OOD sets ``auroc/<set>`` and ``fpr95/<set>`` of the energy, and ``auroc`` and ``fpr95`` of
    the worst set. A metric without a single valid row is NaN, so that no name ever goes missing.

    Args:
        table: of the labelled ID rows.
        ood: tables by the name of the set.

    Example:
        >>> rows = Rows("validation", labelled=True)
        >>> rows.add(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> metrics_of(rows.table(), {})["ebm_guard/accuracy"]
        0.5
    """
    known = table[table[:, 1] > 0]
    found = {"invalid": float(len(table) - len(known)), **_calibration(known)}
    separate = {
        name: _separation(known[:, 0], rows[rows[:, 1] > 0, 0]) for name, rows in ood.items()
    }
    if separate:
        found["auroc"] = min(area for area, _ in separate.values())
        found["fpr95"] = max(share for _, share in separate.values())
    for name, (area, share) in separate.items():
        found |= {f"auroc/{name}": area, f"fpr95/{name}": share}
    return {f"{PREFIX}/{name}": value for name, value in found.items()}


def _columns(logits: NDArray[np.floating], classes: NDArray[np.int64]) -> Table:
    rows = row_statistics(logits, classes)
    return np.stack([np.asarray(getattr(rows, name), float) for name in COLUMNS[UNLABELLED:]], 1)


def _calibration(known: Table) -> dict[str, float]:
    names = ("accuracy", "ece", "ece_null95", "ece_l2_debiased", "nll", "brier")
    if not len(known):
        return dict.fromkeys(names, math.nan)
    _, _, confidence, predicted, correct, nll, brier = np.ascontiguousarray(known.T)
    rows = RowStatistics(confidence, predicted.astype(np.int64), correct > 0, nll, brier)
    error = ece(rows)
    null = math.nan if error.null95 is None else error.null95
    values = (correct.mean(), error.value, null, ece_l2_debiased(rows).value)
    return dict(zip(names, map(float, (*values, nll.mean(), brier.mean())), strict=True))


def _separation(id_energies: Table, ood_energies: Table) -> tuple[float, float]:
    """Return AUROC (OOD positive) and FPR95 (share of OOD accepted with 95 % of ID)."""
    if not len(id_energies) or not len(ood_energies):
        return math.nan, math.nan
    # The definition of ebm_guard.ood.metrics.fpr95, without its bootstrap at every epoch.
    accepted = math.ceil(0.95 * len(id_energies))
    cut = np.partition(id_energies, accepted - 1)[accepted - 1]
    return auroc(id_energies, ood_energies).value, float((ood_energies <= cut).mean())
