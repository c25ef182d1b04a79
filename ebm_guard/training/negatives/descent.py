"""Negatives that are harder the better the net is: descent on the energy, with a curriculum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.sampling.checks import check_number, check_positive, check_whole
from ebm_guard.sampling.sampler import energy_and_gradient
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import Negatives, on_edge
from ebm_guard.training.negatives.making import make_negatives


class Descent(Negatives):
    """Walk other negatives down the energy, in steps of one length, without noise.

    x <- clip(x - a g / rms(g)), g = dE/dx. The steps are as long where the energy is flat as where
    it is steep, so none leaps below the data as SGLD does on a trained net. The number of steps k
    starts at 0; each time the net tells data from the negatives of the last ``window`` images with
    AUROC >= ``target``, k grows by one, up to ``max_steps``.

    Args:
        negatives: where the walk starts, or its registered name.
        max_steps: largest k, >= 0.
        step_size: a, the root-mean-square change of the values in one step, in [0, 1] units. The
            paper's 0.1 in L2 at 3 x 32 x 32 values is 0.0018.
        target: AUROC that earns one step more.
        window: images of each side that the AUROC is taken over.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Yin et al., Learning Energy-Based Models with Adversarial Training, ECCV 2022, and DAT,
        arXiv 2510.13872 (one step more where the AUROC over 1000 images reaches 0.8). Differs:
        the window is shorter, for runs of some hundred updates; the step does not hang on the
        image size.

    Example:
        >>> Descent(max_steps=5).steps
        0
    """

    name = "descent"

    def __init__(
        self,
        negatives: str | Negatives = "synthetic",
        max_steps: int = 10,
        step_size: float = 0.005,
        target: float = 0.8,
        window: int = 512,
    ) -> None:
        self.start = make_negatives(negatives)
        self.max_steps = check_whole("max_steps", max_steps)
        self.window = check_whole("window", window, 2)
        self.step_size = check_positive("step_size", step_size)
        self.target = check_number(
            "target", target, low=0.5, high=1.0, open_low=True, open_high=True
        )
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self._data, self._off = torch.empty(0), torch.empty(0)
        self._saturation: float | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the synthetic kinds that the walks start from."""
        return self.start.kinds

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Prepare where the walks start, and go back to no step."""
        self._reset()
        self.start.begin(context, batch)

    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Draw starts and walk k steps down the energy of the net as it is now."""
        start = self.start.draw(context, batch)
        if not self.steps:
            self._saturation = self.start.saturation()
            return start
        walked = descend(context, start, self.steps, self.step_size)
        self._saturation = on_edge(walked, start)
        return walked

    def saturation(self) -> float | None:
        """Return the share of values that the last walks put on the edge; None without a step."""
        return self._saturation

    def observe(self, energy_data: Tensor, energy_negatives: Tensor) -> None:
        """Take the energies in, and go one step on where the net is good enough."""
        self.start.observe(energy_data, energy_negatives)
        self._data = torch.cat([self._data, energy_data.detach().float().cpu()])
        self._off = torch.cat([self._off, energy_negatives.detach().float().cpu()])
        if min(len(self._data), len(self._off)) < self.window:
            return
        if self.steps < self.max_steps and auroc(self._data, self._off) >= self.target:
            self.steps += 1
        # Also after a failure: energies of a net that was worse would hold the next step back.
        self._data, self._off = torch.empty(0), torch.empty(0)

    def rolled_back(self, context: Context) -> None:
        """Go one step back: the negatives may have been too hard."""
        self.start.rolled_back(context)
        self.steps = max(0, self.steps - 1)
        self._data, self._off = torch.empty(0), torch.empty(0)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "negatives": self.name,
            "start": self.start.settings(),
            "max_steps": self.max_steps,
            "step_size": self.step_size,
            "target": self.target,
            "window": self.window,
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        return {**self.settings(), "start": self.start.identity()}

    def state_dict(self) -> dict[str, Any]:
        """Return the curriculum and what the starts remember."""
        return {
            "steps": self.steps,
            "data": self._data.clone(),
            "negatives": self._off.clone(),
            "start": self.start.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the curriculum."""
        self.steps = int(state["steps"])
        self._data, self._off = state["data"].clone(), state["negatives"].clone()
        self.start.load_state_dict(state["start"])


def descend(context: Context, pixels: Tensor, num_steps: int, step_size: float) -> Tensor:
    """Walk pixels (B, C, H, W) down the energy: x <- clip(x - a g / rms(g)), detached.

    Args:
        context: gives the net.
        pixels: in [0, 1].
        num_steps: steps, >= 0.
        step_size: a, the root-mean-square change of the values in one step.
    """

    def energy(points: Tensor) -> Tensor:
        return formulas.energy(context.forward(points).logits)

    for _ in range(num_steps):
        _, gradient = energy_and_gradient(energy, pixels)
        pixels = (pixels - step_size * _of_rms_one(gradient)).clamp(0, 1)
    return pixels.detach()


def auroc(data: Tensor, negatives: Tensor) -> float:
    """Compute P(E(x-) > E(x+)) + P(equal) / 2.

    Example:
        >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    ordered = data.double().sort().values
    values = negatives.double()
    below = torch.searchsorted(ordered, values, side="left").double()
    up_to = torch.searchsorted(ordered, values, side="right").double()
    return float(((below + up_to) / 2).mean() / len(data))


def _of_rms_one(gradient: Tensor) -> Tensor:
    # Divided by the largest first: squares of small gradients underflow.
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = gradient / largest.where(largest > 0, 1.0)
    rms = scaled.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return scaled / rms.where(rms > 0, 1.0)
