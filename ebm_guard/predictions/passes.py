"""One streaming pass of a classifier over a data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.batches import Batch
from ebm_guard.errors import DataError, UnsupportedModelError
from ebm_guard.model.classifier import EnergyClassifier, check_kind
from ebm_guard.predictions.collected import Collected
from ebm_guard.predictions.record import Predictions, hash_rows
from ebm_guard.progress import track


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
        features: also keep the features and the head, where one can be verified on the first
            batch.
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
    rows = collect(
        classifier,
        data,
        features=features,
        total=total,
        progress=progress,
        amp=amp,
        memory_limit=memory_limit,
        source=source,
    )
    return rows.predictions(classifier, source)


@torch.no_grad()
def collect(
    classifier: EnergyClassifier,
    data: Iterable[Any],
    *,
    features: bool = False,
    total: int | None = None,
    progress: bool = False,
    amp: bool = False,
    memory_limit: int = 1 << 30,
    source: str = "a loader",
) -> Collected:
    """Run a classifier once over a data set, which may hold no row; see :func:`predict`.

    Raises:
        UnsupportedModelError: the model gives probabilities, or no logits.
    """
    found = Collected(memory_limit)
    rows: Iterator[Batch] = map(as_batch, data)
    if features:
        rows = probed(classifier, rows)
    with track(f"predict {source}", total, enabled=progress) as advance:
        for batch in rows:
            found.skipped.extend(batch.skipped)
            advance(len(batch.skipped))
            if not len(batch.inputs):
                continue
            with _autocast(classifier, enabled=amp):
                output = classifier.forward(batch.inputs, features=features)
            if not len(found):
                check_kind(output.logits)
            if len(output.logits) != len(batch.inputs):
                raise UnsupportedModelError(
                    f"the model returned {len(output.logits)} rows for {len(batch.inputs)} inputs"
                )
            found.add(batch, output)
            advance(len(batch.inputs))
    return found


def probed(classifier: EnergyClassifier, rows: Iterator[Batch]) -> Iterator[Batch]:
    """Find the head on the first two or more rows, before any batch is run with features."""
    first: list[Batch] = []
    for batch in rows:
        first.append(batch)
        inputs = [part.inputs for part in first if len(part.inputs)]
        if sum(map(len, inputs)) >= 2:
            classifier.probe_head(inputs[0] if len(inputs) == 1 else torch.cat(inputs))
            break
    return itertools.chain(first, rows)


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
    return hash_rows(rows.view(torch.uint8).numpy() if rows.numel() else rows.numpy())


def _autocast(classifier: EnergyClassifier, *, enabled: bool) -> Any:
    device = classifier.device
    return torch.autocast(device.type if device else "cpu") if enabled else nullcontext()
