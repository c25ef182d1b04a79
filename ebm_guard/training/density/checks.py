"""Whether a learned density may be called one: is it normalised, and can these rows tell?

The density says how often it should tell held-out data from noise, and that is counted. Annealed
importance sampling integrates q exp(-E), which knows nothing of the data; on features the integral
has a closed form besides. And in bits per dimension the density must not be worse than its noise.

All of this refuses, none of it proves: a density that is no more than its noise passes always,
whatever the data are, and is said to be that; and one that is wrong in ways that keep the
logistic regression against its noise calibrated passes too. Bits per dimension tell such densities
apart, from each other and from a better one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.intervals import LEVEL, Metric, mean, normal_quantile, proportion
from ebm_guard.sampling.annealing import LogNormaliser, annealed_log_z
from ebm_guard.sampling.densities import GaussianMixture, KnownDensity
from ebm_guard.sampling.sampler import EnergyFunction
from ebm_guard.training.density.contrast import FittedConstant, fit_constant
from ebm_guard.training.density.record import in_bits
from ebm_guard.training.density.spaces import Space

# Beyond its interval, the accuracy may be off by a point, and log Z by a tenth of a nat.
ACCURACY_TOLERANCE = 0.01
NATS_TOLERANCE = 0.1
# Wider intervals, of an accuracy and of c in nats (its standard error), agree with anything.
WIDEST_ACCURACY = 0.03
WIDEST_CONSTANT = 0.25
# Nearer than this to the half that guessing gets, the density is its noise.
_OF_HALF = 0.01
_HALF = 0.5
# Log ratios that are 0 in float64 but for rounding.
_TIED = 1e-9
# What rounding in float32 leaves of a difference of bits.
_EPS = 1e-4
# Of the annealing, and of a second one where the first is not to be believed.
_TEMPERATURES = (64, 256)
# Noise for each training row when c is refitted.
_RATIO = 4


@dataclass(frozen=True)
class DensityChecks:
    """What was measured of a density.

    Args:
        learned: c, refitted on training rows.
        accuracy: of telling held-out data from as much noise.
        expected: the accuracy that the density itself expects of these rows.
        difference: accuracy minus expected, paired by row.
        annealed: log Z, sampled.
        exact: log Z in closed form, or None where there is none.
        bits: bits per dimension of the held-out data.
        bits_base: the same of q alone, without the energy.
        bits_noise: the same of the density of the noise at the end of the run.
        excess_base: bits of the density minus those of q, paired by row; below 0 it is better.
        excess_noise: the same against the density of the noise.
        dim: values of one point.
    """

    learned: FittedConstant
    accuracy: Metric
    expected: float
    difference: Metric
    annealed: LogNormaliser
    exact: float | None
    bits: Metric
    bits_base: Metric
    bits_noise: Metric
    excess_base: Metric
    excess_noise: Metric
    dim: int

    @property
    def constant(self) -> float:
        """The log Z that is offered: in closed form where there is one, else the learned c."""
        return self.learned.value if self.exact is None else self.exact

    def problems(self) -> list[str]:
        """List what speaks against the density, in words; empty where it may be offered."""
        found = [*self._too_few(), *self._of_accuracy(), *self._of_constant()]
        worse = self.excess_noise
        # c as it was learned shifts all bits alike.
        shift = 0.0 if self.exact is not None else self.learned.standard_error
        if _ends(worse)[0] > shift / (self.dim * math.log(2)) + _EPS:
            found.append(
                f"the known density of the noise is better: {self.bits_noise.value:.3f} bits per "
                f"dimension where this one needs {self.bits.value:.3f}"
            )
        return found

    def notes(self) -> list[str]:
        """List what an offered density does not show, in words."""
        low, high = _ends(self.accuracy)
        guessing = low - _OF_HALF <= _HALF <= high + _OF_HALF
        if guessing and abs(self.expected - _HALF) <= _OF_HALF:
            cases = f"{self.accuracy.value:.1%} of cases, as a guess would"
            return [f"it is no more than its noise: it tells data from it in {cases}"]
        others = [("its noise", self.excess_noise), ("q alone", self.excess_base)]
        # On pixels both are one density.
        others = others[:1] if self.excess_base == self.excess_noise else others
        equal = [name for name, excess in others if _ends(excess)[1] >= 0]
        return [f"it is not shown to be better than {' and than '.join(equal)}"] if equal else []

    def _too_few(self) -> list[str]:
        low, high = _ends(self.accuracy)
        half, error = (high - low) / 2, self.learned.standard_error
        found = []
        if half > WIDEST_ACCURACY:
            found.append(
                f"there are too few held-out rows to tell ({self.accuracy.n // 2:,}): the accuracy "
                f"is known to {half:.1%} where {WIDEST_ACCURACY:.0%} is needed, which takes about "
                f"{_rows_needed(self.accuracy):,}"
            )
        if not error <= WIDEST_CONSTANT:
            found.append(
                "there are too few training rows near the noise to tell: the learned normaliser "
                f"has a standard error of {error:.3f} nats where {WIDEST_CONSTANT:g} is needed"
            )
        return found

    def _of_accuracy(self) -> list[str]:
        low, high = _ends(self.difference)
        if low - ACCURACY_TOLERANCE <= 0 <= high + ACCURACY_TOLERANCE:
            return []
        told = (
            f"it tells held-out data from noise in {self.accuracy.value:.1%} of cases and "
            f"expects {self.expected:.1%} (difference {self.difference.value:+.1%}, beyond its "
            f"interval and {ACCURACY_TOLERANCE:.0%})"
        )
        return [told]

    def _of_constant(self) -> list[str]:
        annealed, found = self.annealed, []
        learned, error = self.learned.value, 2 * self.learned.standard_error
        if not annealed.reliable:
            found.append(
                "the sampled log Z rests on the weight of "
                f"{annealed.effective_chains:.1f} of {annealed.num_chains} chains, too few"
            )
        half = annealed.high - annealed.log_z
        # Where log Z is known, how well it was sampled does not matter to c.
        target, around = (
            (f"the sampled log Z {annealed.log_z:.3f}", math.hypot(half, error))
            if self.exact is None
            else (f"in closed form log Z is {self.exact:.3f}", error)
        )
        known = annealed.log_z if self.exact is None else self.exact
        gap, allowed = abs(learned - known), around + NATS_TOLERANCE
        if not gap <= allowed:
            found.append(
                f"the learned normaliser is {learned:.3f} nats and {target}, {gap:.3f} apart where "
                f"{allowed:.3f} is allowed"
            )
        if self.exact is not None and not abs(annealed.log_z - self.exact) <= half + NATS_TOLERANCE:
            found.append(
                f"the sampled log Z is {annealed.log_z:.3f} nats where the closed form gives "
                f"{self.exact:.3f}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        error = self.learned.standard_error
        return {
            "learned": self.learned.value,
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
            "excess_base": self.excess_base.to_dict(),
            "excess_noise": self.excess_noise.to_dict(),
            "notes": self.notes(),
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
    """Refit c on training points, and look at it and at the density that it makes.

    With u(x) = log q(x) - E(x) - c - log n(x), the density expects to be right about a row with
    probability max(s(u), 1 - s(u)); right is u > 0 for data and u < 0 for noise, in equal number.
    c in u is log Z in closed form where there is one, and the refitted c elsewhere.

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
    learned, exact = fit_constant(*few), _exact(space, head)
    constant = learned.value if exact is None else exact
    off = ratio(against.draw(len(held_out), generator)) - constant
    right = ratio(held_out) - constant
    signs = torch.cat([right, -off])
    # Where the model is its noise, u is 0 up to rounding, and neither answer is right.
    correct = (signs > 0).double().masked_fill(signs.abs() <= _TIED, _HALF)
    sure = torch.sigmoid(torch.cat([right, off]).abs())
    logs = {
        "base": space.base.log_density(held_out),
        "noise": against.log_density(held_out).detach(),
    }
    logs["own"] = logs["base"] - energy(held_out).detach().double() - constant
    dim = space.base.dim
    bits = {name: _numpy(in_bits(part, dim, space.name)) for name, part in logs.items()}
    return DensityChecks(
        learned=learned,
        accuracy=proportion(int(correct.sum()), len(correct)),
        expected=float(sure.mean()),
        difference=mean(_numpy(correct - sure)),
        annealed=sampled_log_z(space, energy, generator),
        exact=exact,
        bits=mean(bits["own"]),
        bits_base=mean(bits["base"]),
        bits_noise=mean(bits["noise"]),
        excess_base=mean(bits["own"] - bits["base"]),
        excess_noise=mean(bits["own"] - bits["noise"]),
        dim=dim,
    )


def sampled_log_z(
    space: Space, energy: EnergyFunction, generator: torch.Generator
) -> LogNormaliser:
    """Estimate log of the integral of q exp(-E) by chains that start at the space's noise.

    The noise lies where the data are, so the path from it is short: its energy is
    E(x) - log q(x) + log n(x). Gaussians are annealed in the coordinates in which their
    covariance is I, where one step size fits all of them. Where too few chains carry the weight,
    it is done again with four times as many temperatures.
    """
    noise = space.noise
    scale = noise.scale_tril if isinstance(noise, GaussianMixture) else None
    start = noise.whitened() if isinstance(noise, GaussianMixture) else noise

    def tilt(points: Tensor) -> Tensor:
        points = points if scale is None else points @ scale.T.to(points.device)
        return energy(points) - space.log_ratio(points)

    for count in _TEMPERATURES:
        found = annealed_log_z(start, tilt, generator, num_temperatures=count)
        if found.reliable:
            break
    return found


def _exact(space: Space, head: tuple[Tensor, Tensor] | None) -> float | None:
    if head is None or not isinstance(space.base, GaussianMixture):
        return None
    return space.base.tilted(*head)[0]


def _rows_needed(accuracy: Metric) -> int:
    """Return about how many held-out rows would make the interval narrow enough."""
    z = normal_quantile(0.5 + LEVEL / 2)
    share = min(max(accuracy.value, 0.05), 0.95)
    return math.ceil(z * z * share * (1 - share) / WIDEST_ACCURACY**2 / 2)


def _ends(metric: Metric) -> tuple[float, float]:
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    return low, high


def _numpy(values: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.detach().cpu().double().numpy()
    return found
