"""Attacks that follow the gradient within a budget: FGSM and PGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ebm_guard.attacks.engine import StepRule, image_generators
from ebm_guard.attacks.geometry import ball_of, per_image
from ebm_guard.attacks.rows import Answer, Examples, State
from ebm_guard.errors import InvalidInputError


class PGD(StepRule[State]):
    """Projected gradient ascent: x <- P(x + a·steepest(g)), P onto the ball and the box.

    Args:
        num_steps: K >= 1.
        relative_step_size: a / epsilon; default 2.5 / K, so that the ball's far side is in reach.
        norm: ``linf`` (steepest = sign) or ``l2`` (steepest = g / ||g||).
        random_start: start anywhere in the ball, else at the image.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018,
        section 2.1. Differs from common code: every iterate is judged, not only the last, and
        images that are fooled are stepped no further.

    Example:
        >>> PGD(num_steps=10).relative_step_size
        0.25
    """

    name = "pgd"

    def __init__(
        self,
        num_steps: int = 20,
        relative_step_size: float | None = None,
        norm: str = "linf",
        *,
        random_start: bool = True,
    ) -> None:
        if num_steps < 1:
            raise InvalidInputError(f"got num_steps {num_steps}; needed at least 1")
        size = 2.5 / num_steps if relative_step_size is None else relative_step_size
        if not 0 < size < float("inf"):
            raise InvalidInputError(f"got relative_step_size {size!r}; needed a number > 0")
        self.ball = ball_of(norm)
        self.norm, self.num_steps = norm, num_steps
        self.relative_step_size, self.random_start = size, random_start

    def begin(
        self, examples: Examples, epsilon: float, start: Tensor | None, seed: Sequence[int]
    ) -> State:
        """Start at the given images, at a random point of the ball, or at the image."""
        return State(first_pixels(self, examples, epsilon, start, seed))

    def step(
        self, state: State, answer: Answer, examples: Examples, epsilon: float, index: int
    ) -> State:
        """Take one step of length a up the gradient."""
        if answer.gradient is None:
            raise InvalidInputError("a gradient attack got an answer without gradient")
        length = per_image(self.relative_step_size * epsilon, state.pixels)
        moved = state.pixels + length * self.ball.steepest(answer.gradient.to(state.pixels))
        return State(self.ball.project(moved, examples.pixels, epsilon))

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            **super().settings(),
            "relative_step_size": self.relative_step_size,
            "random_start": self.random_start,
        }


class FGSM(PGD):
    """One step of the whole budget: x + epsilon·steepest(g).

    References:
        Goodfellow et al., Explaining and Harnessing Adversarial Examples, ICLR 2015, section 4.

    Example:
        >>> FGSM().num_steps
        1
    """

    name = "fgsm"

    def __init__(self, norm: str = "linf") -> None:
        super().__init__(1, 1.0, norm, random_start=False)


def first_pixels(
    rule: Any, examples: Examples, epsilon: float, start: Tensor | None, seed: Sequence[int]
) -> Tensor:
    """Return the images a rule with ``ball`` and ``random_start`` starts from, within the ball."""
    if start is not None:
        return rule.ball.project(start.to(examples.pixels), examples.pixels, epsilon)  # type: ignore[no-any-return]
    if not rule.random_start:
        return examples.pixels
    generators = image_generators(examples.ids, seed)
    return rule.ball.random(examples.pixels, epsilon, generators)  # type: ignore[no-any-return]
