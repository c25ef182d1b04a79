"""Balls around images: distances, projections, random points and steepest steps of each norm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, suggest

# What float32 arithmetic may add to a distance, in pixel units.
TOLERANCE = 1e-6


class Ball(ABC):
    """The set {x : ||x - x0|| <= epsilon, 0 <= x <= 1} around each image x0, in one norm.

    Tensors are (B, C, H, W); ``epsilon`` is a number, or (B,) with one radius for each image.
    """

    name = ""

    @abstractmethod
    def distance(self, pixels: Tensor, centre: Tensor) -> Tensor:
        """Compute ||x - x0|| of each image, (B,)."""

    @abstractmethod
    def project(self, pixels: Tensor, centre: Tensor, epsilon: float | Tensor) -> Tensor:
        """Move each image to the ball, and then into the box [0, 1]."""

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the step of norm 1 that climbs most; 0 where the gradient is 0."""

    @abstractmethod
    def random(
        self, centre: Tensor, epsilon: float | Tensor, generators: Sequence[np.random.Generator]
    ) -> Tensor:
        """Draw a point of each ball, from each image's own generator."""


class Linf(Ball):
    """The largest change of any pixel: ||d||_inf = max |d|."""

    name = "linf"

    def distance(self, pixels: Tensor, centre: Tensor) -> Tensor:
        """Compute max |x - x0|, (B,)."""
        return (pixels - centre).abs().flatten(1).amax(dim=1)

    def project(self, pixels: Tensor, centre: Tensor, epsilon: float | Tensor) -> Tensor:
        """Clip each pixel to [x0 - epsilon, x0 + epsilon], and to [0, 1]."""
        radius = per_image(epsilon, centre)
        return torch.maximum(torch.minimum(pixels, centre + radius), centre - radius).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return sign(g)."""
        return gradient.sign()

    def random(
        self, centre: Tensor, epsilon: float | Tensor, generators: Sequence[np.random.Generator]
    ) -> Tensor:
        """Draw uniformly from the part of the ball that lies in the box."""
        radius = per_image(epsilon, centre)
        low, high = (centre - radius).clamp(min=0), (centre + radius).clamp(max=1)
        share = _stacked([draw.random(centre.shape[1:]) for draw in generators], centre)
        return low + (high - low) * share


class L2(Ball):
    """The Euclidean length of the change: ||d||_2 = sqrt(sum d^2)."""

    name = "l2"

    def distance(self, pixels: Tensor, centre: Tensor) -> Tensor:
        """Compute the Euclidean distance, (B,)."""
        return _lengths(pixels - centre)

    def project(self, pixels: Tensor, centre: Tensor, epsilon: float | Tensor) -> Tensor:
        """Shorten each change to epsilon, then clip to [0, 1].

        Clipping comes last: it moves every pixel towards x0, so the radius still holds.
        """
        change = pixels - centre
        length = per_image(_lengths(change), centre)
        # A millionth less: the length itself is rounded.
        radius = per_image(epsilon, centre) * (1 - 1e-6)
        shrunk = change * (radius / length.clamp(min=1e-12)).clamp(max=1)
        found = centre + shrunk
        # Rounding may add half a unit to each of 10^5 pixels: round towards x0 instead.
        beyond = (found - centre).abs() > shrunk.abs()
        return torch.where(beyond, torch.nextafter(found, centre), found).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return g / ||g||_2.

        Divided by max |g| first: the squares of small gradients underflow.
        """
        largest = per_image(gradient.abs().flatten(1).amax(dim=1), gradient)
        scaled = gradient / largest.where(largest > 0, 1.0)
        length = per_image(_lengths(scaled), gradient)
        return scaled / length.where(length > 0, 1.0)

    def random(
        self, centre: Tensor, epsilon: float | Tensor, generators: Sequence[np.random.Generator]
    ) -> Tensor:
        """Draw uniformly from the ball, then clip to the box."""
        shape = centre.shape[1:]
        size = int(np.prod(shape))
        drawn = []
        for generator in generators:
            direction = generator.standard_normal(shape)
            radius = generator.random() ** (1 / size)
            drawn.append(direction * radius / np.linalg.norm(direction))
        radius = per_image(epsilon, centre)
        return self.project(centre + radius * _stacked(drawn, centre), centre, epsilon)


_BALLS: dict[str, Ball] = {ball.name: ball for ball in (Linf(), L2())}
NORMS = tuple(_BALLS)


def ball_of(norm: str) -> Ball:
    """Return the ball of a norm by its name.

    Raises:
        InvalidInputError: unknown name.

    Example:
        >>> ball_of("l2").distance(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
        tensor([2.])
    """
    if norm not in _BALLS:
        raise InvalidInputError(
            f"got norm {norm!r}; known are {', '.join(_BALLS)}{suggest(norm, _BALLS)}"
        )
    return _BALLS[norm]


def per_image(values: float | Tensor, like: Tensor) -> Tensor:
    """Shape one value for each image (B,), or one for all, to multiply (B, C, H, W)."""
    found = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return found.reshape(-1, *[1] * (like.ndim - 1))


def _lengths(changes: Tensor) -> Tensor:
    # Not vector_norm: on a CPU its float32 sum is off by 1e-4 for images of 224 pixels.
    return changes.flatten(1).square().sum(dim=1).sqrt()


def _stacked(rows: list[np.ndarray], like: Tensor) -> Tensor:
    # Drawn in float64 on the CPU: the same numbers whatever the device and the batch.
    return torch.from_numpy(np.stack(rows)).to(like)
