"""What all kinds share: the checks of an image, and the way back to its own type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError

Image = NDArray[Any]
Floats = NDArray[np.float64]


def check_image(image: Image) -> None:
    """Check an image: uint8, or float in [0, 1], (H, W) or (H, W, C).

    Raises:
        InvalidInputError: another type, shape or range.
    """
    if image.ndim not in (2, 3) or not image.size:
        raise InvalidInputError(
            f"got an image of shape {image.shape}; needed (H, W) or (H, W, C), not empty"
        )
    if image.dtype == np.uint8:
        return
    if not np.issubdtype(image.dtype, np.floating):
        raise InvalidInputError(f"got {image.dtype} pixels; needed uint8, or float in [0, 1]")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise InvalidInputError(
            f"got pixels in [{low:.3g}, {high:.3g}]; needed [0, 1]. Undo the normalisation first"
        )


def as_floats(image: Image) -> Floats:
    """Return the pixels as float64 in [0, 1]."""
    values = np.asarray(image, dtype=np.float64)
    return values / 255 if image.dtype == np.uint8 else values


def like(values: Floats, image: Image) -> Image:
    """Clip to [0, 1] and return the type of ``image``; uint8 is rounded.

    Example:
        >>> like(np.array([[-1.0, 0.5]]), np.zeros((1, 2), np.uint8)).tolist()
        [[0, 128]]
    """
    values = np.clip(values, 0, 1)
    if image.dtype == np.uint8:
        return np.rint(values * 255).astype(np.uint8)
    return values.astype(image.dtype)
