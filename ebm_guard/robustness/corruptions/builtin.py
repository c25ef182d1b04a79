"""The built-in corruptions: numpy and Pillow only. This is not ImageNet-C.

Eight of ImageNet-C's kinds, with constants of our own, so that one set serves digits of 28 pixels
and photographs of 224. Numbers made with it are good for comparing models with each other, and not
with published tables. All functions take a uint8 image (H, W) or (H, W, C), a severity 1..5 and a
generator, and return an image of the same shape.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image as Pillow

from ebm_guard.data.outliers.pixels import Floats, Image, as_floats, like
from ebm_guard.errors import InvalidInputError

LABEL = "built-in set, not ImageNet-C"
SEVERITIES = (1, 2, 3, 4, 5)
# For severities 1..5, in units of the [0, 1] range where nothing else is said. Blur and pixelate
# are relative to the shorter side: one pixel is much at 32 pixels and little at 224.
CONSTANTS: dict[str, tuple[float, ...]] = {
    # Standard deviation.
    "gaussian_noise": (0.04, 0.06, 0.09, 0.13, 0.18),
    # Photons that a white pixel counts.
    "shot_noise": (250, 100, 50, 25, 12),
    # Share of the values that become 0 or 255.
    "impulse_noise": (0.01, 0.03, 0.06, 0.10, 0.17),
    # Standard deviation, as a share of the side: 0.4 to 0.96 pixels at 32, 2.8 to 6.7 at 224.
    "gaussian_blur": (0.0125, 0.016, 0.02, 0.024, 0.03),
    # Added to every value.
    "brightness": (0.08, 0.16, 0.24, 0.32, 0.40),
    # Share of the contrast that is left.
    "contrast": (0.75, 0.60, 0.45, 0.30, 0.15),
    # Pixels that a cell gains per pixel of the side: cells of 1.1 to 1.6 pixels at 32, 1.9 to 5
    # at 224.
    "pixelate": (0.004, 0.007, 0.010, 0.0135, 0.018),
    # Pillow's quality setting.
    "jpeg": (70, 50, 30, 18, 10),
}


def gaussian_noise(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Add normal noise to every value: x + s z, z ~ N(0, 1), s = 0.04 to 0.18.

    Example:
        >>> image = np.full((100, 100), 128, np.uint8)
        >>> round(float(gaussian_noise(image, 1, np.random.default_rng(0)).std() / 255), 2)
        0.04
    """
    deviation = level("gaussian_noise", severity)
    return like(as_floats(image) + deviation * generator.standard_normal(image.shape), image)


def shot_noise(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Count photons: Poisson(c x) / c, c = 250 to 12 photons for a white pixel.

    Black stays black; the noise of a value x has the variance x / c.

    Example:
        >>> shot_noise(np.zeros((2, 2), np.uint8), 5, np.random.default_rng(0)).max()
        np.uint8(0)
    """
    photons = level("shot_noise", severity)
    return like(generator.poisson(as_floats(image) * photons) / photons, image)


def impulse_noise(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Set a share of the values to 0 or 255, each with chance 1/2; 1 % to 17 % of them.

    Channels are hit independently.

    Example:
        >>> image = np.full((100, 100), 128, np.uint8)
        >>> sorted(set(impulse_noise(image, 3, np.random.default_rng(0)).ravel().tolist()))
        [0, 128, 255]
    """
    return salt_and_pepper(image, level("impulse_noise", severity), generator)


def gaussian_blur(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Blur by a Gaussian of 1.25 % to 3 % of the shorter side; edges are continued outwards.

    Example:
        >>> image = np.zeros((32, 32), np.uint8)
        >>> image[16, 16] = 255
        >>> gaussian_blur(image, 1, np.random.default_rng(0))[16, 15:18].tolist()
        [9, 215, 9]
    """
    del generator
    deviation = level("gaussian_blur", severity) * min(image.shape[:2])
    return like(blurred(as_floats(image), deviation), image)


def brightness(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Add 0.08 to 0.40 of the range to every value, and clip.

    Example:
        >>> brightness(np.array([[0, 255]], np.uint8), 1, np.random.default_rng(0)).tolist()
        [[20, 255]]
    """
    del generator
    return like(as_floats(image) + level("brightness", severity), image)


def contrast(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Pull each channel to its mean m: m + c (x - m), c = 0.75 to 0.15.

    Example:
        >>> contrast(np.array([[0, 200]], np.uint8), 2, np.random.default_rng(0)).tolist()
        [[40, 160]]
    """
    del generator
    # Sums of whole numbers are exact, so no machine rounds another way.
    mean = image.sum(axis=(0, 1), dtype=np.int64) / (255 * image.shape[0] * image.shape[1])
    return like(mean + level("contrast", severity) * (as_floats(image) - mean), image)


def pixelate(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Average over cells of 1 + k s pixels, s the shorter side, k = 0.004 to 0.018.

    Each side is divided into round(side / cell) cells, one at least. A cell shows the mean of the
    pixels whose centres lie in it (Pillow's box filter).

    Example:
        >>> image = np.arange(4, dtype=np.uint8)[None].repeat(224, 0).repeat(56, 1)
        >>> pixelate(image, 4, np.random.default_rng(0)).shape
        (224, 224)
    """
    del generator
    height, width = image.shape[:2]
    cell = 1 + level("pixelate", severity) * min(height, width)
    cells = (max(1, round(width / cell)), max(1, round(height / cell)))
    small = as_pillow(image).resize(cells, Pillow.Resampling.BOX)
    return _from_pillow(small.resize((width, height), Pillow.Resampling.NEAREST), image)


def jpeg(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Store as JPEG of quality 70 to 10 and read again, by Pillow.

    Other versions of libjpeg may give other pixels: reports name the one used.

    Example:
        >>> jpeg(np.full((8, 8), 128, np.uint8), 5, np.random.default_rng(0)).max()
        np.uint8(128)
    """
    del generator
    stream = io.BytesIO()
    as_pillow(image).save(stream, "JPEG", quality=int(level("jpeg", severity)))
    with Pillow.open(stream) as read:
        return _from_pillow(read, image)


def level(name: str, severity: int) -> float:
    """Return the constant of a severity.

    Raises:
        InvalidInputError: the severity is not one of 1..5.

    Example:
        >>> level("contrast", 1)
        0.75
    """
    check_severity(severity)
    return CONSTANTS[name][severity - 1]


def check_severity(severity: int) -> None:
    """Refuse what is not a whole number 1..5.

    Raises:
        InvalidInputError: it is not.

    Example:
        >>> check_severity(5)
    """
    if severity not in SEVERITIES or isinstance(severity, bool):
        raise InvalidInputError(f"got severity {severity!r}; needed one of 1, 2, 3, 4, 5")


def salt_and_pepper(image: Image, share: float, generator: np.random.Generator) -> Image:
    """Set a share of the values to 0 or 255, each with chance 1/2.

    Example:
        >>> salt_and_pepper(np.full((1, 3), 9, np.uint8), 0.0, np.random.default_rng(0)).tolist()
        [[9, 9, 9]]
    """
    hit = generator.random(image.shape) < share
    white = generator.random(image.shape) < 0.5
    return np.where(hit, np.where(white, 255, 0), image).astype(np.uint8)


def blurred(values: Floats, deviation: float) -> Floats:
    """Convolve an image with a normalised Gaussian, cut at four standard deviations.

    A plain sum in a fixed order, so that it gives the same bits on every machine.

    Args:
        values: (H, W) or (H, W, C); edges are continued outwards.
        deviation: in pixels, > 0.

    Example:
        >>> blurred(np.array([[0.0, 1.0, 0.0]]), 0.5).round(2).tolist()
        [[0.11, 0.79, 0.11]]
    """
    reach = int(4 * deviation + 0.5)
    kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / deviation))
    kernel /= kernel.sum()
    for axis in (0, 1):
        widths = [(0, 0)] * values.ndim
        widths[axis] = (reach, reach)
        padded = np.pad(values, widths, mode="edge")
        size = values.shape[axis]
        total = np.zeros_like(values)
        for place, weight in enumerate(kernel.tolist()):
            window: list[Any] = [slice(None)] * values.ndim
            window[axis] = slice(place, place + size)
            total += weight * padded[tuple(window)]
        values = total
    return values


def as_pillow(image: Image) -> Pillow.Image:
    """Return a uint8 image (H, W), (H, W, 1) or (H, W, 3) as Pillow's.

    Example:
        >>> as_pillow(np.zeros((2, 3, 1), np.uint8)).size
        (3, 2)
    """
    return Pillow.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _from_pillow(picture: Pillow.Image, image: Image) -> Image:
    return np.array(picture, dtype=np.uint8).reshape(image.shape)
