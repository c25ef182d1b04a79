"""Predictions that lie on disk: ``logits:`` files and ``predictions:`` folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ebm_guard.data.sources import checked_groups, integer_labels, read_npz
from ebm_guard.data.sources.arrays import names_in
from ebm_guard.data.specs import Spec, existing_path
from ebm_guard.errors import DataError, UnsupportedModelError
from ebm_guard.model.classifier import check_kind
from ebm_guard.predictions.head import LinearHead
from ebm_guard.predictions.record import Array, Predictions, check_logits

_ARRAYS = (
    "logits",
    "probs",
    "labels",
    "features",
    "groups",
    "sample_weight",
    "classes",
    "ids",
    "head_weight",
    "head_bias",
)

_NUMBERS = ("probs", "features", "sample_weight", "head_weight", "head_bias")


def stored_predictions(spec: Spec, *, labelled: bool = True) -> Predictions:
    """Open a ``logits:`` or ``predictions:`` spec.

    Args:
        spec: what to open.
        labelled: False drops the labels, as for OOD sets.

    Raises:
        DataError: missing or malformed, or the slice selects nothing.
    """
    if spec.kind == "logits":
        loaded = read_logits(spec, labelled=labelled)
    else:
        loaded = Predictions.load(existing_path(spec))
        loaded = loaded if labelled else replace(loaded, labels=None)
    if spec.rows is None:
        return loaded
    if not len(range(len(loaded))[spec.rows]):
        raise DataError(f"got spec {spec.text!r}, which selects none of {len(loaded)} rows")
    return loaded.select(spec.rows)


def read_logits(spec: Spec, *, labelled: bool = True) -> Predictions:
    """Read ``logits:FILE``: ``logits`` or ``probs``, and what else the file holds.

    Optional: ``labels``, ``features``, ``groups``, ``sample_weight``, ``classes``, ``ids``, and the
    last linear layer as ``head_weight`` (C, D) and ``head_bias`` (C,), which is verified.

    Args:
        spec: a ``logits:`` spec.
        labelled: False ignores the labels, as for OOD sets, whose labels are of other classes.

    Raises:
        DataError: no logits, damaged, non-finite values, labels out of range, or a head that does
            not turn the features into the logits.
    """
    path = existing_path(spec)
    arrays = read_npz(spec, path, _ARRAYS)
    for name in _NUMBERS:
        if name in arrays and arrays[name].dtype.kind not in "biuf":
            raise DataError(
                f"got spec {spec.text!r} with `{name}` of dtype {arrays[name].dtype}; needed "
                "numbers"
            )
    if "logits" in arrays:
        kind, values = "logits", arrays["logits"]
    elif "probs" in arrays:
        kind, values = "probs", _log_of_probabilities(arrays["probs"], spec.text)
    else:
        raise DataError(f"got spec {spec.text!r}; the file holds neither `logits` nor `probs`")
    check_logits(values, spec.text)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if kind == "logits" and len(bad):
        raise DataError(
            f"{spec.text}: {len(bad)} of {len(values)} rows hold NaN or infinite logits (first "
            f"row {bad[0]}); a file must be finite, remove or recompute these rows"
        )
    labels = arrays.get("labels") if labelled else None
    features = arrays.get("features")
    if features is not None and not np.isfinite(features).all():
        raise DataError(f"{spec.text}: the features hold NaN or infinite values; recompute them")
    groups = arrays.get("groups")
    weights = arrays.get("sample_weight")
    dtype = str(values.dtype)
    stored = values if values.dtype == np.float64 else values.astype(np.float32)
    predictions = Predictions(
        stored,
        features=features,
        labels=None if labels is None else integer_labels(labels, len(values), spec.text),
        groups=None if groups is None else checked_groups(groups, len(values), spec.text),
        sample_weight=None if weights is None else np.asarray(weights, dtype=np.float64),
        ids=names_in(arrays, "ids", spec.text),
        kind=kind,
        dtype=dtype,
        classes=names_in(arrays, "classes", spec.text),
        source=spec.text,
        head=_read_head(arrays),
    )
    if predictions.head is not None and features is not None and kind == "logits":
        predictions.head.check(features, stored, spec.text)
    if kind == "logits":
        try:
            check_kind(torch.from_numpy(stored))
        except UnsupportedModelError as error:
            raise DataError(
                f"{spec.text}: {error}. Stored probabilities go under the name `probs`"
            ) from None
    return predictions


def _read_head(arrays: Mapping[str, Array]) -> LinearHead | None:
    if "head_weight" not in arrays:
        return None
    weight, bias = arrays["head_weight"], arrays.get("head_bias")
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    return LinearHead(weight.astype(wide), None if bias is None else bias.astype(wide))


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
