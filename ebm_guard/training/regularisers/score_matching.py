"""Denoising score matching: the energy's gradient at noisy images points away from clean ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import UnsupportedModelError
from ebm_guard.sampling.checks import check_number
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.regularisers.base import Regulariser


class DenoisingScoreMatching(Regulariser):
    """Shape the energy around the data: a small gradient and a large curvature there.

    For x~ = x + sigma xi, xi ~ N(0, 1), the penalty is

        sigma^2 / D * mean |dE/dx(x~) - (x~ - x) / sigma^2|^2 / 2

    over the batch, D the values of an image. Its minimum over all energies is the energy of the
    data blurred by N(0, sigma^2), up to a constant: -dE/dx is the score of that density. It knows
    the neighbourhood of the data alone: how much mass lies where, and what is far away, stays
    unsaid. The factor sigma^2 / D makes the penalty 1/2 for a flat energy, whatever the size of
    the images.

    The gradient of a gradient is needed: three to five times the time of a plain update.
    Noisy pixels may leave [0, 1], so that the noise is Gaussian as the equation says.

    Args:
        weight: w >= 0; low, the class loss pays for it.
        sigma: of the noise, in [0, 1] pixels, > 0.
        warm_up: share of the run over which the weight rises from 0.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Vincent, A Connection Between Score Matching and Denoising Autoencoders, Neural Computation
        2011; the factor sigma^2 as in Song and Ermon, NeurIPS 2019. Differs: the score is -dE/dx of
        the classifier's own energy, not a net's output; divided by D.

    Example:
        >>> DenoisingScoreMatching(sigma=0.2).settings()["sigma"]
        0.2
    """

    name = "dsm"

    def __init__(self, weight: float = 0.01, sigma: float = 0.1, warm_up: float = 0.1) -> None:
        super().__init__(weight, warm_up)
        self.sigma = check_number("sigma", sigma, open_low=True)

    def penalty(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Compute the penalty by a double backward pass.

        Raises:
            UnsupportedModelError: a layer of the model cannot be differentiated twice.
        """
        clean = batch.pixels.detach()
        generator = context.torch_generator("score matching")
        noise = torch.randn(
            clean.shape, generator=generator, device=generator.device, dtype=clean.dtype
        )
        noisy = (clean + self.sigma * noise.to(clean)).requires_grad_()
        energy = formulas.energy(context.logits(noisy))
        (gradient,) = torch.autograd.grad(energy.sum(), noisy, create_graph=True)
        if not gradient.requires_grad:
            raise UnsupportedModelError(
                "the gradient of this model's energy does not hang on its weights, so dsm cannot "
                "train them; leave the regulariser out"
            )
        away = gradient - noise.to(clean) / self.sigma
        values = clean[0].numel()
        return self.sigma**2 / (2 * values) * away.flatten(1).square().sum(dim=1).mean()

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {**super().settings(), "sigma": self.sigma}
