"""Augmentation of the cross-entropy stream; energies are always computed on the plain images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard.errors import InvalidInputError, suggest

# From pixels (B, C, H, W) in [0, 1] and a generator to pixels of the same shape.
Augment = Callable[[Tensor, np.random.Generator], Tensor]
# Share of the side by which a crop may move.
_MOVE = 1 / 8


def flip_crop(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Mirror half of the images, and move each by up to an eighth of its sides.

    The border that a move opens is filled by reflection. Mirrored digits and letters are other
    classes or none: not for them.

    Args:
        pixels: (B, C, H, W) in [0, 1].
        generator: source of the draws.

    Returns:
        (B, C, H, W), a new tensor.

    References:
        Krizhevsky et al., NeurIPS 2012; He et al., CVPR 2016, section 4.2, pad with zeros.

    Example:
        >>> flip_crop(torch.zeros(2, 1, 8, 8), np.random.default_rng(0)).shape
        torch.Size([2, 1, 8, 8])
    """
    n, _, height, width = pixels.shape
    draws = torch.from_numpy(generator.random((n, 3))).to(pixels.device)
    tall, wide = int(height * _MOVE), int(width * _MOVE)
    padded = F.pad(pixels, (wide, wide, tall, tall), mode="reflect")
    rows = (draws[:, 0] * (2 * tall + 1)).long()[:, None] + torch.arange(
        height, device=pixels.device
    )
    columns = (draws[:, 1] * (2 * wide + 1)).long()[:, None] + torch.arange(
        width, device=pixels.device
    )
    columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    image = torch.arange(n, device=pixels.device)[:, None, None]
    # Indexing images, rows and columns at once puts the channels last.
    cut = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def make_augment(augment: str | Augment | None) -> Augment | None:
    """Return the function of a name, or the function itself.

    Raises:
        InvalidInputError: no such name.

    Example:
        >>> make_augment("flip_crop") is flip_crop, make_augment(None)
        (True, None)
    """
    if augment is None or augment == "none":
        return None
    if callable(augment):
        return augment
    known = {"flip_crop": flip_crop}
    if augment not in known:
        raise InvalidInputError(
            f"got augment {augment!r}; known are none, {', '.join(known)}"
            f"{suggest(str(augment), known)}; or give a function (pixels, generator) -> pixels"
        )
    return known[augment]


def augmented(augment: Augment | None, pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Apply an augmentation, and check what it gives; without one return the very same tensor.

    Raises:
        InvalidInputError: it returned another shape, or values outside [0, 1].
    """
    if augment is None:
        return pixels
    made = augment(pixels, generator)
    if not isinstance(made, Tensor) or made.shape != pixels.shape:
        raise InvalidInputError(
            f"the augmentation returned {getattr(made, 'shape', type(made).__name__)} for pixels "
            f"of shape {tuple(pixels.shape)}; needed the same shape"
        )
    low, high = float(made.min()), float(made.max())
    if not (low >= 0 and high <= 1):
        raise InvalidInputError(
            f"the augmentation returned pixels in [{low:.4g}, {high:.4g}]; needed [0, 1]: it works "
            "on pixels, not on normalised inputs; clamp what it gives"
        )
    return made.detach()
