"""Samplers with an accept-or-reject test: their chains follow exp(-E/T) exactly, if slowly.

Both are one method. Momentum p ~ N(0, I) is drawn, the leapfrog rule moves (x, p) along the
dynamics of H(x, p) = E(x)/T + |p|^2 / 2, and the end is accepted with probability
min(1, exp(H_start - H_end)). MALA is a leapfrog of one step. All sums run over all values of a
chain, whatever its shape.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_box, check_choice, check_positive, check_whole
from ebm_guard.sampling.sampler import (
    Chains,
    EnergyFunction,
    Sampler,
    StepRecord,
    energy_and_gradient,
)
from ebm_guard.sampling.sgld import noise_like

Wall = Literal["reject", "reflect"]


class HMC(Sampler):
    """Hamiltonian Monte Carlo with unit mass and fresh momentum for each step.

    One leapfrog step of size e, repeated ``num_leapfrog`` times::

        p <- p - (e/2) dE/dx / T,    x <- x + e p,    p <- p - (e/2) dE/dx / T

    Args:
        num_steps: proposals of a run, >= 0; each costs ``num_leapfrog`` gradients.
        step_size: e, > 0, in units of the values.
        num_leapfrog: leapfrog steps of a proposal.
        temperature: T of the distribution exp(-E/T).
        box: (low, high) that the points stay in, or None. With None, chains of a classifier leave
            the range of pixels.
        boundary: ``reject`` refuses proposals outside of the box, which with many values is nearly
            all of them; ``reflect`` bounces off its walls. Both keep exp(-E/T) on the box.

    Raises:
        InvalidInputError: a setting is out of range.

    References:
        Neal, MCMC Using Hamiltonian Dynamics, Handbook of Markov Chain Monte Carlo, 2011, section
        5.3, and section 5.5.1.5 for walls. Differs from common code in that the kinetic energy is
        summed over all values of a chain, not over its last dimension.

    Example:
        >>> sampler = HMC(num_steps=2, step_size=0.1)
        >>> bowl = lambda x: x.square().flatten(1).sum(dim=1) / 2
        >>> samples = sampler.run(bowl, torch.zeros(3, 2, 2), torch.Generator().manual_seed(0))
        >>> samples.points.shape, samples.trace.acceptance.shape
        (torch.Size([3, 2, 2]), torch.Size([2]))
    """

    name = "hmc"

    def __init__(
        self,
        num_steps: int = 20,
        step_size: float = 0.01,
        num_leapfrog: int = 10,
        *,
        temperature: float = 1.0,
        box: tuple[float, float] | None = None,
        boundary: Wall = "reject",
    ) -> None:
        self.num_steps = check_whole("num_steps", num_steps)
        self.step_size = check_positive("step_size", step_size)
        self.num_leapfrog = check_whole("num_leapfrog", num_leapfrog, 1)
        self.temperature = check_positive("temperature", temperature)
        self.box = check_box(box)
        self.boundary = cast("Wall", check_choice("boundary", boundary, get_args(Wall)))

    @property
    def leapfrog_size(self) -> float:
        """Size e of one leapfrog step."""
        return self.step_size

    @torch.no_grad()
    def step(
        self, energy: EnergyFunction, chains: Chains, generator: torch.Generator
    ) -> tuple[Chains, StepRecord]:
        """Propose once for each chain, and accept or reject."""
        values, gradient = chains.energy, chains.gradient
        if values is None or gradient is None:
            values, gradient = energy_and_gradient(energy, chains.points)
        here = Chains(chains.points, values, gradient)
        momentum = noise_like(chains.points, generator)
        there, arrived = self.leapfrog(energy, here, momentum)
        log_ratio = self.log_ratio(here, momentum, there, arrived)
        log_ratio = torch.where(self._inside(there.points), log_ratio, -math.inf)
        uniform = torch.rand(
            len(values), generator=generator, device=values.device, dtype=torch.float64
        )
        accepted = uniform.log() < log_ratio
        record = StepRecord(values, gradient.flatten(1).norm(dim=1), accepted)
        return _chosen(accepted, there, here), record

    def leapfrog(
        self, energy: EnergyFunction, here: Chains, momentum: Tensor
    ) -> tuple[Chains, Tensor]:
        """Move along the dynamics; return the proposal and its momentum.

        A proposal that meets an energy or a gradient that is not finite gets the energy infinity:
        it is rejected.

        Args:
            energy: E(x), (B, ...) to (B,).
            here: points with their energies and gradients.
            momentum: (B, ...).
        """
        size, points, gradient = self.leapfrog_size, here.points, here.gradient
        if gradient is None:
            gradient = energy_and_gradient(energy, points)[1]
        kick, values = size / (2 * self.temperature), here.energy
        lost = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        for _ in range(self.num_leapfrog):
            momentum = momentum - kick * gradient
            points = points + size * momentum
            if self.box is not None and self.boundary == "reflect":
                points, momentum = bounce(points, momentum, self.box)
            values, gradient = energy_and_gradient(energy, points, check=False)
            lost |= ~(torch.isfinite(values) & torch.isfinite(gradient).flatten(1).all(dim=1))
            values = values.masked_fill(lost, math.inf)
            gradient = gradient.masked_fill(_like(lost, gradient), 0.0)
            momentum = momentum - kick * gradient
        return Chains(points, values, gradient), momentum

    def log_ratio(self, here: Chains, momentum: Tensor, there: Chains, arrived: Tensor) -> Tensor:
        """Compute H_start - H_end, (B,) in float64: the log of the acceptance probability.

        Args:
            here: the start.
            momentum: (B, ...) at the start.
            there: the proposal.
            arrived: (B, ...) momentum there.
        """
        kinetic = _square(momentum) - _square(arrived)
        return self._potential(here) - self._potential(there) + kinetic / 2

    def _potential(self, chains: Chains) -> Tensor:
        if chains.energy is None:
            raise InvalidInputError("got chains without energies; needed E at both ends")
        return chains.energy.double() / self.temperature

    def _inside(self, points: Tensor) -> Tensor:
        if self.box is None:
            return torch.ones(len(points), dtype=torch.bool, device=points.device)
        kept = (points >= self.box[0]) & (points <= self.box[1])
        return kept.flatten(1).all(dim=1)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "sampler": self.name,
            "num_steps": self.num_steps,
            "step_size": self.step_size,
            "num_leapfrog": self.num_leapfrog,
            "temperature": self.temperature,
            "box": None if self.box is None else list(self.box),
            "boundary": self.boundary,
        }


class MALA(HMC):
    """Langevin dynamics with a test: the Metropolis-adjusted Langevin algorithm.

    The proposal is that of :meth:`SGLD.langevin <ebm_guard.sampling.sgld.SGLD.langevin>`, and the
    test makes up for its error::

        x' = x - (a/2) dE/dx + sqrt(a T) xi
        log ratio = (E(x) - E(x')) / T + log q(x|x') - log q(x'|x)
        q(.|x) = N(x - (a/2) dE/dx, a T)

    It is one leapfrog step of size sqrt(a T): the two densities q are then the two kinetic
    energies. Without them, the test would hold for symmetric proposals only.

    Args:
        num_steps: proposals of a run, >= 0.
        step_size: a, > 0, as in ``SGLD.langevin``.
        temperature: T of the distribution exp(-E/T).
        box: (low, high) that the points stay in, or None.
        boundary: see :class:`HMC`.

    Raises:
        InvalidInputError: a setting is out of range.

    References:
        Roberts and Tweedie, Exponential Convergence of Langevin Distributions and Their Discrete
        Approximations, Bernoulli 1996, section 1.4.2.

    Example:
        >>> bowl = lambda x: x.square().flatten(1).sum(dim=1) / 2
        >>> run = MALA(5, step_size=1e-6).run(bowl, torch.ones(4, 3), torch.Generator())
        >>> run.trace.acceptance.mean().item() > 0.9
        True
    """

    name = "mala"

    def __init__(
        self,
        num_steps: int = 20,
        step_size: float = 0.0001,
        *,
        temperature: float = 1.0,
        box: tuple[float, float] | None = None,
        boundary: Wall = "reject",
    ) -> None:
        super().__init__(
            num_steps, step_size, 1, temperature=temperature, box=box, boundary=boundary
        )

    @property
    def leapfrog_size(self) -> float:
        """Size sqrt(a T) of the one leapfrog step."""
        return math.sqrt(self.step_size * self.temperature)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {key: value for key, value in super().settings().items() if key != "num_leapfrog"}


def bounce(points: Tensor, momentum: Tensor, box: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Fold points that left the box back, and turn a value's momentum round at each wall.

    Example:
        >>> bounce(torch.tensor([1.25, 2.25]), torch.tensor([1.0, 1.0]), (0.0, 1.0))
        (tensor([0.7500, 0.2500]), tensor([-1.,  1.]))
    """
    low, high = box
    width = high - low
    phase = torch.remainder(points - low, 2 * width)
    back = phase > width
    folded = torch.where(back, 2 * width - phase, phase) + low
    return folded.clamp(low, high), torch.where(back, -momentum, momentum)


def _square(momentum: Tensor) -> Tensor:
    return momentum.flatten(1).double().square().sum(dim=1)


def _like(rows: Tensor, values: Tensor) -> Tensor:
    """Shape one value for each chain, (B,), to go with (B, ...)."""
    return rows.view(-1, *[1] * (values.ndim - 1))


def _chosen(accepted: Tensor, there: Chains, here: Chains) -> Chains:
    """Take the proposal where it was accepted, chain by chain."""

    def pick(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None or old is None:
            return None
        return torch.where(_like(accepted, new), new, old)

    points = pick(there.points, here.points)
    return Chains(
        here.points if points is None else points,
        pick(there.energy, here.energy),
        pick(there.gradient, here.gradient),
    )
