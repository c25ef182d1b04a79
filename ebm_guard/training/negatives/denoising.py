"""Corrupted data as negatives: what a denoising autoencoder pushes away from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebm_guard.sampling.checks import check_choice, check_number
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import Negatives

CORRUPTIONS = ("gaussian", "mask", "salt_and_pepper")


class Denoising(Negatives):
    """Corrupt each image of the batch: the energy shall rise off the data, and fall towards it.

    ``gaussian``: clip(x + sigma xi); ``mask``: a share of the pixels is 0, in all channels;
    ``salt_and_pepper``: a share of the pixels is 0 or 1. Small corruptions keep the class, and an
    energy that rises there refuses slightly noisy images: that is what is asked for.

    Args:
        corruption: ``gaussian``, ``mask`` or ``salt_and_pepper``.
        level: sigma in [0, 1] pixels, or the share of the pixels, in (0, 1].

    Raises:
        InvalidInputError: settings out of range.

    References:
        Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders, ICML
        2008, and JMLR 2010 (the three corruptions). Differs: the energy of the corrupted image is
        raised, nothing is reconstructed.

    Example:
        >>> Denoising("mask", 0.5).settings()
        {'negatives': 'denoising', 'corruption': 'mask', 'level': 0.5}
    """

    name = "denoising"

    def __init__(self, corruption: str = "gaussian", level: float = 0.3) -> None:
        self.corruption = check_choice("corruption", corruption, CORRUPTIONS)
        self.level = check_number("level", level, high=1.0, open_low=True)

    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Corrupt the batch, (B, C, H, W)."""
        pixels = batch.pixels.detach()
        generator = context.torch_generator("denoising negatives")
        device = generator.device

        def random(shape: tuple[int, ...], *, normal: bool = False) -> Tensor:
            make = torch.randn if normal else torch.rand
            return make(shape, generator=generator, device=device, dtype=pixels.dtype).to(pixels)

        if self.corruption == "gaussian":
            noise = random(tuple(pixels.shape), normal=True)
            return (pixels + self.level * noise).clamp(0, 1)
        batch_size, _, height, width = pixels.shape
        hit = random((batch_size, 1, height, width)) < self.level
        if self.corruption == "mask":
            return pixels.masked_fill(hit, 0)
        coin = (random((batch_size, 1, height, width)) < 0.5).to(pixels).expand_as(pixels)
        return torch.where(hit, coin, pixels)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"negatives": self.name, "corruption": self.corruption, "level": self.level}
