"""Chains on a part of the values: the others are known, and stay what they are bit by bit.

Where x = (u, k) with k known, chains on u alone with the energy E(u, k) follow

    p(u | k) = exp(-E(u, k)) / integral of exp(-E(u', k)) over u',

the conditional of exp(-E). So a sampler gets the unknown values as its points, (B, U), and knows of
no others: momentum, noise, walls and the acceptance test are of the unknown values, whatever the
sampler does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.sampler import Chains, EnergyFunction, Sampler, Samples, check_start


class Unknown:
    """The unknown values of a batch as rows (B, U), and the way back.

    Args:
        points: (B, ...), floating; its known values are kept.
        known: bool, (B, ...) or of a shape that broadcasts to it, such as (B, 1, H, W); True =
            known. Each row has the same number of unknown values.

    Attributes:
        size: U, the unknown values of a row.

    Raises:
        InvalidInputError: no mask of this shape, nothing unknown, or another number of unknown
            values from row to row.

    Example:
        >>> points = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> unknown = Unknown(points, torch.tensor([[True, False, True], [False, True, True]]))
        >>> unknown.pack(points).tolist()
        [[2.0], [4.0]]
        >>> unknown.unpack(torch.tensor([[9.0], [8.0]])).tolist()
        [[1.0, 9.0, 3.0], [8.0, 5.0, 6.0]]
    """

    def __init__(self, points: Tensor, known: Tensor) -> None:
        self._hidden = ~check_mask(known, points.shape).to(points.device)
        counts = self._hidden.flatten(1).sum(dim=1)
        low, high = int(counts.min()), int(counts.max())
        if low != high or not low:
            raise InvalidInputError(
                f"got a mask with {low} to {high} unknown values in a row; chains that run "
                "together need the same number of at least one. Run rows of other numbers apart"
            )
        self.size = low
        self._points = points.detach().clone()

    def pack(self, points: Tensor) -> Tensor:
        """Take the unknown values (B, U) out of points (B, ...)."""
        return points[self._hidden].view(len(points), self.size)

    def unpack(self, values: Tensor) -> Tensor:
        """Put values (B, U) beside the known ones: points (B, ...), differentiable in values."""
        return self._points.to(values.dtype).masked_scatter(self._hidden, values)

    def energy(self, energy: EnergyFunction) -> EnergyFunction:
        """Return E(u, k) as a function of u (B, U)."""
        return lambda values: energy(self.unpack(values))


def run_masked(
    sampler: Sampler,
    energy: EnergyFunction,
    start: Tensor,
    known: Tensor,
    generator: torch.Generator,
    *,
    num_steps: int | None = None,
    observe: Callable[[int, Chains], None] | None = None,
) -> Samples:
    """Run chains on the unknown values alone.

    Args:
        sampler: any; its box holds for the unknown values.
        energy: E(x), (B, ...) to (B,), of whole points.
        start: (B, ...): the known values, and where the unknown ones start.
        known: bool, (B, ...) or broadcastable, True = known; see :class:`Unknown`.
        generator: source of all random numbers, on the device of ``start``.
        num_steps: default: the sampler's own.
        observe: called with (step, chains) before each step and at the end; their points are whole.

    Returns:
        Whole points, their energies, and a trace whose gradients and shares on the edge are of the
        unknown values.

    Raises:
        InvalidInputError: a mask that does not fit, or a start that no chain can start from.
        ModelOutputError: an energy or a gradient is not finite.

    References:
        Neal, MCMC Using Hamiltonian Dynamics, 2011: here with the conditional density as target.

    Example:
        >>> from ebm_guard.sampling import MALA
        >>> bowl = lambda x: (x[:, 0] - x[:, 1]).square() / 2
        >>> start, known = torch.tensor([[0.0, 3.0]]), torch.tensor([[False, True]])
        >>> numbers = torch.Generator().manual_seed(0)
        >>> run_masked(MALA(5, 0.5), bowl, start, known, numbers).points[0, 1].item()
        3.0
    """
    # The sampler sees the unknown values alone: check the rest of the start here.
    check_start(start, None)
    unknown = Unknown(start, known)

    def watch(step: int, chains: Chains) -> None:
        if observe is not None:
            observe(step, Chains(unknown.unpack(chains.points), chains.energy))

    samples = sampler.run(
        unknown.energy(energy),
        unknown.pack(start),
        generator,
        num_steps=num_steps,
        observe=watch,
    )
    return Samples(unknown.unpack(samples.points), samples.energy, samples.trace)


def check_mask(known: Any, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return a mask of whole shape (B, ...), or refuse it.

    Args:
        known: bool tensor that broadcasts to the shape; one without the first dimension is the
            same for all rows.
        shape: of the points.

    Raises:
        InvalidInputError: no bool tensor, or its shape does not fit.

    Example:
        >>> check_mask(torch.tensor([[True], [False]]), (2, 3)).tolist()
        [[True, True, True], [False, False, False]]
    """
    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        came = str(known.dtype) if isinstance(known, Tensor) else type(known).__name__
        raise InvalidInputError(
            f"got a mask as {came}; needed a bool tensor, True where a value is known"
        )
    try:
        return known.expand(shape)
    except RuntimeError:
        raise InvalidInputError(
            f"got a mask of shape {tuple(known.shape)} for points of {tuple(shape)}; needed the "
            "same shape, or one that broadcasts to it, such as (B, 1, H, W)"
        ) from None
