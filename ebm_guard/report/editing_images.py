"""Pictures of edits: strips from the truth to the chains, and a short GIF of the chains."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebm_guard.report.sample_images import eight_bit

if TYPE_CHECKING:
    import torch

    from ebm_guard.sampling import Denoised, Inpainted, Morph

Images = NDArray[np.uint8]
# Of the strips on a page, and of the chains in a GIF.
SHOWN, MOVING = 12, 8
# What is hidden: a colour that no grey image has.
_HOLE = (214, 137, 63)
_FRAME_MS, _END_MS, _TILE = 140, 900, 64
# Sides above it are averaged down, so that a page of large images stays small.
_MOST_SIDE = 112


@dataclass(frozen=True, eq=False)
class EditPictures:
    """Pictures of one section.

    Args:
        sheet: (N, K, H, W, 3), a strip of K images for each row.
        heads: what the K columns are.
        names: (N,) what the rows are.
        frames: (F, M, H, W, 3), M chains along their way.
    """

    sheet: Images
    heads: tuple[str, ...]
    names: tuple[str, ...]
    frames: Images

    def strips(self) -> list[str]:
        """Return each row as PNG in a data URI."""
        return [strip(row) for row in self.sheet]

    def gif(self) -> bytes:
        """Return the chains along their way as GIF."""
        return animation(self.frames)

    def still(self) -> str:
        """Return the last frame as PNG in a data URI, for readers who want no motion."""
        buffer = io.BytesIO()
        Image.fromarray(tiled(self.frames[-1])).save(buffer, "png")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def inpainting_pictures(made: Inpainted, names: tuple[str, ...]) -> EditPictures:
    """Show truth, hole, fill and chains of the first images."""
    stages = {name: _colour(part[:SHOWN]) for name, part in made.pixels.items()}
    # A pixel of which one channel is known is shown as it is.
    hidden = (~made.known[:SHOWN]).all(dim=1).numpy()
    hole = stages["truth"].copy()
    hole[hidden] = _HOLE
    order = [stages["truth"], hole, stages["trivial"], stages["chains"]]
    heads = ("true image", "what is known", "smooth fill", "chains")
    return EditPictures(np.stack(order, axis=1), heads, names[:SHOWN], _moving(made))


def denoising_pictures(made: Denoised, names: tuple[str, ...]) -> EditPictures:
    """Show truth, noisy image, filter and chains of the first images."""
    order = [_colour(made.pixels[name][:SHOWN]) for name in ("truth", "given", "trivial", "chains")]
    heads = ("true image", "noisy", "Wiener filter", "chains")
    return EditPictures(np.stack(order, axis=1), heads, names[:SHOWN], _moving(made))


def morph_pictures(made: Morph) -> EditPictures:
    """Show where each chain started and where it was at each t."""
    whole = [made.start, *made.frames]
    frames = np.stack([_colour(part[:MOVING]) for part in whole])
    heads = ("start", *(f"t = {value:.2g}" for value in made.t.tolist()))
    names = tuple(f"chain {number}" for number in range(1, frames.shape[1] + 1))
    return EditPictures(frames.swapaxes(0, 1), heads, names, frames)


def _moving(made: Inpainted | Denoised) -> Images:
    frames = made.pixels["chains"][None] if made.frames is None else made.frames
    return np.stack([_colour(part[:MOVING]) for part in frames])


def _colour(pixels: torch.Tensor) -> Images:
    """Turn pixels (N, C, H, W) into RGB images (N, H, W, 3); other channel counts show the mean."""
    images = eight_bit(pixels if pixels.shape[1] == 3 else pixels.mean(dim=1, keepdim=True))
    return images if images.shape[3] == 3 else images.repeat(3, axis=3)


def strip(row: Images) -> str:
    """Put images (K, H, W, 3) side by side, one clear pixel between them; PNG in a data URI.

    Example:
        >>> strip(np.zeros((2, 4, 4, 3), np.uint8))[:22]
        'data:image/png;base64,'
    """
    row = reduced(row)
    count, height, width = row.shape[:3]
    gap = max(1, width // 14)
    whole = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for number, image in enumerate(row):
        left = number * (width + gap)
        whole[:, left : left + width, :3] = image
        whole[:, left : left + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def reduced(images: Images) -> Images:
    """Average images (M, H, W, 3) down to sides of at most 112; what is left over is cut off.

    Example:
        >>> reduced(np.zeros((1, 224, 300, 3), np.uint8)).shape
        (1, 74, 100, 3)
    """
    count, height, width = images.shape[:3]
    by = -(-max(height, width) // _MOST_SIDE)
    if by == 1:
        return images
    kept = images[:, : height // by * by, : width // by * by].astype(np.float32)
    blocks = kept.reshape(count, height // by, by, width // by, by, 3)
    small: Images = blocks.mean(axis=(2, 4)).round().astype(np.uint8)
    return small


def tiled(images: Images) -> Images:
    """Put images (M, H, W, 3) into a grid of at most four columns, each at least 64 pixels wide.

    Example:
        >>> tiled(np.zeros((5, 8, 8, 3), np.uint8)).shape
        (132, 268, 3)
    """
    images = reduced(images)
    count, height, width = images.shape[:3]
    scale = max(1, -(-_TILE // max(height, width)))
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    columns, gap = min(4, count), 4
    lines = -(-count // columns)
    tall, wide = height * scale + gap, width * scale + gap
    grid = np.full((lines * tall - gap, columns * wide - gap, 3), 255, np.uint8)
    for number, image in enumerate(large):
        line, column = divmod(number, columns)
        top, left = line * tall, column * wide
        grid[top : top + tall - gap, left : left + wide - gap] = image
    return grid


def animation(frames: Images) -> bytes:
    """Write frames (F, M, H, W, 3) as a GIF that is shown twice and then stands still.

    Example:
        >>> animation(np.zeros((2, 1, 4, 4, 3), np.uint8))[:6]
        b'GIF89a'
    """
    grids = [tiled(frame) for frame in frames]
    grey = all((grid[..., :1] == grid).all() for grid in grids)
    # Grey keeps every value; colours are chosen for each frame.
    pictures = [
        Image.fromarray(grid[..., 0]) if grey else Image.fromarray(grid).quantize(256)
        for grid in grids
    ]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[_FRAME_MS] * (len(pictures) - 1) + [_END_MS],
        loop=1,
    )
    return buffer.getvalue()


def gif_uri(data: bytes) -> str:
    """Return a GIF as a data URI.

    Example:
        >>> gif_uri(b"GIF89a")
        'data:image/gif;base64,R0lGODlh'
    """
    return f"data:image/gif;base64,{base64.b64encode(data).decode()}"
