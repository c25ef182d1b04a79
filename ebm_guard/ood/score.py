"""The base of all out-of-distribution scores, and how they are built by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard import registry
from ebm_guard.errors import DataError, InvalidInputError, suggest
from ebm_guard.precision import KeepDouble
from ebm_guard.predictions import Predictions

# Scores ready as they are, and scores that are fitted first.
SCORE_FAMILIES = ("score", "feature_score")
_CHUNK = 2_000_000


class Score(KeepDouble, ABC):
    """Base of the scores: a function of one row, higher = more out-of-distribution.

    Attributes:
        name: the registered name.
        from_probabilities: whether the score is unchanged when a constant is added to a row's
            logits, so that log-probabilities serve as well.
        needs_features: whether rows need features (B, D).
        needs_head: whether :meth:`fit` needs the last linear layer.
        needs_labels: whether :meth:`fit` needs labels.
        needs_fit: whether :meth:`fit` must run before rows can be scored.
        storable: whether a guard with this score can be saved.
    """

    name = ""
    from_probabilities = False
    needs_features = False
    needs_head = False
    needs_labels = False
    needs_fit = False
    storable = True

    @abstractmethod
    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Score rows.

        Args:
            logits: (B, C).
            features: (B, D), for scores that need them.

        Returns:
            (B,), float32 or float64; non-finite for a row with a non-finite logit is allowed, the
            gate refuses such rows by their logits.
        """

    def forward(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Score rows; see :meth:`score`."""
        return self.score(logits, features)

    def fit(self, predictions: Predictions) -> Self:
        """Fit on ID rows of the role ``fit``; a score of the logits alone has nothing to fit.

        Raises:
            TooFewRowsError: too few images per class.
            DataError: the rows lack what the score needs; see :meth:`why_not_fit`.
        """
        return self.partial_fit(predictions).finish(predictions)

    def partial_fit(self, predictions: Predictions) -> Self:
        """Add the statistics of more ID rows; :meth:`finish` makes the score ready."""
        return self

    def merge(self, other: Score) -> Self:
        """Add the statistics that another score of the same settings has collected.

        Raises:
            InvalidInputError: another kind of score, or other settings.
        """
        if type(other) is not type(self) or other.options() != self.options():
            raise InvalidInputError(
                f"got {other.name} {other.options()} to merge into {self.name} {self.options()}; "
                "needed the same score with the same settings"
            )
        return self

    def finish(self, *parts: Predictions) -> Self:
        """Turn the collected statistics into a score.

        Args:
            parts: the rows of all calls of :meth:`partial_fit` once more, for scores that need a
                second pass (``vim``; ``mahalanobis`` with the Ledoit-Wolf estimator).
        """
        return self

    def why_not(self, predictions: Predictions) -> str | None:
        """Say in plain words why these rows cannot be scored, or None.

        Example:
            >>> make_score("vim").why_not(Predictions(np.zeros((1, 2))))
            'needs features, and arrays has none: the head was not found, or none were asked for'
        """
        if predictions.kind == "probs" and not self.from_probabilities:
            return "needs logits, got probabilities"
        if self.needs_features and predictions.features is None:
            return (
                f"needs features, and {predictions.source} has none: the head was not found, or "
                "none were asked for"
            )
        return None

    def why_not_fit(self, predictions: Predictions) -> str | None:
        """Say in plain words why the score cannot be fitted on these rows, or None."""
        return self.why_not(predictions)

    def check_kind(self, predictions: Predictions) -> None:
        """Refuse stored probabilities where the score needs logits.

        Raises:
            DataError: with the way out.
        """
        if predictions.kind == "probs" and not self.from_probabilities:
            raise DataError(
                f"{self.name} is not available on {predictions.source}: needs logits, got "
                "probabilities. Store the logits, or use msp or gen"
            )

    @torch.no_grad()
    def of(self, predictions: Predictions) -> NDArray[np.float64]:
        """Score all rows of stored predictions, (N,) float64.

        Raises:
            DataError: the score needs logits, and only probabilities were stored; or it needs
                features, and there are none.
        """
        self.check_kind(predictions)
        reason = self.why_not(predictions)
        if reason is not None:
            raise DataError(f"{self.name} is not available on {predictions.source}: {reason}")
        features = predictions.features if self.needs_features else None
        width = max(predictions.num_classes, 0 if features is None else features.shape[1])
        found = np.empty(len(predictions))
        for rows in blocks(len(predictions), width):
            part = None if features is None else torch.from_numpy(np.array(features[rows]))
            logits = torch.from_numpy(np.array(predictions.logits[rows]))
            found[rows] = self.score(logits, part).double().numpy()
        return found

    def options(self) -> dict[str, Any]:
        """Return the settings that were chosen, without what was fitted."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the settings that rebuild the score."""
        return self.options()

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Score:
        """Rebuild a score from its tensors and settings."""
        del tensors
        return cls(**settings)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move buffers between devices; ``.half()`` must not round what was fitted."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


def blocks(rows: int, width: int, elements: int = _CHUNK) -> list[slice]:
    """Cut rows into slices of about ``elements`` values.

    Example:
        >>> blocks(5, 2, elements=4)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, elements // max(1, width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def make_score(name: str, **settings: Any) -> Score:
    """Build a registered score by name.

    Raises:
        InvalidInputError: unknown name (near names are suggested) or setting.

    Example:
        >>> make_score("energy", energy_temperature=2.0).settings()
        {'energy_temperature': 2.0}
        >>> make_score("knn", k=10).needs_features
        True
    """
    kind = score_class(name)
    try:
        return kind(**settings)
    except TypeError as error:
        raise InvalidInputError(f"score {name!r} does not take {settings}: {error}") from None


def score_class(name: str) -> type[Score]:
    """Return the class of a registered score.

    Raises:
        InvalidInputError: unknown name; near names are suggested.

    Example:
        >>> score_class("msp").__name__
        'MSP'
    """
    rows = {row.name: row for family in SCORE_FAMILIES for row in registry.methods(family)}
    if name in {row.name for row in registry.methods("input_score")}:
        raise InvalidInputError(
            f"{name} needs a backward pass through the model, so it is no score of logits and "
            f"features; call ebm_guard.ood.{name}(classifier, inputs)"
        )
    if name not in rows:
        raise InvalidInputError(
            f"got score {name!r}; known are {', '.join(rows)}{suggest(name, rows)}; "
            "`ebm-guard list` shows them all"
        )
    kind = rows[name].load()
    if not (isinstance(kind, type) and issubclass(kind, Score)):
        raise InvalidInputError(f"the registry names {kind!r} for {name!r}, not a Score")
    return kind
