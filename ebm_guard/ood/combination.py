"""Several scores as one: the mean of their calibrated ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebm_guard.errors import DataError, InvalidInputError, NotFittedError
from ebm_guard.ood.score import Score, make_score, score_class
from ebm_guard.predictions import Predictions


class Combined(Score):
    """Score by the mean rank of several scores among the fit rows.

    s(x) = mean_j F_j(s_j(x)), where F_j is the distribution function of score j on the rows of
    the role ``fit``: mid-ranks at the fit scores, straight lines between them. Beyond the last fit
    score F_j goes on as log(1 + d), d in interquartile ranges (and downward likewise), so that two
    rows beyond all fit rows are still ordered, and one score that is far out is heard. A
    combination is a score like any other: a threshold on it keeps its promise.

    The detectors' own fit rows look a little more normal to them than new rows; this moves ranks,
    never the promise, which rests on calibration rows.

    Args:
        scores: two or more names or scores; all are fitted anew by :meth:`fit`.
        knots: fit scores kept of each, evenly spaced by rank where there are more.

    References:
        Mean of ranks as in rank aggregation; the tails are ours.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> rows = Predictions(generator.normal(size=(200, 3)))
        >>> score = Combined(["energy", "msp"]).fit(rows)
        >>> bool(abs(score.of(rows).mean() - 0.5) < 0.01)
        True
    """

    name = "combine"

    def __init__(
        self, scores: Sequence[str | Score] = ("energy", "mahalanobis"), knots: int = 10_000
    ) -> None:
        super().__init__()
        if isinstance(scores, str) or len(scores) < 2 or knots < 2:
            raise InvalidInputError(
                f"got scores {scores!r} and knots {knots}; needed two or more scores, and 2 knots"
            )
        self.knots = knots
        members = [make_score(item) if isinstance(item, str) else item for item in scores]
        self.members = nn.ModuleList(members)
        self.needs_fit = True
        self.needs_features = any(score.needs_features for score in members)
        self.needs_head = any(score.needs_head for score in members)
        self.needs_labels = any(score.needs_labels for score in members)
        self.from_probabilities = all(score.from_probabilities for score in members)
        self.storable = all(score.storable for score in members)
        self._fitted = False

    @property
    def scores(self) -> list[Score]:
        """The combined scores."""
        return [score for score in self.members if isinstance(score, Score)]

    def fit(self, predictions: Predictions) -> Self:
        """Fit every score, and its ranks, on ID rows of the role ``fit``.

        Raises:
            TooFewRowsError: too few images per class for one of the scores.
            DataError: the rows lack what a score needs, or a score has one value on all rows.
        """
        found = []
        for score in self.scores:
            values = score.fit(predictions).of(predictions)
            found.append(_curve(values, self.knots, score.name))
        for number, (points, levels, spread) in enumerate(found):
            self.register_buffer(f"points_{number}", torch.from_numpy(points))
            self.register_buffer(f"levels_{number}", torch.from_numpy(levels))
            self.register_buffer(f"spread_{number}", torch.tensor(spread, dtype=torch.float64))
        self._fitted = True
        return self

    def partial_fit(self, predictions: Predictions) -> Self:
        """Refuse: ranks exist only once the scores are fitted.

        Raises:
            InvalidInputError: always; :meth:`fit` takes all rows at once.
        """
        raise InvalidInputError("combine ranks fitted scores: give all rows to fit(predictions)")

    def merge(self, other: Score) -> Self:
        """Refuse, as :meth:`partial_fit`.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError("combine ranks fitted scores: give all rows to fit(predictions)")

    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the mean rank (B,) float64; 0 to 1 among the fit scores, beyond it outside.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        if not self._fitted:
            raise NotFittedError("combine is not fitted: call fit(predictions)")
        total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        for number, score in enumerate(self.scores):
            part = score.score(logits, features if score.needs_features else None).double()
            total = total + self._rank(number, part)
        return total / len(self.members)

    def why_not(self, predictions: Predictions) -> str | None:
        """Say in plain words why these rows cannot be scored, or None."""
        return self._first([score.why_not(predictions) for score in self.scores])

    def why_not_fit(self, predictions: Predictions) -> str | None:
        """Say in plain words why the scores cannot be fitted on these rows, or None."""
        return self._first([score.why_not_fit(predictions) for score in self.scores])

    def options(self) -> dict[str, Any]:
        """Return the scores with their settings, and the number of knots."""
        members = [{"name": score.name, "settings": score.settings()} for score in self.scores]
        return {"scores": members, "knots": self.knots}

    def settings(self) -> dict[str, Any]:
        """Return the settings that rebuild the score."""
        return self.options() | {"fitted": self._fitted}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Combined:
        """Rebuild a combination and its scores from their tensors and settings."""
        members = []
        for number, item in enumerate(settings["scores"]):
            prefix = f"members.{number}."
            own = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            members.append(score_class(item["name"]).from_state(own, item["settings"]))
        score = cls(members, settings["knots"])
        if settings["fitted"]:
            for number in range(len(members)):
                for kind in ("points", "levels", "spread"):
                    score.register_buffer(f"{kind}_{number}", tensors[f"{kind}_{number}"])
            score._fitted = True
        return score

    def _first(self, reasons: list[str | None]) -> str | None:
        for score, reason in zip(self.scores, reasons, strict=True):
            if reason is not None:
                return f"{score.name}: {reason}"
        return None

    def _rank(self, number: int, values: Tensor) -> Tensor:
        points = self.get_buffer(f"points_{number}")
        levels = self.get_buffer(f"levels_{number}")
        spread = self.get_buffer(f"spread_{number}")
        right = torch.searchsorted(points, values.contiguous()).clamp(1, len(points) - 1)
        low, high = points[right - 1], points[right]
        share = (values - low) / (high - low)
        inside = levels[right - 1] + share * (levels[right] - levels[right - 1])
        above = levels[-1] + torch.log1p((values - points[-1]).clamp_min(0) / spread)
        below = levels[0] - torch.log1p((points[0] - values).clamp_min(0) / spread)
        outside = torch.where(values > points[-1], above, below)
        return torch.where((values > points[-1]) | (values < points[0]), outside, inside)


def _curve(
    values: NDArray[np.float64], knots: int, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return distinct fit scores, their mid-ranks, and the interquartile range."""
    if not np.isfinite(values).all():
        raise DataError(
            f"combine cannot be fitted: {name} is not finite on "
            f"{int((~np.isfinite(values)).sum())} fit rows; remove rows with NaN or infinite logits"
        )
    points, counts = np.unique(values, return_counts=True)
    if len(points) < 2:
        raise DataError(
            f"combine cannot be fitted: {name} is {points[0]:.6g} on all {len(values)} fit rows, "
            "so it has no ranks"
        )
    levels = (np.cumsum(counts) - counts / 2) / len(values)
    low, high = np.quantile(values, [0.25, 0.75])
    spread = float(high - low) or float(points[-1] - points[0])
    kept = np.unique(np.linspace(0, len(points) - 1, min(knots, len(points))).round().astype(int))
    return points[kept], levels[kept], spread


def combine(*scores: str | Score, knots: int = 10_000) -> Combined:
    """Combine scores by the mean of their calibrated ranks; see :class:`Combined`.

    Raises:
        InvalidInputError: fewer than two scores, or an unknown name.

    Example:
        >>> combine("energy", "mahalanobis").needs_features
        True
    """
    return Combined(scores, knots)
