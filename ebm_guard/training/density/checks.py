"""Whether a learned density may be called one: two independent looks at its normaliser.

The first asks the density itself how often it should tell held-out data from noise, and counts.
The second integrates exp(-E) by annealed importance sampling, which knows nothing of the data.
Where the energy cannot be the density of the data, c settles at a value that serves the logistic
loss and is not log Z, and the two disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.intervals import Metric, mean, proportion
from ebm_guard.sampling.annealing import LogNormaliser, annealed_log_z
from ebm_guard.sampling.densities import GaussianMixture, KnownDensity
from ebm_guard.sampling.sampler import EnergyFunction
from ebm_guard.training.density.contrast import FittedConstant, fit_constant
from ebm_guard.training.density.record import in_bits
from ebm_guard.training.density.spaces import Space

# Beyond its interval, the accuracy may be off by a point, and log Z by a tenth of a nat.
ACCURACY_TOLERANCE = 0.01
NATS_TOLERANCE = 0.1
# Noise for each training row when c is refitted.
_RATIO = 4


@dataclass(frozen=True)
class DensityChecks:
    """What was measured of a density.

    Args:
        constant: c, refitted on training rows.
        accuracy: of telling held-out data from as much noise.
        expected: the accuracy that the density itself expects of these rows.
        difference: accuracy minus expected, paired by row.
        annealed: log Z, sampled.
        exact: log Z in closed form, or None where there is none.
        bits: bits per dimension of the held-out data.
        bits_base: the same of q alone, without the energy.
        bits_noise: the same of the density of the noise at the end of the run.
    """

    constant: FittedConstant
    accuracy: Metric
    expected: float
    difference: Metric
    annealed: LogNormaliser
    exact: float | None
    bits: Metric
    bits_base: Metric
    bits_noise: Metric

    def problems(self) -> list[str]:
        """List what speaks against the density, in words; empty where it may be offered."""
        found = []
        low, high = _ends(self.difference)
        off = self.difference.value
        if not low - ACCURACY_TOLERANCE <= 0 <= high + ACCURACY_TOLERANCE:
            found.append(
                f"it tells held-out data from noise in {self.accuracy.value:.1%} of cases and "
                f"expects {self.expected:.1%} (difference {off:+.1%}, beyond its interval and "
                f"{ACCURACY_TOLERANCE:.0%})"
            )
        annealed = self.annealed
        if not annealed.reliable:
            found.append(
                "the sampled log Z rests on the weight of "
                f"{annealed.effective_chains:.1f} of {annealed.num_chains} chains, too few"
            )
        gap = self.constant.value - annealed.log_z
        allowed = annealed.high - annealed.log_z + NATS_TOLERANCE
        if not abs(gap) <= allowed:
            found.append(
                f"the learned normaliser is {self.constant.value:.3f} nats and the sampled log Z "
                f"{annealed.log_z:.3f}, {abs(gap):.3f} apart where {allowed:.3f} is allowed"
            )
        if self.exact is not None and not abs(self.constant.value - self.exact) <= allowed:
            found.append(
                f"in closed form log Z is {self.exact:.3f} nats, and the learned normaliser "
                f"{self.constant.value:.3f}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        error = self.constant.standard_error
        return {
            "constant_standard_error": error if math.isfinite(error) else None,
            "accuracy": self.accuracy.to_dict(),
            "expected": self.expected,
            "difference": self.difference.to_dict(),
            "accuracy_tolerance": ACCURACY_TOLERANCE,
            "annealed": self.annealed.to_dict(),
            "nats_tolerance": NATS_TOLERANCE,
            "exact": self.exact,
            "bits": self.bits.to_dict(),
            "bits_base": self.bits_base.to_dict(),
            "bits_noise": self.bits_noise.to_dict(),
        }


def check_density(
    space: Space,
    energy: EnergyFunction,
    train: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
    *,
    noise: KnownDensity | None = None,
    head: tuple[Tensor, Tensor] | None = None,
) -> DensityChecks:
    """Refit c on training points, and look at it twice.

    With u(x) = log q(x) - E(x) - c - log n(x), the density expects to be right about a row with
    probability max(s(u), 1 - s(u)); right is u > 0 for data and u < 0 for noise, in equal number.

    Args:
        space: fitted, with q and the noise that log Z is sampled from.
        energy: of points.
        train: (N, ...) points that c is fitted on.
        held_out: (M, ...) points that nothing was fitted or chosen on.
        generator: of noise and chains.
        noise: n of the contrast; default: the space's own.
        head: W and b where E(h) = -logsumexp(W h + b), for log Z in closed form.

    References:
        Neal, Annealed Importance Sampling, 2001; Gutmann and Hyvärinen, JMLR 2012, section 2.
    """
    against = space.noise if noise is None else noise

    @torch.no_grad()
    def ratio(points: Tensor) -> Tensor:
        return (
            space.base.log_density(points) - energy(points).double() - against.log_density(points)
        )

    drawn = against.draw(_RATIO * len(train), generator)
    # With _RATIO times as much noise as data, u loses log _RATIO; c does not.
    few = ratio(train) - math.log(_RATIO), ratio(drawn) - math.log(_RATIO)
    constant = fit_constant(*few)
    off = ratio(against.draw(len(held_out), generator)) - constant.value
    right = ratio(held_out) - constant.value
    correct = torch.cat([right > 0, off < 0]).double()
    sure = torch.sigmoid(torch.cat([right, off]).abs())
    logs = {
        "base": space.base.log_density(held_out),
        "noise": against.log_density(held_out).detach(),
    }
    logs["own"] = logs["base"] - energy(held_out).detach().double() - constant.value

    def bits(name: str) -> Metric:
        return mean(_numpy(in_bits(logs[name], space.base.dim, space.name)))

    return DensityChecks(
        constant=constant,
        accuracy=proportion(int(correct.sum()), len(correct)),
        expected=float(sure.mean()),
        difference=mean(_numpy(correct - sure)),
        annealed=sampled_log_z(space, energy, generator),
        exact=_exact(space, head),
        bits=bits("own"),
        bits_base=bits("base"),
        bits_noise=bits("noise"),
    )


def sampled_log_z(
    space: Space, energy: EnergyFunction, generator: torch.Generator
) -> LogNormaliser:
    """Estimate log of the integral of q exp(-E) by chains that start at the space's noise.

    The noise lies where the data are, so the path from it is short: its energy is
    E(x) - log q(x) + log n(x). Gaussians are annealed in the coordinates in which their
    covariance is I, where one step size fits all of them.
    """
    start = space.noise
    if not isinstance(start, GaussianMixture):
        return annealed_log_z(start, lambda x: energy(x) - space.log_ratio(x), generator)
    scale = start.scale_tril

    def whitened(z: Tensor) -> Tensor:
        points = z @ scale.T.to(z.device)
        return energy(points) - space.log_ratio(points)

    return annealed_log_z(start.whitened(), whitened, generator)


def _exact(space: Space, head: tuple[Tensor, Tensor] | None) -> float | None:
    if head is None or not isinstance(space.base, GaussianMixture):
        return None
    return space.base.tilted(*head)[0]


def _ends(metric: Metric) -> tuple[float, float]:
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    return low, high


def _numpy(values: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.detach().cpu().double().numpy()
    return found
