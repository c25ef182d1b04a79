"""One image to one row of the model's input, as timm's evaluation transform does it.

What differs from timm, on purpose:

* **EXIF orientation** is applied when a file is read. timm's own folder reader does not look at it,
  so a photograph that a phone stored on its side reaches timm's model on its side.
* **16-bit grey** is scaled to 8 bits (value / 257). Older Pillow clips it at 255, which turns
  nearly every such image white.

What is as in timm, where one could expect otherwise: transparency is dropped, not blended with a
background (Pillow's ``convert("RGB")``), and an animation gives its first frame.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ebm_guard.errors import DataError, InvalidInputError, first_line
from ebm_guard.model.pixels import Preprocessing

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# Pillow turns all of these into RGB and L by itself.
_EIGHT_BIT = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
)
# Resizing a one-pixel line to the model's short side would fill the memory.
_MOST_PIXELS = 200_000_000
_BAD_EXIF = (SyntaxError, OSError, ValueError, TypeError, LookupError, struct.error, OverflowError)
_BAD_IMAGE = (
    OSError,
    UnidentifiedImageError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    # An error where the user made warnings errors.
    Image.DecompressionBombWarning,
)


def read_image(file: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """Decode a file completely, its first frame, and turn it as its EXIF orientation says.

    timm's own reader ignores the EXIF orientation.

    Args:
        file: path, or an open binary file.
        name: what to call it in errors; default: the path.

    Raises:
        DataError: it is missing, damaged, no image, or beyond Pillow's limit on the pixels.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            image.load()
            return upright(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        numbers = [f"{int(number):,}" for number in re.findall(r"\d+", str(error))]
        pixels, limit = numbers if len(numbers) == 2 else ("too many", "?")
        raise DataError(
            f"cannot read image {name}: it has {pixels} pixels, and Pillow's limit against "
            f"decompression bombs is {limit}. Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if "
            "you trust it"
        ) from None
    except _BAD_IMAGE as error:
        raise DataError(f"cannot read image {name}: {error}") from None


def upright(image: Image.Image) -> Image.Image:
    """Return a copy that is turned as the EXIF orientation says; broken EXIF data is ignored.

    Example:
        >>> upright(Image.new("L", (2, 3))).size
        (2, 3)
    """
    try:
        return ImageOps.exif_transpose(image)
    except _BAD_EXIF:
        return image.copy()


def plain(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits a channel that Pillow can turn into RGB and into L.

    16-bit grey (Pillow's modes ``I;16`` and ``I``, as which it reads 16-bit PNG, TIFF and PGM) is
    divided by 257, so that 65535 becomes 255.

    Raises:
        DataError: pixels that have no known range (floating point, 32 bits), or colours that Pillow
            cannot turn into RGB (LAB).

    Example:
        >>> plain(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        255
    """
    if image.mode == "P" and "transparency" in image.info:
        # The same colours as in one step, without Pillow's warning.
        return image.convert("RGBA")
    if image.mode in _EIGHT_BIT:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"got an image of 32-bit pixels in [{values.min()}, {values.max()}]; their range "
                "is not known. Save it with 8 or 16 bits (0..65535)"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    raise DataError(
        f"got an image of Pillow's mode {image.mode}, which has no fixed way to 8-bit RGB; save it "
        "as 8-bit RGB or grey"
    )


def to_input(
    image: Image.Image, preprocessing: Preprocessing, *, is_array: bool = False
) -> NDArray[np.float32]:
    """Resize, crop and normalise one image.

    Grey becomes RGB by repeating the channel, RGB becomes grey by Pillow's L, transparency is
    dropped. Equal to timm's evaluation transform (resize the short side, centre crop) to the last
    bit of the pixels, but for 16-bit grey (see the module's text).

    Args:
        image: any Pillow image, taken as it lies: :func:`read_image` turns it.
        preprocessing: the model's settings.
        is_array: the image comes from an array: at the input size it is left as it is, because a
            silent crop costs accuracy (1.3 points for a CIFAR ResNet-20).

    Returns:
        (C, H, W) float32.

    Raises:
        DataError: the image has no known range of pixels, or is so long and thin that the resized
            one would fill the memory.
    """
    image = plain(image).convert("L" if preprocessing.channels == 1 else "RGB")
    size = preprocessing.image_size
    if size is not None and not (is_array and (image.height, image.width) == size):
        image = _resized(image, preprocessing, size)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    mean = np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std)


def _resized(
    image: Image.Image, preprocessing: Preprocessing, size: tuple[int, int]
) -> Image.Image:
    resample = _RESAMPLING[preprocessing.interpolation]
    height, width = (math.floor(side / preprocessing.crop_pct) for side in size)
    if preprocessing.crop_mode == "squash":
        return _centre_crop(image.resize((width, height), resample), size)
    if height != width:
        raise InvalidInputError(
            f"got image size {size}; a centre crop needs a square size. Prepare the images "
            "yourself and give batches instead"
        )
    short, long = sorted((image.width, image.height))
    scaled = int(height * long / short)
    if height * scaled > _MOST_PIXELS:
        raise DataError(
            f"got an image of {image.width} x {image.height} pixels; with its short side at "
            f"{height} it would have {height * scaled:,}. Crop it first"
        )
    shape = (height, scaled) if image.width <= image.height else (scaled, height)
    return _centre_crop(image.resize(shape, resample), size)


def _centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    top = round((image.height - size[0]) / 2)
    left = round((image.width - size[1]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


def thumbnail(image: Image.Image, side: int = 64) -> Image.Image:
    """Return a copy of at most ``side`` pixels per side; smaller images stay as they are."""
    image = plain(image)
    copy = image.convert("L" if image.mode in ("1", "L") else "RGB")
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def describe_error(error: BaseException) -> str:
    """Return an error's type and first line, for errors of other libraries.

    Example:
        >>> describe_error(KeyError("label"))
        "KeyError: 'label'"
    """
    return f"{type(error).__name__}: {first_line(error)}"
