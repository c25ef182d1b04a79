"""The smallest change that fools: a whole curve of accuracy over epsilon from one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebm_guard.attacks.engine import Query, image_generators
from ebm_guard.attacks.geometry import Ball, ball_of
from ebm_guard.attacks.rows import Examples, joined, selected
from ebm_guard.errors import InvalidInputError

_GAMMA_LAST = 0.001
# An image on the boundary may fall back when it is scored in another batch: then it is moved out
# by these shares of its change.
_GROWTH = (0.0, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class MinimalOutcome:
    """The nearest adversarial image found of each image.

    Args:
        distance: (N,) ||x - x0|| of ``pixels``; 0 where the clean image succeeds already, inf
            where none was found. An upper bound of the true smallest distance.
        pixels: (N, C, H, W) the adversarial images; the clean ones where none was found.
        found: (N,) bool.
        gradients: (N,) int64, gradients that each image cost.
        forwards: (N,) int64, forward passes that each image cost.
    """

    distance: Tensor
    pixels: Tensor
    found: Tensor
    gradients: Tensor
    forwards: Tensor

    def select(self, rows: Tensor | slice) -> MinimalOutcome:
        """Return these rows."""
        return selected(self, rows)

    @property
    def median(self) -> float:
        """Median distance over all images; inf where half of them or more were not fooled."""
        return float(np.median(self.distance.double().cpu().numpy()))

    def curve(self, epsilons: Sequence[float]) -> list[float]:
        """Compute the accuracy at each radius: the share of images with distance > epsilon.

        Falls with epsilon by construction; at 0 it is the clean accuracy. An upper bound of the
        robust accuracy, as of any attack.

        Example:
            >>> nothing = torch.zeros(2)
            >>> outcome = MinimalOutcome(
            ...     torch.tensor([0.0, 0.1]), nothing, nothing, nothing, nothing)
            >>> outcome.curve([0, 0.05, 0.2])
            [0.5, 0.5, 0.0]
        """
        return [float((self.distance.double() > epsilon).double().mean()) for epsilon in epsilons]


@dataclass(frozen=True)
class _Schedule:
    """Step sizes that fall along half a cosine from the first step to the last."""

    num_steps: int
    step_size: float
    gamma: float

    def at(self, index: int) -> tuple[float, float]:
        share = (1 + math.cos(math.pi * index / self.num_steps)) / 2
        last = self.step_size / 100
        return (
            last + (self.step_size - last) * share,
            _GAMMA_LAST + (self.gamma - _GAMMA_LAST) * share,
        )


def minimal_distance(
    query: Query,
    examples: Examples,
    *,
    norm: str = "linf",
    num_steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    seed: Sequence[int] = (0,),
) -> MinimalOutcome:
    """Search the nearest adversarial image of each image (FMN).

    The radius r of a ball follows the boundary while the image climbs the objective in it:
    x <- P_r(x + a·g/||g||_2); r <- min(r·(1-gamma), best distance) where the attack succeeds, else
    r·(1+gamma), or, before the first success, ||x - x0|| + |objective| / ||g||_dual: the distance
    to the boundary of a linear objective. a and gamma fall along half a cosine, to a/100 and 0.001.

    Args:
        query: the model and the goal. The goal's ``success`` decides, so a gate can be in it. Its
            objective should cross 0 where success begins, as ``Misclassify("margin")`` does; with
            others only the first radius is worse.
        examples: the images.
        norm: ``linf`` or ``l2``.
        num_steps: gradients per image.
        step_size: a of the first step, a Euclidean length in pixel units for both norms.
        gamma: relative change of the radius at the first step, in (0.001, 1).
        seed: whole numbers >= 0, of the steps where the gradient is zero everywhere.

    Returns:
        One row for each image, in order. Every image found was scored again at the end, in
        other batches than those of the search.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Pintor et al., Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints,
        NeurIPS 2021, algorithm 1. Differs: the image after the last step is judged too; images
        wrong from the start are not stepped; the parts of g that leave the box are dropped; before
        the first success the radius is 0.1 % larger, without which the boundary of a linear model
        is met and never crossed.

    Example:
        >>> from ebm_guard.attacks import Misclassify
        >>> from ebm_guard.model.classifier import ClassifierOutput
        >>> forward = lambda pixels: ClassifierOutput(
        ...     torch.cat([pixels.flatten(1), 1 - pixels.flatten(1)], dim=1), None)
        >>> examples = Examples.of(torch.full((1, 1, 1, 1), 0.6), torch.tensor([0]))
        >>> outcome = minimal_distance(Query(forward, Misclassify("margin")), examples)
        >>> round(float(outcome.distance), 3)
        0.1
    """
    if num_steps < 1:
        raise InvalidInputError(f"got num_steps {num_steps}; needed at least 1")
    if not 0 < step_size < math.inf:
        raise InvalidInputError(f"got step_size {step_size!r}; needed a number > 0")
    if not _GAMMA_LAST < gamma < 1:
        raise InvalidInputError(f"got gamma {gamma!r}; needed a number in ({_GAMMA_LAST}, 1)")
    ball, schedule = ball_of(norm), _Schedule(num_steps, step_size, gamma)
    examples = query.goal.prepare(query.forward, examples)
    plain = query.forwards_per_answer[0]
    clean = query.answer(examples.pixels, examples, gradient=False).success
    outcome = _untouched(examples, clean.to(examples.pixels.device), plain)
    rows = torch.nonzero(~outcome.found).flatten()
    if not len(rows):
        return outcome
    standing = examples.select(rows)
    parts = [
        _search(
            query, standing.select(slice(first, first + query.batch_size)), ball, schedule, seed
        )
        for first in range(0, len(standing), query.batch_size)
    ]
    found = _confirmed(query, standing, joined(parts), ball)
    outcome.pixels[rows], outcome.distance[rows] = found.pixels, found.distance
    outcome.found[rows] = found.found
    outcome.gradients[rows.cpu()] = found.gradients
    outcome.forwards[rows.cpu()] += found.forwards
    return outcome


def _untouched(examples: Examples, clean: Tensor, forwards: int) -> MinimalOutcome:
    """Return the outcome before the search: distance 0 where the clean image succeeds."""
    n = len(examples)
    return MinimalOutcome(
        distance=torch.zeros(n, device=clean.device).masked_fill(~clean, math.inf),
        pixels=examples.pixels.clone(),
        found=clean.clone(),
        gradients=torch.zeros(n, dtype=torch.int64),
        forwards=torch.full((n,), forwards, dtype=torch.int64),
    )


def _search(
    query: Query, examples: Examples, ball: Ball, schedule: _Schedule, seed: Sequence[int]
) -> MinimalOutcome:
    centre = pixels = examples.pixels
    generators = image_generators(examples.ids, seed)
    farthest = ball.distance((centre < 0.5).to(centre), centre)
    radius = torch.full_like(farthest, math.inf)
    distance, best = radius, centre
    for index in range(schedule.num_steps + 1):
        last = index == schedule.num_steps
        answer = query.answer(pixels, examples, gradient=not last)
        success, here = answer.success.to(centre.device), ball.distance(pixels, centre)
        better = success & (here < distance)
        distance = torch.where(better, here, distance)
        best = torch.where(better[:, None, None, None], pixels, best)
        if last or answer.gradient is None:
            break
        objective = answer.objective.to(centre)
        gradient = _within_box(answer.gradient.to(centre), pixels)
        still = (gradient == 0).flatten(1).all(dim=1)
        size, gamma = schedule.at(index)
        guess = here + objective.abs() / _dual_norm(ball, gradient)
        # A little beyond it: the boundary of a linear model would be met and never crossed.
        guess = guess * (1 + _GAMMA_LAST)
        outside = torch.where(distance < math.inf, radius * (1 + gamma), guess)
        inside = torch.minimum(radius * (1 - gamma), distance)
        # NaN comes from a zero objective over a zero gradient.
        radius = torch.where(success, inside, outside).nan_to_num(math.inf).minimum(farthest)
        direction = ball_of("l2").steepest(gradient)
        if bool(still.any()):
            # On a plateau every direction is as good; a random walk leads off it.
            draws = [generators[int(row)] for row in torch.nonzero(still)]
            walk = [torch.from_numpy(draw.standard_normal(centre.shape[1:])) for draw in draws]
            direction[still] = ball_of("l2").steepest(torch.stack(walk).to(centre))
        moved = pixels + size * direction
        pixels = ball.project(moved, centre, radius)
    plain, with_gradient = query.forwards_per_answer
    steps = torch.full((len(examples),), schedule.num_steps, dtype=torch.int64)
    forwards = steps * with_gradient + plain
    return MinimalOutcome(distance, best, distance < math.inf, steps * query.eot_samples, forwards)


def _confirmed(
    query: Query, examples: Examples, found: MinimalOutcome, ball: Ball
) -> MinimalOutcome:
    """Score the images found again; what fails is moved out a little, or counts as not found."""
    centre, pixels = examples.pixels, found.pixels.clone()
    forwards, held = found.forwards.clone(), torch.zeros_like(found.found)
    for growth in _GROWTH:
        rows = torch.nonzero(found.found & ~held).flatten()
        if not len(rows):
            break
        change = found.pixels[rows] - centre[rows]
        grown = (found.pixels[rows] + growth * change).clamp(0, 1)
        success = query.answer(grown, examples.select(rows), gradient=False).success
        success = success.to(held.device)
        forwards[rows.cpu()] += query.forwards_per_answer[0]
        pixels[rows[success]] = grown[success]
        held[rows] = success
    pixels[~held] = centre[~held]
    distance = ball.distance(pixels, centre).masked_fill(~held, math.inf)
    return MinimalOutcome(distance, pixels, held, found.gradients, forwards)


def _within_box(gradient: Tensor, pixels: Tensor) -> Tensor:
    """Drop the parts that would move a pixel at 0 or 1 out of the box."""
    blocked = ((pixels <= 0) & (gradient < 0)) | ((pixels >= 1) & (gradient > 0))
    return gradient.masked_fill(blocked, 0)


def _dual_norm(ball: Ball, gradient: Tensor) -> Tensor:
    """Compute the largest climb of a linear objective in a unit ball, <g, steepest(g)>, (B,)."""
    return (gradient * ball.steepest(gradient)).flatten(1).sum(dim=1)
