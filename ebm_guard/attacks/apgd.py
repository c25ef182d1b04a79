"""APGD: gradient ascent that chooses its step sizes itself, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebm_guard.attacks.engine import StepRule
from ebm_guard.attacks.geometry import ball_of, per_image
from ebm_guard.attacks.gradient import first_pixels
from ebm_guard.attacks.rows import Answer, Examples, State
from ebm_guard.errors import InvalidInputError

MOMENTUM = 0.75


@dataclass(frozen=True)
class APGDState(State):
    """What APGD remembers of each image.

    Args:
        pixels: (B, C, H, W) the images to ask about next.
        previous: (B, C, H, W) the images of the step before.
        step_size: (B,) in pixel units.
        objective: (B,) at the images asked about last.
        best: (B,) the highest objective so far.
        best_pixels: (B, C, H, W) where it was found.
        best_gradient: (B, C, H, W) the gradient there.
        increases: (B,) int64, steps since the last checkpoint that raised the objective.
        checked: (B,) the highest objective at the last checkpoint.
        halved: (B,) bool, whether the last checkpoint halved the step size.
    """

    previous: Tensor
    step_size: Tensor
    objective: Tensor
    best: Tensor
    best_pixels: Tensor
    best_gradient: Tensor
    increases: Tensor
    checked: Tensor
    halved: Tensor


class APGD(StepRule[APGDState]):
    """Gradient ascent with momentum; the step size halves where an image gets no further.

    z = P(x_k + η·steepest(g)),  x_{k+1} = P(x_k + α(z - x_k) + (1 - α)(x_k - x_{k-1})),

    P onto the ball and the box, α = 0.75 (1 in the first step), η = 2·epsilon at first. At each
    checkpoint (see :func:`checkpoints`) an image halves η and starts again from its best point,
    with the gradient there, if one of these holds:

    1. fewer than ``rho`` of the steps since the last checkpoint raised its objective;
    2. the last checkpoint did not halve its η, and its best objective has not risen since.

    With ``Misclassify("ce")`` it is APGD-CE, with ``Misclassify("dlr")`` APGD-DLR, and with
    ``TargetedMisclassify(rank)`` for rank = 1, 2, ... APGD-T.

    Args:
        num_steps: K >= 1.
        norm: ``linf`` (steepest = sign) or ``l2`` (steepest = g / ||g||).
        random_start: start anywhere in the ball, else at the image.
        rho: share of rising steps, in (0, 1].

    Raises:
        InvalidInputError: settings out of range.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
        Parameter-free Attacks, ICML 2020, Algorithm 1. Differs from the authors' code: images that
        are fooled are stepped no further; starts are uniform in the ball, not on its surface; the
        first step is compared with the start, and condition 2 holds at the first checkpoint too,
        as in the paper.

    Example:
        >>> APGD().settings()
        {'norm': 'linf', 'num_steps': 100, 'random_start': True, 'rho': 0.75}
    """

    name = "apgd"

    def __init__(
        self,
        num_steps: int = 100,
        norm: str = "linf",
        *,
        random_start: bool = True,
        rho: float = 0.75,
    ) -> None:
        if num_steps < 1:
            raise InvalidInputError(f"got num_steps {num_steps}; needed at least 1")
        if not 0 < rho <= 1:
            raise InvalidInputError(f"got rho {rho!r}; needed a share in (0, 1]")
        self.ball = ball_of(norm)
        self.norm, self.num_steps = norm, num_steps
        self.random_start, self.rho = random_start, rho
        self._checkpoints = checkpoints(num_steps)

    def begin(
        self, examples: Examples, epsilon: float, start: Tensor | None, seed: Sequence[int]
    ) -> APGDState:
        """Start at the given images, at a random point of the ball, or at the image."""
        pixels = first_pixels(self, examples, epsilon, start, seed)
        every = pixels.new_zeros(len(pixels))
        return APGDState(
            pixels=pixels,
            previous=pixels,
            step_size=every + 2 * epsilon,
            # The start raises nothing, and is the best so far.
            objective=every + torch.inf,
            best=every - torch.inf,
            best_pixels=pixels,
            best_gradient=torch.zeros_like(pixels),
            increases=every.long(),
            checked=every,
            halved=every.bool(),
        )

    def step(
        self, state: APGDState, answer: Answer, examples: Examples, epsilon: float, index: int
    ) -> APGDState:
        """Take one step; at a checkpoint, first halve step sizes and go back to the best points."""
        if answer.gradient is None:
            raise InvalidInputError("a gradient attack got an answer without gradient")
        gradient = answer.gradient.to(state.pixels)
        state = _noted(state, answer.objective.to(state.best), gradient)
        if index == 0:
            state = replace(state, checked=state.best)
        if index in self._checkpoints:
            stuck = self._stuck(state, self._checkpoints[index])
            state = _restarted(state, stuck)
            gradient = state.best_gradient.where(_mask(stuck, gradient), gradient)
        pixels, centre = state.pixels, examples.pixels
        length = per_image(state.step_size, pixels)
        aim = self.ball.project(pixels + length * self.ball.steepest(gradient), centre, epsilon)
        share = MOMENTUM if index else 1.0
        moved = pixels + share * (aim - pixels) + (1 - share) * (pixels - state.previous)
        return replace(state, pixels=self.ball.project(moved, centre, epsilon), previous=pixels)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {**super().settings(), "random_start": self.random_start, "rho": self.rho}

    def _stuck(self, state: APGDState, steps: int) -> Tensor:
        few = state.increases < self.rho * steps
        still = ~state.halved & (state.best <= state.checked)
        return few | still


def checkpoints(num_steps: int) -> dict[int, int]:
    """Return the steps at which APGD looks back, and how many steps each looks back over.

    Shares of the budget p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06),
    each part in whole steps, at least one.

    Example:
        >>> list(checkpoints(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    length, shorter, shortest = (max(share * num_steps // 100, 1) for share in (22, 3, 6))
    found, at = {}, length
    while at < num_steps:
        found[at] = length
        length = max(length - shorter, shortest)
        at += length
    return found


def _noted(state: APGDState, objective: Tensor, gradient: Tensor) -> APGDState:
    """Count increases, and keep the best point with its gradient; NaN is never better."""
    better = objective > state.best
    images = _mask(better, gradient)
    return replace(
        state,
        objective=objective,
        increases=state.increases + (objective > state.objective),
        best=objective.where(better, state.best),
        best_pixels=state.pixels.where(images, state.best_pixels),
        best_gradient=gradient.where(images, state.best_gradient),
    )


def _restarted(state: APGDState, stuck: Tensor) -> APGDState:
    """Halve the step size of stuck images and put them at their best point."""
    return replace(
        state,
        pixels=state.best_pixels.where(_mask(stuck, state.pixels), state.pixels),
        step_size=torch.where(stuck, state.step_size / 2, state.step_size),
        increases=torch.zeros_like(state.increases),
        checked=state.best,
        halved=stuck,
    )


def _mask(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))
