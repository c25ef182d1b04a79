"""Corruptions by name, on whole sets: random numbers hang on the image, not on the batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.outliers.pixels import Image
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.robustness.corruptions import builtin, extra

BUILTIN = tuple(builtin.CONSTANTS)
IMAGECORRUPTIONS = tuple(f"{extra.PREFIX}{name}" for name in extra.IMAGENET_C)
NAMES = (*BUILTIN, *IMAGECORRUPTIONS)


@dataclass(frozen=True)
class Corruption:
    """One named corruption.

    Args:
        name: as in ``NAMES``: ``fog`` of the optional package is ``imagecorruptions:fog``.
        source: which set it is of, in words for reports.
    """

    name: str
    source: str

    def apply(self, image: Image, severity: int, generator: np.random.Generator) -> Image:
        """Corrupt one image.

        Args:
            image: uint8, (H, W) or (H, W, C) with 1 or 3 channels.
            severity: 1..5.
            generator: source of the random numbers, where there are any.
        """
        if self.name.startswith(extra.PREFIX):
            plain = self.name.removeprefix(extra.PREFIX)
            return extra.imagecorruptions(image, plain, severity, generator)
        found: Image = getattr(builtin, self.name)(image, severity, generator)
        return found


def get_corruption(name: str) -> Corruption:
    """Return a corruption by its name.

    Raises:
        InvalidInputError: no such name; near ones are suggested.

    Example:
        >>> get_corruption("jpeg").source
        'built-in set, not ImageNet-C'
    """
    if name not in NAMES:
        raise InvalidInputError(
            f"got corruption {name!r}{suggest(name, NAMES)}; built in are {', '.join(BUILTIN)}; "
            f"with the optional package {extra.PREFIX}NAME, NAME one of "
            f"{', '.join(extra.IMAGENET_C)}"
        )
    return Corruption(name, builtin.LABEL if name in BUILTIN else extra.LABEL)


def corrupt_images(
    images: NDArray[np.uint8],
    ids: Iterable[int],
    name: str,
    severity: int,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """Corrupt images, each by itself: its random numbers hang on (seed, name, severity, id).

    Order, batches and the choice of rows change nothing, and numpy's global random numbers are
    left alone.

    Args:
        images: (N, H, W) or (N, H, W, C), uint8, 1 or 3 channels, at the model's input size.
        ids: N whole numbers >= 0, the number of each image in its set.
        name: as in ``NAMES``.
        severity: 1..5.
        seed: a whole number >= 0.

    Returns:
        The corrupted images, of the same shape.

    Raises:
        InvalidInputError: another dtype or shape, negative ids, an unknown name or severity.

    Example:
        >>> images = np.full((2, 4, 4), 128, np.uint8)
        >>> both = corrupt_images(images, [7, 8], "gaussian_noise", 3)
        >>> np.array_equal(both[1:], corrupt_images(images[1:], [8], "gaussian_noise", 3))
        True
    """
    corruption = get_corruption(name)
    builtin.check_severity(severity)
    numbers = [int(number) for number in ids]
    _check_images(images, numbers, seed)
    key = zlib.crc32(name.encode())
    found = np.empty_like(images)
    for row, number in enumerate(numbers):
        generator = np.random.default_rng([seed, key, severity, number])
        found[row] = corruption.apply(images[row], severity, generator)
    return found


def corrupt_pixels(
    pixels: Tensor, ids: Tensor | Iterable[int], name: str, severity: int, seed: int = 0
) -> Tensor:
    """Corrupt pixels as the model gets them, after resizing and cropping.

    Models of ImageNet mostly get 224 pixels a side. The pixels are rounded to 256 grey values
    first, as they are where they come from a file.

    Args:
        pixels: (N, C, H, W) floating in [0, 1], C = 1 or 3.
        ids: N whole numbers >= 0, the number of each image in its set.
        name: as in ``NAMES``.
        severity: 1..5.
        seed: a whole number >= 0.

    Returns:
        (N, C, H, W) in [0, 1], of the same dtype and device.

    Raises:
        InvalidInputError: pixels outside [0, 1], or see :func:`corrupt_images`.

    Example:
        >>> corrupt_pixels(torch.zeros(1, 1, 2, 2), [0], "brightness", 5).unique()
        tensor([0.4000])
    """
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
        raise InvalidInputError(
            "corruptions need a floating tensor of pixels (N, C, H, W) in [0, 1], got "
            f"{getattr(pixels, 'dtype', type(pixels).__name__)} of shape "
            f"{tuple(getattr(pixels, 'shape', ()))}; uint8 images go to corrupt_images"
        )
    if pixels.numel() and not (float(pixels.min()) >= 0 and float(pixels.max()) <= 1):
        raise InvalidInputError(
            f"got pixels in [{float(pixels.min()):.4g}, {float(pixels.max()):.4g}]; needed [0, 1]: "
            "undo the normalisation first"
        )
    images = (pixels.detach().float() * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1)
    numbers = ids.tolist() if isinstance(ids, Tensor) else ids
    found = corrupt_images(np.ascontiguousarray(images.numpy()), numbers, name, severity, seed)
    result = torch.from_numpy(found).permute(0, 3, 1, 2).float() / 255
    return result.contiguous().to(device=pixels.device, dtype=pixels.dtype)


def corruption_facts(names: Iterable[str]) -> dict[str, Any]:
    """Return what the pixels hang on beside the names: constants and versions, as JSON types.

    Args:
        names: the corruptions in use.

    Raises:
        EbmGuardError: the optional package is asked for and is not installed.

    Example:
        >>> sorted(corruption_facts(["contrast"]))
        ['applied_to', 'constants', 'numpy', 'pillow', 'sources']
    """
    import PIL
    from PIL import features

    names = [get_corruption(name).name for name in names]
    facts: dict[str, Any] = {
        "applied_to": "8-bit pixels at the model's input size, after resizing and cropping",
        "sources": list(dict.fromkeys(get_corruption(name).source for name in names)),
        "constants": {
            name: list(builtin.CONSTANTS[name]) for name in names if name in builtin.CONSTANTS
        },
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    if any("jpeg" in name for name in names):
        turbo = features.version_feature("libjpeg_turbo")
        facts["libjpeg"] = f"libjpeg-turbo {turbo}" if turbo else features.version_codec("jpg")
    if any(name.startswith(extra.PREFIX) for name in names):
        facts["imagecorruptions-imaug"] = extra.package_version()
    return facts


def _check_images(images: NDArray[Any], ids: list[int], seed: int) -> None:
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3))
        or 0 in images.shape[1:]
    ):
        raise InvalidInputError(
            f"got {getattr(images, 'dtype', type(images).__name__)} images of shape "
            f"{getattr(images, 'shape', ())}; needed uint8 (N, H, W) or (N, H, W, C) with 1 or 3 "
            "channels"
        )
    if len(ids) != len(images):
        raise InvalidInputError(f"got {len(images)} images and {len(ids)} ids; needed one for each")
    if seed < 0 or min(ids, default=0) < 0:
        raise InvalidInputError("got a negative seed or id; needed whole numbers >= 0")
