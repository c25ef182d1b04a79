"""Detectors of other libraries as scores, by duck typing: nothing of theirs is imported."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.ood.score import Score
from ebm_guard.predictions import Predictions


def as_score(detector: Any, name: str | None = None) -> PluginScore:
    """Use a detector that has ``predict_logits`` or ``predict_features``, such as pytorch-ood's.

    Args:
        detector: ``predict_features(features (B, D))`` or ``predict_logits(logits (B, C))`` gives
            (B,), higher = more OOD. It is fitted by its ``fit_features(features, labels)`` or
            ``fit_logits(logits, labels)``, unless it has none or says ``requires_fit = False``. Its
            numerics are its own.
        name: what the score is called; default: the detector's class.

    Returns:
        A score for guards and reports in this process; it cannot be saved.

    Raises:
        InvalidInputError: the detector has neither method.

    Example:
        >>> class Norm:
        ...     def predict_features(self, features):
        ...         return features.norm(dim=1)
        >>> as_score(Norm()).score(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    return PluginScore(detector, name)


class PluginScore(Score):
    """Score by another library's detector; see :func:`as_score`.

    Args:
        detector: the object.
        name: what the score is called.
    """

    storable = False

    def __init__(self, detector: Any, name: str | None = None) -> None:
        super().__init__()
        self.needs_features = callable(getattr(detector, "predict_features", None))
        if not self.needs_features and not callable(getattr(detector, "predict_logits", None)):
            raise InvalidInputError(
                f"got a {type(detector).__name__}, which has neither predict_features(features) "
                "nor predict_logits(logits); write such a method around what it has"
            )
        # In a list, so that a detector that is an nn.Module is not moved or saved with a guard.
        self._detector = [detector]
        self.name = name or type(detector).__name__.lower()
        self._fitter = "fit_features" if self.needs_features else "fit_logits"
        self.needs_fit = callable(getattr(detector, self._fitter, None)) and bool(
            getattr(detector, "requires_fit", True)
        )
        self.needs_labels = self.needs_fit
        self._ready = not self.needs_fit

    def fit(self, predictions: Predictions) -> Self:
        """Fit the detector by its own ``fit_features`` or ``fit_logits``.

        Raises:
            InvalidInputError: no features or labels.
        """
        if not self.needs_fit:
            return self
        values = predictions.features if self.needs_features else predictions.logits
        reason = self.why_not_fit(predictions)
        if reason is not None or values is None or predictions.labels is None:
            raise InvalidInputError(f"{self.name} cannot be fitted: {reason}")
        fit = getattr(self._detector[0], self._fitter)
        fit(torch.from_numpy(np.array(values)), torch.from_numpy(np.array(predictions.labels)))
        self._ready = True
        return self

    def partial_fit(self, predictions: Predictions) -> Self:
        """Refuse: other libraries' detectors take all rows at once.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(f"{self.name} takes all rows at once: call fit(predictions)")

    def why_not_fit(self, predictions: Predictions) -> str | None:
        """Say in plain words why the detector cannot be fitted on these rows, or None."""
        reason = self.why_not(predictions)
        if reason is None and self.needs_labels and predictions.labels is None:
            return "needs labels"
        return reason

    @torch.no_grad()
    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the detector's score (B,).

        Raises:
            NotFittedError: the detector wants to be fitted first.
            InvalidInputError: no features, or a result that is not one number a row.
        """
        if not self._ready:
            raise NotFittedError(f"{self.name} is not fitted: call fit(predictions)")
        if not self.needs_features:
            found = self._detector[0].predict_logits(logits)
        elif features is None:
            raise InvalidInputError(f"{self.name} needs features (B, D), and got none")
        else:
            found = self._detector[0].predict_features(features)
        found = torch.as_tensor(found)
        if found.shape != (len(logits),):
            raise InvalidInputError(
                f"{self.name} gave a score of shape {tuple(found.shape)} for {len(logits)} rows; "
                "needed one number a row"
            )
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def options(self) -> dict[str, Any]:
        """Return whose detector it is."""
        kind = type(self._detector[0])
        return {"detector": f"{kind.__module__}.{kind.__qualname__}"}

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be stored: a foreign object has no state that we could read back.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            f"{self.name} is a detector of another library ({self.options()['detector']}) and "
            "cannot be saved in an artefact; choose one of ebm_guard's scores (`ebm-guard list`)"
        )
