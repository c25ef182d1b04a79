"""The guard: wrap a classifier, fit once, then decide on every input it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.data.images import plain, read_image, to_input, upright
from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.gate.class_conditional import ClassConditionalThreshold, require_threshold
from ebm_guard.gate.deciding import decide, decide_stored
from ebm_guard.gate.decision import Decision
from ebm_guard.gate.drift import DriftMonitor
from ebm_guard.gate.fittable import Fittable
from ebm_guard.gate.screening import FDR, Screening, screen_batch
from ebm_guard.gate.storage import (
    GuardState,
    describe_manifest,
    manifest_of,
    read_state,
    write_state,
)
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.predictions import Predictions


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


class Guard(Fittable):
    """A classifier with a calibrator, a score and a threshold.

    ``guard(x)`` takes exactly what the model takes. The user's model is held unregistered: moving,
    casting or saving the guard never touches it.

    Args:
        classifier: the wrapped model, or None for a guard on stored logits alone.

    Attributes:
        score: the OOD score, ``energy`` unless ``fit`` was told otherwise.
        calibrator: the fitted calibrator, or None (unlabelled data).
        threshold: the fitted threshold, or None before ``fit``.
        rule: the rule with a certified risk, or None.
        facts: what the guard was fitted on, as JSON types.

    Example:
        >>> import numpy as np
        >>> logits = np.random.default_rng(0).normal(0, 5, size=(200, 3))
        >>> labels = np.where(np.arange(200) % 5, logits.argmax(axis=1), 0)
        >>> guard = Guard().fit(Predictions(logits, labels=labels))
        >>> guard.decide(torch.tensor([[9.0, 0, 0], [-9.0, -9.0, -9.0]])).status.tolist()
        [1, 0]
    """

    @torch.no_grad()
    def forward(self, x: Any) -> Decision:
        """Decide on a batch of the model's input.

        Args:
            x: exactly what the model takes; moved to the model's device.

        Raises:
            NotFittedError: :meth:`fit` has not run.
            UnsupportedModelError: the score needs features, and the model's head is not found.
        """
        require_threshold(self.threshold)
        classifier = self._require_classifier()
        if not self.score.needs_features:
            return self.decide(classifier(x))
        return self.decide(*self._with_features(classifier, x))

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
        parts = self._parts()
        formulas.check_logits(logits)
        self._check_classes(logits.shape[1])
        return decide(parts, logits, features)

    def decide_stored(self, predictions: Predictions) -> Decision:
        """Decide on stored rows; the model is not run.

        Raises:
            NotFittedError: :meth:`fit` has not run.
            DataError: the score needs logits or features that are not stored.
            InvalidInputError: another number of classes.
        """
        parts = self._parts()
        self._check_classes(predictions.num_classes)
        return decide_stored(parts, predictions)

    def screen_batch(self, x: Any, fdr: float = FDR) -> Screening:
        """Name the outliers of a batch, with a bound on the false share among those named.

        No decision is changed: the gate decides each input by itself.

        Args:
            x: a :class:`Decision` of this guard, or what ``guard(x)`` takes.
            fdr: bound on the expected false share among the flagged, in (0, 1).

        References:
            See :func:`ebm_guard.gate.screening.screen_batch`.
        """
        threshold = require_threshold(self.threshold)
        decision = x if isinstance(x, Decision) else self.forward(x)
        # With cuts by class, the smallest group says how small a p-value can be.
        n = min(getattr(threshold, "sizes", [threshold.n]))
        return screen_batch(decision.p_value, fdr, n=n)

    def drift_monitor(self, **settings: Any) -> DriftMonitor:
        """Start a monitor for this gate's scores: feed it ``decision.score``.

        Its reject rate is that of the threshold on the score alone, without a certified rule, and
        where there are cuts by class that of one cut for all classes with the same promise.

        Args:
            settings: of :class:`~ebm_guard.gate.drift.DriftMonitor`, such as ``delta``.
        """
        threshold = require_threshold(self.threshold)
        if isinstance(threshold, ClassConditionalThreshold):
            scores = threshold.scores.cpu().numpy()
            threshold = Threshold.fit(
                scores, threshold.method, threshold.false_reject_rate, threshold.assurance
            )
        return DriftMonitor.from_threshold(threshold, **settings)

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
        parts = self._parts()
        return GuardState(
            score=parts.score,
            threshold=parts.threshold,
            calibrator=parts.calibrator,
            canary=self.canary,
            facts=self.facts,
            classifier=self.classifier,
            rule=parts.rule,
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
        guard._set(state.parts, state.facts)
        guard.canary = state.canary
        return guard._beside_model()

    def _with_features(self, classifier: EnergyClassifier, x: Any) -> tuple[Tensor, Tensor]:
        known = classifier.head is not None and classifier.head.found
        if not known and isinstance(x, Tensor) and len(x):
            # One row proves nothing about a layer; its half is another input of the same kind.
            alone = len(x) == 1 and x.is_floating_point()
            classifier.probe_head(torch.cat([x, x / 2]) if alone else x)
        output = classifier.forward(x, features=True)
        if output.features is None:
            message = "not looked for" if classifier.head is None else classifier.head.message
            raise UnsupportedModelError(
                f"the score {self.score.name} needs the features of the last linear layer, and "
                f"that was not found in this {classifier.name}: {message}"
            )
        return output.logits, output.features


def _opened(item: str | Path | Image.Image) -> Image.Image:
    return plain(upright(item) if isinstance(item, Image.Image) else read_image(item))


__all__ = ["Guard", "wrap"]
