"""A guarded classifier as a scikit-learn estimator: calibrated, and free to refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.faces.scikit_models import ArrayModel, is_scikit, opened
from ebm_guard.gate import INVALID, Decision, Guard

# `X` and `y` are scikit-learn's names for data and labels, and part of its interface.
# ruff: noqa: N803


class Guarding:
    """Calibrate a classifier and put a gate before it, with scikit-learn's interface.

    ``fit(X, y)`` takes rows that the classifier was *not* trained on, fits a temperature and the
    gate on them (:meth:`ebm_guard.Guard.fit`), and leaves the classifier as it is. An unfitted
    scikit-learn classifier is cloned and fitted first, on the rows that ``holdout`` leaves; a
    fitted one is taken as it is in ``sklearn.frozen.FrozenEstimator`` (scikit-learn clones bare
    ones, which forgets their fit).

    * ``predict``: the class, or ``reject_label`` where the gate refuses the row.
    * ``predict_proba`` (N, C): calibrated; of refused rows too.
    * ``decision_function``: of a *classifier*, as scikit-learn's scorers read it: log-odds (N,) of
      the second class of two, else calibrated log-probabilities (N, C).
    * ``score_samples`` (N,): -s(x), high = normal, the sign of scikit-learn's outlier detectors
      and the reverse of ``Decision.score``.
    * ``accept`` (N,): whether the gate accepts; ``decide``: everything that it says.
    * ``score``: accuracy of ``predict``, so that with a ``reject_label`` a refused row counts as
      wrong; accuracy among the accepted is ``score(X[a], y[a])`` with ``a = accept(X)``.

    What a scikit-learn classifier can give: *logits*, with all scores of logits, where softmax of
    its ``decision_function`` equals its ``predict_proba``, which is checked at ``fit`` (multinomial
    LogisticRegression, LinearDiscriminantAnalysis, gradient boosting of three classes or more);
    else *probabilities*, for ``msp`` and ``gen`` only, as an energy needs logits (one log-odds of
    two classes says which of the two, and not how much of either). Without ``predict_proba`` it is
    refused. The last step of a ``Pipeline`` counts; in a ``CalibratedClassifierCV`` there are
    probabilities.

    Clones share no state, and a torch model is copied with them. Pickling is scikit-learn's, which
    runs code when it loads; save ``guard_`` with :meth:`ebm_guard.Guard.save` instead.

    Args:
        model: an ``nn.Module`` or callable from a batch to logits, which gets batches of the rows
            of X (floating ones in the dtype of its parameters); a scikit-learn classifier; or a
            fitted :class:`~ebm_guard.Guard`, which is taken as it is and needs no ``fit``.
        classes: labels in the order of a torch model's logits; default 0..C-1.
        score_name: the gate's score; default: ``energy`` on logits, ``msp`` on probabilities.
        calibrator: of the probabilities.
        false_reject_rate: target for the share of ID rows refused.
        assurance: probability that the target is met.
        threshold: ``pac`` or ``marginal``.
        reject_label: what ``predict`` says of refused rows; None: their class all the same.
        logits: takes a torch model's output and returns the logits.
        holdout: share of the rows of ``fit`` for calibrator and gate, where the classifier is
            fitted here too.
        batch_size: rows in one forward pass of a torch model.
        seed: of the splits.

    Attributes:
        guard_: the fitted :class:`~ebm_guard.Guard`.
        classes_: (C,) labels in the order of the probabilities.
        model_: the classifier in use.

    Example:
        >>> from ebm_guard.faces import GuardedClassifier
        >>> from sklearn.linear_model import LogisticRegression
        >>> X, y = np.random.default_rng(0).normal(size=(400, 2)), np.arange(400) % 3
        >>> X[np.arange(400), y % 2] += 4.0 * (y > 0)
        >>> guarded = GuardedClassifier(LogisticRegression(), reject_label=-1).fit(X, y)
        >>> guarded.predict_proba(X).shape
        (400, 3)
    """

    def __init__(
        self,
        model: Any = None,
        *,
        classes: Sequence[Any] | None = None,
        score_name: str | None = None,
        calibrator: str = "temperature",
        false_reject_rate: float = 0.05,
        assurance: float = 0.95,
        threshold: str = "pac",
        reject_label: Any = None,
        logits: Callable[[Any], Any] | None = None,
        holdout: float = 0.5,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.classes = classes
        self.score_name = score_name
        self.calibrator = calibrator
        self.false_reject_rate = false_reject_rate
        self.assurance = assurance
        self.threshold = threshold
        self.reject_label = reject_label
        self.logits = logits
        self.holdout = holdout
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Any:
        """Calibrate and fit the gate; fit a scikit-learn classifier first where it is not frozen.

        Raises:
            InvalidInputError: labels that the classifier does not know, too few rows for the
                promise (the error names the number needed), or settings that do not go together.
            UnsupportedModelError: the classifier gives neither logits nor probabilities.
            DataError: the score needs logits or features, and there are none.
        """
        labels = _column(y)
        if isinstance(self.model, Guard):
            self._refuse_settings()
            model, rows = opened(self.model, self), slice(None)
        elif is_scikit(self.model):
            model, rows = self._scikit(X, labels)
        else:
            model, rows = opened(self.model, self), slice(None)
        held = _part(X, rows)
        model.look(held)
        self._set(model)
        classes = self._encoded(labels[rows])
        if not isinstance(self.model, Guard):
            model.fit(held, classes)
        return self

    def decide(self, X: Any) -> Decision:
        """Return the gate's decision on each row."""
        return self._ready().decide(X)

    def accept(self, X: Any) -> NDArray[np.bool_]:
        """Return whether the gate accepts, (N,)."""
        return np.asarray(self.decide(X).accept.cpu().numpy())

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the classes, (N,), and ``reject_label`` where the gate refuses.

        Raises:
            ModelOutputError: a row has NaN or infinite logits, so no class, and no
                ``reject_label`` is set.
        """
        decision = self.decide(X)
        label, invalid = decision.label.cpu().numpy(), (decision.status == INVALID).cpu().numpy()
        if self.reject_label is None:
            if invalid.any():
                raise ModelOutputError(
                    f"{int(invalid.sum())} of {len(invalid)} rows have NaN or infinite logits (row "
                    f"{int(invalid.argmax())} first), so they have no class; set reject_label="
                )
            return np.asarray(self.classes_[label])
        # The reject label may be longer than every class name.
        known = np.append(self.classes_, self.reject_label)
        refused = ~decision.accept.cpu().numpy()
        return np.asarray(known[np.where(refused, len(known) - 1, label)])

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Return calibrated log-probabilities, (N, C)."""
        model = self._ready()
        return model.log_probabilities(model.decide(X).logits)

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return calibrated probabilities, (N, C)."""
        return np.asarray(np.exp(self.predict_log_proba(X)))

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return log-odds (N,) of the second class of two, or log-probabilities (N, C)."""
        found = self.predict_log_proba(X)
        return np.asarray(found[:, 1] - found[:, 0]) if found.shape[1] == 2 else found

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Return -s(x), (N,); high = normal, the reverse of ``Decision.score``."""
        return np.asarray(-self.decide(X).score.cpu().numpy())

    @property
    def n_features_in_(self) -> int:
        """Number of columns of X, where the scikit-learn classifier inside says it."""
        return int(self.model_.n_features_in_)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import get_tags

        tags: Any = super().__sklearn_tags__()  # type: ignore[misc]
        if is_scikit(self.model):
            tags.input_tags.sparse = get_tags(self.model).input_tags.sparse
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "guard_") or isinstance(self.model, Guard)

    def _scikit(self, X: Any, labels: NDArray[Any]) -> tuple[ArrayModel, Any]:
        from sklearn.base import clone
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import _num_samples, check_consistent_length

        if self.classes is not None or self.logits is not None:
            raise InvalidInputError(
                "classes= and logits= are for torch models; a scikit-learn classifier knows its "
                "classes, and its logits are checked"
            )
        check_consistent_length(X, labels)
        check_classification_targets(labels)
        if type(self.model).__name__ == "FrozenEstimator":
            return opened(self.model, self), slice(None)
        if not 0 < self.holdout < 1:
            raise InvalidInputError(f"got holdout={self.holdout}; needed a share in (0, 1)")
        held = _held_out(labels, self.holdout, self.seed)
        rows = np.arange(_num_samples(X))
        inner = clone(self.model).fit(_part(X, rows[~held]), labels[~held])
        return opened(inner, self), rows[held]

    def _refuse_settings(self) -> None:
        names = (
            "score_name",
            "calibrator",
            "false_reject_rate",
            "assurance",
            "threshold",
            "logits",
        )
        fresh = type(self)()
        changed = [name for name in names if getattr(self, name) != getattr(fresh, name)]
        if changed:
            raise InvalidInputError(
                f"got {', '.join(changed)} beside a fitted guard, which is taken as it is; fit the "
                "guard with these settings, or give its model"
            )

    def _set(self, model: ArrayModel) -> None:
        self._arrays, self.guard_, self.model_ = model, model.guard, model.model
        names = model.classes if self.classes is None else np.asarray(self.classes)
        self.classes_ = names
        if model.num_classes != len(names) or len(set(names.tolist())) < len(names):
            raise InvalidInputError(
                f"got classes={names.tolist()} for a model of {model.num_classes} classes; needed "
                "one name for each, in the order of the logits"
            )
        if self.reject_label is None:
            return
        one = np.asarray(self.reject_label)
        alike = (one.dtype.kind in "US") == (names.dtype.kind in "US")
        if one.ndim or not (alike or names.dtype == object) or self.reject_label in names.tolist():
            raise InvalidInputError(
                f"got reject_label={self.reject_label!r} for the classes {names.tolist()}; needed "
                "a label of the same kind that is none of them"
            )

    def _encoded(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the place of each label among the classes."""
        place = {name: index for index, name in enumerate(self.classes_.tolist())}
        unknown = sorted({str(item) for item in labels.tolist() if item not in place})
        if unknown:
            raise InvalidInputError(
                f"got labels that the classifier does not know: {', '.join(unknown[:5])}; its "
                f"classes are {self.classes_.tolist()[:20]} (classes= for a torch model)"
            )
        return np.array([place[item] for item in labels.tolist()], dtype=np.int64)

    def _ready(self) -> ArrayModel:
        if not hasattr(self, "guard_"):
            if not isinstance(self.model, Guard):
                from sklearn.exceptions import NotFittedError

                raise NotFittedError("this GuardedClassifier is not fitted: call fit(X, y)")
            self._refuse_settings()
            self._set(opened(self.model, self))
        return self._arrays


def _column(y: Any) -> NDArray[Any]:
    from sklearn.utils.validation import column_or_1d

    if y is None:
        raise InvalidInputError(
            "requires y to be passed, but the target y is None; calibration needs the labels"
        )
    return np.asarray(column_or_1d(y, warn=True))


def _part(X: Any, rows: Any) -> Any:
    """Return some rows; data frames stay what they are, for a pipeline that reads columns."""
    from scipy.sparse import issparse
    from sklearn.utils import _safe_indexing

    if isinstance(rows, slice):
        return X
    if issparse(X):
        return _safe_indexing(X.tocsr(), rows)
    return _safe_indexing(X if hasattr(X, "__getitem__") else np.asarray(X), rows)


def _held_out(labels: NDArray[Any], share: float, seed: int) -> NDArray[np.bool_]:
    """Return which rows calibrate, (N,): the same share of each class, drawn at random.

    Raises:
        InvalidInputError: a class of one row, which cannot be on both sides.
    """
    names, where, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise InvalidInputError(
            f"got 1 sample of the class {names[counts.argmin()]!r}; needed at least 2, one to fit "
            "the classifier and one to calibrate. A fitted one, in a FrozenEstimator, needs 1"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(where[order], kind="stable")]
    held = np.zeros(len(labels), dtype=bool)
    start = 0
    for count in counts:
        kept = min(count - 1, max(1, round(share * count)))
        held[order[start : start + kept]] = True
        start += count
    return held


def __getattr__(name: str) -> Any:
    """Make the class on first use: scikit-learn is slow to import."""
    if name != "GuardedClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sklearn.base import BaseEstimator, ClassifierMixin

    try:
        import sklearn.frozen  # noqa: F401 - of the release that this class needs
    except ImportError:
        raise InvalidInputError(
            "GuardedClassifier needs scikit-learn 1.6 or newer: pip install -U scikit-learn"
        ) from None
    facts = {"__doc__": Guarding.__doc__, "__module__": __name__, "__qualname__": name}
    globals()[name] = type(name, (Guarding, ClassifierMixin, BaseEstimator), facts)
    return globals()[name]
