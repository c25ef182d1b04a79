"""Choose a score for the gate on synthetic outliers, without one real OOD row.

The outliers are made from held-out ID images (``GUARD_KINDS``: rotation, paste, pixel shuffle,
Gaussian and uniform noise), never from rows that a detector was fitted on, and never from rows
that the threshold uses: a threshold promises its coverage for a score that was fixed before its
rows were seen. What is chosen is good at *these* outliers; real ones may be others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard import registry
from ebm_guard.data.outliers import GUARD_KINDS, get_kind, make_outliers
from ebm_guard.data.splits import check_disjoint
from ebm_guard.errors import EbmGuardError, InvalidInputError, first_line
from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import Score, make_score
from ebm_guard.ood.metrics import auroc
from ebm_guard.predictions import Predictions, predict

# Images kept for outliers: five kinds of each are run through the model.
MOST_IMAGES = 500
_FORWARD = 50


@dataclass(frozen=True)
class Candidate:
    """One score that was tried.

    Args:
        name: of the score.
        mean_auroc: mean over the kinds of outliers; higher is better.
        aurocs: AUROC on each kind.
    """

    name: str
    mean_auroc: float
    aurocs: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "name": self.name,
            "mean_auroc": self.mean_auroc,
            "aurocs": dict(self.aurocs),
        }


@dataclass(frozen=True)
class Choice:
    """Which score was chosen, and by how much.

    Args:
        score: the chosen score, fitted.
        candidates: all that were tried, best first.
        not_run: why the others were not, by name.
        n: ID rows that the choice used.
        outliers: outlier rows by kind.
        source: where the ID rows come from.
        fingerprint: of the ID rows, so that a threshold can refuse them.
    """

    score: Score
    candidates: tuple[Candidate, ...]
    not_run: Mapping[str, str]
    n: int
    outliers: Mapping[str, int]
    source: str
    fingerprint: str

    @property
    def margin(self) -> float | None:
        """Lead in mean AUROC over the second best; None where only one score could be tried."""
        if len(self.candidates) < 2:
            return None
        return self.candidates[0].mean_auroc - self.candidates[1].mean_auroc

    @property
    def sentence(self) -> str:
        """The choice in plain words."""
        best = self.candidates[0]
        text = (
            f"{best.name} was chosen among {len(self.candidates)} scores on outliers alone "
            f"({', '.join(self.outliers)}; {self.n:,} ID rows of their own): mean AUROC "
            f"{best.mean_auroc:.3f}"
        )
        if self.margin is not None:
            second = self.candidates[1]
            text += f", {self.margin:.3f} before {second.name}"
        ours = next((row for row in self.candidates if row.name == "energy"), None)
        if ours is not None and ours is not best:
            text += f"; energy has {ours.mean_auroc:.3f}"
        return f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "chosen": self.score.name,
            "margin": self.margin,
            "candidates": [row.to_dict() for row in self.candidates],
            "not_run": dict(self.not_run),
            "n": self.n,
            "outliers": dict(self.outliers),
            "source": self.source,
            "fingerprint": self.fingerprint,
            "sentence": self.sentence,
        }


def choose_score(
    inside: Predictions,
    outliers: Mapping[str, Predictions],
    fit_data: Predictions | None = None,
    candidates: Sequence[str | Score] | None = None,
) -> Choice:
    """Choose the score with the best mean AUROC of outliers against held-out ID rows.

    Args:
        inside: ID rows that neither a detector nor a threshold uses.
        outliers: predictions by kind, made from images of ``inside``; or any rows that stand for
            OOD, if they are not those that the guard will be judged on.
        fit_data: ID rows that detectors are fitted on; without them only scores of the logits are
            tried.
        candidates: names or scores, fitted here; default: all that are registered but ``combine``.

    Returns:
        The fitted score with the table. A tie goes to the first in the registry's order.

    Raises:
        InvalidInputError: no outliers, or no score could be run.
        DataError: ``inside`` and ``fit_data`` share rows.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> inside, outside = (generator.normal(0, size, (200, 3)) for size in (9, 1))
        >>> choice = choose_score(Predictions(inside), {"small": Predictions(outside)})
        >>> len(choice.candidates), choice.score.name in ("energy", "msp", "maxlogit", "gen")
        (4, True)
    """
    if not outliers:
        raise InvalidInputError("got no outliers to choose a score on; needed at least one kind")
    if fit_data is not None:
        check_disjoint(_hashes(inside), _hashes(fit_data), ("the rows of the choice", "fit_data"))
    tried: list[tuple[Candidate, Score]] = []
    not_run: dict[str, str] = {}
    for score in _scores(candidates):
        reason = _prepare(score, inside, outliers, fit_data)
        if reason is not None:
            not_run[score.name] = reason
            continue
        known = _finite(score.of(inside))
        aurocs = {
            kind: auroc(known, _finite(score.of(part))).value for kind, part in outliers.items()
        }
        tried.append((Candidate(score.name, float(np.mean(list(aurocs.values()))), aurocs), score))
    if not tried:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_run.items())
        raise InvalidInputError(f"no score could be tried on {inside.source} ({reasons})")
    tried.sort(key=lambda item: -item[0].mean_auroc)
    return Choice(
        score=tried[0][1],
        candidates=tuple(row for row, _ in tried),
        not_run=not_run,
        n=len(inside),
        outliers={kind: len(part) for kind, part in outliers.items()},
        source=inside.source,
        fingerprint=inside.fingerprint,
    )


def synthetic_outliers(
    classifier: EnergyClassifier,
    inputs: Tensor,
    labels: NDArray[np.int64] | None = None,
    *,
    features: bool = True,
    seed: int = 0,
) -> dict[str, Predictions]:
    """Make outliers of each guard kind from a batch of the model's own inputs, and run them.

    The normalisation is undone, the pixels are changed, and it is applied again. Images that a
    kind leaves as they are (one colour, or the same turned) are left out of it.

    Args:
        classifier: the wrapped model, whose preprocessing must be known.
        inputs: (B, C, H, W), normalised as the model takes them.
        labels: (B,), so that pasted parts come from another class.
        features: also keep the features.
        seed: of the generator.

    Returns:
        Predictions by kind.

    Raises:
        InvalidInputError: the normalisation is not known, or does not lead back to [0, 1] pixels.
    """
    pixels = _pixels(classifier, inputs)
    generator = np.random.default_rng(seed)
    found = {}
    for kind in GUARD_KINDS:
        made = made_outliers(pixels, kind, generator, labels)
        if len(made):
            batches = [classifier.pixels(part) for part in torch.split(made, _FORWARD)]
            found[kind] = predict(
                classifier, batches, features=features, source=f"synthetic {kind}"
            )
    return found


def _pixels(classifier: EnergyClassifier, inputs: Tensor) -> Tensor:
    settings = classifier.preprocessing
    way_out = (
        "score='auto' needs outliers made from images. Wrap the model with mean= and std= so that "
        "the normalisation can be undone, or give outliers= (Predictions on outliers)"
    )
    if settings is None:
        raise InvalidInputError(f"the normalisation of this model is not known; {way_out}")
    try:
        return settings.denormalize(inputs.cpu())
    except InvalidInputError as error:
        raise InvalidInputError(f"{error}; {way_out}") from None


def made_outliers(
    pixels: Tensor, kind: str, generator: np.random.Generator, labels: NDArray[np.int64] | None
) -> Tensor:
    """Make outliers of one kind from those images that it changes.

    Args:
        pixels: (B, C, H, W) in [0, 1].
        kind: a name of the outlier kinds.
        generator: source of randomness.
        labels: (B,), so that partners come from another class, or None.

    Returns:
        (M, C, H, W), M <= B: images that the kind leaves as they are (one colour) are left out.
    """
    of = None if labels is None else torch.from_numpy(np.array(labels))
    # With one class only, partners cannot come from another.
    of = of if of is not None and len(set(of.tolist())) > 1 else None
    try:
        return make_outliers(pixels, kind, generator, of)
    except InvalidInputError:
        return _one_by_one(pixels, kind, generator)


def _one_by_one(pixels: Tensor, kind: str, generator: np.random.Generator) -> Tensor:
    """Make what can be made: one image that cannot be changed must not cost all others."""
    partner = get_kind(kind).partner
    made = []
    for row in range(len(pixels)):
        # Where it takes a partner, the next image is the only other one in its batch.
        pair = [row, (row + 1) % len(pixels)] if partner else [row]
        try:
            made.append(make_outliers(pixels[pair], kind, generator)[:1])
        except InvalidInputError:
            continue
    return torch.cat(made) if made else pixels[:0]


def _scores(candidates: Sequence[str | Score] | None) -> list[Score]:
    if candidates is None:
        rows = [*registry.methods("score"), *registry.methods("feature_score")]
        # A combination is asked for by name: which scores to combine is the user's choice.
        candidates = [row.name for row in rows if row.name != "combine"]
    return [make_score(item) if isinstance(item, str) else item for item in candidates]


def _prepare(
    score: Score,
    inside: Predictions,
    outliers: Mapping[str, Predictions],
    fit_data: Predictions | None,
) -> str | None:
    """Fit a score; return why it cannot be tried, or None."""
    for part in (inside, *outliers.values()):
        reason = score.why_not(part)
        if reason is not None:
            return reason
    if not score.needs_fit:
        return None
    if fit_data is None:
        return "no rows to fit it on"
    reason = score.why_not_fit(fit_data)
    if reason is not None:
        return reason
    try:
        score.fit(fit_data)
    except EbmGuardError as error:
        return first_line(error)
    return None


def _finite(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank what the gate would refuse as invalid above all else."""
    finite = scores[np.isfinite(scores)]
    top = float(finite.max()) + 1 if len(finite) else 0.0
    return np.where(np.isfinite(scores), scores, top)


def _hashes(predictions: Predictions) -> NDArray[np.uint64]:
    return predictions.hashes if predictions.hashes is not None else np.empty(0, dtype=np.uint64)
