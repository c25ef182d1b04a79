"""An image file from a stranger to one row of the model's input."""

from __future__ import annotations

import io
import struct
import zlib

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ebm_guard.data.images import to_input, upright
from ebm_guard.deploy.serve.bombs import check_cost
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.errors import DataError, InvalidInputError, first_line
from ebm_guard.model import Preprocessing

# Decoders that are used everywhere and run no other program, as Pillow's EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
    # An error where warnings are errors.
    UserWarning,
)


def row_of_image(body: bytes, preprocessing: Preprocessing, max_pixels: int) -> Tensor:
    """Decode and prepare one image.

    Its size, and what else makes decoding long, is read from the header and refused there, before
    a pixel is decoded.

    Args:
        body: the file.
        preprocessing: of the model.
        max_pixels: of the image, and of what it is resized to.

    Returns:
        (1, C, H, W) float32.

    Raises:
        RefusedError: too large, damaged, or of another format.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (5, 4)).save(file, "PNG")
        >>> plain = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), image_size=(2, 2))
        >>> row_of_image(file.getvalue(), plain, 100).shape
        torch.Size([1, 3, 2, 2])
    """
    check_cost(body, max_pixels)
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            _check_size(image.size, preprocessing, max_pixels)
            image.load()
            row = to_input(upright(image), preprocessing)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(None, max_pixels) from None
    except UnidentifiedImageError:
        raise RefusedError(
            "unreadable", f"the body is no image of the formats {', '.join(FORMATS)}"
        ) from None
    except (DataError, InvalidInputError) as error:
        raise RefusedError("unreadable", str(error)) from None
    except _DAMAGED as error:
        raise RefusedError(
            "unreadable", f"the image is damaged: {type(error).__name__}: {first_line(error)}"
        ) from None
    return torch.from_numpy(row)[None]


def _check_size(size: tuple[int, int], preprocessing: Preprocessing, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _too_large(size, max_pixels)
    target = preprocessing.image_size
    if target is None or preprocessing.crop_mode == "squash" or not min(size):
        return
    # The short side becomes that of the crop: a long and thin image becomes a large one.
    side = target[0] / preprocessing.crop_pct
    if side * side * max(size) / min(size) > max_pixels:
        raise _too_large(size, max_pixels)


def _too_large(size: tuple[int, int] | None, max_pixels: int) -> RefusedError:
    what = "an image" if size is None else f"an image of {size[0]} x {size[1]} pixels"
    return RefusedError(
        "too_large",
        f"got {what}; at most {max_pixels:,} pixels are decoded, before and after resizing. Shrink "
        "or crop it first",
    )
