"""Scores, calibrators and cuts as programs of tensors alone, with a batch of any size.

What the gate computes with a search in sorted values (p-values, an isotonic curve, ranks) is here a
count of comparisons: ONNX has no ``searchsorted``, and the counts are the same integers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ebm_guard.calibration.calibrators import Calibrator, IsotonicCalibration
from ebm_guard.calibration.calibrators.auto import AutoCalibrator
from ebm_guard.energy import energy
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.class_conditional import AnyThreshold, ClassConditionalThreshold
from ebm_guard.ood import (
    FDBD,
    KNN,
    Combined,
    EnergyScale,
    FeatureScore,
    GMMEnergy,
    Mahalanobis,
    NNGuide,
    PluginScore,
    Score,
)
from ebm_guard.ood.feature_scores.base import EPS, unit
from ebm_guard.precision import KeepDouble

# Distances of equal rows of weights come out as sqrt(rounding) of their length, as in FDBD.
_SAME = 1e-7


class CountBelow(KeepDouble):
    """Count the values of a sorted group that lie below x: #{v_i < x}.

    Values lie in blocks of about sqrt(n): first whole blocks are counted by their last value, then
    the values of one block. That is 2 sqrt(n) comparisons a row instead of n. Equal to
    ``searchsorted(..., right=False)``; 0 for NaN.

    Args:
        groups: for each group its values, ascending and finite.

    Example:
        >>> count = CountBelow([torch.tensor([1.0, 2.0, 2.0, 5.0]).double()])
        >>> count(torch.tensor([2.0, 9.0]).double()).tolist()
        [1, 4]
    """

    blocks: Tensor
    ends: Tensor
    first: Tensor

    def __init__(self, groups: list[Tensor]) -> None:
        super().__init__()
        self.width = width = max(1, math.isqrt(max(len(group) for group in groups)))
        blocks, ends, first = [], [], [0]
        for group in groups:
            # One value of infinity at least, so that no row ever passes the last block.
            rows = len(group) // width + 1
            padded = torch.full((rows * width,), math.inf, dtype=torch.float64)
            padded[: len(group)] = group.double().cpu()
            blocks.append(padded.view(rows, width))
            ends.append(blocks[-1][:, -1])
            first.append(first[-1] + rows)
        table = nn.utils.rnn.pad_sequence(ends, batch_first=True, padding_value=math.inf)
        self.register_buffer("blocks", torch.cat(blocks))
        self.register_buffer("ends", table)
        self.register_buffer("first", torch.tensor(first[:-1]))

    def forward(self, values: Tensor, group: Tensor | None = None) -> Tensor:
        """Return counts (B,) int64 of values (B,) in their groups (B,), default the only one."""
        column = values.double()[:, None]
        if group is None:
            full = (self.ends < column).sum(dim=1)
            place = full
        else:
            full = (self.ends[group] < column).sum(dim=1)
            place = self.first[group] + full
        return full * self.width + (self.blocks[place] < column).sum(dim=1)


class Cuts(KeepDouble):
    """The threshold of a gate, global or by predicted class: accept and p-value.

    Args:
        threshold: as fitted.
    """

    group_of: Tensor
    group_cuts: Tensor
    sizes: Tensor

    def __init__(self, threshold: AnyThreshold) -> None:
        super().__init__()
        scores = threshold.scores.detach().cpu()
        self.by_class = isinstance(threshold, ClassConditionalThreshold)
        if isinstance(threshold, ClassConditionalThreshold):
            starts = threshold.starts.tolist()
            groups = [scores[a:b] for a, b in pairwise(starts)]
            cuts, group_of = threshold.group_cuts, threshold.group_of
        else:
            groups, cuts = [scores], threshold.cut[None]
            group_of = torch.zeros(1, dtype=torch.long)
        self.below = CountBelow(groups)
        self.register_buffer("group_of", group_of.detach().cpu().clone())
        self.register_buffer("group_cuts", cuts.detach().cpu().double().clone())
        sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
        self.register_buffer("sizes", sizes)

    def forward(self, score: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return accept (B,) bool and p-value (B,) float64 of scores (B,) and classes (B,)."""
        if not self.by_class:
            below = self.below(score)
            p_value = (1 + self.sizes - below.double()) / (self.sizes + 1)
            return score <= self.group_cuts, p_value
        group = self.group_of[classes]
        known, place = group >= 0, group.clamp_min(0)
        size = self.sizes[place]
        p_value = (1 + size - self.below(score, place).double()) / (size + 1)
        return known & (score <= self.group_cuts[place]), torch.where(known, p_value, 1.0)


class _Isotonic(nn.Module):
    def __init__(self, calibrator: IsotonicCalibration) -> None:
        super().__init__()
        self.calibrator = calibrator
        self.below = CountBelow([calibrator.log_odds])

    def log_probabilities(self, logits: Tensor) -> Tensor:
        exact, top = logits.double(), logits.argmax(dim=-1, keepdim=True)
        others = exact.scatter(-1, top, -math.inf)
        rest = torch.logsumexp(others, dim=-1, keepdim=True)
        share = self._curve((exact.gather(-1, top) - rest).squeeze(-1))[:, None]
        log_p = (others - rest + torch.log1p(-share)).scatter(-1, top, share.log())
        return log_p if logits.dtype == torch.float64 else log_p.float()

    def _curve(self, odds: Tensor) -> Tensor:
        corners, values = self.calibrator.log_odds, self.calibrator.values
        if len(values) == 1:
            return values.expand_as(odds)
        right = self.below(odds).clamp(1, len(values) - 1)
        start, end = corners[right - 1], corners[right]
        low, high = values[right - 1], values[right]
        at = ((odds - start) / (end - start)).clamp(0.0, 1.0)
        return low + at * (high - low)


def calibrator_module(calibrator: Calibrator) -> nn.Module:
    """Return a module whose ``log_probabilities`` is tensors alone."""
    if isinstance(calibrator, AutoCalibrator):
        calibrator = calibrator.chosen
    if isinstance(calibrator, IsotonicCalibration) and len(calibrator.values):
        return _Isotonic(calibrator)
    return calibrator


class _Features(nn.Module):
    """A score on features: the formula of one block, and NaN for rows that are not finite."""

    def __init__(self, score: FeatureScore) -> None:
        super().__init__()
        self.score = score

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        half = logits.dtype not in (torch.float32, torch.float64)
        wide = features if features.dtype == torch.float64 else features.float()
        found = self.rows(logits.float() if half else logits, wide)
        finite = torch.isfinite(logits).all(dim=1) & torch.isfinite(features).all(dim=1)
        return torch.where(finite, found, torch.nan)

    def rows(self, logits: Tensor, features: Tensor) -> Tensor:
        # `score` cuts the batch into blocks by its size, which would fix the size in a graph.
        return self.score._score(logits, features)


class _Neighbours(_Features):
    def rows(self, logits: Tensor, features: Tensor) -> Tensor:
        near: Tensor = self.score._near(unit(features.double()))  # type: ignore[operator]
        if isinstance(self.score, KNN):
            return near
        return -near * torch.logsumexp(logits.double(), dim=1)


class _Boundaries(_Features):
    """FDBD with all distances between classes at hand, instead of those of the batch's classes."""

    apart: Tensor

    def __init__(self, score: FDBD) -> None:
        super().__init__(score)
        weight = score.weight.detach().cpu()
        apart = torch.cdist(weight, weight)
        length = torch.linalg.vector_norm(weight, dim=1).amax()
        apart = torch.where(apart > _SAME * length, apart, torch.inf)
        self.register_buffer("apart", apart)

    def rows(self, logits: Tensor, features: Tensor) -> Tensor:
        logits = logits.double()
        mean = self.score.get_buffer("mean")
        away: Tensor = torch.linalg.vector_norm(features.double() - mean, dim=1)
        top, label = logits.max(dim=1, keepdim=True)
        margins = ((top - logits) / self.apart[label.squeeze(1)]).sum(dim=1)
        return -margins / (logits.shape[1] - 1) / away.clamp_min(EPS)


class _Distances(_Features):
    """Mahalanobis and the tied mixture, whose whitened lengths are taken at once."""

    def rows(self, logits: Tensor, features: Tensor) -> Tensor:
        score = self.score
        if not isinstance(score, (Mahalanobis, GMMEnergy)):
            raise TypeError(f"{score.name} has no whitened distances")
        centred = score._points(features) - score.origin
        apart = torch.addmm(score.lengths, centred, score.pull, alpha=-2.0)
        own = (centred @ score.whiten).square().sum(dim=1)
        if isinstance(score, GMMEnergy):
            squared = (apart + own[:, None]).clamp_min(0)
            return -torch.logsumexp(score.log_weights - squared / 2, dim=1)
        nearest = (apart.amin(dim=1) + own).clamp_min(0)
        if not score.relative:
            return nearest
        return nearest - (centred @ score.background).square().sum(dim=1)


class _Scaled(_Features):
    """SCALE, with bounds of one type: the ONNX exporter takes no clamp between int and float."""

    def rows(self, logits: Tensor, features: Tensor) -> Tensor:
        score = self.score
        if not isinstance(score, EnergyScale):
            raise TypeError(f"{score.name} scales no features")
        width = features.shape[1]
        kept = max(1, width - round(width * score.percentile / 100))
        largest = features.topk(kept, dim=1, sorted=False).values.sum(dim=1)
        ratio = torch.where(largest > 0, features.sum(dim=1) / largest, 1.0)
        scale = ratio.clamp(0.0, width / kept).exp()[:, None]
        dtype = torch.promote_types(features.dtype, score.weight.dtype)
        weight, bias = score.weight.to(dtype), score.bias.to(dtype)
        return energy(torch.addmm(bias, (features * scale).to(dtype), weight.T))


class _Combination(nn.Module):
    def __init__(self, score: Combined) -> None:
        super().__init__()
        self.needs = [member.needs_features for member in score.scores]
        self.members = nn.ModuleList([score_module(member) for member in score.scores])
        self.ranks = nn.ModuleList([_Ranks(score, number) for number in range(len(self.needs))])

    def forward(self, logits: Tensor, features: Tensor | None) -> Tensor:
        total = torch.zeros_like(logits[:, 0], dtype=torch.float64)
        for member, rank, needed in zip(self.members, self.ranks, self.needs, strict=True):
            total = total + rank(member(logits, features if needed else None).double())
        return total / len(self.needs)


class _Ranks(KeepDouble):
    def __init__(self, score: Combined, number: int) -> None:
        super().__init__()
        for name in ("points", "levels", "spread"):
            self.register_buffer(name, score.get_buffer(f"{name}_{number}").detach().cpu())
        self.below = CountBelow([self.get_buffer("points")])

    def forward(self, values: Tensor) -> Tensor:
        points, levels, spread = (self.get_buffer(n) for n in ("points", "levels", "spread"))
        right = self.below(values).clamp(1, len(points) - 1)
        low, high = points[right - 1], points[right]
        share = (values - low) / (high - low)
        inside = levels[right - 1] + share * (levels[right] - levels[right - 1])
        above = levels[-1] + torch.log1p((values - points[-1]).clamp_min(0) / spread)
        below = levels[0] - torch.log1p((points[0] - values).clamp_min(0) / spread)
        outside = torch.where(values > points[-1], above, below)
        return torch.where((values > points[-1]) | (values < points[0]), outside, inside)


# Scores whose own code depends on the size of the batch; of others the formula is taken as it is.
_KINDS: tuple[tuple[type[FeatureScore], type[_Features]], ...] = (
    (KNN, _Neighbours),
    (NNGuide, _Neighbours),
    (EnergyScale, _Scaled),
    (Mahalanobis, _Distances),
    (FDBD, _Boundaries),
)


def score_module(score: Score) -> nn.Module:
    """Return a score as a module from (logits, features) to (B,), tensors alone.

    Raises:
        InvalidInputError: the score is another library's detector.
    """
    if isinstance(score, PluginScore):
        raise InvalidInputError(
            f"{score.name} is a detector of another library ({score.options()['detector']}), whose "
            "code cannot become a part of an exported program; fit the guard with one of "
            "ebm_guard's scores (`ebm-guard list`)"
        )
    if isinstance(score, Combined):
        return _Combination(score)
    if not isinstance(score, FeatureScore):
        return score
    if isinstance(score, GMMEnergy) and score.covariance == "tied":
        return _Distances(score)
    return next((form for kind, form in _KINDS if isinstance(score, kind)), _Features)(score)
