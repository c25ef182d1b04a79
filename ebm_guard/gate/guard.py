"""The guard: wrap a classifier, fit once, then decide on every input it sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.calibration.calibrators import Calibrator, make_calibrator
from ebm_guard.data.images import to_input
from ebm_guard.errors import (
    DataError,
    EbmGuardWarning,
    InvalidInputError,
    ModelOutputError,
    NotFittedError,
)
from ebm_guard.gate.artifact import CANARY_ROWS, Canary
from ebm_guard.gate.decision import ACCEPT, INVALID, REJECT, Decision
from ebm_guard.gate.storage import (
    GuardState,
    describe_manifest,
    manifest_of,
    read_state,
    write_state,
)
from ebm_guard.gate.thresholds import Threshold, require_threshold
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.ood import Energy, Score, make_score
from ebm_guard.precision import KeepDouble
from ebm_guard.predictions import Predictions, as_batch, predict

# Apple's GPUs have no float64; decisions are made on the CPU there.
_NO_DOUBLE = ("mps",)


def wrap(
    model: Callable[..., Any],
    *,
    logits: Callable[[Any], Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Guard:
    """Wrap a pretrained classifier; the model is not changed, moved or copied.

    Args:
        model: an ``nn.Module`` or any callable from a batch to logits (B, C).
        logits: takes the model's output and returns the logits, where they are not found alone.
        mean: per channel, in [0, 1] units, for :meth:`Guard.pixels` and :meth:`Guard.predict`;
            default: the model's ``pretrained_cfg``.
        std: per channel, > 0.
        image_size: (H, W) of the model's input.
        preprocessing: all of these at once, instead of mean, std and image_size.

    Returns:
        A guard that is ready to be fitted.

    Raises:
        UnsupportedModelError: the model says that it has no classes, or several labels per image.

    Example:
        >>> guard = wrap(torch.nn.Linear(4, 3).eval())
        >>> guard.fit(torch.randn(100, 4)).threshold.n  # doctest: +SKIP
        100
    """
    if (mean is None) != (std is None):
        raise InvalidInputError("got only one of mean and std; give both, or neither")
    if preprocessing is None and mean is not None and std is not None:
        preprocessing = Preprocessing(
            tuple(map(float, mean)), tuple(map(float, std)), image_size=image_size
        )
    return Guard(EnergyClassifier(model, logits=logits, preprocessing=preprocessing))


class Guard(KeepDouble):
    """A classifier with a calibrator, a score and a threshold.

    ``guard(x)`` takes exactly what the model takes. The user's model is held unregistered: moving,
    casting or saving the guard never touches it.

    Args:
        classifier: the wrapped model, or None for a guard on stored logits alone.

    Attributes:
        score: the OOD score, ``energy`` unless ``fit`` was told otherwise.
        calibrator: the fitted calibrator, or None (unlabelled data).
        threshold: the fitted threshold, or None before ``fit``.
        facts: what the guard was fitted on, as JSON types.
    """

    def __init__(self, classifier: EnergyClassifier | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        self.score: Score = Energy()
        self.calibrator: Calibrator | None = None
        self.threshold: Threshold | None = None
        self.canary: Canary | None = None
        self.facts: dict[str, Any] = {}

    def fit(
        self,
        data: Predictions | Tensor | Iterable[Any],
        *,
        score: str | Score = "energy",
        calibrator: str | Calibrator = "temperature",
        false_reject_rate: float = 0.05,
        assurance: float = 0.95,
        threshold: str = "pac",
        canary: bool | Tensor = True,
        progress: bool = False,
    ) -> Guard:
        """Fit the calibrator and the threshold on held-out ID rows.

        The score of logits needs no fit, so both may use all rows. Rows without labels give a gate
        but no calibrator, with a warning. Energies and scores are those of the raw logits, whatever
        the calibrator.

        Args:
            data: a loader of (inputs, labels) or of inputs, one tensor of inputs, or
                :class:`~ebm_guard.predictions.Predictions`. ID rows that the model was not trained
                on, drawn like the traffic to come.
            score: a registered score or a :class:`~ebm_guard.ood.Score`.
            calibrator: a registered calibrator, or a
                :class:`~ebm_guard.calibration.calibrators.Calibrator`, which is fitted here.
            false_reject_rate: target for the share of ID refused.
            assurance: probability that the target is met (PAC).
            threshold: ``pac`` or ``marginal``.
            canary: keep 8 inputs with their logits in the artefact, to catch a changed model; a
                tensor gives these inputs (for ``Predictions``, which hold none), False keeps none.
            progress: show a progress bar.

        Returns:
            Itself.

        Raises:
            InvalidInputError: too few rows for the promise or for the calibrator; the error names
                the number needed.
            ModelOutputError: the model gives NaN or infinite logits for some rows.
            UnsupportedModelError: the model does not give logits.
        """
        kept: list[Tensor] = []
        if isinstance(data, Predictions):
            predictions = data
        else:
            classifier = self._require_classifier()
            rows = [data] if isinstance(data, Tensor) else data
            predictions = predict(classifier, _keep_first(rows, kept), progress=progress)
        self._refuse_invalid(predictions)
        chosen = make_score(score) if isinstance(score, str) else score
        cut = Threshold.fit(chosen.of(predictions), threshold, false_reject_rate, assurance)
        fitted = _fit_calibrator(predictions, calibrator)
        self.score, self.threshold, self.calibrator = chosen, cut, fitted
        inputs = canary if isinstance(canary, Tensor) else torch.cat(kept) if kept else None
        self.canary = None if canary is False or inputs is None else self._make_canary(inputs)
        self.facts = {
            "n": len(predictions),
            "num_classes": predictions.num_classes,
            "classes": None if predictions.classes is None else list(predictions.classes),
            "dtype": predictions.dtype,
            "source": predictions.source,
            "fingerprint": predictions.fingerprint,
            "labelled": predictions.labels is not None,
        }
        return self._beside_model()

    @torch.no_grad()
    def forward(self, x: Any) -> Decision:
        """Decide on a batch of the model's input.

        Args:
            x: exactly what the model takes; moved to the model's device.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        require_threshold(self.threshold)
        return self.decide(self._require_classifier()(x))

    @torch.no_grad()
    def pixels(self, pixels: Tensor) -> Decision:
        """Decide on [0, 1] pixels (B, C, H, W) of the model's input size.

        Raises:
            InvalidInputError: values outside [0, 1], with a guess why; or the normalisation is not
                known.
        """
        require_threshold(self.threshold)
        return self.forward(self._require_classifier().pixels(pixels))

    def predict(
        self, images: Sequence[str | Path | Image.Image] | str | Path, batch_size: int = 32
    ) -> Decision:
        """Decide on image files or Pillow images, with the stored preprocessing.

        Args:
            images: paths or images, or one path.
            batch_size: images per forward pass.

        Raises:
            DataError: an image cannot be read.
            InvalidInputError: no image, or the preprocessing is not known.
        """
        require_threshold(self.threshold)
        preprocessing = self._require_classifier().preprocessing
        if preprocessing is None:
            raise InvalidInputError(
                "this guard does not know how to prepare images; wrap the model with mean=, std= "
                "and image_size=, or give prepared batches to guard(x)"
            )
        items = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        if not items:
            raise InvalidInputError("got no images; needed at least one path or Pillow image")
        parts = []
        for start in range(0, len(items), batch_size):
            rows = [
                torch.from_numpy(to_input(_opened(item), preprocessing))
                for item in items[start : start + batch_size]
            ]
            parts.append(self.forward(torch.stack(rows)))
        return Decision.concatenate(parts)

    @torch.no_grad()
    def decide(self, logits: Tensor, features: Tensor | None = None) -> Decision:
        """Decide on logits; the model is not run.

        valid = all logits and used features finite and the score finite; accept = valid and
        score <= cut. One NaN or infinite entry in a row refuses that row, for every score.

        Args:
            logits: (B, C).
            features: (B, D), for scores that need them.

        Raises:
            NotFittedError: :meth:`fit` has not run.
            InvalidInputError: not (B, C), or another number of classes.
        """
        threshold = require_threshold(self.threshold)
        formulas.check_logits(logits)
        if logits.device.type in _NO_DOUBLE:
            logits = logits.cpu()
            features = None if features is None else features.cpu()
        expected = self.facts.get("num_classes", logits.shape[1])
        if logits.shape[1] != expected:
            raise InvalidInputError(
                f"got logits of {logits.shape[1]} classes; this guard was fitted on {expected}"
            )
        score = self.score(logits, features).double()
        valid = torch.isfinite(logits).all(dim=1) & torch.isfinite(score)
        if features is not None:
            valid &= torch.isfinite(features).all(dim=1)
        accept = valid & threshold.accept(score)
        status = torch.where(accept, ACCEPT, torch.where(valid, REJECT, INVALID)).to(torch.int8)
        label, confidence = self._predicted(logits)
        return Decision(
            status=status,
            label=torch.where(valid, label, -1),
            confidence=torch.where(valid, confidence, 0.0),
            energy=formulas.energy(logits),
            score=score,
            p_value=torch.where(valid, threshold.p_value(score), 0.0),
            logits=logits,
            cut=float(threshold.cut),
            score_name=self.score.name,
        )

    def _predicted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.calibrator is not None:
            return self.calibrator.predict(logits)
        log_p, label = formulas.log_probabilities(logits).max(dim=-1)
        return label, log_p.exp()

    def summary(self) -> str:
        """Say in a few lines what this guard is and promises."""
        if self.threshold is None:
            name = "stored logits" if self.classifier is None else self.classifier.name
            return f"Guard around {name}, not fitted: call guard.fit(validation_loader)"
        rows = describe_manifest(manifest_of(self.state()))
        return "\n".join(f"{word:>12}  {sentence}" for word, sentence in rows)

    def _repr_html_(self) -> str:
        """Show the summary in a notebook."""
        return f"<pre>{escape(self.summary())}</pre>"

    def state(self) -> GuardState:
        """Return all that this guard consists of.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        return GuardState(
            score=self.score,
            threshold=require_threshold(self.threshold),
            calibrator=self.calibrator,
            canary=self.canary,
            facts=self.facts,
            classifier=self.classifier,
        )

    def save(self, path: str | Path) -> Path:
        """Write the guard, without the model, as one ``.safetensors`` file.

        Raises:
            NotFittedError: :meth:`fit` has not run.
            DataError: the place cannot be written; nothing is left behind.
        """
        return write_state(self.state(), path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any] | None = None,
        *,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> Guard:
        """Read a guard and prove that it belongs to the model.

        Args:
            path: file written by :meth:`save`.
            model: the model it was fitted on; None gives a guard for :meth:`decide` alone.
            logits: as in :func:`wrap`.

        Raises:
            ArtifactError: damaged, edited, or of another model: the weights' hash, the number of
                classes, the dtype and the canary's logits are compared.
        """
        state = read_state(path, model, logits)
        guard = cls(state.classifier)
        guard.score, guard.threshold, guard.calibrator = (
            state.score,
            state.threshold,
            state.calibrator,
        )
        guard.canary, guard.facts = state.canary, dict(state.facts)
        return guard._beside_model()

    def _beside_model(self) -> Guard:
        """Keep the threshold's scores where the model is, so that a call copies nothing."""
        device = None if self.classifier is None else self.classifier.device
        return self if device is None or device.type in _NO_DOUBLE else self.to(device)

    def _require_classifier(self) -> EnergyClassifier:
        if self.classifier is None:
            raise NotFittedError(
                "this guard holds no model; load it with Guard.load(path, model), or give logits "
                "to guard.decide(logits)"
            )
        return self.classifier

    def _make_canary(self, inputs: Tensor) -> Canary:
        classifier = self._require_classifier()
        inputs = inputs[:CANARY_ROWS].detach().cpu().clone()
        with torch.no_grad():
            logits = classifier(inputs)
        return Canary(inputs, logits.cpu(), logits.device.type)

    def _refuse_invalid(self, predictions: Predictions) -> None:
        bad = predictions.invalid
        if bad.any():
            first = predictions.names([int(bad.argmax())])[0]
            raise ModelOutputError(
                f"{int(bad.sum())} of {len(bad)} rows of {predictions.source} have NaN or infinite "
                f"logits (first: {first}); a guard cannot be fitted on them. Look for overflow in "
                "half precision or broken inputs"
            )


def _fit_calibrator(predictions: Predictions, chosen: str | Calibrator) -> Calibrator | None:
    calibrator = make_calibrator(chosen) if isinstance(chosen, str) else chosen
    if predictions.labels is None:
        warnings.warn(
            "no labels were given, so no temperature or other calibrator is fitted: confidence is "
            "the plain softmax probability. The gate itself needs no labels",
            EbmGuardWarning,
            stacklevel=3,
        )
        return None
    return calibrator.fit(predictions.logits, predictions.labels, predictions.sample_weight)


def _keep_first(data: Iterable[Any], kept: list[Tensor]) -> Iterator[Any]:
    """Pass batches on, and keep the first rows for the canary."""
    for item in data:
        batch = as_batch(item)
        missing = CANARY_ROWS - sum(map(len, kept))
        if missing > 0 and len(batch.inputs):
            kept.append(batch.inputs[:missing])
        yield batch


def _opened(item: str | Path | Image.Image) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    try:
        with Image.open(item) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {item}: {error}") from None


__all__ = ["Guard", "wrap"]
