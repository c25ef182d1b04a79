"""The embedded demo: real images from scikit-learn and a small trained classifier, no network.

The classes known to the classifier are the handwritten digits 0..7. Digits 8 and 9, which it never
saw, are the near outliers; patches of two photographs are the far ones. Every image is 8x8 grey.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ebm_guard.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEMO_ROLES = ("train", "calibration", "evaluation", "near_ood", "far_ood")
DEMO_CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7")
DEMO_WEIGHTS = "demo_classifier.safetensors"

# Mean and standard deviation of pixel/255 over the train role.
DEMO_MEAN = 0.3033
DEMO_STD = 0.3766

_SPLIT_SEED = 0
_CALIBRATION_ROWS = 450
_EVALUATION_ROWS = 450
_PATCHES_PER_PHOTO = 225
_TILE = 32
_SIDE = 8

_DIGITS_NOTE = (
    "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI Machine Learning "
    "Repository, doi:10.24432/C50P49), CC BY 4.0, the test part as shipped with scikit-learn; "
    "values 0..16 rescaled to 0..255"
)
_PHOTOS_NOTE = (
    "scikit-learn's sample photographs china.jpg (Flickr, danielbuechele) and flower.jpg (Flickr, "
    "account vultilion), both CC BY 2.0; changed: grey, 32x32 tiles averaged down to 8x8"
)


@dataclass(frozen=True, eq=False)
class DemoSet:
    """Hold one role of the demo data.

    Attributes:
        role: One of ``DEMO_ROLES``.
        images: uint8 (N, 8, 8), values 0..255.
        labels: int64 (N,) in 0..7, the index into ``classes``; None for the outlier roles, whose
            images belong to none of the classes.
        classes: Names of the classes that the demo classifier knows.
        note: Content, source and licence of the images.
    """

    role: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    note: str


def load_demo(role: str) -> DemoSet:
    """Load one role of the demo data; no image belongs to two roles.

    Args:
        role: "train", "calibration", "evaluation" (digits 0..7, disjoint rows), "near_ood"
            (digits 8 and 9) or "far_ood" (patches of photographs).

    Returns:
        The images, their labels where they have any, and their source.

    Raises:
        DataError: If ``role`` is none of ``DEMO_ROLES``.
    """
    if role not in DEMO_ROLES:
        known = ", ".join(DEMO_ROLES)
        msg = f"unknown role {role!r} of the demo data: use one of {known}"
        raise DataError(msg)
    if role == "far_ood":
        return DemoSet(role, _photo_patches(), None, DEMO_CLASSES, f"Outliers: {_PHOTOS_NOTE}.")
    images, digits = _digits()
    if role == "near_ood":
        unknown = images[digits >= len(DEMO_CLASSES)]
        return DemoSet(role, unknown, None, DEMO_CLASSES, f"Digits 8 and 9 of: {_DIGITS_NOTE}.")
    rows = _split(digits)[role]
    note = f"Digits 0 to 7 of: {_DIGITS_NOTE}."
    return DemoSet(role, images[rows], digits[rows], DEMO_CLASSES, note)


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read scikit-learn's digits as uint8 (1797, 8, 8) with int64 labels 0..9."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return images, bunch.target.astype(np.int64)


def _shuffled(count: int, stream: str) -> NDArray[np.intp]:
    """Order 0..count-1 at random, by a generator of its own for each ``stream``."""
    # NumPy promises a fixed stream for its bit generators, not for Generator.permutation: a split
    # that moved with the NumPy version would leak training rows into the evaluation.
    seed = int.from_bytes(hashlib.sha256(f"{_SPLIT_SEED}/{stream}".encode()).digest()[:8], "big")
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _split(digits: NDArray[np.int64]) -> dict[str, NDArray[np.intp]]:
    """Split the rows of the known classes by role, with the classes in equal proportion.

    Args:
        digits: int64 (N,) in 0..9.

    Returns:
        Row numbers for "calibration", "evaluation" and "train", each in random order.
    """
    order = _shuffled(len(digits), "digits")
    order = order[digits[order] < len(DEMO_CLASSES)]
    labels = digits[order]
    # A row's place within its class, as a fraction: a cut there is the same share of every class.
    place = np.empty(len(order))
    for label in range(len(DEMO_CLASSES)):
        member = labels == label
        place[member] = (np.arange(member.sum()) + 0.5) / member.sum()
    ranked = order[np.argsort(place, kind="stable")]
    first, second = _CALIBRATION_ROWS, _CALIBRATION_ROWS + _EVALUATION_ROWS
    parts = {
        "calibration": ranked[:first],
        "evaluation": ranked[first:second],
        "train": ranked[second:],
    }
    # Ranking by place interleaves the classes; a shuffle leaves no order that a prefix could feel.
    return {role: rows[_shuffled(len(rows), role)] for role, rows in parts.items()}


def _photo_patches() -> NDArray[np.uint8]:
    """Cut uint8 (450, 8, 8) patches out of the photographs; no two share a pixel."""
    from sklearn.datasets import load_sample_images

    # Sky and blurred background stay in: a camera delivers them too, and dropping the patches
    # without contrast would be choosing the outliers by how they look.
    chosen = [
        tiles[_shuffled(len(tiles), f"photo {number}")[:_PATCHES_PER_PHOTO]]
        for number, tiles in enumerate(map(_tiles, load_sample_images().images))
    ]
    patches = np.concatenate(chosen)
    return patches[_shuffled(len(patches), "far_ood")]


def _tiles(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut a photograph (H, W, 3) into disjoint tiles, each averaged down to a grey 8x8."""
    # Integers (ITU-R 601 luma, as Pillow's "L"): no rounding that differs between machines.
    grey = photo.astype(np.int64) @ np.array([299, 587, 114])
    high, wide = grey.shape[0] // _TILE, grey.shape[1] // _TILE
    cell = _TILE // _SIDE
    blocks = grey[: high * _TILE, : wide * _TILE].reshape(high, _SIDE, cell, wide, _SIDE, cell)
    sums = blocks.sum(axis=(2, 5)).transpose(0, 2, 1, 3).reshape(-1, _SIDE, _SIDE)
    patches: NDArray[np.uint8] = np.rint(sums / (1000 * cell**2)).astype(np.uint8)
    return patches


class DemoConvNet(nn.Module):
    """Classify 8x8 grey images: three convolutions, global pooling, one linear layer.

    Global max pooling is the shipped choice; "average" is there for comparison, because its energy
    tells photographs from digits far less well (figures: reports/demo_classifier/README.md).
    """

    def __init__(self, pooling: Literal["max", "average"] = "max") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.shrink = nn.MaxPool2d(2)
        self.pool: nn.Module = nn.AdaptiveMaxPool2d(1)
        if pooling == "average":
            self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, len(DEMO_CLASSES))
        self.pretrained_cfg: dict[str, Any] = {
            "label_names": DEMO_CLASSES,
            "architecture": "demo_digits_convnet",
            "input_size": (1, _SIDE, _SIDE),
            "mean": (DEMO_MEAN,),
            "std": (DEMO_STD,),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images float (N, 1, 8, 8) to logits (N, 8)."""
        hidden = self.conv1(images).relu()
        hidden = self.shrink(self.conv2(hidden).relu())
        hidden = self.pool(self.conv3(hidden).relu())
        logits: torch.Tensor = self.fc(hidden.flatten(1))
        return logits


def demo_classifier() -> nn.Module:
    """Load the trained demo classifier in eval mode.

    Returns:
        A module that maps normalised images float32 (N, 1, 8, 8) to logits (N, 8);
        ``pretrained_cfg`` tells how to normalise. examples/train_demo_classifier.py trained it with
        plain cross-entropy on the train role and its default seed.
    """
    from safetensors.torch import load

    stored = (resources.files("ebm_guard") / "data" / DEMO_WEIGHTS).read_bytes()
    weights = {name: tensor.clone() for name, tensor in load(stored).items()}
    # On the meta device nothing is initialised, so the caller's random state is not advanced.
    with torch.device("meta"):
        model = DemoConvNet()
    model.load_state_dict(weights, assign=True)
    return model.eval()
