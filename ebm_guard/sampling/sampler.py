"""What all samplers share: chains, one step of them, and what a run leaves behind.

A sampler is pure: it holds settings and no state, draws from the generator it is given, and
differentiates with respect to the pixels alone. Whoever runs a user's model inside one holds
:func:`ebm_guard.model.isolation.untouched` around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.sampling.checks import check_whole

# From points (B, ...) to their energies (B,), differentiable; lower = more likely.
EnergyFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chains:
    """Where all chains are.

    Args:
        points: (B, ...), detached.
        energy: (B,) at the points, or None where it is not known yet.
        gradient: (B, ...) dE/dx at the points, or None.
    """

    points: Tensor
    energy: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class StepRecord:
    """What one step did, by chain.

    Args:
        energy: (B,) before the step.
        gradient_norm: (B,) L2 norm of dE/dx before the step.
        accepted: (B,) bool, for samplers that accept or reject; else None.
    """

    energy: Tensor
    gradient_norm: Tensor
    accepted: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """The diagnostics of a run of S steps with B chains; all on the CPU.

    Args:
        energy: (S + 1, B), before each step and at the end.
        gradient_norm: (S, B).
        saturation: (S + 1,) share of values on the edge of the box, or None without a box.
        acceptance: (S,) share of the chains whose proposal was accepted, or None.
    """

    energy: Tensor
    gradient_norm: Tensor
    saturation: Tensor | None = None
    acceptance: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return means over the chains as JSON types."""

        def listed(values: Tensor | None) -> list[float] | None:
            return None if values is None else [float(value) for value in values]

        return {
            "energy": listed(self.energy.mean(dim=1)),
            "gradient_norm": listed(self.gradient_norm.mean(dim=1)),
            "saturation": listed(self.saturation),
            "acceptance": listed(self.acceptance),
        }


@dataclass(frozen=True)
class Samples:
    """Where a run ended.

    Args:
        points: (B, ...), detached.
        energy: (B,) there.
        trace: how it got there.
    """

    points: Tensor
    energy: Tensor
    trace: Trace


class Sampler(ABC):
    """Move points so that they come to follow exp(-E(x)).

    Attributes:
        name: the registered name.
        num_steps: steps of a run.
        box: (low, high) that the points stay in, or None.
    """

    name = ""
    num_steps: int
    box: tuple[float, float] | None

    @abstractmethod
    def step(
        self, energy: EnergyFunction, chains: Chains, generator: torch.Generator
    ) -> tuple[Chains, StepRecord]:
        """Make one step of all chains."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""

    def run(
        self,
        energy: EnergyFunction,
        start: Tensor,
        generator: torch.Generator,
        *,
        num_steps: int | None = None,
        observe: Callable[[int, Chains], None] | None = None,
    ) -> Samples:
        """Run all chains from ``start``.

        Args:
            energy: E(x), (B, ...) to (B,).
            start: (B, ...), floating; not changed.
            generator: source of all random numbers, on the device of ``start``.
            num_steps: default: the sampler's own.
            observe: called with (step, chains) before each step and at the end.

        Raises:
            InvalidInputError: ``start`` is no floating tensor, or lies outside the box.
            ModelOutputError: an energy or a gradient is not finite.
        """
        check_start(start, self.box)
        steps = self.num_steps if num_steps is None else check_whole("num_steps", num_steps)
        chains, records = Chains(start.detach().clone()), []
        saturated = [_saturation(chains.points, self.box)]
        for number in range(steps):
            if observe is not None:
                observe(number, chains)
            chains, record = self.step(energy, chains, generator)
            records.append(record)
            saturated.append(_saturation(chains.points, self.box))
        if observe is not None:
            observe(steps, chains)
        last = chains.energy
        if last is None:
            with torch.no_grad():
                last = energy(chains.points)
        check_finite(last, "energies")
        energies = [record.energy.cpu() for record in records] + [last.detach().cpu()]
        accepted = [record.accepted for record in records if record.accepted is not None]
        trace = Trace(
            energy=torch.stack(energies),
            gradient_norm=torch.stack([record.gradient_norm.cpu() for record in records])
            if records
            else torch.empty(0, len(start)),
            saturation=None if self.box is None else torch.stack(saturated),
            acceptance=torch.stack([part.float().mean().cpu() for part in accepted])
            if accepted
            else None,
        )
        return Samples(chains.points, last.detach(), trace)


def energy_and_gradient(
    energy: EnergyFunction, points: Tensor, *, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Return E(x) (B,) and dE/dx (B, ...), detached; no ``.grad`` is written.

    Works under ``torch.no_grad()``; each chain's gradient is its own because the sum is
    differentiated.

    Args:
        energy: (B, ...) to (B,), differentiable.
        points: (B, ...), floating.
        check: refuse values that are not finite; False for callers that deal with them.

    Raises:
        InvalidInputError: no gradient reaches the points, or torch is in inference mode.
        ModelOutputError: an energy or a gradient is not finite.

    Example:
        >>> energy_and_gradient(lambda x: x.square().sum(dim=1) / 2, torch.tensor([[3.0]]))
        (tensor([4.5000]), tensor([[3.]]))
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = points.detach().clone().requires_grad_()
        values = energy(leaf)
        if not values.requires_grad:
            raise InvalidInputError(
                "no gradient reaches the points: the model detaches its input or runs under "
                "no_grad. Samplers move along dE/dx and need one"
            )
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    if check:
        check_finite(values, "energies")
        check_finite(gradient, "gradients")
    return values.detach(), gradient.detach()


def check_start(start: Tensor, box: tuple[float, float] | None) -> None:
    """Refuse points that no chain can start from.

    Raises:
        InvalidInputError: not a floating tensor with at least one chain, not finite, or outside
            of the box.

    Example:
        >>> check_start(torch.zeros(1, 2), (0.0, 1.0))
    """
    if not isinstance(start, Tensor) or not start.is_floating_point() or start.ndim < 2:
        raise InvalidInputError(
            f"got {getattr(start, 'dtype', type(start).__name__)} of shape "
            f"{tuple(getattr(start, 'shape', ()))}; chains start at a floating tensor (B, ...)"
        )
    if not start.numel():
        raise InvalidInputError(f"got a start of shape {tuple(start.shape)}; needed one chain")
    if not bool(torch.isfinite(start).all()):
        raise InvalidInputError("got a start with NaN or infinite values; needed finite ones")
    if box is None:
        return
    low, high = float(start.min()), float(start.max())
    if low < box[0] or high > box[1]:
        raise InvalidInputError(
            f"got a start in [{low:.4g}, {high:.4g}]; this sampler stays in the box "
            f"[{box[0]:g}, {box[1]:g}]: clamp it, or use box=None"
        )


def check_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity, which would carry into every later step.

    Raises:
        ModelOutputError: some value is not finite.
    """
    bad = ~torch.isfinite(values).flatten(1).all(dim=1) if values.ndim > 1 else None
    bad = ~torch.isfinite(values) if bad is None else bad
    if bool(bad.any()):
        raise ModelOutputError(
            f"{int(bad.sum())} of {len(bad)} chains have {what} that are not finite; lower "
            "step_size, or clip the gradient"
        )


def _saturation(points: Tensor, box: tuple[float, float] | None) -> Tensor:
    if box is None:
        return torch.zeros(())
    edge = (points <= box[0]) | (points >= box[1])
    return edge.float().mean().cpu()
