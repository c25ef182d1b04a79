"""Mild shifts that keep the label: what the same camera may give on another day.

An image after a shift is still in-distribution in meaning. The question it asks is how many of
them the gate refuses, and not whether it can tell them apart. Images are as in
:mod:`ebm_guard.data.outliers.makers`.
"""

from __future__ import annotations

import numpy as np

from ebm_guard.data.outliers.pixels import Floats, Image, as_floats, like

_BRIGHTER = 0.1
_CONTRASTS = (0.75, 1.25)
_NOISE = 0.02
# Pixels; the deviation of the blur is half a pixel up to a side of 100.
_BLUR, _SIDE = 0.5, 100


def brightness(image: Image, generator: np.random.Generator) -> Image:
    """Add or take a tenth of the whole range.

    Example:
        >>> value = brightness(np.full((1, 1), 0.5), np.random.default_rng(0)).item()
        >>> round(abs(value - 0.5), 3)
        0.1
    """
    sign = generator.choice((-1.0, 1.0))
    return like(as_floats(image) + sign * _BRIGHTER, image)


def contrast(image: Image, generator: np.random.Generator) -> Image:
    """Pull each channel to its mean or push it away: 3/4 or 5/4 of the contrast.

    Example:
        >>> image = np.array([[0.4, 0.6]])
        >>> round(float(np.ptp(contrast(image, np.random.default_rng(0)))), 3) in (0.15, 0.25)
        True
    """
    factor = generator.choice(_CONTRASTS)
    values = as_floats(image)
    mean = values.mean(axis=(0, 1))
    return like(mean + factor * (values - mean), image)


def blur(image: Image, generator: np.random.Generator) -> Image:
    """Blur by a Gaussian of half a pixel, or 1/200 of the longer side where that is more.

    Args:
        image: an image; its edges are continued outwards.
        generator: not used; nothing here is random.

    Example:
        >>> blur(np.array([[0.0, 1.0, 0.0]]), np.random.default_rng(0)).round(2).tolist()
        [[0.11, 0.79, 0.11]]
    """
    del generator
    deviation = _BLUR * max(1.0, max(image.shape[:2]) / _SIDE)
    values = as_floats(image)
    for axis in (0, 1):
        values = _blurred(values, deviation, axis)
    return like(values, image)


def noise(image: Image, generator: np.random.Generator) -> Image:
    """Add normal noise with a deviation of 0.02 of the range.

    Example:
        >>> shifted = noise(np.full((100, 100), 0.5), np.random.default_rng(0))
        >>> round(float(shifted.std()), 2)
        0.02
    """
    return like(as_floats(image) + _NOISE * generator.standard_normal(image.shape), image)


def _blurred(values: Floats, deviation: float, axis: int) -> Floats:
    reach = max(1, int(np.ceil(3 * deviation)))
    kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / deviation))
    kernel /= kernel.sum()
    widths = [(0, 0)] * values.ndim
    widths[axis] = (reach, reach)
    padded = np.pad(values, widths, mode="edge")
    size = values.shape[axis]
    total = np.zeros_like(values)
    for place, weight in enumerate(kernel.tolist()):
        total += weight * np.take(padded, np.arange(place, place + size), axis=axis)
    return total
