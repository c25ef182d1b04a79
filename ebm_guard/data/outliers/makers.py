"""Outliers made from the user's own images: pure functions of an image and a generator.

Images are (H, W) or (H, W, C), uint8 or float in [0, 1]; shape, type and range are kept. Two kinds
take a second image, the partner, of the same shape and type.
"""

from __future__ import annotations

import numpy as np

from ebm_guard.data.outliers.pixels import Floats, Image, as_floats, like

_GRID = 4
_NODES = 5
_LEAST_SPREAD = 0.05
# Pasted rectangles cover between a quarter and half of the image.
_SIDES = (0.5, 0.7)


def patch_shuffle(image: Image, generator: np.random.Generator) -> Image:
    """Cut the image into 4 x 4 patches and put them back in another order.

    Textures stay, the whole is destroyed. Sides that 4 does not divide leave a rest at the lower
    and right edge where it is; sides below 4 are cut into single pixels.

    Args:
        image: an image.
        generator: source of the order, which is never the first one if there are two patches.

    References:
        Noroozi and Favaro, Unsupervised Learning by Solving Jigsaw Puzzles, ECCV 2016; as
        negatives: Tack et al., CSI, NeurIPS 2020 (``perm``).

    Example:
        >>> image = np.arange(64, dtype=np.uint8).reshape(8, 8)
        >>> shuffled = patch_shuffle(image, np.random.default_rng(0))
        >>> sorted(shuffled.ravel().tolist()) == list(range(64))
        True
    """
    rows, columns = (min(_GRID, side) for side in image.shape[:2])
    high, wide = image.shape[0] // rows, image.shape[1] // columns
    result = image.copy()
    inner = result[: rows * high, : columns * wide]
    patches = _blocks(inner, high, wide).reshape(rows * columns, high, wide, *image.shape[2:])
    patches = patches[_other_order(len(patches), generator)]
    inner[...] = _joined(patches.reshape(rows, columns, high, wide, *image.shape[2:]))
    return result


def pixel_shuffle(image: Image, generator: np.random.Generator) -> Image:
    """Shuffle the pixels within each block of 1/8 of the sides (2 pixels at least).

    The whole stays recognisable from afar, the local texture is destroyed.

    Args:
        image: an image; an edge that the blocks do not fill stays as it is.
        generator: source of the orders, one a block.

    Example:
        >>> image = np.arange(64, dtype=np.uint8).reshape(8, 8)
        >>> sorted(pixel_shuffle(image, np.random.default_rng(0))[:2, :2].ravel().tolist())
        [0, 1, 8, 9]
    """
    high, wide = (min(side, max(2, side // 8)) for side in image.shape[:2])
    rows, columns = image.shape[0] // high, image.shape[1] // wide
    result = image.copy()
    inner = result[: rows * high, : columns * wide]
    blocks = _blocks(inner, high, wide)
    flat = blocks.reshape(rows * columns, high * wide, -1)
    order = generator.permuted(np.tile(np.arange(high * wide), (rows * columns, 1)), axis=1)
    flat = np.take_along_axis(flat, order[:, :, None], axis=1)
    inner[...] = _joined(flat.reshape(blocks.shape))
    return result


def blend(image: Image, partner: Image, generator: np.random.Generator) -> Image:
    """Average two images, pixel by pixel: (a + b) / 2.

    Args:
        image: an image.
        partner: another, best of another class.
        generator: not used; nothing here is random.

    References:
        Zhang et al., mixup, ICLR 2018, at weight 1/2, without its labels.

    Example:
        >>> one, two = np.zeros((1, 1), np.uint8), np.full((1, 1), 100, np.uint8)
        >>> blend(one, two, np.random.default_rng(0)).item()
        50
    """
    del generator
    return like((as_floats(image) + as_floats(partner)) / 2, image)


def paste(image: Image, partner: Image, generator: np.random.Generator) -> Image:
    """Paste a rectangle of another image, a quarter to half of the area, at another place.

    On an empty ground (digits on black) some results are the partner's object and little else,
    and so in-distribution.

    Args:
        image: the ground.
        partner: where the rectangle is cut from, best of another class.
        generator: source of size and places.

    References:
        Yun et al., CutMix, ICCV 2019, which pastes at the same place and mixes the labels.

    Example:
        >>> one, two = np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)
        >>> 16 <= int(paste(one, two, np.random.default_rng(0)).sum()) <= 36
        True
    """
    sides = [
        max(1, int(np.ceil(side * generator.uniform(*_SIDES)))) if side > 1 else 1
        for side in image.shape[:2]
    ]
    high, wide = sides
    places = [
        int(generator.integers(0, side - part + 1))
        for side, part in zip(image.shape[:2] * 2, sides * 2, strict=True)
    ]
    top, left, from_top, from_left = places
    result = image.copy()
    cut = partner[from_top : from_top + high, from_left : from_left + wide]
    result[top : top + high, left : left + wide] = cut
    return result


def rotation(image: Image, generator: np.random.Generator) -> Image:
    """Turn the image by 90, 180 or 270 degrees; one that is not square only by 180.

    Where "up" means nothing (textures, cells, views from above) a turned image is as
    in-distribution as the original, and this kind shows an AUROC near 0.5.

    Args:
        image: an image.
        generator: source of the angle.

    References:
        Hendrycks et al., Using Self-Supervised Learning Can Improve Model Robustness and
        Uncertainty, NeurIPS 2019; Tack et al., CSI, NeurIPS 2020.

    Example:
        >>> image = np.array([[1, 2]], dtype=np.uint8)
        >>> rotation(image, np.random.default_rng(0)).tolist()
        [[2, 1]]
    """
    square = image.shape[0] == image.shape[1]
    turns = int(generator.integers(1, 4)) if square else 2
    return np.ascontiguousarray(np.rot90(image, turns))


def smooth_noise(image: Image, generator: np.random.Generator) -> Image:
    """Draw low-frequency noise in the image's colours: 5 x 5 random pixels, blown up smoothly.

    Args:
        image: gives the size and the colours.
        generator: chooses the pixels.

    References:
        Hendrycks et al., Outlier Exposure, ICLR 2019, tests on ``blobs`` of filtered noise.

    Example:
        >>> image = np.linspace(0, 1, 64).reshape(8, 8)
        >>> noise = smooth_noise(image, np.random.default_rng(0))
        >>> noise.shape, bool(noise.min() >= 0), bool(noise.max() <= 1)
        ((8, 8), True, True)
    """
    height, width = image.shape[:2]
    values = as_floats(image)
    pixels = values.reshape(height * width, -1)
    nodes = pixels[generator.integers(0, len(pixels), _NODES * _NODES)]
    grid = nodes.reshape(_NODES, _NODES, -1)
    # Weights that sum to 1 and are never negative keep the range.
    tall, wide = _smooth_weights(height), _smooth_weights(width)
    smooth = np.einsum("hi,wj,ijc->hwc", tall, wide, grid)
    return like(smooth.reshape(image.shape), image)


def gaussian_noise(image: Image, generator: np.random.Generator) -> Image:
    """Draw pixels from a normal with the mean and deviation of each channel of the image.

    The deviation is at least 0.05, so that an empty image gives noise too; what falls outside
    [0, 1] is clipped.

    Args:
        image: gives size, means and deviations.
        generator: source of the noise.

    References:
        Hendrycks and Gimpel, ICLR 2017, test on Gaussian noise; the moments here are the image's.

    Example:
        >>> gaussian_noise(np.full((4, 4), 0.5), np.random.default_rng(0)).shape
        (4, 4)
    """
    values = as_floats(image)
    mean = values.mean(axis=(0, 1))
    spread = np.maximum(values.std(axis=(0, 1)), _LEAST_SPREAD)
    return like(mean + spread * generator.standard_normal(image.shape), image)


def uniform_noise(image: Image, generator: np.random.Generator) -> Image:
    """Draw every value from the uniform distribution on the whole range.

    Args:
        image: gives the size and the type.
        generator: source of the noise.

    References:
        Hendrycks and Gimpel, ICLR 2017.

    Example:
        >>> uniform_noise(np.zeros((4, 4), np.uint8), np.random.default_rng(0)).dtype
        dtype('uint8')
    """
    if image.dtype == np.uint8:
        return generator.integers(0, 256, image.shape, dtype=np.uint8)
    return like(generator.random(image.shape), image)


def _blocks(image: Image, high: int, wide: int) -> Image:
    """Cut (H, W, ...) into (rows, columns, high, wide, ...)."""
    rows, columns = image.shape[0] // high, image.shape[1] // wide
    cut = image.reshape(rows, high, columns, wide, *image.shape[2:])
    return np.swapaxes(cut, 1, 2)


def _joined(blocks: Image) -> Image:
    rows, columns, high, wide = blocks.shape[:4]
    return np.swapaxes(blocks, 1, 2).reshape(rows * high, columns * wide, *blocks.shape[4:])


def _other_order(n: int, generator: np.random.Generator) -> Image:
    """Return a random order that is not the present one, where there is another."""
    order = generator.permutation(n)
    while n > 1 and (order == np.arange(n)).all():
        order = generator.permutation(n)
    return order


def _smooth_weights(side: int) -> Floats:
    """Return (side, 5) weights of the nodes for each pixel: a cosine between neighbours."""
    place = (np.arange(side) + 0.5) / side * (_NODES - 1)
    away = np.minimum(np.abs(place[:, None] - np.arange(_NODES)), 1.0)
    weights: Floats = (1 + np.cos(np.pi * away)) / 2
    return weights
