"""What a later report needs of this one to compare row by row: five numbers a row, and scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import RowStatistics
from ebm_guard.errors import DataError
from ebm_guard.files import DAMAGED_NPZ, read_arrays

FILE_NAME = "rows.npz"
SCHEMA = "ebm_guard.rows/1"
_STATISTICS = tuple(RowStatistics.__dataclass_fields__)


@dataclass(frozen=True)
class SetRows:
    """The rows of one data set.

    Args:
        hashes: (N,) uint64 of the rows' content.
        scores: (N,) the gate's score, higher = more OOD, or None where it needs logits.
    """

    hashes: NDArray[np.uint64]
    scores: NDArray[np.float64] | None


@dataclass(frozen=True)
class ReportRows:
    """The rows behind a report.

    Args:
        sets: ``evaluation`` and the OOD sets.
        labels: (N,) of the evaluation rows, or None.
        before: statistics of the evaluation rows before calibration, or None without labels.
        after: the same after calibration.
    """

    sets: Mapping[str, SetRows]
    labels: NDArray[np.int64] | None
    before: RowStatistics | None
    after: RowStatistics | None

    def write(self, path: Path) -> None:
        """Write an .npz file; the same rows give the same bytes."""
        arrays: dict[str, Any] = {"schema": np.array(SCHEMA)}
        for name, part in self.sets.items():
            arrays[f"hashes:{name}"] = part.hashes
            if part.scores is not None:
                arrays[f"scores:{name}"] = part.scores
        if self.labels is not None:
            arrays["labels"] = self.labels.astype(np.int32)
        for side in ("before", "after"):
            statistics = getattr(self, side)
            if statistics is not None:
                columns = {name: getattr(statistics, name) for name in _STATISTICS}
                arrays |= {
                    f"{side}:{name}": _small(values)
                    for name, values in columns.items()
                    if values is not None
                }
        np.savez_compressed(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> ReportRows:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: damaged, or of another schema.
        """
        try:
            with path.open("rb") as handle:
                arrays = read_arrays(handle)
            if str(arrays["schema"]) != SCHEMA:
                raise DataError(f"{path} has schema {arrays['schema']}; needed {SCHEMA!r}")
            names = [name.partition(":")[2] for name in arrays if name.startswith("hashes:")]
            return cls(
                sets={
                    name: SetRows(arrays[f"hashes:{name}"], arrays.get(f"scores:{name}"))
                    for name in names
                },
                labels=arrays["labels"].astype(np.int64) if "labels" in arrays else None,
                before=_statistics(arrays, "before"),
                after=_statistics(arrays, "after"),
            )
        except (*DAMAGED_NPZ, AttributeError) as error:
            raise DataError(f"cannot read the rows of a report from {path}: {error}") from None

    def fingerprint(self) -> str:
        """Hash over all rows of all sets."""
        digest = hashlib.sha256()
        for name in sorted(self.sets):
            digest.update(name.encode() + self.sets[name].hashes.tobytes())
        return digest.hexdigest()[:32]


def _small(values: NDArray[Any]) -> NDArray[Any]:
    """Keep seven digits: enough for every figure, half the size."""
    if np.issubdtype(values.dtype, np.floating):
        return values.astype(np.float32)
    return values if values.dtype == np.bool_ else values.astype(np.int32)


def _statistics(arrays: Mapping[str, NDArray[Any]], side: str) -> RowStatistics | None:
    if f"{side}:correct" not in arrays:
        return None
    kinds = {"predicted": np.int64, "correct": np.bool_}
    columns: dict[str, Any] = {
        name: arrays[f"{side}:{name}"].astype(kinds.get(name, np.float64))
        for name in _STATISTICS
        # Weights are the one column that a report may lack.
        if name != "weight" or f"{side}:weight" in arrays
    }
    return RowStatistics(**columns)
