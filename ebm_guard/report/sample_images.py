"""Samples as pictures: 8-bit images, PNG for a page, and a data set that ``npz:`` reads."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def eight_bit(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """Turn pixels (N, C, H, W) in [0, 1] into images (N, H, W, C) with 8 bits.

    Example:
        >>> import torch
        >>> eight_bit(torch.tensor([[[[0.0, 1.0, 0.5]]]])).tolist()
        [[[[0], [255], [128]]]]
    """
    values = (pixels.detach().cpu().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    return np.ascontiguousarray(values.numpy().astype(np.uint8))


def picture(image: NDArray[np.uint8]) -> str:
    """Return an image (H, W, C) as PNG in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save_samples(report: Mapping[str, Any], images: NDArray[np.uint8], path: Path) -> None:
    """Write samples as a data set that ``npz:`` reads: images, labels and energies.

    Labels are the model's class numbers, also where only some of the classes were sampled.

    Args:
        report: what ``SampleReport.to_dict()`` returns.
        images: (N, H, W, C), in the order of its classes.
        path: ends with ``.npz``.
    """
    rows = report["classes"]
    grey = images.shape[3] == 1
    np.savez_compressed(
        path,
        images=images[..., 0] if grey else images,
        labels=np.repeat(
            np.array([row["label"] for row in rows], dtype=np.int64),
            [len(row["energies"]) for row in rows],
        ),
        energies=np.concatenate([row["energies"] for row in rows]),
        joint_energies=np.concatenate([row["joint_energies"] for row in rows]),
    )
