"""The base of scores that are fitted on the features of ID rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.energy import check_logits
from ebm_guard.errors import DataError, InvalidInputError, NotFittedError, TooFewRowsError
from ebm_guard.ood.score import Score, blocks
from ebm_guard.predictions import LinearHead, Predictions

# Values of a block of rows while they are scored: 2 MiB in float64.
_CACHED = 1 << 18
# A norm below this is a zero vector: it has no direction.
EPS = 1e-12


@dataclass(frozen=True)
class Rows:
    """A block of ID rows to fit on.

    Args:
        logits: (B, C).
        features: (B, D), float32 or float64.
        classes: (B,) int64, the label, or the predicted class where there are no labels.
        hashes: (B,) uint64 of the rows' content.
    """

    logits: Tensor
    features: Tensor
    classes: Tensor
    hashes: NDArray[np.uint64]


class FeatureScore(Score):
    """Base of the scores on features: fit once on ID rows, then score any row.

    Statistics are float64. A row with a NaN or infinite logit or feature scores NaN. Features in
    half precision are scored in float32, as :func:`ebm_guard.predict` stores them.

    Attributes:
        min_per_class: images per class that :meth:`fit` needs, on average over the classes seen.
        non_negative: whether the score is defined for features >= 0 only.
        tensors: names of the fitted tensors.
    """

    needs_features = True
    needs_fit = True
    min_per_class = 5
    non_negative = False
    tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._facts: dict[str, Any] | None = None
        self._counts: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self._reset()

    @abstractmethod
    def _add(self, rows: Rows) -> None:
        """Add the statistics of a block of rows."""

    @abstractmethod
    def _join(self, other: Self) -> None:
        """Add the statistics that another score has collected."""

    @abstractmethod
    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        """Return the fitted tensors by name."""

    @abstractmethod
    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        """Score rows (B,); features are float32 or float64, autocast is off."""

    def fit(self, predictions: Predictions) -> Self:
        """Fit on ID rows of the role ``fit``, from nothing.

        Raises:
            TooFewRowsError: fewer than ``min_per_class`` images per class.
            DataError: the rows lack what the score needs, or hold NaN or infinite values.
        """
        self._reset()
        return self.partial_fit(predictions).finish(predictions)

    def partial_fit(self, predictions: Predictions) -> Self:
        """Add the statistics of more ID rows; :meth:`finish` makes the score ready.

        Raises:
            DataError: the rows lack what the score needs, hold NaN or infinite values, or come
                from another model than the rows before.
        """
        reason = self._lacks(predictions)
        if reason is not None:
            raise DataError(f"{self.name} cannot be fitted on {predictions.source}: {reason}")
        self._same_model(predictions)
        for rows in each_block(predictions):
            counts = torch.bincount(rows.classes, minlength=predictions.num_classes)
            self._counts = self._counts + counts.numpy()
            self._add(rows)
        self._drop_tensors()
        return self

    def merge(self, other: Score) -> Self:
        """Add the statistics that another score of the same settings has collected.

        Raises:
            InvalidInputError: another kind of score, other settings, or a loaded score, which
                keeps no statistics.
        """
        super().merge(other)
        if not isinstance(other, FeatureScore) or not other._counts.any():
            raise InvalidInputError(
                f"got a {other.name} without statistics (not fitted, or loaded from a file); only "
                "scores that were fitted in this process can be merged"
            )
        self._take_model(other._width, other._num_classes, other._head, other._dtype, "the other")
        self._counts = self._counts + other._counts
        self._join(other)  # type: ignore[arg-type]
        self._drop_tensors()
        return self

    def finish(self, *parts: Predictions) -> Self:
        """Turn the collected statistics into a score; see :meth:`Score.finish`.

        Raises:
            TooFewRowsError: fewer than ``min_per_class`` images per class.
            InvalidInputError: a second pass is needed, and ``parts`` are not the rows added.
        """
        reason = self._too_few(self._counts)
        if reason is not None:
            raise TooFewRowsError(f"{self.name} cannot be fitted: {reason}")
        for name, tensor in self._finish(parts).items():
            self.register_buffer(name, tensor)
        self._facts = {
            "n": int(self._counts.sum()),
            "classes_seen": int((self._counts > 0).sum()),
            "num_classes": self._num_classes,
            "width": self._width,
            "dtype": self._dtype,
        } | self._found()
        return self

    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Score rows (B,).

        Raises:
            NotFittedError: :meth:`fit` has not run.
            InvalidInputError: no features, or other widths than those fitted on.
        """
        if self._facts is None:
            raise NotFittedError(
                f"{self.name} is not fitted: call fit(predictions), or finish() after partial_fit"
            )
        check_logits(logits)
        features = self._checked(logits, features)
        with torch.autocast(logits.device.type, enabled=False):
            half = logits.dtype not in (torch.float32, torch.float64)
            found = self._in_blocks(logits.float() if half else logits, features)
        # A sum in float64 is finite where all of its float32 parts are, and quicker to take.
        wide = torch.float64
        checked = logits.sum(dim=1, dtype=wide) + features.sum(dim=1, dtype=wide)
        return torch.where(torch.isfinite(checked), found, torch.nan)

    def _in_blocks(self, logits: Tensor, features: Tensor) -> Tensor:
        """Score block by block: what is in the cache need not be fetched again."""
        width = max(logits.shape[1], features.shape[1])
        parts = [
            self._score(logits[rows], features[rows])
            for rows in blocks(len(logits), width, _CACHED)
        ]
        return torch.cat(parts) if parts else features.new_empty(0)

    def why_not_fit(self, predictions: Predictions) -> str | None:
        """Say in plain words why the score cannot be fitted on these rows, or None.

        Example:
            >>> rows = Predictions(np.eye(3), features=np.eye(3), labels=np.arange(3))
            >>> from ebm_guard.ood import make_score
            >>> make_score("knn").why_not_fit(rows)
            '1 image per class (3 rows of 3 classes), 5 are needed'
        """
        reason = self._lacks(predictions)
        if reason is not None:
            return reason
        counts = np.zeros(predictions.num_classes, dtype=np.int64)
        for rows in blocks(len(predictions), predictions.num_classes):
            classes = _classes(predictions, rows, np.asarray(predictions.logits[rows]))
            counts += np.bincount(classes, minlength=len(counts))
        return self._too_few(counts)

    def settings(self) -> dict[str, Any]:
        """Return the settings, and what was fitted on, as JSON types."""
        return self.options() | {"fit": self._facts}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild a score from its tensors and settings."""
        score = cls(**{name: value for name, value in settings.items() if name != "fit"})
        facts = settings["fit"]
        if facts is not None:
            for name in score._names():
                score.register_buffer(name, tensors[name])
            score._facts = dict(facts)
        return score

    def _names(self) -> tuple[str, ...]:
        """Names of the tensors that these settings need."""
        return self.tensors

    def _found(self) -> dict[str, Any]:
        """More facts of the fit, as JSON types."""
        return {}

    def _reset(self) -> None:
        """Forget all statistics."""
        self._counts = np.zeros(1, dtype=np.int64)
        self._width = self._num_classes = 0
        self._head: LinearHead | None = None
        self._dtype = ""

    def _drop_tensors(self) -> None:
        """Make a score that has new statistics not ready, so that nothing stale is used."""
        self._facts = None
        for name in self.tensors:
            self._buffers.pop(name, None)

    def _lacks(self, predictions: Predictions) -> str | None:
        reason = self.why_not(predictions)
        if reason is not None:
            return reason
        if self.needs_head and predictions.head is None:
            return "needs the head's weights (W, b), and they are not stored with the features"
        if self.needs_labels and predictions.labels is None:
            return "needs labels"
        bad, negative = _bad_values(predictions)
        if bad:
            return f"{bad} of {len(predictions)} rows hold NaN or infinite logits or features"
        if self.non_negative and negative:
            return f"features go negative ({100 * negative:.2g} % of values); needs features >= 0"
        return None

    def _too_few(self, counts: NDArray[np.int64]) -> str | None:
        n, seen = int(counts.sum()), max(1, int((counts > 0).sum()))
        if n >= self.min_per_class * seen:
            return None
        each = n / seen
        return (
            f"{each:.3g} image{'' if each == 1 else 's'} per class ({n} rows of {seen} classes), "
            f"{self.min_per_class} are needed"
        )

    def _same_model(self, predictions: Predictions) -> None:
        if predictions.features is None:
            return
        self._take_model(
            predictions.features.shape[1],
            predictions.num_classes,
            predictions.head,
            predictions.dtype,
            predictions.source,
        )

    def _take_model(
        self, width: int, num_classes: int, head: LinearHead | None, dtype: str, source: str
    ) -> None:
        """Keep what the first rows say of the model; refuse rows that say something else."""
        if not self._counts.any():
            self._width, self._num_classes, self._dtype = width, num_classes, dtype
            self._head = head if self.needs_head else None
            self._counts = np.zeros(num_classes, dtype=np.int64)
            return
        shapes = (width, num_classes, dtype)
        other = (self._width, self._num_classes, self._dtype)
        if shapes != other or (self.needs_head and not _equal(head, self._head)):
            raise DataError(
                f"{self.name}: {source} has features of width {width}, {num_classes} classes and "
                f"{dtype} logits, the rows before had {other[0]}, {other[1]} and {other[2]}, or "
                "the heads differ; needed rows of one model"
            )

    def _checked(self, logits: Tensor, features: Tensor | None) -> Tensor:
        facts = self._facts or {}
        if features is None:
            raise InvalidInputError(f"{self.name} needs features (B, D), and got none")
        if features.shape != (len(logits), facts["width"]) or not features.is_floating_point():
            raise InvalidInputError(
                f"got features of shape {tuple(features.shape)} and dtype {features.dtype}; "
                f"{self.name} was fitted on width {facts['width']}, needed floating "
                f"({len(logits)}, {facts['width']})"
            )
        if logits.shape[1] != facts["num_classes"]:
            raise InvalidInputError(
                f"got logits of {logits.shape[1]} classes; {self.name} was fitted on "
                f"{facts['num_classes']}"
            )
        return features if features.dtype == torch.float64 else features.float()


def each_block(predictions: Predictions) -> Iterator[Rows]:
    """Yield the rows in blocks of about 2 million values.

    Raises:
        DataError: there are no features.
    """
    features, hashes = predictions.features, predictions.hashes
    if features is None or hashes is None:
        raise DataError(f"{predictions.source} has no features")
    width = max(features.shape[1], predictions.num_classes)
    for rows in blocks(len(predictions), width):
        logits, part = np.array(predictions.logits[rows]), np.array(features[rows])
        part = part if part.dtype == np.float64 else part.astype(np.float32)
        yield Rows(
            torch.from_numpy(logits),
            torch.from_numpy(part),
            torch.from_numpy(_classes(predictions, rows, logits)),
            np.asarray(hashes[rows], dtype=np.uint64),
        )


def unit(features: Tensor) -> Tensor:
    """Scale rows to length 1; a zero vector stays zero instead of turning NaN."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / length.clamp_min(EPS)


def head_tensors(head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """Return W (C, D) and b (C,), zeros where there is no bias.

    Raises:
        DataError: there is no head.
    """
    if head is None:
        raise DataError("the head's weights are missing")
    weight = torch.from_numpy(np.array(head.weight))
    if head.bias is None:
        return weight, torch.zeros(len(weight), dtype=weight.dtype)
    return weight, torch.from_numpy(np.array(head.bias))


def _classes(predictions: Predictions, rows: slice, logits: NDArray[Any]) -> NDArray[np.int64]:
    if predictions.labels is not None:
        return np.array(predictions.labels[rows], dtype=np.int64)
    return np.asarray(logits.argmax(axis=1), dtype=np.int64)


def _equal(one: LinearHead | None, other: LinearHead | None) -> bool:
    if one is None or other is None:
        return one is other
    biases = (one.bias, other.bias)
    same = all(b is None for b in biases) or (
        one.bias is not None and other.bias is not None and np.array_equal(one.bias, other.bias)
    )
    return same and np.array_equal(one.weight, other.weight)


def _bad_values(predictions: Predictions) -> tuple[int, float]:
    """Count rows that are not finite, and the share of negative feature values."""
    features = predictions.features
    if features is None:
        return 0, 0.0
    bad, negative = 0, 0
    for rows in blocks(len(predictions), max(features.shape[1], predictions.num_classes)):
        part = np.asarray(features[rows])
        finite = np.isfinite(part).all(axis=1)
        finite &= np.isfinite(predictions.logits[rows]).all(axis=1)
        bad += int((~finite).sum())
        negative += int((part < 0).sum())
    return bad, negative / features.size
