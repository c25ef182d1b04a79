"""The square attack: random search that needs no gradient, only the objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.attacks.engine import StepRule, image_generators
from ebm_guard.attacks.geometry import TOLERANCE, Ball, ball_of
from ebm_guard.attacks.rows import Answer, Examples, State
from ebm_guard.errors import InvalidInputError

# Where p is halved in a run of 10,000 queries; other lengths rescale these.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_COLOUR_DRAWS = 10


@dataclass(frozen=True)
class SquareState(State):
    """A proposal for each image, beside the best image so far.

    Args:
        pixels: (B, C, H, W) the proposals.
        best: (B, C, H, W) the images of the highest objective so far.
        objective: (B,) of ``best``; -inf before the first answer.
        generators: one for each image.
    """

    best: Tensor
    objective: Tensor
    generators: list[np.random.Generator]


class Square(StepRule[SquareState]):
    """Random search: recolour one random square; keep it only where the objective rises.

    Per image and step, a square of side h ~ sqrt(p·H·W) is drawn; p starts at ``p_init`` and is
    halved on the way.

    - ``linf``: the start is vertical stripes x0 ± epsilon; each channel of the square is moved by
      ± 2·epsilon and then projected, so that pixels stay at the edge of the ball.
    - ``l2``: the start is a grid of tiles with two bumps each, one up and one down; then the
      change in a second square is erased, and its length moves to such a tile in the first.

    It works with any goal, also with a gate whose score has no gradient. Run it with ``until``
    ``success`` or ``best``: the last image is a proposal, not the best one.

    Args:
        num_steps: queries after the start.
        norm: ``linf`` or ``l2``.
        p_init: share of the pixels in the first square, in (0, 1].

    Raises:
        InvalidInputError: settings out of range.

    References:
        Andriushchenko et al., Square Attack: A Query-Efficient Black-Box Adversarial Attack via
        Random Search, ECCV 2020, algorithms 1 to 3 and equation 2. Differs from common code:
        squares are drawn per image, not per batch, so that results do not hang on the batch, and
        reach every place of the image; colours that would change nothing are drawn again.

    Example:
        >>> Square(num_steps=200).needs_gradient
        False
    """

    name = "square"
    needs_gradient = False

    def __init__(self, num_steps: int = 5000, norm: str = "linf", p_init: float = 0.8) -> None:
        if num_steps < 1:
            raise InvalidInputError(f"got num_steps {num_steps}; needed at least 1 query")
        if not 0 < p_init <= 1:
            raise InvalidInputError(f"got p_init {p_init!r}; needed a share of pixels in (0, 1]")
        self.ball = ball_of(norm)
        self.norm, self.num_steps, self.p_init = norm, num_steps, p_init

    def begin(
        self, examples: Examples, epsilon: float, start: Tensor | None, seed: Sequence[int]
    ) -> SquareState:
        """Start at the given images, at stripes (linf) or at a grid of tiles (l2)."""
        centre = examples.pixels
        generators = image_generators(examples.ids, seed)
        if start is not None:
            pixels = self.ball.project(start.to(centre), centre, epsilon)
        elif self.norm == "linf":
            pixels = _stripes(self.ball, centre, epsilon, generators)
        else:
            pixels = _tiles(self.ball, centre, epsilon, generators)
        worst = torch.full((len(centre),), -torch.inf, device=centre.device)
        return SquareState(pixels, pixels, worst, generators)

    def step(
        self, state: SquareState, answer: Answer, examples: Examples, epsilon: float, index: int
    ) -> SquareState:
        """Keep what is better, and propose the next square."""
        objective = answer.objective.to(state.objective)
        # NaN is not larger than anything: such proposals are dropped.
        better = objective > state.objective
        best = torch.where(better[:, None, None, None], state.pixels, state.best)
        objective = torch.where(better, objective, state.objective)
        side = self.side(index, *best.shape[2:])
        propose = _recoloured if self.norm == "linf" else _exchanged
        pixels = propose(self.ball, best, examples.pixels, epsilon, side, state.generators)
        return SquareState(pixels, best, objective, state.generators)

    def side(self, index: int, height: int, width: int) -> int:
        """Return the side of the square at a step, in pixels; odd and at least 3 for ``l2``."""
        scaled = index * 10_000 // self.num_steps
        p = self.p_init / 2 ** sum(scaled > limit for limit in _HALVINGS)
        side = max(1, round(math.sqrt(p * height * width)))
        if self.norm == "l2":
            side = max(3, side + (side % 2 == 0))
        return min(side, height, width)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {**super().settings(), "p_init": self.p_init}


def bumps(side: int) -> Tensor:
    """Return the change of a tile in the l2 attack: two bumps of opposite signs, length 1.

    eta(r, s) = sum_{j = d+1}^{n+1} 1/j^2 with d the Chebyshev distance to the middle of a half and
    n = floor(side / 2); the upper half is positive, the lower one negative.

    Args:
        side: pixels, >= 1.

    Returns:
        (side, side) float64.

    References:
        Andriushchenko et al., ECCV 2020, equation 2.

    Example:
        >>> bumps(2)[0] + bumps(2)[1]
        tensor([0., 0.], dtype=torch.float64)
    """
    upper = side // 2
    found = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    length: Tensor = torch.linalg.vector_norm(found)
    return found / length


def _bump(height: int, width: int) -> Tensor:
    rows = (torch.arange(height) - height // 2).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()[None, :]
    terms = 1 / torch.arange(1, width // 2 + 2, dtype=torch.float64) ** 2
    # tails[d] = sum of the terms from j = d + 1 on.
    tails = terms.flip(0).cumsum(0).flip(0)
    return tails[torch.maximum(rows, columns)]


def _stripes(
    ball: Ball, centre: Tensor, epsilon: float, generators: Sequence[np.random.Generator]
) -> Tensor:
    _, channels, _, width = centre.shape
    signs = _signs(generators, (channels, 1, width), centre)
    return ball.project(centre + epsilon * signs, centre, epsilon)


def _recoloured(
    ball: Ball,
    best: Tensor,
    centre: Tensor,
    epsilon: float,
    side: int,
    generators: Sequence[np.random.Generator],
) -> Tensor:
    inside = _window(_corners(generators, side, best), side, best)
    proposal = best.clone()
    rows = torch.arange(len(best), device=best.device)
    for _ in range(_COLOUR_DRAWS):
        drawing = [generators[int(row)] for row in rows]
        signs = _signs(drawing, (best.shape[1], 1, 1), best)
        moved = ball.project(best[rows] + 2 * epsilon * signs, centre[rows], epsilon)
        proposal[rows] = torch.where(inside[rows], moved, best[rows])
        # A square that already has these colours would waste a query.
        rows = rows[ball.distance(proposal[rows], best[rows]) <= TOLERANCE]
        if not len(rows):
            break
    return proposal


def _tiles(
    ball: Ball, centre: Tensor, epsilon: float, generators: Sequence[np.random.Generator]
) -> Tensor:
    _, channels, height, width = centre.shape
    side = max(1, min(height, width) // 5)
    down, across = height // side, width // side
    signs = _signs(generators, (channels, down, across), centre)
    turned = _signs(generators, (1, down, across), centre) > 0
    tile = bumps(side).to(centre)
    upright, lying = tile.repeat(down, across), tile.T.repeat(down, across)
    pattern = torch.where(_spread(turned, side), lying, upright) * _spread(signs, side)
    change = torch.zeros_like(centre)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    change[:, :, top : top + down * side, left : left + across * side] = pattern
    return ball.project(centre + epsilon * ball.steepest(change), centre, epsilon)


def _exchanged(
    ball: Ball,
    best: Tensor,
    centre: Tensor,
    epsilon: float,
    side: int,
    generators: Sequence[np.random.Generator],
) -> Tensor:
    change = best - centre
    corners = _corners(generators, side, best)
    first = _window(corners, side, best)
    second = _window(_corners(generators, side, best), side, best)
    turned = _signs(generators, (1, 1, 1), best).flatten() > 0
    signs = _signs(generators, (best.shape[1], 1, 1), best)
    # Clipping to the box leaves some of the radius unused: it is given to the new tile.
    unused = (epsilon**2 - change.square().sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0)
    available = (_length(change * (first | second)) ** 2 + unused / best.shape[1]).sqrt()
    old = change * first
    tile = signs * _placed(corners, side, turned, best) + old / _length(old).clamp(min=1e-12)
    tile = tile / _length(tile).clamp(min=1e-12) * available
    changed = torch.where(first, tile, torch.where(second, 0.0, change))
    return ball.project(centre + changed, centre, epsilon)


def _signs(
    generators: Sequence[np.random.Generator], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    drawn = np.stack([generator.integers(0, 2, size=shape) for generator in generators])
    return torch.from_numpy(2 * drawn - 1).to(like)


def _corners(generators: Sequence[np.random.Generator], side: int, like: Tensor) -> Tensor:
    highest = np.array(like.shape[2:]) - side
    drawn = [generator.integers(0, highest, endpoint=True) for generator in generators]
    return torch.from_numpy(np.stack(drawn)).to(like.device)


def _offsets(corners: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(like.shape[2], device=like.device) - corners[:, :1]
    columns = torch.arange(like.shape[3], device=like.device) - corners[:, 1:]
    return rows[:, :, None], columns[:, None, :]


def _window(corners: Tensor, side: int, like: Tensor) -> Tensor:
    """Mark the square of each image, (B, 1, H, W) bool."""
    rows, columns = _offsets(corners, like)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return inside[:, None]


def _placed(corners: Tensor, side: int, turned: Tensor, like: Tensor) -> Tensor:
    """Put a tile, or the one turned by 90 degrees, at each corner; (B, 1, H, W), 0 elsewhere."""
    tile = bumps(side).to(like)
    both = torch.stack([tile, tile.T])
    rows, columns = (part.clamp(0, side - 1) for part in _offsets(corners, like))
    placed = both[turned.long()[:, None, None], rows, columns]
    return placed[:, None] * _window(corners, side, like)


def _spread(values: Tensor, side: int) -> Tensor:
    return values.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def _length(change: Tensor) -> Tensor:
    """Compute the Euclidean length of each channel, (B, C, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(change, dim=(2, 3), keepdim=True)
    return length
