"""Negatives drawn from the net itself by a sampler: chains from the data or from noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.sampling import (
    SGLD,
    ClassGaussian,
    EnergyFunction,
    Sampler,
    Start,
    UniformStart,
)
from ebm_guard.sampling.checks import check_choice
from ebm_guard.sampling.starts import start_from_state
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import Negatives, on_edge

STARTS = ("gaussian", "uniform")
DEFAULT_STEPS = 10


@dataclass(frozen=True)
class Drawn:
    """Negatives of one update.

    Args:
        pixels: (M, C, H, W) in [0, 1], detached.
        labels: (M,) classes whose joint energy the chains followed, or None for E(x).
    """

    pixels: Tensor
    labels: Tensor | None


class ChainNegatives(Negatives):
    """Run a sampler on the energy of the net as it is now; one chain for each image of the batch.

    Args:
        sampler: default: noisy descent with clipped steps (``SGLD.short_run``) of 10 steps.
        conditional: follow E(x, y) = -f(x)[y] of a class of each chain, instead of E(x).
    """

    def __init__(self, sampler: Sampler | None = None, conditional: bool = False) -> None:
        self.sampler = SGLD.short_run(DEFAULT_STEPS) if sampler is None else sampler
        if not isinstance(self.sampler, Sampler):
            raise InvalidInputError(
                f"got a {type(sampler).__name__} as sampler; needed an object made from Sampler, "
                "such as SGLD.short_run()"
            )
        self.conditional = bool(conditional)
        self._saturation: float | None = None

    def conditioned(self) -> ChainNegatives:
        """Return chains with the same settings that follow E(x, y); to be begun by themselves."""
        twin = copy(self)
        twin.conditional = True
        return twin

    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Return where the chains stop."""
        return self.draw_labelled(context, batch).pixels

    def draw_labelled(self, context: Context, batch: TrainingBatch) -> Drawn:
        """Return where the chains stop, and their classes where they follow E(x, y)."""
        start = self._start(context, batch)
        points = start.pixels.to(batch.pixels)
        labels = None if start.labels is None else start.labels.to(batch.labels)
        generator = context.torch_generator(f"{self.name} chains")
        ended = self.sampler.run(energy_of(context, labels), points, generator)
        self._stopped(ended.points)
        self._saturation = on_edge(ended.points)
        return Drawn(ended.points, labels)

    def saturation(self) -> float | None:
        """Return the share of values of the last draw that lie on the edge of [0, 1]."""
        return self._saturation

    @abstractmethod
    def _start(self, context: Context, batch: TrainingBatch) -> Drawn:
        """Return where the chains start."""

    def _stopped(self, points: Tensor) -> None:
        """Look at where they stopped."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "negatives": self.name,
            "conditional": self.conditional,
            "sampler": self.sampler.settings(),
        }


class DataChains(ChainNegatives):
    """Start the chains at the images of the batch: contrastive divergence.

    Args:
        sampler: see :class:`ChainNegatives`.
        conditional: follow E(x, y) of each image's own label; rows without one get any class.

    References:
        Hinton, Training Products of Experts by Minimizing Contrastive Divergence, Neural
        Computation 2002, section 3.

    Example:
        >>> DataChains().settings()["sampler"]["num_steps"]
        10
    """

    name = "data_chains"

    def _start(self, context: Context, batch: TrainingBatch) -> Drawn:
        if not self.conditional:
            return Drawn(batch.pixels, None)
        any_class = spread_labels(context, len(batch)).to(batch.labels)
        return Drawn(batch.pixels, torch.where(batch.labels >= 0, batch.labels, any_class))


class NoiseChains(ChainNegatives):
    """Start the chains afresh for each update: at class-Gaussian or uniform noise.

    Args:
        sampler: see :class:`ChainNegatives`.
        conditional: follow E(x, y) of the class that a chain started from.
        start: ``gaussian`` (fitted on the first batch) or ``uniform``.

    Raises:
        InvalidInputError: another start.

    References:
        Nijkamp et al., Learning Non-Convergent Non-Persistent Short-Run MCMC, NeurIPS 2019
        (uniform noise); Yang and Ji, JEM++, ICCV 2021 (class Gaussian).

    Example:
        >>> NoiseChains(start="uniform").settings()["start"]
        'uniform'
    """

    name = "noise_chains"

    def __init__(
        self, sampler: Sampler | None = None, conditional: bool = False, start: str = "gaussian"
    ) -> None:
        super().__init__(sampler, conditional)
        self._kind = check_start_name(start)
        self._from: Start | None = None

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Fit where the chains start."""
        self._from = fitted_start(self._kind, context, batch)

    def _start(self, context: Context, batch: TrainingBatch) -> Drawn:
        if self._from is None:
            raise NotFittedError("these chains have no start yet; call begin(context, batch) first")
        labels = spread_labels(context, len(batch)) if self.conditional else None
        generator = torch.Generator().manual_seed(seed_of(context, "starts of noise chains"))
        return Drawn(self._from.draw(len(batch) if labels is None else labels, generator), labels)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {**super().settings(), "start": self._kind}

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted start."""
        if self._from is None:
            return {}
        return {
            "settings": self._from.settings(),
            "shape": list(self._from.shape),
            "start": self._from.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the fitted start."""
        self._from = None
        if state:
            self._from = start_from_state(state["settings"], state["shape"], state["start"])


def energy_of(context: Context, labels: Tensor | None = None) -> EnergyFunction:
    """Return E(x) of the net, or E(x, y) for one label a row, as a function of pixels."""

    def energy(points: Tensor) -> Tensor:
        logits = context.forward(points).logits
        if labels is None:
            return formulas.energy(logits)
        return formulas.joint_energy(logits).gather(1, labels[:, None]).squeeze(1)

    return energy


def spread_labels(context: Context, n: int) -> Tensor:
    """Draw n classes, each as often as any other but for one, in random order."""
    generator = context.generator("classes of chains")
    cycled = np.arange(n) % context.num_classes
    # The classes that get one chain more must not be the first ones each time.
    return torch.from_numpy(
        generator.permutation(generator.permutation(context.num_classes)[cycled])
    )


def seed_of(context: Context, purpose: str) -> int:
    """Return a seed for this update and purpose."""
    return int(context.generator(purpose).integers(2**62))


def check_start_name(start: str) -> str:
    """Return the name of a start.

    Raises:
        InvalidInputError: another name.

    Example:
        >>> check_start_name("uniform")
        'uniform'
    """
    return check_choice("start", start, STARTS)


def fitted_start(kind: str, context: Context, batch: TrainingBatch) -> Start:
    """Return uniform noise, or class Gaussians of the batch where it has labelled images."""
    if kind == "uniform" or int((batch.labels >= 0).sum()) < 2:
        return UniformStart(tuple(batch.pixels.shape[1:]))
    pixels, labels = batch.pixels.detach().cpu(), batch.labels.cpu()
    return ClassGaussian().fit(pixels, labels, context.num_classes)
