"""Stochastic gradient Langevin dynamics, in the form that is used to train energy models.

One rule, two readings. ``short_run`` is noisy gradient descent: it goes where the energy is low,
and no more is claimed. ``langevin`` has the noise that belongs to its step, so that its chains
follow exp(-E/T) up to the error of a finite step.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ebm_guard.sampling.checks import (
    check_box,
    check_choice,
    check_number,
    check_positive,
    check_whole,
)
from ebm_guard.sampling.sampler import (
    Chains,
    EnergyFunction,
    Sampler,
    StepRecord,
    energy_and_gradient,
)

Boundary = Literal["clamp", "reflect"]
UNIT_BOX = (0.0, 1.0)


class SGLD(Sampler):
    """Go down the energy with noise: x <- x - clip(step_size dE/dx) + noise_std xi, xi ~ N(0, I).

    ``step_size`` and ``noise_std`` are two independent settings. Together they imply the
    :attr:`temperature` noise_std^2 / (2 step_size): small steps of this rule follow
    exp(-E(x) / temperature).

    Args:
        num_steps: steps of a run, >= 0.
        step_size: factor of the gradient, > 0, for values in [0, 1].
        noise_std: standard deviation of the noise, >= 0, in units of the values.
        clip: largest change of one value by the gradient in one step, in units of the values, or
            None. With it the rule is no sampler of exp(-E/T), but it cannot be thrown off.
        box: (low, high) that the points stay in, or None.
        boundary: ``clamp`` puts what leaves the box onto its edge, which piles values up there;
            ``reflect`` folds it back, which keeps the uniform distribution as it is.

    Raises:
        InvalidInputError: a setting is out of range.

    References:
        Welling and Teh, Bayesian Learning via Stochastic Gradient Langevin Dynamics, ICML 2011;
        Grathwohl et al., ICLR 2020, eq. 3. Its authors' code has no box and no clip.

    Example:
        >>> sampler = SGLD(100, 0.1, 0.0, box=None)
        >>> bowl = lambda x: x.square().sum(dim=1) / 2
        >>> sampler.run(bowl, torch.ones(1, 2), torch.Generator()).points.norm().item() < 1e-4
        True
    """

    name = "sgld"

    def __init__(
        self,
        num_steps: int = 20,
        step_size: float = 0.25,
        noise_std: float = 0.005,
        *,
        clip: float | None = None,
        box: tuple[float, float] | None = UNIT_BOX,
        boundary: Boundary = "clamp",
    ) -> None:
        self.num_steps = check_whole("num_steps", num_steps)
        self.step_size = check_positive("step_size", step_size)
        self.noise_std = check_number("noise_std", noise_std)
        self.clip = None if clip is None else check_positive("clip", clip)
        self.box = check_box(box)
        self.boundary = cast("Boundary", check_choice("boundary", boundary, get_args(Boundary)))

    @classmethod
    def short_run(
        cls,
        num_steps: int = 20,
        step_size: float = 0.25,
        noise_std: float = 0.005,
        *,
        clip: float | None = 0.1,
        box: tuple[float, float] | None = UNIT_BOX,
    ) -> SGLD:
        """Build JEM's sampler, for values in [0, 1]: noisy descent, not an exact sampler.

        JEM has step 1 and noise .01 for values in [-1, 1], twice as wide: E as a function of
        [0, 1] values has twice the gradient, so the same path has a quarter of the step and half
        of the noise. The implied temperature is 5e-5. Clip and box are ours: without them, chains
        on a trained classifier leave the images within a few steps.

        Args:
            num_steps: steps of a run.
            step_size: JEM's 1, rescaled.
            noise_std: JEM's .01, rescaled.
            clip: largest change of one value by the gradient in one step, or None as in JEM.
            box: (low, high), kept by clamping, or None as in JEM.

        References:
            Grathwohl et al., ICLR 2020, appendix A; Yang and Ji, JEM++, ICCV 2021, for the clip.

        Example:
            >>> f"{SGLD.short_run().temperature:.0e}"
            '5e-05'
        """
        return cls(num_steps, step_size, noise_std, clip=clip, box=box, boundary="clamp")

    @classmethod
    def langevin(
        cls,
        step_size: float,
        temperature: float = 1.0,
        *,
        num_steps: int = 20,
        box: tuple[float, float] | None = UNIT_BOX,
    ) -> SGLD:
        """Build true Langevin dynamics: x <- x - (a/2) dE/dx + sqrt(a T) xi.

        Its chains follow exp(-E/T) up to an error of order a; see
        :class:`~ebm_guard.sampling.mcmc.MALA` for the test that takes this error away.

        Args:
            step_size: a, > 0.
            temperature: T, > 0.
            num_steps: steps of a run.
            box: (low, high), kept by reflection, or None.

        References:
            Welling and Teh, ICML 2011, eq. 4 with the whole data set in each step.

        Example:
            >>> sampler = SGLD.langevin(0.02)
            >>> sampler.step_size, round(sampler.noise_std, 6), round(sampler.temperature, 6)
            (0.01, 0.141421, 1.0)
        """
        step_size = check_positive("step_size", step_size)
        temperature = check_positive("temperature", temperature)
        noise = math.sqrt(step_size * temperature)
        return cls(num_steps, step_size / 2, noise, box=box, boundary="reflect")

    @property
    def temperature(self) -> float:
        """T of the distribution exp(-E/T) that small steps of this rule follow."""
        return self.noise_std**2 / (2 * self.step_size)

    @torch.no_grad()
    def step(
        self, energy: EnergyFunction, chains: Chains, generator: torch.Generator
    ) -> tuple[Chains, StepRecord]:
        """Make one step of all chains."""
        points = chains.points
        values, gradient = chains.energy, chains.gradient
        if values is None or gradient is None:
            values, gradient = energy_and_gradient(energy, points)
        record = StepRecord(values, gradient.flatten(1).norm(dim=1))
        if self.clip is None:
            moved = points.sub(gradient, alpha=self.step_size)
        else:
            moved = points - (gradient * self.step_size).clamp_(-self.clip, self.clip)
        if self.noise_std > 0:
            moved.add_(noise_like(points, generator), alpha=self.noise_std)
        return Chains(self._kept(moved)), record

    def _kept(self, points: Tensor) -> Tensor:
        if self.box is None:
            return points
        if self.boundary == "clamp":
            return points.clamp_(*self.box)
        return reflect(points, self.box)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "sampler": self.name,
            "num_steps": self.num_steps,
            "step_size": self.step_size,
            "noise_std": self.noise_std,
            "temperature": self.temperature,
            "clip": self.clip,
            "box": None if self.box is None else list(self.box),
            "boundary": self.boundary,
        }


def reflect(points: Tensor, box: tuple[float, float]) -> Tensor:
    """Fold values that left the box back into it, as light between two mirrors.

    Example:
        >>> reflect(torch.tensor([-0.25, 0.5, 1.25, 2.25]), (0.0, 1.0))
        tensor([0.2500, 0.5000, 0.7500, 0.2500])
    """
    low, high = box
    width = high - low
    phase = torch.remainder(points - low, 2 * width)
    return (high - (phase - width).abs()).clamp_(low, high)


def noise_like(points: Tensor, generator: torch.Generator) -> Tensor:
    """Draw N(0, I) of the shape, type and place of the points.

    Example:
        >>> noise_like(torch.zeros(2, 3), torch.Generator()).shape
        torch.Size([2, 3])
    """
    return torch.randn(points.shape, generator=generator, device=points.device, dtype=points.dtype)
