"""Pixel space: what turns an image into the model's input, and the normalisation folded in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.model.wrappers import unwrapped

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# Rounding of normalised inputs, in pixels: half precision loses this much.
_OVERSHOOT = 1e-3


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the batch that the model takes.

    The image is resized so that its short side is ``floor(image_size / crop_pct)``, cropped to
    ``image_size`` at the centre, divided by 255, and normalised as (pixel - mean) / std. An array
    image that already has ``image_size`` is neither resized nor cropped.

    Args:
        mean: one value per channel, in [0, 1] units.
        std: one value per channel, > 0.
        image_size: (H, W), or None to take images as they come.
        crop_pct: share of the resized image that the crop keeps, in (0, 1].
        interpolation: one of ``INTERPOLATIONS``.
        crop_mode: ``center`` or ``squash`` (resize both sides, no crop).
        source: where these settings come from, in words.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int] | None = None
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    source: str = "given"

    def __post_init__(self) -> None:
        """Refuse settings that no image could be prepared with."""
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise InvalidInputError(
                f"got mean {self.mean} and std {self.std}; needed one value per channel in each, "
                "std > 0, in units of [0, 1] pixels"
            )
        if len(self.mean) not in (1, 3):
            raise InvalidInputError(f"got {len(self.mean)} channels; images have 1 or 3")
        if not 0 < self.crop_pct <= 1:
            raise InvalidInputError(f"got crop_pct {self.crop_pct}; it must be in (0, 1]")
        if self.interpolation not in INTERPOLATIONS:
            raise InvalidInputError(
                f"got interpolation {self.interpolation!r}; known are {', '.join(INTERPOLATIONS)}"
                f"{suggest(self.interpolation, INTERPOLATIONS)}"
            )
        if self.crop_mode not in ("center", "squash"):
            raise InvalidInputError(
                f"got crop_mode {self.crop_mode!r}; `center` and `squash` are supported. Prepare "
                "the images yourself and give batches instead"
            )

    @property
    def channels(self) -> int:
        """Number of channels of the model's input."""
        return len(self.mean)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Compute (pixels - mean) / std; differentiable.

        Args:
            pixels: (B, C, H, W) in [0, 1].

        Returns:
            (B, C, H, W), the batch that the model takes.

        Example:
            >>> Preprocessing((0.5,), (0.5,)).normalize(torch.ones(1, 1, 1, 1)).item()
            1.0
        """
        mean = torch.tensor(self.mean, dtype=pixels.dtype, device=pixels.device)
        std = torch.tensor(self.std, dtype=pixels.dtype, device=pixels.device)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Compute inputs * std + mean, the pixels that :meth:`normalize` was given.

        Args:
            inputs: (B, C, H, W), floating, normalised as the model takes them.

        Returns:
            (B, C, H, W) in [0, 1], detached, in float32 or better; rounding that leaves the range
            is clamped.

        Raises:
            InvalidInputError: no normalised images, or these settings do not lead back to [0, 1].

        Example:
            >>> Preprocessing((0.5,), (0.5,)).denormalize(torch.ones(1, 1, 1, 1)).item()
            1.0
        """
        if inputs.ndim != 4 or inputs.shape[1] != self.channels or not inputs.is_floating_point():
            raise InvalidInputError(
                f"got inputs of shape {tuple(inputs.shape)} and dtype {inputs.dtype}, which are no "
                f"normalised images (B, {self.channels}, H, W)"
            )
        inputs = inputs.detach()
        inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
        mean = torch.tensor(self.mean, dtype=inputs.dtype, device=inputs.device)
        std = torch.tensor(self.std, dtype=inputs.dtype, device=inputs.device)
        pixels = inputs * std[:, None, None] + mean[:, None, None]
        if not pixels.numel():
            return pixels
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
            raise InvalidInputError(
                f"undoing the normalisation (mean {self.mean}, std {self.std}) gives pixels in "
                f"[{low:.3g}, {high:.3g}] instead of [0, 1]: the loader prepares images otherwise"
            )
        return pixels.clamp(0, 1)

    def check_pixels(self, pixels: Tensor) -> None:
        """Refuse a batch that is not (B, C, H, W) pixels in [0, 1], with a guess why.

        Raises:
            InvalidInputError: wrong type, shape or range.

        Example:
            >>> Preprocessing((0.5,), (0.5,)).check_pixels(torch.zeros(2, 1, 4, 4))
        """
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
            came = (
                f"{tuple(pixels.shape)} {pixels.dtype}"
                if isinstance(pixels, Tensor)
                else type(pixels).__name__
            )
            raise InvalidInputError(
                f"got {came}; pixels must be a floating tensor (B, {self.channels}, H, W) in "
                "[0, 1]; divide uint8 images by 255"
            )
        if pixels.shape[1] != self.channels:
            raise InvalidInputError(
                f"got {pixels.shape[1]} channels; this model takes {self.channels}"
            )
        if pixels.numel() == 0:
            return
        low, high = float(pixels.min()), float(pixels.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise InvalidInputError(
                "got pixels that hold NaN or infinite values; needed [0, 1]. Look for a division "
                "by zero where the images are prepared"
            )
        if low >= 0 and high <= 1:
            return
        if low < -0.1:
            guess = "they look normalised already: give them to guard(x), or undo the normalisation"
        elif high > 1.5:
            guess = "they look like 0..255: divide by 255"
        else:
            guess = "they overshoot slightly, as after resizing: use .clamp(0, 1)"
        raise InvalidInputError(f"got pixels in [{low:.4g}, {high:.4g}]; needed [0, 1]; {guess}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        settings = asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in settings.items()
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Preprocessing:
        """Build from what :meth:`to_dict` returned."""
        size = settings["image_size"]
        return cls(
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            image_size=None if size is None else (int(size[0]), int(size[1])),
            crop_pct=settings["crop_pct"],
            interpolation=settings["interpolation"],
            crop_mode=settings["crop_mode"],
            source=settings["source"],
        )

    @classmethod
    def from_model(cls, model: object) -> Preprocessing | None:
        """Read a model's ``pretrained_cfg`` (timm, or a dict that a factory attached).

        The test size and test crop are taken where the dict has them, as timm's validate.py does;
        a dict without ``crop_pct`` means 1.0.

        Returns:
            The settings, or None for a model that has none.
        """
        cfg = pretrained_cfg(model)
        if "mean" not in cfg or "std" not in cfg:
            return None
        size = cfg.get("test_input_size") or cfg.get("input_size")
        crop = cfg.get("test_crop_pct") or cfg.get("crop_pct") or 1.0
        return cls(
            mean=tuple(float(value) for value in cfg["mean"]),
            std=tuple(float(value) for value in cfg["std"]),
            image_size=None if size is None else (int(size[-2]), int(size[-1])),
            crop_pct=float(crop),
            interpolation=str(cfg.get("interpolation") or "bicubic"),
            crop_mode=str(cfg.get("crop_mode") or "center"),
            source="the model's pretrained_cfg",
        )


def pretrained_cfg(model: object) -> dict[str, Any]:
    """Return the ``pretrained_cfg`` of a model as a dict, empty where it has none.

    Wrappers such as DataParallel are looked through.
    """
    cfg = getattr(unwrapped(model), "pretrained_cfg", None)
    if cfg is None:
        return {}
    if hasattr(cfg, "to_dict"):
        cfg = cfg.to_dict()
    return dict(cfg) if isinstance(cfg, dict) else {}
