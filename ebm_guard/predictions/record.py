"""The record of one pass: logits, features, labels, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import DataError, EbmGuardError, InvalidInputError
from ebm_guard.files import DAMAGED_NPZ, map_array, replace_folder
from ebm_guard.predictions.head import LinearHead

SCHEMA = "ebm_guard.predictions/1"
COLUMNS = ("logits", "features", "labels", "groups", "sample_weight", "hashes")
_HEAD = ("head_weight", "head_bias")
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
        sample_weight: (N,) float64 >= 0, or None; calibration figures and calibrators use it, the
            gate's promise does not.
        ids: N names, or None for 0..N-1.
        hashes: (N,) uint64 of the rows' content, to tell shared rows.
        kind: ``logits`` or ``probs``.
        dtype: dtype in which the model gave the logits.
        classes: class names in logit order, or None.
        skipped: (id, error) of unreadable images.
        source: the spec or a description.
        head: the last linear layer, for scores that need it, or None.
        notes: sentences on how labels were matched, what was limited, and so on.
    """

    logits: Array
    features: Array | None = None
    labels: NDArray[np.int64] | None = None
    groups: Array | None = None
    sample_weight: NDArray[np.float64] | None = None
    ids: tuple[str, ...] | None = None
    hashes: NDArray[np.uint64] | None = None
    kind: str = "logits"
    dtype: str = "float32"
    classes: tuple[str, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    source: str = "arrays"
    head: LinearHead | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse columns that do not fit each other."""
        check_logits(self.logits, self.source)
        n, num_classes = self.logits.shape
        if self.kind not in ("logits", "probs"):
            raise InvalidInputError(f"got kind {self.kind!r}; needed 'logits' or 'probs'")
        for name in ("features", "labels", "groups", "sample_weight", "ids", "hashes"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise DataError(f"{self.source}: got {n} rows of logits and {len(column)} {name}")
        if self.classes is not None and len(self.classes) != num_classes:
            raise DataError(
                f"{self.source}: got {len(self.classes)} class names (classes) for {num_classes} "
                "logits"
            )
        _check_features(self.features, self.head, num_classes, self.source)
        check_labels(self.labels, num_classes, self.source)
        _check_weights(self.sample_weight, self.source)
        if self.hashes is None:
            object.__setattr__(self, "hashes", hash_rows(self.logits))

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
        kept: Iterable[int] = (
            range(*rows.indices(len(self)))
            if isinstance(rows, slice)
            else np.arange(len(self))[rows]
        )
        columns: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in COLUMNS
        }
        ids = None if self.ids is None else tuple(self.ids[int(row)] for row in kept)
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
            files = {}
            for name, column in self._arrays().items():
                if column is not None:
                    np.save(new / f"{name}.npy", column, allow_pickle=False)
                    files[name] = _hash_file(new / f"{name}.npy")
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
                "files": files,
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
            if header["schema"] != SCHEMA:
                raise DataError(
                    f"{folder} has schema {header['schema']!r}; this version reads {SCHEMA!r}"
                )
            columns: dict[str, Any] = {}
            for name, digest in header["files"].items():
                file = folder / f"{name}.npy"
                if name not in (*COLUMNS, *_HEAD) or _hash_file(file) != digest:
                    raise DataError(
                        f"cannot read predictions from {folder}: {file.name} was edited or "
                        "damaged after it was saved; run the prediction again"
                    )
                columns[name] = map_array(file)
            weight, bias = (columns.pop(name, None) for name in _HEAD)
            loaded = cls(
                **columns,
                head=None if weight is None else LinearHead(weight, bias),
                kind=header["kind"],
                dtype=header["dtype"],
                source=header["source"],
                classes=_tuple(header["classes"]),
                ids=_tuple(header["ids"]),
                skipped=tuple((str(name), str(error)) for name, error in header["skipped"]),
                notes=header["notes"],
            )
        except (*DAMAGED_NPZ, LookupError, AttributeError) as error:
            if isinstance(error, EbmGuardError):
                raise
            raise DataError(f"cannot read predictions from {folder}: {error}") from None
        if loaded.fingerprint != header.get("fingerprint"):
            raise DataError(f"{folder} was edited: its rows do not match its fingerprint")
        return loaded

    def _arrays(self) -> dict[str, Array | None]:
        """All that is saved as .npy, by file name."""
        head = (None, None) if self.head is None else (self.head.weight, self.head.bias)
        columns = {name: getattr(self, name) for name in COLUMNS}
        return columns | dict(zip(_HEAD, head, strict=True))


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


def _check_features(
    features: Array | None, head: LinearHead | None, num_classes: int, source: str
) -> None:
    """Refuse features that are no (N, D) floats, and a head of other classes or width."""
    if features is not None and (
        features.ndim != 2
        or not features.shape[1]
        or not np.issubdtype(features.dtype, np.floating)
    ):
        raise DataError(
            f"{source}: got features of shape {features.shape} and dtype {features.dtype}; needed "
            "floating (N, D)"
        )
    width = None if features is None else features.shape[1]
    if head is not None and (
        head.weight.shape[0] != num_classes or width not in (None, head.weight.shape[1])
    ):
        raise DataError(
            f"{source}: got a head of weight {head.weight.shape} (C, D) for {num_classes} classes "
            f"and features of width {width}"
        )


def _check_weights(weights: Array | None, source: str) -> None:
    """Refuse weights that are not finite numbers >= 0 with at least one above 0."""
    if weights is None:
        return
    if weights.ndim != 1 or not np.issubdtype(weights.dtype, np.floating):
        raise DataError(
            f"{source}: got sample_weight of shape {weights.shape} and dtype {weights.dtype}; "
            "needed (N,) floating"
        )
    bad = int((~(np.isfinite(weights) & (weights >= 0))).sum())
    if bad or not weights.any():
        found = f"{bad} negative or non-finite values" if bad else "only zeros"
        raise DataError(f"{source}: got {found} in sample_weight; needed finite weights >= 0")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_rows(rows: Array) -> NDArray[np.uint64]:
    """Hash the content of each row, (N,) uint64."""
    hashes = np.empty(len(rows), dtype=np.uint64)
    start = 0
    for block in chunks(rows):
        for offset, row in enumerate(np.ascontiguousarray(block)):
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            hashes[start + offset] = int.from_bytes(digest, "little")
        start += len(block)
    return hashes


def check_logits(logits: Array, source: str) -> None:
    """Refuse what is not floating (N, C) with C >= 2 and N >= 1."""
    if logits.ndim != 2 or logits.shape[1] < 2 or not np.issubdtype(logits.dtype, np.floating):
        raise DataError(
            f"{source}: got logits of shape {logits.shape} and dtype {logits.dtype}; needed "
            "floating (N, C) with C >= 2"
        )
    if not len(logits):
        raise DataError(f"{source}: got no rows; needed at least one")


def _tuple(values: list[Any] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(map(str, values))
