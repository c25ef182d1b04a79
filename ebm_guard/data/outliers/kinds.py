"""The table of kinds, in groups that share none, and how to make one outlier or a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.outliers import makers, shifts
from ebm_guard.data.outliers.pixels import Image, check_image
from ebm_guard.errors import InvalidInputError, suggest

# Draws until an image differs from its original; a few patches of one colour may need some.
DRAWS = 16


@dataclass(frozen=True)
class Kind:
    """One kind of synthetic outlier or shift.

    Args:
        name: its registered name.
        function: of an image, its partner where it takes one, and a generator.
        destroys: ``structure`` (the whole), ``texture`` (the local detail), ``both``, or ``none``
            for a shift that keeps the label.
        partner: whether it takes a second image.
    """

    name: str
    function: Callable[..., Image]
    destroys: str
    partner: bool = False

    def make(self, image: Image, partner: Image | None, generator: np.random.Generator) -> Image:
        """Make one image.

        Args:
            image: (H, W) or (H, W, C), uint8 or float in [0, 1].
            partner: another image of the same shape and type, for the kinds that take one.
            generator: source of randomness.

        Raises:
            InvalidInputError: malformed images, no partner where one is needed, or an image that
                this kind leaves as it is (one colour, or the same turned as not).
        """
        check_image(image)
        given: tuple[Any, ...] = (image,)
        if self.partner:
            if partner is None:
                raise InvalidInputError(f"{self.name} needs two images; got one")
            check_image(partner)
            if partner.shape != image.shape or partner.dtype != image.dtype:
                raise InvalidInputError(
                    f"got images {image.shape} {image.dtype} and {partner.shape} {partner.dtype}; "
                    f"{self.name} needs two of one shape and type"
                )
            given = (image, partner)
        for _ in range(DRAWS):
            result = self.function(*given, generator)
            if not np.array_equal(result, image):
                return result
        raise InvalidInputError(
            f"{self.name} leaves this image as it is: it has one colour, looks the same turned, "
            "or its partner is equal to it"
        )


_KINDS = (
    Kind("patch_shuffle", makers.patch_shuffle, "structure"),
    Kind("blend", makers.blend, "both", partner=True),
    Kind("smooth_noise", makers.smooth_noise, "texture"),
    Kind("rotation", makers.rotation, "structure"),
    Kind("paste", makers.paste, "structure", partner=True),
    Kind("pixel_shuffle", makers.pixel_shuffle, "texture"),
    Kind("gaussian_noise", makers.gaussian_noise, "both"),
    Kind("uniform_noise", makers.uniform_noise, "both"),
    Kind("brightness", shifts.brightness, "none"),
    Kind("contrast", shifts.contrast, "none"),
    Kind("blur", shifts.blur, "none"),
    Kind("noise", shifts.noise, "none"),
)
# What training sees must not be what chooses a score, guards a checkpoint or is reported.
TRAINING_KINDS = ("patch_shuffle", "blend", "smooth_noise")
GUARD_KINDS = ("rotation", "paste", "pixel_shuffle", "gaussian_noise", "uniform_noise")
SHIFT_KINDS = ("brightness", "contrast", "blur", "noise")
_BY_NAME = {kind.name: kind for kind in _KINDS}


def get_kind(name: str) -> Kind:
    """Return a kind by its name.

    Raises:
        InvalidInputError: there is none of that name.

    Example:
        >>> get_kind("blend").partner
        True
    """
    if name not in _BY_NAME:
        raise InvalidInputError(
            f"got outlier kind {name!r}; known are {', '.join(_BY_NAME)}{suggest(name, _BY_NAME)}"
        )
    return _BY_NAME[name]


def make_outliers(
    batch: Tensor,
    kind: str,
    generator: np.random.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """Make one outlier of each image of a batch, by the same functions as for single images.

    Args:
        batch: (B, C, H, W), uint8 or float in [0, 1]: pixels, not normalised values.
        kind: a name of ``TRAINING_KINDS``, ``GUARD_KINDS`` or ``SHIFT_KINDS``.
        generator: source of randomness.
        labels: (B,); partners are then of another class. Without them any other image is one.

    Returns:
        (B, C, H, W) of the same type, on the same device, detached.

    Raises:
        InvalidInputError: a malformed batch, too few images or classes for partners, or an image
            that this kind leaves as it is.

    Example:
        >>> batch = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> make_outliers(batch, "patch_shuffle", np.random.default_rng(0)).shape
        torch.Size([4, 3, 8, 8])
    """
    chosen = get_kind(kind)
    if batch.ndim != 4:
        raise InvalidInputError(f"got a batch of shape {tuple(batch.shape)}; needed (B, C, H, W)")
    pixels = batch.detach().cpu()
    # numpy knows no bfloat16.
    wide = pixels.float() if pixels.dtype == torch.bfloat16 else pixels
    images = wide.permute(0, 2, 3, 1).contiguous().numpy()
    known = None if labels is None else labels.detach().cpu().numpy().astype(np.int64)
    if known is not None and known.shape != (len(images),):
        raise InvalidInputError(f"got labels of shape {known.shape}; needed ({len(images)},)")
    partners = Partners(len(images), known) if chosen.partner else None
    made = [
        chosen.make(
            image, None if partners is None else images[partners.draw(row, generator)], generator
        )
        for row, image in enumerate(images)
    ]
    if not made:
        return batch.detach().clone()
    stacked = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()
    return stacked.to(device=batch.device, dtype=batch.dtype)


class Partners:
    """Draws a second row for each row, of another class where classes are known.

    Args:
        n: rows.
        labels: (n,), or None.

    Raises:
        InvalidInputError: one row, or one class.

    Example:
        >>> Partners(3, np.array([0, 0, 1])).draw(0, np.random.default_rng(0))
        2
    """

    def __init__(self, n: int, labels: NDArray[np.int64] | None) -> None:
        self._labels = np.arange(n) if labels is None else labels
        # By label, so that the rows of one class lie side by side and the others around them.
        self._order = np.argsort(self._labels, kind="stable")
        self._sorted = self._labels[self._order]
        if n and self._sorted[0] == self._sorted[-1]:
            what = f"{n} images of one class" if labels is not None and n > 1 else f"{n} image"
            raise InvalidInputError(
                f"got {what}; blend and paste need two images of different classes (two different "
                "images where there are no labels)"
            )

    def draw(self, row: int, generator: np.random.Generator) -> int:
        """Draw another row, uniformly from the other classes."""
        label = self._labels[row]
        first, last = (int(self._sorted.searchsorted(label, side)) for side in ("left", "right"))
        place = int(generator.integers(0, len(self._order) - (last - first)))
        return int(self._order[place if place < first else place + last - first])
