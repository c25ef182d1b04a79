"""What classifies inside a scikit-learn face: a torch model, a guard, or scikit-learn's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.gate import Decision, Guard, wrap
from ebm_guard.predictions import Predictions

# How far softmax of a decision function may lie from the probabilities that go with it.
_ALIKE = 1e-6


class ArrayModel(ABC):
    """A classifier with its guard, from arrays to decisions.

    Args:
        model: the classifier.
        guard: around it.
        settings: the estimator whose settings :meth:`fit` takes.
    """

    def __init__(self, model: Any, guard: Guard, settings: Any) -> None:
        self.model = model
        self.guard = guard
        self._settings = settings

    @property
    @abstractmethod
    def classes(self) -> NDArray[Any]:
        """(C,) labels in the order of the logits."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C; of a torch model after :meth:`look`."""

    @abstractmethod
    def look(self, values: Any) -> None:
        """Find out on some rows what the classifier gives, before :meth:`fit`."""

    @abstractmethod
    def fit(self, values: Any, classes: NDArray[np.int64]) -> None:
        """Fit the guard on rows with their places among the classes."""

    @abstractmethod
    def decide(self, values: Any) -> Decision:
        """Decide on rows."""

    def log_probabilities(self, logits: Tensor) -> NDArray[np.float64]:
        """Return calibrated log-probabilities (N, C), in float64."""
        logits = logits.detach().cpu().double()
        calibrator = self.guard.calibrator
        if calibrator is None:
            return np.asarray(formulas.log_probabilities(logits).numpy())
        return calibrator.transform(logits.numpy())

    def _recipe(self, score: str) -> dict[str, Any]:
        settings = self._settings
        return {
            "score": settings.score_name or score,
            "calibrator": settings.calibrator,
            "false_reject_rate": settings.false_reject_rate,
            "assurance": settings.assurance,
            "threshold": settings.threshold,
            "seed": settings.seed,
        }


class TorchModel(ArrayModel):
    """A torch model, or a guard around one, on numeric arrays (N, ...)."""

    def __init__(self, model: Any, guard: Guard, settings: Any) -> None:
        super().__init__(model, guard, settings)
        self._seen = int(guard.facts.get("num_classes", 0))

    @property
    def classes(self) -> NDArray[Any]:
        """0..C-1."""
        return np.arange(self.num_classes)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self._seen

    def look(self, values: Any) -> None:
        """Count the logits of the first row."""
        classifier = self.guard._require_classifier()
        with torch.no_grad():
            self._seen = classifier(next(self._batches(values[:1]))).shape[1]

    def fit(self, values: Any, classes: NDArray[np.int64]) -> None:
        """Run the model over the rows once, and fit its guard."""
        self.guard.fit(self._batches(values, classes), **self._recipe("energy"))

    def decide(self, values: Any) -> Decision:
        """Decide on rows, batch by batch."""
        return Decision.concatenate([self.guard(batch) for batch in self._batches(values)])

    def _batches(self, values: Any, classes: NDArray[np.int64] | None = None) -> Iterator[Any]:
        array = np.asarray(values)
        if array.ndim < 2 or not len(array) or array.dtype.kind not in "fiub":
            raise InvalidInputError(
                f"got X of shape {array.shape} and dtype {array.dtype}; needed at least one row of "
                "numbers, (N, ...), as the model takes them"
            )
        dtype, step = self._dtype(), self._settings.batch_size
        for at in range(0, len(array), step):
            # A copy: the caller's array may be read-only, and is not the model's to write on.
            batch = torch.from_numpy(np.array(array[at : at + step]))
            batch = batch.to(dtype) if batch.is_floating_point() else batch
            if classes is None:
                yield batch
            else:
                yield batch, torch.from_numpy(classes[at : at + step])

    def _dtype(self) -> torch.dtype:
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        kinds = (part.dtype for part in parameters if part.is_floating_point())
        return next(kinds, torch.float32)


class ScikitModel(ArrayModel):
    """A fitted scikit-learn classifier: logits where it has them, else log-probabilities."""

    kind = "probs"

    @property
    def classes(self) -> NDArray[Any]:
        """The classifier's own."""
        return np.asarray(self.model.classes_)

    @property
    def num_classes(self) -> int:
        """Number of its classes."""
        return len(self.classes)

    def look(self, values: Any) -> None:
        """Tell logits from probabilities."""
        self.kind = "logits" if _has_logits(self.model, values) else "probs"

    def fit(self, values: Any, classes: NDArray[np.int64]) -> None:
        """Fit the guard on what the classifier says about the rows."""
        rows = self._rows(values, classes)
        self.guard.fit(rows, **self._recipe("energy" if self.kind == "logits" else "msp"))

    def decide(self, values: Any) -> Decision:
        """Decide on what the classifier says about the rows."""
        return self.guard.decide_stored(self._rows(values))

    def _rows(self, values: Any, classes: NDArray[np.int64] | None = None) -> Predictions:
        if self.kind == "logits":
            found = np.asarray(self.model.decision_function(values), dtype=np.float64)
        else:
            found = np.asarray(self.model.predict_proba(values), dtype=np.float64)
            found = np.log(np.maximum(found, np.finfo(np.float64).tiny))
        name = type(self.model).__name__
        return Predictions(found, labels=classes, kind=self.kind, dtype="float64", source=name)


def opened(model: Any, settings: Any) -> ArrayModel:
    """Return the right reader for a model.

    Raises:
        InvalidInputError: no model, a guard that is not fitted, or one without a model.
        UnsupportedModelError: a scikit-learn classifier without probabilities.
    """
    if isinstance(model, Guard):
        if model.threshold is None or model.classifier is None:
            raise InvalidInputError(
                "got a guard that is not fitted, or that holds no model; give guard.fit(...), "
                "Guard.load(path, model), or the model itself"
            )
        return TorchModel(model.classifier.model, model, settings)
    if is_scikit(model):
        if not hasattr(model, "predict_proba"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no predict_proba, so what it says has no reading as "
                "logits of a softmax; put it into a CalibratedClassifierCV"
            )
        return ScikitModel(model, Guard(), settings)
    if model is None or not callable(model):
        raise InvalidInputError(
            f"got model={model!r}; needed an nn.Module, a callable from a batch to logits, a "
            "fitted Guard, or a scikit-learn classifier"
        )
    return TorchModel(model, wrap(model, logits=settings.logits), settings)


def is_scikit(model: Any) -> bool:
    """Whether this is a scikit-learn classifier (or looks like one)."""
    return hasattr(model, "fit") and hasattr(model, "predict") and not isinstance(model, Guard)


def _has_logits(model: Any, values: Any) -> bool:
    """Whether softmax of the decision function is what the classifier calls its probabilities."""
    if not hasattr(model, "decision_function"):
        return False
    found = np.asarray(model.decision_function(values), dtype=np.float64)
    if found.ndim != 2 or found.shape[1] != len(model.classes_):
        return False
    said = np.asarray(model.predict_proba(values), dtype=np.float64)
    means = formulas.log_probabilities(torch.from_numpy(found)).exp().numpy()
    return bool(np.abs(means - said).max() <= _ALIKE)
