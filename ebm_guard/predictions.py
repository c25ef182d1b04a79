"""One pass over a data set: logits, features, labels, and where they came from.

Everything after this module works on :class:`Predictions` and never sees the model again, so a
report from saved logits equals the report from the model.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.batches import Batch
from ebm_guard.data.sources import read_npz
from ebm_guard.data.specs import Spec, existing_path
from ebm_guard.errors import DataError, EbmGuardError, InvalidInputError, UnsupportedModelError
from ebm_guard.files import replace_folder
from ebm_guard.model.classifier import EnergyClassifier, check_kind
from ebm_guard.progress import track

SCHEMA = "ebm_guard.predictions/1"
_COLUMNS = ("logits", "features", "labels", "groups", "hashes")
Array = NDArray[Any]


@dataclass(frozen=True)
class Predictions:
    """What a model said about a data set.

    Args:
        logits: (N, C) float32 or float64; may be memory-mapped. For ``kind="probs"`` the log of
            stored probabilities: good for calibration, ``msp`` and ``gen``, without an energy.
        features: (N, D) float32, or None.
        labels: (N,) int64 in 0..C-1, or None.
        groups: (N,) int64 or text, or None.
        ids: N names, or None for 0..N-1.
        hashes: (N,) uint64 of the rows' content, to tell shared rows.
        kind: ``logits`` or ``probs``.
        dtype: dtype in which the model gave the logits.
        classes: class names in logit order, or None.
        skipped: (id, error) of unreadable images.
        source: the spec or a description.
        notes: sentences on how labels were matched, what was limited, and so on.
    """

    logits: Array
    features: Array | None = None
    labels: NDArray[np.int64] | None = None
    groups: Array | None = None
    ids: tuple[str, ...] | None = None
    hashes: NDArray[np.uint64] | None = None
    kind: str = "logits"
    dtype: str = "float32"
    classes: tuple[str, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    source: str = "arrays"
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse columns that do not fit each other."""
        _check_logits(self.logits, self.source)
        n, num_classes = self.logits.shape
        if self.kind not in ("logits", "probs"):
            raise InvalidInputError(f"got kind {self.kind!r}; needed 'logits' or 'probs'")
        for name in ("features", "labels", "groups", "ids", "hashes"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise DataError(f"{self.source}: got {n} rows of logits and {len(column)} {name}")
        check_labels(self.labels, num_classes, self.source)
        if self.hashes is None:
            object.__setattr__(self, "hashes", _hash_rows(self.logits))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.logits)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return int(self.logits.shape[1])

    @property
    def fingerprint(self) -> str:
        """Hash over the content of all rows, in order, and their labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.hashes).tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return f"sha256:{digest.hexdigest()[:32]}"

    @property
    def invalid(self) -> NDArray[np.bool_]:
        """(N,) rows with a NaN or infinite logit."""
        bad = [~np.isfinite(part).all(axis=1) for part in chunks(self.logits)]
        return np.concatenate(bad)

    def names(self, rows: Iterable[int]) -> list[str]:
        """Return the ids of some rows."""
        return [self.ids[row] if self.ids is not None else str(row) for row in rows]

    def select(self, rows: NDArray[np.int64] | slice) -> Predictions:
        """Return some rows, in the given order."""
        kept = np.arange(len(self), dtype=np.int64)[rows]
        columns: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in _COLUMNS
        }
        ids = None if self.ids is None else tuple(self.ids[row] for row in kept)
        return replace(self, ids=ids, **columns)

    def require_labels(self, why: str) -> NDArray[np.int64]:
        """Return the labels.

        Raises:
            DataError: there are none.
        """
        if self.labels is None:
            raise DataError(f"{self.source} has no labels; {why} needs them")
        return self.labels

    def save(self, folder: str | Path) -> Path:
        """Write a folder of .npy files and ``predictions.json``, all of it or nothing.

        Raises:
            DataError: the folder cannot be written, or holds something else.
        """
        folder = Path(folder)
        with replace_folder(folder, marker="predictions.json") as new:
            for name in _COLUMNS:
                column = getattr(self, name)
                if column is not None:
                    np.save(new / f"{name}.npy", column, allow_pickle=False)
            header = {
                "schema": SCHEMA,
                "kind": self.kind,
                "dtype": self.dtype,
                "n": len(self),
                "num_classes": self.num_classes,
                "source": self.source,
                "classes": self.classes,
                "ids": self.ids,
                "skipped": self.skipped,
                "notes": dict(self.notes),
                "fingerprint": self.fingerprint,
            }
            text = json.dumps(header, indent=1, allow_nan=False)
            (new / "predictions.json").write_text(text)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Predictions:
        """Open what :meth:`save` wrote, memory-mapped.

        Raises:
            DataError: missing, damaged, edited, or of another schema.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "predictions.json").read_text())
            columns = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _COLUMNS
                if (folder / f"{name}.npy").exists()
            }
            if header["schema"] != SCHEMA:
                raise DataError(
                    f"{folder} has schema {header['schema']!r}; this version reads {SCHEMA!r}"
                )
            loaded = cls(
                **columns,
                kind=header["kind"],
                dtype=header["dtype"],
                source=header["source"],
                classes=_tuple(header["classes"]),
                ids=_tuple(header["ids"]),
                skipped=tuple((str(name), str(error)) for name, error in header["skipped"]),
                notes=header["notes"],
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            if isinstance(error, EbmGuardError):
                raise
            raise DataError(f"cannot read predictions from {folder}: {error}") from None
        if loaded.fingerprint != header["fingerprint"]:
            raise DataError(f"{folder} was edited: its rows do not match its fingerprint")
        return loaded

    @classmethod
    def from_npz(cls, spec: Spec, *, labelled: bool = True) -> Predictions:
        """Read ``logits:FILE``: ``logits`` or ``probs``, optional labels, features, groups.

        Args:
            spec: a ``logits:`` spec.
            labelled: False ignores the labels, as for OOD sets, whose labels are of other classes.

        Raises:
            DataError: no logits, damaged, non-finite values, labels out of range.
        """
        path = existing_path(spec)
        wanted = ("logits", "probs", "labels", "features", "groups", "classes", "ids")
        arrays = read_npz(spec, path, wanted)
        if "logits" in arrays:
            kind, values = "logits", arrays["logits"]
        elif "probs" in arrays:
            kind, values = "probs", _log_of_probabilities(arrays["probs"], spec.text)
        else:
            raise DataError(f"got spec {spec.text!r}; the file holds neither `logits` nor `probs`")
        _check_logits(values, spec.text)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if kind == "logits" and len(bad):
            raise DataError(
                f"{spec.text}: {len(bad)} of {len(values)} rows hold NaN or infinite logits (first "
                f"row {bad[0]}); a file must be finite, remove or recompute these rows"
            )
        labels = arrays.get("labels") if labelled else None
        dtype = str(values.dtype)
        stored = values if values.dtype == np.float64 else values.astype(np.float32)
        predictions = cls(
            stored,
            features=arrays.get("features"),
            labels=None if labels is None else labels.astype(np.int64),
            groups=arrays.get("groups"),
            ids=tuple(map(str, arrays["ids"])) if "ids" in arrays else None,
            kind=kind,
            dtype=dtype,
            classes=tuple(map(str, arrays["classes"])) if "classes" in arrays else None,
            source=spec.text,
        )
        if kind == "logits":
            try:
                check_kind(torch.from_numpy(stored))
            except UnsupportedModelError as error:
                raise DataError(
                    f"{spec.text}: {error}. Stored probabilities go under the name `probs`"
                ) from None
        return predictions


def stored_predictions(spec: Spec, *, labelled: bool = True) -> Predictions:
    """Open a ``logits:`` or ``predictions:`` spec.

    Args:
        spec: what to open.
        labelled: False drops the labels, as for OOD sets.

    Raises:
        DataError: missing or malformed, or the slice selects nothing.
    """
    if spec.kind == "logits":
        loaded = Predictions.from_npz(spec, labelled=labelled)
    else:
        loaded = Predictions.load(existing_path(spec))
        loaded = loaded if labelled else replace(loaded, labels=None)
    if spec.rows is None:
        return loaded
    kept = loaded.select(spec.rows)
    if not len(kept):
        raise DataError(f"got spec {spec.text!r}, which selects none of {len(loaded)} rows")
    return kept


@torch.no_grad()
def predict(
    classifier: EnergyClassifier,
    data: Iterable[Any],
    *,
    features: bool = False,
    total: int | None = None,
    progress: bool = False,
    amp: bool = False,
    memory_limit: int = 1 << 30,
    source: str = "a loader",
) -> Predictions:
    """Run a classifier once over a data set.

    Args:
        classifier: the wrapped model.
        data: :class:`~ebm_guard.data.Batch` objects, (inputs, labels) pairs, or inputs.
        features: also keep the features, where a head can be verified on the first batch.
        total: number of rows, for the progress bar.
        progress: show a progress bar on stderr.
        amp: run the model under autocast (scores stay in float32).
        memory_limit: bytes per column beyond which it is kept in a memory-mapped temporary file.
        source: description of the data.

    Returns:
        Logits as the model gave them, half precision stored exactly as float32.

    Raises:
        UnsupportedModelError: the model gives probabilities, or no logits.
        DataError: no rows, or labels out of range.

    Example:
        >>> from torch import nn
        >>> out = predict(EnergyClassifier(nn.Linear(4, 3).eval()), [torch.randn(5, 4)])
        >>> out.logits.shape
        (5, 3)
    """
    columns = {name: _Column(memory_limit) for name in _COLUMNS}
    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    dtype = "float32"
    with track(f"predict {source}", total, enabled=progress) as advance:
        for batch in map(as_batch, data):
            skipped.extend(batch.skipped)
            advance(len(batch.skipped))
            if not len(batch.inputs):
                continue
            if features:
                classifier.probe_head(batch.inputs)
            with _autocast(classifier, enabled=amp):
                output = classifier.forward(batch.inputs, features=features)
            if not columns["logits"].n:
                check_kind(output.logits)
            if len(output.logits) != len(batch.inputs):
                raise UnsupportedModelError(
                    f"the model returned {len(output.logits)} rows for {len(batch.inputs)} inputs"
                )
            dtype = str(output.logits.dtype).removeprefix("torch.")
            columns["logits"].add(_to_numpy(output.logits))
            if output.features is not None:
                columns["features"].add(_to_numpy(output.features))
            if batch.labels is not None:
                columns["labels"].add(batch.labels.cpu().numpy().astype(np.int64))
            columns["hashes"].add(batch.hashes)
            ids.extend(batch.ids)
            advance(len(batch.inputs))
    if not columns["logits"].n:
        raise DataError(f"{source} gave no rows ({len(skipped)} images were unreadable)")
    arrays: dict[str, Any] = {name: column.array() for name, column in columns.items() if column.n}
    return Predictions(
        **arrays,
        ids=tuple(ids) or None,
        dtype=dtype,
        skipped=tuple(skipped),
        source=source,
    )


def as_batch(item: Any) -> Batch:
    """Read one item of a user's loader: a batch, (inputs, labels), {inputs, labels}, or inputs.

    Raises:
        DataError: the item is none of these.

    Example:
        >>> as_batch((torch.zeros(2, 3), torch.tensor([0, 1]))).labels
        tensor([0, 1])
    """
    if isinstance(item, Batch):
        return item
    inputs, labels = item, None
    if isinstance(item, Mapping):
        inputs = item.get("pixel_values", item.get("inputs"))
        labels = item.get("labels", item.get("label"))
    elif isinstance(item, (tuple, list)) and len(item) in (1, 2):
        inputs, labels = item[0], item[1] if len(item) == 2 else None
    if not isinstance(inputs, Tensor) or inputs.ndim < 1:
        raise DataError(
            f"got a batch of type {type(item).__name__}; needed a tensor of inputs, a pair "
            "(inputs, labels), or a mapping with 'pixel_values' and 'labels'"
        )
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.shape != inputs.shape[:1]:
            raise DataError(
                f"got labels of shape {tuple(labels.shape)} and dtype {labels.dtype} for "
                f"{len(inputs)} inputs; needed one integer class per input"
            )
    return Batch(inputs, labels, (), hash_inputs(inputs))


def hash_inputs(inputs: Tensor) -> NDArray[np.uint64]:
    """Hash each row of a batch, (B,) uint64."""
    values = inputs.detach().cpu().contiguous()
    rows = values.reshape(len(values), -1)
    return _hash_rows(rows.view(torch.uint8).numpy() if rows.numel() else rows.numpy())


def chunks(array: Array, elements: int = 2_000_000) -> Iterator[Array]:
    """Yield row blocks of about ``elements`` values, so that no N x C copy is made.

    Example:
        >>> [len(block) for block in chunks(np.zeros((5, 2)), elements=4)]
        [2, 2, 1]
    """
    width = int(np.prod(array.shape[1:])) or 1
    step = max(1, elements // width)
    for start in range(0, len(array), step):
        yield array[start : start + step]


def check_labels(labels: NDArray[np.int64] | None, num_classes: int, source: str) -> None:
    """Refuse labels outside 0..C-1.

    Raises:
        DataError: with the count and the first such row.
    """
    if labels is None:
        return
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{source}: got labels of shape {labels.shape} and dtype {labels.dtype}; needed (N,) "
            "integers"
        )
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise DataError(
            f"{source}: {len(bad)} of {len(labels)} labels are outside 0..{num_classes - 1} (row "
            f"{bad[0]} has {labels[bad[0]]}); the model has {num_classes} classes. Select or remap "
            "classes with npz:FILE?classes=..., or take the right model"
        )


class _Column:
    """Rows collected in memory, and beyond a limit in an unlinked temporary file."""

    def __init__(self, limit: int) -> None:
        self.n = 0
        self._limit = limit
        self._bytes = 0
        self._parts: list[Array] = []
        self._file: Any = None
        self._like: Array | None = None

    def add(self, rows: Array) -> None:
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

    def array(self) -> Array | None:
        if self._like is None:
            return None
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        shape = (self.n, *self._like.shape[1:])
        return np.memmap(self._file, dtype=self._like.dtype, mode="r", shape=shape)


def _check_logits(logits: Array, source: str) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or not np.issubdtype(logits.dtype, np.floating):
        raise DataError(
            f"{source}: got logits of shape {logits.shape} and dtype {logits.dtype}; needed "
            "floating (N, C) with C >= 2"
        )
    if not len(logits):
        raise DataError(f"{source}: got no rows; needed at least one")


def _log_of_probabilities(probs: Array, source: str) -> Array:
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise DataError(f"{source}: got probs of shape {values.shape}; needed (N, C)")
    sums = values.sum(axis=1)
    good = (values >= 0).all(axis=1) & (np.abs(sums - 1) < 1e-3)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise DataError(
            f"{source}: {int((~good).sum())} of {len(values)} rows are not probabilities (row "
            f"{row} sums to {sums[row]:.6g}); logits go under the name `logits`"
        )
    # A stored float32 zero is a probability below the smallest float32, not an impossible event.
    floor = np.finfo(np.float32).tiny if probs.dtype != np.float64 else np.finfo(np.float64).tiny
    return np.log(np.maximum(values, floor))


def _hash_rows(rows: Array) -> NDArray[np.uint64]:
    hashes = np.empty(len(rows), dtype=np.uint64)
    start = 0
    for block in chunks(rows):
        for offset, row in enumerate(np.ascontiguousarray(block)):
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            hashes[start + offset] = int.from_bytes(digest, "little")
        start += len(block)
    return hashes


def _to_numpy(values: Tensor) -> Array:
    values = values.detach()
    kept = values if values.dtype == torch.float64 else values.float()
    return np.asarray(kept.cpu().numpy())


def _autocast(classifier: EnergyClassifier, *, enabled: bool) -> Any:
    device = classifier.device
    return torch.autocast(device.type if device else "cpu") if enabled else nullcontext()


def _tuple(values: list[Any] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(map(str, values))


__all__ = ["Predictions", "as_batch", "chunks", "predict", "stored_predictions"]
