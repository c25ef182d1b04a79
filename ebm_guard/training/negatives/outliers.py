"""Negatives that the user has: real images that belong to none of the classes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_whole
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import Negatives


@runtime_checkable
class PixelRows(Protocol):
    """Images that can be asked for by row."""

    def __len__(self) -> int:
        """Return the number of images."""

    def pixels(self, rows: Any) -> Tensor:
        """Return pixels (len(rows), C, H, W) in [0, 1]."""


class Outliers(Negatives):
    """Draw from the user's outliers: real images off the data are the best negatives there are.

    Rows are drawn for the whole update at once, without repeats while they last, and each process
    takes its share: two processes with half the batch see what one with the whole batch sees.

    Args:
        pixels: (N, C, H, W) in [0, 1] or uint8; or an object with ``len`` and ``pixels(rows)``.
        per_image: outliers for each image of the batch.

    Raises:
        InvalidInputError: no images, not four axes, or values outside [0, 1].

    References:
        Hendrycks et al., Deep Anomaly Detection with Outlier Exposure, ICLR 2019; Liu et al.,
        NeurIPS 2020, section 3.2, which draw 2 outliers for each image.

    Example:
        >>> len(Outliers(torch.rand(8, 1, 4, 4)))
        8
    """

    name = "outliers"

    def __init__(self, pixels: Tensor | PixelRows, per_image: int = 1) -> None:
        self.per_image = check_whole("per_image", per_image, 1)
        self._source = _checked(pixels)
        if not len(self._source):
            raise InvalidInputError("got no outliers; needed at least one image")

    def __len__(self) -> int:
        """Return the number of images to draw from."""
        return len(self._source)

    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Draw (per_image * B, C, H, W)."""
        share = self.per_image * len(batch)
        generator = context.generator("outliers", shared=True)
        rows = _without_repeats(len(self._source), share * context.world, generator)
        own = rows[share * context.rank : share * (context.rank + 1)]
        if isinstance(self._source, Tensor):
            found = self._source[torch.from_numpy(own)]
        else:
            found = self._source.pixels(own)
        if found.shape[1:] != batch.pixels.shape[1:]:
            raise InvalidInputError(
                f"got outliers of shape {tuple(found.shape[1:])} for images of shape "
                f"{tuple(batch.pixels.shape[1:])}; both need the same channels and size"
            )
        if found.dtype == torch.uint8:
            found = found.float() / 255
        return found.detach().to(batch.pixels)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"negatives": self.name, "n": len(self), "per_image": self.per_image}


def _checked(pixels: Tensor | PixelRows) -> Tensor | PixelRows:
    if not isinstance(pixels, Tensor):
        if isinstance(pixels, PixelRows):
            return pixels
        raise InvalidInputError(
            f"got a {type(pixels).__name__} as outliers; needed pixels (N, C, H, W) in [0, 1], or "
            "an object with len() and pixels(rows)"
        )
    if pixels.ndim != 4:
        raise InvalidInputError(
            f"got outliers of shape {tuple(pixels.shape)}; needed (N, C, H, W) in [0, 1]"
        )
    if pixels.dtype != torch.uint8 and pixels.numel():
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):
            raise InvalidInputError(
                f"got outliers with pixels in [{low:.3g}, {high:.3g}]; needed [0, 1]. Undo the "
                "normalisation first"
            )
    return pixels.detach()


def _without_repeats(n: int, wanted: int, generator: np.random.Generator) -> Any:
    """Draw ``wanted`` of n rows; no row twice before every row was drawn once more."""
    rounds = -(-wanted // n)
    return np.concatenate([generator.permutation(n) for _ in range(rounds)])[:wanted]
