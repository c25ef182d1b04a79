"""What a guard is fitted on: rows run through the model once, and which rows serve which part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.batches import Batch
from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.gate.artifact import CANARY_ROWS
from ebm_guard.gate.choice import MOST_IMAGES
from ebm_guard.model import EnergyClassifier
from ebm_guard.predictions import Predictions, as_batch, predict

Rows = NDArray[np.int64]


@dataclass
class Sample:
    """A uniform random sample of the inputs that pass by, of a bounded size.

    References:
        Vitter, Random Sampling with a Reservoir, 1985, Algorithm R.
    """

    generator: np.random.Generator
    size: int = MOST_IMAGES
    seen: int = 0
    rows: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor) -> None:
        """Look at a batch."""
        for row in inputs.detach():
            if len(self.rows) < self.size:
                self.rows.append(self.seen)
                self.inputs.append(row.cpu().clone())
            else:
                place = int(self.generator.integers(0, self.seen + 1))
                if place < self.size:
                    self.rows[place], self.inputs[place] = self.seen, row.cpu().clone()
            self.seen += 1

    def take(self, most: int) -> tuple[Rows, Tensor]:
        """Return at most ``most`` rows with their inputs, in the order of the data.

        Raises:
            InvalidInputError: inputs of several shapes.
        """
        if len({tuple(row.shape) for row in self.inputs}) != 1:
            raise InvalidInputError(
                "the inputs have different shapes, so no outliers can be made from them; give "
                "outliers= (Predictions on outliers)"
            )
        kept = self.generator.permutation(len(self.rows))[:most]
        kept = kept[np.argsort(np.array(self.rows)[kept])]
        rows = np.array(self.rows, dtype=np.int64)[kept]
        return rows, torch.stack([self.inputs[place] for place in kept])


@dataclass(frozen=True)
class Gathered:
    """Rows with what the model said about them.

    Args:
        predictions: of all rows.
        first: the first inputs, for the canary; None for stored rows.
        sample: inputs for outliers, where they were asked for.
    """

    predictions: Predictions
    first: Tensor | None = None
    sample: Sample | None = None


def gather(
    data: Predictions | Tensor | Iterable[Any],
    classifier: EnergyClassifier | None,
    *,
    features: bool = False,
    sample: Sample | None = None,
    progress: bool = False,
) -> Gathered:
    """Run the model once over a loader or a tensor; stored rows are taken as they are.

    Raises:
        InvalidInputError: a loader and no model.
        ModelOutputError: some rows have NaN or infinite logits.
    """
    if isinstance(data, Predictions):
        found = Gathered(data)
    elif classifier is None:
        raise InvalidInputError(
            f"got {type(data).__name__} and a guard without a model; give Predictions, or wrap the "
            "model: ebm_guard.wrap(model)"
        )
    else:
        kept: list[Tensor] = []
        rows = [data] if isinstance(data, Tensor) else data
        passed = _watched(rows, kept, sample)
        predictions = predict(classifier, passed, features=features, progress=progress)
        found = Gathered(predictions, torch.cat(kept) if kept else None, sample)
    refuse_invalid(found.predictions)
    return found


def refuse_invalid(predictions: Predictions) -> None:
    """Refuse rows that the gate itself would call invalid.

    Raises:
        ModelOutputError: with their number and the first of them.
    """
    bad = predictions.invalid
    if bad.any():
        first = predictions.names([int(bad.argmax())])[0]
        raise ModelOutputError(
            f"{int(bad.sum())} of {len(bad)} rows of {predictions.source} have NaN or infinite "
            f"logits (first: {first}); a guard cannot be fitted on them. Look for overflow in "
            "half precision or broken inputs"
        )


def deal(
    predictions: Predictions, names: Sequence[str], seed: int, taken: Rows | None = None
) -> dict[str, Rows]:
    """Deal rows out to the parts of a guard, at random and evenly, stratified by label.

    Args:
        predictions: all rows.
        names: the parts, the one that is to get a row more first.
        seed: of the deal's own generator.
        taken: rows that are given out already.

    Returns:
        Sorted, disjoint row numbers by part.

    Example:
        >>> rows = deal(Predictions(np.zeros((5, 2))), ("calibration", "fit"), seed=0)
        >>> [len(part) for part in rows.values()]
        [3, 2]
    """
    free = np.arange(len(predictions), dtype=np.int64)
    if taken is not None:
        free = np.setdiff1d(free, taken)
    if len(names) == 1:
        return {names[0]: free}
    order = free[np.random.default_rng(seed).permutation(len(free))]
    if predictions.labels is not None:
        # A stable sort of a random order, dealt out in turn, balances every class to within 1.
        order = order[np.argsort(predictions.labels[order], kind="stable")]
    return {name: np.sort(order[part :: len(names)]) for part, name in enumerate(names)}


def _watched(data: Iterable[Any], kept: list[Tensor], sample: Sample | None) -> Iterator[Batch]:
    """Pass batches on; keep the first rows, and a sample of all."""
    for item in data:
        batch = as_batch(item)
        missing = CANARY_ROWS - sum(map(len, kept))
        if missing > 0 and len(batch.inputs):
            kept.append(batch.inputs[:missing])
        if sample is not None:
            sample.add(batch.inputs)
        yield batch
