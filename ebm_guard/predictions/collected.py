"""The rows of a pass as they grow."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.data.batches import Batch
from ebm_guard.errors import DataError
from ebm_guard.model.classifier import ClassifierOutput, EnergyClassifier
from ebm_guard.predictions.head import LinearHead
from ebm_guard.predictions.record import COLUMNS, Array, Predictions


class Collected:
    """The columns of a pass as they grow, in memory or beyond a limit on disk.

    Args:
        memory_limit: bytes per column beyond which it is kept in a temporary file.
    """

    def __init__(self, memory_limit: int = 1 << 30) -> None:
        # Texts of different lengths have different dtypes, which one flat file cannot hold.
        limits = dict.fromkeys(COLUMNS, memory_limit) | {"groups": sys.maxsize}
        self.columns = {name: Column(limit) for name, limit in limits.items()}
        self.ids: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self.dtype: str | None = None

    def __len__(self) -> int:
        """Return the number of rows so far."""
        return self.columns["logits"].n

    def add(self, batch: Batch, output: ClassifierOutput) -> None:
        """Append the rows of a batch."""
        self.dtype = str(output.logits.dtype).removeprefix("torch.")
        self.columns["logits"].add(_to_numpy(output.logits))
        if output.features is not None:
            self.columns["features"].add(_to_numpy(output.features))
        if batch.labels is not None:
            self.columns["labels"].add(batch.labels.cpu().numpy().astype(np.int64))
        if batch.groups is not None:
            self.columns["groups"].add(batch.groups)
        self.columns["hashes"].add(batch.hashes)
        self.ids.extend(batch.ids)

    def predictions(self, classifier: EnergyClassifier, source: str) -> Predictions:
        """Return the rows as a record.

        Raises:
            DataError: there are none.
        """
        if not len(self):
            raise DataError(f"{source} gave no rows ({len(self.skipped)} images were unreadable)")
        arrays: dict[str, Any] = {
            name: column.array() for name, column in self.columns.items() if column.n
        }
        head = classifier.head
        return Predictions(
            **arrays,
            head=LinearHead.of_model(head) if "features" in arrays and head is not None else None,
            ids=tuple(self.ids) or None,
            dtype=self.dtype or "float32",
            skipped=tuple(self.skipped),
            source=source,
        )


class Column:
    """Rows collected in memory, and beyond a limit in an unlinked temporary file."""

    def __init__(self, limit: int) -> None:
        self.n = 0
        self._limit = limit
        self._bytes = 0
        self._parts: list[Array] = []
        self._file: Any = None
        self._like: Array | None = None

    def add(self, rows: Array) -> None:
        """Append rows."""
        self.n += len(rows)
        self._bytes += rows.nbytes
        self._like = rows if self._like is None else self._like
        if self._file is None and self._bytes > self._limit:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as its map
            for part in self._parts:
                self._file.write(part.tobytes())
            self._parts = []
        if self._file is None:
            self._parts.append(rows)
        else:
            self._file.write(np.ascontiguousarray(rows).tobytes())

    def layout(self) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
        """Return dtype and shape of all rows, or None where none were added."""
        if self._like is None:
            return None
        kind = np.result_type(*self._parts) if self._file is None else self._like.dtype
        return kind, (self.n, *self._like.shape[1:])

    def array(self) -> Array | None:
        """Return all rows, memory-mapped beyond the limit; None where none were added.

        Nothing can be appended to a column beyond the limit afterwards.
        """
        if self._like is None:
            return None
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        shape = (self.n, *self._like.shape[1:])
        mapped = np.memmap(self._file, dtype=self._like.dtype, mode="r", shape=shape)
        # The map keeps the data alive; the handle is not needed any more.
        self._file.close()
        return mapped


def _to_numpy(values: Tensor) -> Array:
    values = values.detach()
    kept = values if values.dtype == torch.float64 else values.float()
    return np.asarray(kept.cpu().numpy())
